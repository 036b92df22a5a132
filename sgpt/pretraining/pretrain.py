"""Pretraining of `nano`, the small GPT-Neo decoder that the embedded default starts from, on two cores in a few hours.

Lexical stage: the token embeddings alone, pooled as bags of tokens (position-weighted mean after the last norm), are
trained by InfoNCE on weak pairs: two texts that an author put together, such as heading and section, first sentence and
its paragraph, neighbouring paragraphs. Without blocks to compute, hundreds of thousands of pairs take minutes.

Joint stage: the blocks start as the identity (their output projections are zero), so the model begins where the lexical
stage ended. Three steps of four take weak pairs, where the documents' forward pass carries the contrastive and the
next-token loss; the fourth is next-token loss on long windows of packed text. All weights learn. The language-model head is
untied: embeddings that keep the identity of their token and a head that predicts the next one do not fit in one table.

Language stage: next-token loss alone, so that the model ends as what decoders are: a language model, whose embeddings are
not yet those of a search engine and whose head can score text.

No marker, no pydocs pair and no evaluation split is seen here: those belong to the run that follows.

Matrices inside the blocks are updated by Muon (Jordan et al. 2024), everything else by AdamW.
Batches are drawn from (seed, step) alone, so a resumed run goes on with exactly the batches it would have had.
"""

import json
import logging
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GPTNeoForCausalLM

from sgpt.decoder.packing import packs
from sgpt.decoder.trunk import packed_token_embeddings
from sgpt.encoder.pooling import weighted_mean
from sgpt.pretraining.corpus import Corpus, language_windows, pair_numbers
from sgpt.pretraining.lexical import lexical_stage, pair_loss, share_ranked_first
from sgpt.pretraining.model import PretrainConfig, build_model, build_optimizers, start_from
from sgpt.pretraining.next_token_loss import next_token_loss
from sgpt.runtime.distributed import average_gradients, from_main, gather
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole
from sgpt.runtime.interrupt import Interrupted, Stop
from sgpt.runtime.provenance import check_same, differences, environment, file_hash, recorded_threads, threads

log = logging.getLogger(__name__)
TOKENS_PER_PACK = 2048
MAY_CHANGE = {"folder", "output", "save_every_steps", "log_every_steps"}  # on resuming


def pretrain(config: PretrainConfig, corpus: Corpus, accelerator: Accelerator) -> GPTNeoForCausalLM:
    """All stages, from the newest checkpoint when there is one: of this configuration, text and versions, by as many threads."""
    manifest = from_main(lambda: begin(config, corpus, accelerator.num_processes))
    with threads(recorded_threads(manifest)):
        return _pretrain(config, corpus, accelerator)


def begin(config: PretrainConfig, corpus: Corpus, processes: int) -> dict[str, Any]:
    """`<folder>/manifest.json`: written by the first start, checked by the next ones."""
    file = Path(config.folder) / "manifest.json"
    inputs = {part.name: file_hash(Path(config.folder) / f"{part.name}.npy") for part in fields(corpus)}
    inputs["processes"] = processes
    if not file.is_file() and not any(Path(config.folder).glob("step-*.pt")):
        manifest = {"config": asdict(config), "inputs": inputs, "environment": environment()}
        write_whole(file, json.dumps(manifest, indent=2) + "\n")
        return manifest
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if changed := differences(manifest.get("config", asdict(config)), asdict(config), MAY_CHANGE):
        raise InputError(
            f"{config.folder} was begun with another configuration: {'; '.join(changed[:5])}. "
            "Resume it unchanged, or choose another folder=<folder>"
        )
    with threads(recorded_threads(manifest)):
        check_same(Path(config.folder), manifest, inputs, otherwise="choose another folder=<folder>")
    return manifest


def _pretrain(config: PretrainConfig, corpus: Corpus, accelerator: Accelerator) -> GPTNeoForCausalLM:
    folder, rank, processes = Path(config.folder), accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first():
        if not (folder / "lexical.pt").is_file():
            torch.save(lexical_stage(config, corpus), folder / ".lexical.tmp")
            (folder / ".lexical.tmp").rename(folder / "lexical.pt")
    model = build_model(config.nano, config.seed)
    start_from(model, *torch.load(folder / "lexical.pt", weights_only=True))
    model.to(accelerator.device)
    optimizers = build_optimizers(model, config)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, tokens = _resume(folder, model, optimizers)
    started, first = time.perf_counter(), step
    steps = config.joint_steps + config.language_steps
    with Stop() as stop:
        while step < steps:
            factor = min(1.0, (step + 1) / config.warmup_steps) * (1 - 0.9 * step / steps)
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            windows = min(step, config.joint_steps) // 4 + max(0, step - config.joint_steps)  # steps on windows so far
            with accelerator.autocast():
                if step % 4 == 3 or step >= config.joint_steps:
                    line, seen = language_step(model, corpus, config, windows, rank, processes)
                else:
                    line, seen = pair_step(model, corpus, config, step - windows, rank, processes)
            average_gradients(model.parameters())
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step, tokens = step + 1, tokens + seen * processes
            if step % config.log_every_steps == 0:
                seconds = time.perf_counter() - started
                shown = {name: gather(value.float()[None]).mean().item() for name, value in line.items()}
                if accelerator.is_main_process:
                    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as out:
                        out.write(json.dumps({"step": step, "tokens": tokens, **shown, "grad_norm": norm.item(), "seconds": seconds}) + "\n")
                log.info("step %d/%d  %s tokens  %s  %.0f s left", step, steps, f"{tokens:,}",
                         "  ".join(f"{name} {value:.3f}" for name, value in shown.items()), seconds / (step - first) * (steps - step))
            stopping = stop.agreed()
            if (step % config.save_every_steps == 0 or step == steps or stopping) and accelerator.is_main_process:
                _save(folder, model, optimizers, step, tokens)
            if stopping:
                raise Interrupted(f"step {step} of {steps} is saved")
    return model


def language_step(model: GPTNeoForCausalLM, corpus: Corpus, config: PretrainConfig, step: int, rank: int, processes: int) -> tuple[dict[str, Tensor], int]:
    """Gradients of the next-token loss over this process' windows; the loss and the tokens seen."""
    windows = language_windows(corpus, config, step)[rank::processes].to(model.device)
    total = torch.zeros((), device=model.device)
    for part in windows.split(config.windows_per_forward):
        hidden = model.transformer(part[:, :-1]).last_hidden_state
        loss = next_token_loss(hidden.flatten(0, 1), model.lm_head.weight, part[:, 1:].flatten()) / windows[:, 1:].numel()
        loss.backward()
        total += loss.detach()
    return {"language": total}, windows[:, 1:].numel()


def pair_step(model: GPTNeoForCausalLM, corpus: Corpus, config: PretrainConfig, step: int, rank: int, processes: int) -> tuple[dict[str, Tensor], int]:
    """Gradients of the contrastive loss plus the documents' next-token loss; the losses and the tokens seen.

    Every process scores its own share of the pairs: in-batch negatives are those of one process.
    """
    places = torch.arange(rank, config.pairs_per_step, processes)
    numbers = pair_numbers(len(corpus.query_starts) - 1, config.pairs_per_step, config, step)
    queries, documents = map(list, zip(*(corpus.pair(numbers[place], config) for place in places), strict=True))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    query, _ = embed(model, queries)
    document, language = embed(model, documents, config.head_share, generator)
    contrastive = pair_loss(query, document, places.to(query.device), config)
    first = share_ranked_first(query, document, places.to(query.device), config)
    (config.contrastive_weight * contrastive + language).backward()
    shown = {"language": language.detach(), "contrastive": contrastive.detach(), "first": first}
    return shown, sum(map(len, queries)) + sum(map(len, documents))


def embed(model: GPTNeoForCausalLM, rows: list[list[int]], share: float = 0.0, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, D] and the mean next-token loss over a random `share` of the positions (0 when the share is 0)."""
    embeddings, order, hidden_scored, targets = [], [], [], []
    for pack in packs(rows, TOKENS_PER_PACK):
        hidden = packed_token_embeddings(model.transformer, pack.to(model.device))  # [N, D]
        embeddings += [weighted_mean(block, block.new_ones(block.shape[:2])) for block in pack.split(hidden)]
        order += pack.rows
        if share:
            scored = (torch.rand(len(pack) - 1, generator=generator) < share) & (pack.position_ids[1:] > 0)  # not across a border
            hidden_scored.append(hidden[:-1][scored.to(model.device)])
            targets.append(pack.input_ids[1:][scored].to(model.device))
    restored = torch.cat(embeddings)[torch.tensor(order, device=model.device).argsort()]
    if not share:
        return restored, restored.new_zeros(())
    return restored, next_token_loss(torch.cat(hidden_scored), model.lm_head.weight, torch.cat(targets)) / sum(map(len, targets))


def _save(folder: Path, model: nn.Module, optimizers: list, step: int, tokens: int) -> None:
    temporary = folder / ".step.tmp"
    torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step, "tokens": tokens}, temporary)
    temporary.rename(folder / f"step-{step}.pt")


def _resume(folder: Path, model: nn.Module, optimizers: list) -> tuple[int, int]:
    saved = sorted(folder.glob("step-*.pt"), key=lambda file: int(file.stem.split("-")[1]))
    if not saved:
        return 0, 0
    state = torch.load(saved[-1], weights_only=True, map_location=model.device)
    model.load_state_dict(state["model"])
    for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    log.info("resumed from %s", saved[-1])
    return state["step"], state["tokens"]
