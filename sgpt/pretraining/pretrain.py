"""Pretraining of `nano`, the small GPT-Neo decoder that training starts from by default, on two cores in a few hours.

Lexical stage: the token embeddings alone, pooled as bags of tokens (position-weighted mean after the last norm), are
trained by InfoNCE on weak pairs: two texts that an author put together, such as heading and section, first sentence and
its paragraph, neighbouring paragraphs. Without blocks to compute, hundreds of thousands of pairs take minutes.

Joint stage: the blocks start as the identity (their output projections are zero), so the model begins where the lexical
stage ended. Three steps of four take weak pairs, where the documents' forward pass carries the contrastive and the
next-token loss; the fourth is next-token loss on long windows of packed text. All weights learn. The language-model
head is untied: embeddings that keep the identity of their token and a head that predicts the next one do not fit in one
table.

Language stage: next-token loss alone, so that the model ends as what decoders are: a language model, whose embeddings
are not yet those of a search engine and whose head can score text.

No marker, no pydocs pair and no evaluation split is seen here: those belong to the run that follows.

Matrices inside the blocks are updated by Muon (Jordan et al. 2024), everything else by AdamW.
Batches are drawn from (seed, step) alone, so a resumed run gets exactly the batches it would have had.
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
    """All stages, from the newest checkpoint when there is one.

    InputError when that one is of another configuration, text or version. It is resumed with as many threads as it had.
    """
    manifest = from_main(lambda: open_manifest(config, corpus, accelerator.num_processes))
    with threads(recorded_threads(manifest)):
        return _pretrain(config, corpus, accelerator)


def open_manifest(config: PretrainConfig, corpus: Corpus, processes: int) -> dict[str, Any]:
    """`<folder>/manifest.json`: written by the first start, checked by the next ones."""
    folder = Path(config.folder)
    file = folder / "manifest.json"
    inputs = {array.name: file_hash(folder / f"{array.name}.npy") for array in fields(corpus)}
    inputs["processes"] = processes
    if not file.is_file() and not any(folder.glob("step-*.pt")):
        manifest = {"config": asdict(config), "inputs": inputs, "environment": environment()}
        write_whole(file, json.dumps(manifest, indent=2) + "\n")
        return manifest
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if changed := differences(manifest.get("config", asdict(config)), asdict(config), MAY_CHANGE):
        raise InputError(
            f"{config.folder} was started with another configuration: {'; '.join(changed[:5])}. "
            "Resume it with that one, or set folder=<another folder>"
        )
    with threads(recorded_threads(manifest)):
        check_same(folder, manifest, inputs, otherwise="set folder=<another folder>")
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
    step, tokens = _resume(folder, model, optimizers, rank)
    started, first_step = time.perf_counter(), step
    steps = config.joint_steps + config.language_steps
    with Stop() as stop:
        while step < steps:
            warmup, decay = min(1.0, (step + 1) / config.warmup_steps), 1 - 0.9 * step / steps
            _set_learning_rates(optimizers, peaks, factor=warmup * decay)
            # steps on windows so far: the fourth of each four of the joint stage, and all of the language stage
            window_steps = min(step, config.joint_steps) // 4 + max(0, step - config.joint_steps)
            with accelerator.autocast():
                if step % 4 == 3 or step >= config.joint_steps:
                    losses, num_tokens = language_step(model, corpus, config, window_steps, rank, processes)
                else:
                    losses, num_tokens = pair_step(model, corpus, config, step - window_steps, rank, processes)
            average_gradients(model.parameters())
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            tokens += num_tokens * processes

            if step % config.log_every_steps == 0:
                seconds = time.perf_counter() - started
                means = {name: gather(value.float()[None]).mean().item() for name, value in losses.items()}
                line = {"step": step, "tokens": tokens, **means, "grad_norm": norm.item(), "seconds": seconds}
                if accelerator.is_main_process:
                    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as out:
                        out.write(json.dumps(line) + "\n")
                shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
                left = seconds / (step - first_step) * (steps - step)
                log.info("step %d/%d  %s tokens  %s  %.0f s left", step, steps, f"{tokens:,}", shown, left)
            stopping = stop.requested_anywhere()
            saves = step % config.save_every_steps == 0 or step == steps or stopping
            if saves and accelerator.is_main_process:
                _save(folder, model, optimizers, step, tokens)
            if stopping:
                raise Interrupted(f"step {step} of {steps} is saved")
    return model


def _set_learning_rates(optimizers: list[torch.optim.Optimizer], peaks: list[list[float]], factor: float) -> None:
    """Each group's learning rate is `factor` of its peak."""
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor


def language_step(
    model: GPTNeoForCausalLM, corpus: Corpus, config: PretrainConfig, step: int, rank: int, processes: int
) -> tuple[dict[str, Tensor], int]:
    """Gradients of the next-token loss over this process' windows; the loss, and the tokens of this process."""
    windows = language_windows(corpus, config, step)[rank::processes].to(model.device)
    num_targets = windows[:, 1:].numel()
    total = torch.zeros((), device=model.device)
    for part in windows.split(config.windows_per_forward):
        hidden = model.transformer(part[:, :-1]).last_hidden_state
        loss = next_token_loss(hidden.flatten(0, 1), model.lm_head.weight, part[:, 1:].flatten()) / num_targets
        with torch.autocast(model.device.type, enabled=False):
            loss.backward()
        total += loss.detach()
    return {"language": total}, num_targets


def pair_step(
    model: GPTNeoForCausalLM, corpus: Corpus, config: PretrainConfig, step: int, rank: int, processes: int
) -> tuple[dict[str, Tensor], int]:
    """Gradients of the contrastive loss and the documents' next-token loss; both, and the tokens of this process.

    Every process scores its own share of the pairs: in-batch negatives are those of one process.
    """
    positions = torch.arange(rank, config.pairs_per_step, processes)  # of this process' pairs in the step
    numbers = pair_numbers(corpus.num_pairs, config.pairs_per_step, config, step)
    queries, documents = corpus.pairs([numbers[position] for position in positions], config)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    query_embeddings, _ = embed(model, queries)
    document_embeddings, language = embed(model, documents, config.head_share, generator)
    positions = positions.to(model.device)
    contrastive = pair_loss(query_embeddings, document_embeddings, positions, config)
    with torch.autocast(model.device.type, enabled=False):
        (config.contrastive_weight * contrastive + language).backward()
    losses = {
        "language": language.detach(),
        "contrastive": contrastive.detach(),
        "first": share_ranked_first(query_embeddings, document_embeddings, positions, config),
    }
    return losses, sum(map(len, queries)) + sum(map(len, documents))


def embed(
    model: GPTNeoForCausalLM, rows: list[list[int]], share: float = 0.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, D], and the mean next-token loss over a random `share` of the positions, 0 without one."""
    embeddings, order, scored_hidden, targets = [], [], [], []
    for pack in packs(rows, TOKENS_PER_PACK):
        hidden = packed_token_embeddings(model.transformer, pack.to(model.device))  # [N, D]
        for block in pack.split(hidden):  # [texts of one length, T, D]
            embeddings.append(weighted_mean(block, block.new_ones(block.shape[:2])))
        order += pack.rows
        if share:
            is_scored = torch.rand(len(pack) - 1, generator=generator) < share
            is_scored &= pack.position_ids[1:] > 0  # a text's last token does not predict the next text's first
            scored_hidden.append(hidden[:-1][is_scored.to(model.device)])
            targets.append(pack.input_ids[1:][is_scored].to(model.device))
    restored = torch.cat(embeddings)[torch.tensor(order, device=model.device).argsort()]
    if not share:
        return restored, restored.new_zeros(())
    language = next_token_loss(torch.cat(scored_hidden), model.lm_head.weight, torch.cat(targets))
    return restored, language / sum(map(len, targets))


def _save(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, tokens: int) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "tokens": tokens,
    }
    temporary = folder / ".step.tmp"
    torch.save(state, temporary)
    temporary.rename(folder / f"step-{step}.pt")  # a killed save never looks whole


def _drop_lines_behind(log_file: Path, step: int) -> None:
    """Of steps that are done again, and a half line that a kill left."""
    lines = log_file.read_text(encoding="utf-8").splitlines(keepends=True) if log_file.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(log_file, "".join(kept))


def _resume(
    folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], rank: int
) -> tuple[int, int]:  # fmt: skip
    """Restores the newest checkpoint; steps taken and tokens seen, 0 without one."""
    saved = sorted(folder.glob("step-*.pt"), key=lambda file: int(file.stem.split("-")[1]))
    if not saved:
        return 0, 0
    state = torch.load(saved[-1], weights_only=True, map_location=model.device)
    model.load_state_dict(state["model"])
    for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    log.info("resumed from %s", saved[-1])
    if rank == 0:
        _drop_lines_behind(folder / "metrics.jsonl", state["step"])
    return state["step"], state["tokens"]
