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
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from sgpt.attention import prepare as prepare_attention
from sgpt.data import pydocs
from sgpt.data.jsonl import read_rows
from sgpt.data.open_text import read_documents, read_weak_pairs
from sgpt.distributed import average_gradients, from_main, gather
from sgpt.errors import InputError
from sgpt.files import write_whole
from sgpt.interrupt import Interrupted, Stop
from sgpt.loss import similarities
from sgpt.model import packed_token_embeddings
from sgpt.packing import packs
from sgpt.pooling import weighted_mean
from sgpt.progress import progress_bar
from sgpt.provenance import check_same, differences, environment, file_hash, recorded_threads, threads
from sgpt.values import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SEED, SHARE, check_choice, check_ranges

log = logging.getLogger(__name__)

END = "<|endoftext|>"  # between documents, and padding; id 0
TOKENS_PER_PACK = 2048
CHUNK = 512  # positions whose logits exist at a time
MAY_CHANGE = {"folder", "output", "save_every_steps", "log_every_steps"}  # on resuming


@dataclass
class NanoConfig:
    """Shape of the decoder; the defaults give 6.4 million parameters."""

    vocabulary: int = 12288
    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    positions: int = 384
    window: int = 256

    def __post_init__(self) -> None:
        check_ranges(self, "nano.", **dict.fromkeys((field.name for field in fields(self)), COUNT))
        if self.hidden_size % self.heads:
            raise InputError(f"nano.heads={self.heads} does not divide nano.hidden_size={self.hidden_size}")


@dataclass
class PretrainConfig:
    """Totals are over all processes.

    text: folder of the sources (sgpt/data/open_text.py). pydocs: folder of the docstring harvest, whose training packages
    are read as text. folder: tokenizer, token ids and checkpoints. output: the finished model, fp16 safetensors.
    neighbours: pairs come in runs of so many from one place, whose members are hard negatives of each other.
    head_share: share of document positions that carry the next-token loss in a step of pairs.
    """

    text: str = ""
    pydocs: str = "data/raw/pydocs"
    folder: str = "runs/nano"
    output: str = "data/nano"
    nano: NanoConfig = field(default_factory=NanoConfig)
    lexical_steps: int = 728
    lexical_pairs_per_step: int = 1024
    lexical_learning_rate: float = 1e-2
    joint_steps: int = 1280
    language_steps: int = 120
    window_tokens: int = 384
    windows_per_step: int = 20
    windows_per_forward: int = 4
    pairs_per_step: int = 160
    neighbours: int = 8
    max_query_tokens: int = 48
    max_document_tokens: int = 128
    head_share: float = 0.33
    contrastive_weight: float = 3.0
    scale: float = 20.0
    muon_learning_rate: float = 2e-3
    embedding_learning_rate: float = 2e-3
    head_learning_rate: float = 3e-3
    vector_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    precision: str = "fp32"
    seed: int = 0
    save_every_steps: int = 80
    log_every_steps: int = 5

    def __post_init__(self) -> None:
        rates = ("lexical_learning_rate", "muon_learning_rate", "embedding_learning_rate", "head_learning_rate", "vector_learning_rate", "scale")
        counts = (
            "lexical_pairs_per_step", "window_tokens", "windows_per_step", "windows_per_forward", "pairs_per_step", "neighbours",
            "max_query_tokens", "max_document_tokens", "warmup_steps", "save_every_steps", "log_every_steps",
        )  # fmt: skip
        steps = ("lexical_steps", "joint_steps", "language_steps")
        check_ranges(self, **dict.fromkeys(rates, POSITIVE), **dict.fromkeys(counts, COUNT), **dict.fromkeys(steps, COUNT_OR_NONE), seed=SEED,
                     head_share=SHARE, contrastive_weight=NOT_NEGATIVE, weight_decay=NOT_NEGATIVE)
        check_choice("precision", self.precision, ("fp32", "bf16"))
        for name in ("pairs_per_step", "lexical_pairs_per_step"):
            if getattr(self, name) % self.neighbours:
                raise InputError(f"neighbours={self.neighbours} does not divide {name}={getattr(self, name)}")
        if self.window_tokens > self.nano.positions:
            raise InputError(f"window_tokens={self.window_tokens} is more than nano.positions={self.nano.positions}")


@dataclass
class Corpus:
    """Token ids on disk: `stream` [tokens], documents in shuffled order; the pairs as two ragged arrays and their starts."""

    stream: np.ndarray
    queries: np.ndarray
    query_starts: np.ndarray
    documents: np.ndarray
    document_starts: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        return cls(**{part.name: np.load(folder / f"{part.name}.npy", mmap_mode="r") for part in fields(cls)})

    def pair(self, number: int, config: PretrainConfig) -> tuple[list[int], list[int]]:
        return (
            _ragged(self.queries, self.query_starts, number, config.max_query_tokens),
            _ragged(self.documents, self.document_starts, number, config.max_document_tokens),
        )


def prepare(config: PretrainConfig) -> Corpus:
    """Trains the tokenizer and tokenises everything, once; later calls open what is there."""
    if not config.text:
        raise InputError("set text=<folder> of the open text sources; sgpt/data/open_text.py says which files lie in it")
    folder = Path(config.folder)
    if not (folder / "stream.npy").is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        log.info("reading text below %s", config.text)
        docstrings = (f"{row['query']}\n\n{row['positive']}" for _, row in read_rows(pydocs.build(Path(config.pydocs)) / "train.jsonl"))
        documents = list(chain(read_documents(Path(config.text)), docstrings))
        tokenizer = _train_tokenizer(documents, config.nano.vocabulary)
        tokenizer.save(str(folder / "tokenizer.json"))
        pairs = list(read_weak_pairs(Path(config.text)))
        for name, texts, limit in (("query", [pair.query for pair in pairs], config.max_query_tokens),
                                   ("document", [pair.document for pair in pairs], config.max_document_tokens)):
            ids = [np.array(row[:limit], dtype=np.uint16) for row in _tokenise(tokenizer, texts)]
            np.save(folder / f"{name}_starts.npy", np.cumsum([0, *map(len, ids)]))
            np.save(folder / ("queries.npy" if name == "query" else "documents.npy"), np.concatenate(ids))
        random.Random(config.seed).shuffle(documents)
        end = tokenizer.token_to_id(END)
        np.save(folder / "stream.npy", np.concatenate([np.array([*row, end], dtype=np.uint16) for row in _tokenise(tokenizer, documents)]))
    corpus = Corpus.open(folder)
    log.info("%s tokens of text, %s weak pairs", f"{len(corpus.stream):,}", f"{len(corpus.query_starts) - 1:,}")
    return corpus


def lexical_stage(config: PretrainConfig, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Token embeddings [V, D], of standard deviation 1, and the last norm's bias [D]; one process does it for all."""
    torch.manual_seed(config.seed)
    width = config.nano.hidden_size
    table, bias = nn.Parameter(0.02 * torch.randn(config.nano.vocabulary, width)), nn.Parameter(torch.zeros(width))
    optimizer = torch.optim.AdamW([table, bias], lr=config.lexical_learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    pairs = len(corpus.query_starts) - 1
    for step in range(config.lexical_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lexical_learning_rate * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / config.lexical_steps)
        numbers = pair_numbers(pairs, config.lexical_pairs_per_step, config, step)
        queries, documents = map(list, zip(*(corpus.pair(number, config) for number in numbers), strict=True))
        normed = F.layer_norm(table, (width,), bias=bias)  # of each token once, not of each occurrence
        loss, _ = pair_loss(bag_of_tokens(normed, queries), bag_of_tokens(normed, documents), torch.arange(len(numbers)), config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            log.info("lexical step %d/%d  contrastive %.3f", step, config.lexical_steps, loss.item())
    return (table / table.std()).detach(), bias.detach()  # the last norm does not see the scale, the blocks do


def bag_of_tokens(table: Tensor, rows: list[list[int]]) -> Tensor:
    """[rows, D]: position-weighted mean of the rows of `table`; what a trunk without blocks computes."""
    lengths = torch.tensor([len(row) for row in rows])
    starts = lengths.cumsum(0) - lengths
    positions = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths) + 1
    weights = positions / (lengths * (lengths + 1) / 2).repeat_interleave(lengths)
    return F.embedding_bag(torch.tensor([token for row in rows for token in row]), table, starts, mode="sum", per_sample_weights=weights)


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


@torch.no_grad()
def start_from(model: GPTNeoForCausalLM, table: Tensor, bias: Tensor) -> None:
    """Makes the trunk compute what the lexical stage computed: its embeddings, no positions, blocks that add nothing."""
    model.transformer.wte.weight.copy_(table)
    model.transformer.wpe.weight.zero_()
    model.transformer.ln_f.bias.copy_(bias)
    for block in model.transformer.h:
        block.attn.attention.out_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()


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
    contrastive, first = pair_loss(query, document, places.to(query.device), config)
    (config.contrastive_weight * contrastive + language).backward()
    shown = {"language": language.detach(), "contrastive": contrastive.detach(), "first": first}
    return shown, sum(map(len, queries)) + sum(map(len, documents))


def pair_loss(queries: Tensor, documents: Tensor, places: Tensor, config: PretrainConfig) -> tuple[Tensor, Tensor]:
    """InfoNCE, both directions, and the share of queries that rank their document first. places: of the pairs in the batch."""
    labels = torch.arange(len(queries), device=queries.device)
    ignored = overlapping(places, config)
    scores = similarities(queries, documents, config.scale, ignored)
    loss = (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2
    return loss, (scores.argmax(1) == labels).float().mean()


def overlapping(places: Tensor, config: PretrainConfig) -> Tensor:
    """[pairs, pairs]: pairs up to two apart in one run share a sentence or a paragraph, so neither is the other's negative."""
    run, apart = places // config.neighbours, (places[:, None] - places[None]).abs()
    return (run[:, None] == run[None]) & (apart > 0) & (apart <= 2)


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


class _NextTokenLoss(torch.autograd.Function):
    """Cross-entropy of a linear head that never holds all logits: each chunk's gradient is made while its softmax is at hand."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = hidden.new_zeros(())
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            part, target = hidden[start : start + CHUNK], targets[start : start + CHUNK, None]
            logits = part @ weight.T
            logits -= logits.amax(1, keepdim=True)
            chosen = logits.gather(1, target)
            probabilities = logits.exp_()
            normalizer = probabilities.sum(1, keepdim=True)
            total += (normalizer.log() - chosen).sum()
            probabilities /= normalizer
            probabilities.scatter_add_(1, target, torch.full_like(chosen, -1.0))
            hidden_gradient[start : start + CHUNK] = probabilities @ weight
            weight_gradient.addmm_(probabilities.T, part)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * gradient, weight_gradient * gradient, None


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats; hidden [n, D], weight [V, D], targets [n]. Computed in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _NextTokenLoss.apply(hidden.float(), weight, targets)


def perplexity(model: GPTNeoForCausalLM, ids: np.ndarray, window: int) -> float:
    """exp of the mean next-token loss over whole windows of held-out ids."""
    windows = torch.from_numpy(ids[: len(ids) // window * window].astype(np.int64)).view(-1, window).to(model.device)
    with torch.inference_mode():
        losses = [next_token_loss(model.transformer(part[:, :-1]).last_hidden_state.flatten(0, 1), model.lm_head.weight, part[:, 1:].flatten())
                  for part in windows.split(4)]
    return float((sum(losses) / windows[:, 1:].numel()).exp())


def build_model(nano: NanoConfig, seed: int) -> GPTNeoForCausalLM:
    torch.manual_seed(seed)
    config = GPTNeoConfig(
        vocab_size=nano.vocabulary, hidden_size=nano.hidden_size, num_layers=nano.layers, num_heads=nano.heads,
        attention_types=[[["global", "local"], nano.layers // 2]], window_size=nano.window,
        max_position_embeddings=nano.positions, intermediate_size=4 * nano.hidden_size,
        activation_function="gelu_pytorch_tanh",  # gelu_new's function as one fused operation
        embed_dropout=0.0, attention_dropout=0.0, resid_dropout=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False, use_cache=False,
    )
    return prepare_attention(GPTNeoForCausalLM(config))


def build_optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and ".h." in n]
    groups = [
        {"params": [named["transformer.wte.weight"], named["transformer.wpe.weight"]], "lr": config.embedding_learning_rate, "weight_decay": 0.0},
        {"params": [named["lm_head.weight"]], "lr": config.head_learning_rate, "weight_decay": config.weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "lr": config.vector_learning_rate, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.98)),
    ]


def language_windows(corpus: Corpus, config: PretrainConfig, step: int) -> Tensor:
    """[windows_per_step, window_tokens + 1]; the windows of one epoch are a permutation of the stream."""
    length = config.window_tokens
    windows = (len(corpus.stream) - 1) // length
    epoch, first = divmod(step * config.windows_per_step, windows)
    order = np.random.default_rng((config.seed, epoch)).permutation(windows)
    chosen = np.take(order, range(first, first + config.windows_per_step), mode="wrap")
    return torch.stack([torch.from_numpy(corpus.stream[i * length : (i + 1) * length + 1].astype(np.int64)) for i in chosen])


def pair_numbers(pairs: int, count: int, config: PretrainConfig, step: int) -> list[int]:
    """`count` pairs, without replacement inside an epoch: runs of neighbouring pairs, the runs in shuffled order."""
    run = config.neighbours
    runs = pairs // run
    epoch, first = divmod(step * (count // run), runs)
    generator = np.random.default_rng((config.seed, 1, epoch, 0))
    order, shift = generator.permutation(runs), generator.integers(run)
    return [int((order[(first + i) % runs] * run + shift + j) % pairs) for i in range(count // run) for j in range(run)]


def save_model(model: GPTNeoForCausalLM, config: PretrainConfig) -> Path:
    """fp16 safetensors and the tokenizer, as every loader expects them."""
    from transformers import PreTrainedTokenizerFast

    output = Path(config.output)
    half = build_model(config.nano, config.seed)
    half.load_state_dict(model.state_dict())
    half.config._attn_implementation = None  # a choice of this process, not of the checkpoint
    half.half().save_pretrained(output)
    PreTrainedTokenizerFast(tokenizer_file=f"{config.folder}/tokenizer.json", eos_token=END, bos_token=END, pad_token=END,
                            padding_side="right").save_pretrained(output)
    return output


def _train_tokenizer(documents: list[str], vocabulary: int):
    """Byte-level BPE as GPT-2's; single bytes, brackets and braces among them, are always tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    return tokenizer


def _tokenise(tokenizer, texts: list[str], size: int = 10_000) -> Iterator[list[int]]:
    with progress_bar("tokenising", len(texts)) as advance:
        for start in range(0, len(texts), size):
            yield from (encoding.ids for encoding in tokenizer.encode_batch(texts[start : start + size]))
            advance(size)


def _ragged(ids: np.ndarray, starts: np.ndarray, row: int, limit: int) -> list[int]:
    return ids[starts[row] : min(starts[row + 1], starts[row] + limit)].tolist()


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
