"""One contrastive step: from a batch of token ids to gradients, in as much memory as it is given.

The texts of a batch are embedded in packs (sgpt/packing.py). A pack's activations stay alive for its backward pass while
they fit the keep budget; of the others only the embeddings are made, and after the loss has said what it wants of each
embedding they are computed again, with the random state that they had. With a budget of nothing that is GradCache (Gao et
al. 2021, arXiv 2101.06983). The gradient is the same number for number, dropout included; only time and memory differ.

The scores are computed for some queries at a time as well, so a batch is limited by nothing but time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sgpt.data.collate import Batch
from sgpt.distributed import gather, gather_with_gradient, world
from sgpt.encoder import Encoder
from sgpt.loss import LossConfig, duplicate_queries, duplicates, positive_rows, scaled, too_alike, unit
from sgpt.model import takes_packs
from sgpt.packing import Pack, distinct

SCORES_AT_A_TIME = 2**23  # 32 MB in float32, a few times that while they are computed
ROUNDING = 1e-6  # of a cosine in float32


@dataclass(frozen=True)
class Guided:
    """A frozen guide's embeddings of the texts of a batch, of length 1: queries [Q, G] and positives [Q, G] of this process,

    all_queries [W·Q, G] and all_documents [C, G] of all.
    """

    queries: Tensor
    positives: Tensor
    all_queries: Tensor
    all_documents: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "Guided | None":
        if batch.guide_queries is None or batch.guide_documents is None:
            return None
        queries, documents = batch.guide_queries.to(device), batch.guide_documents.to(device)
        return cls(queries, documents[:: batch.documents_per_query], gather(queries), gather(documents))


@dataclass(frozen=True)
class Contest:
    """Who competes for whom in a batch, over all processes, on the device: hashes of own queries [Q], of all queries [W·Q]

    and of all documents [C]; positives [Q], the row of each own query's positive among the candidates; all_other_positives
    [W·Q, any], further positives of all queries; guided, None without a guide.
    """

    queries: Tensor
    all_queries: Tensor
    all_documents: Tensor
    positives: Tensor
    all_other_positives: Tensor
    documents_per_query: int
    guided: Guided | None = None

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "Contest":
        queries, documents, r = batch.query_hashes.to(device), batch.document_hashes.to(device), batch.documents_per_query
        positives, others = positive_rows(len(queries), r, world()[0], device), batch.other_positive_hashes.to(device)
        return cls(queries, gather(queries), gather(documents), positives, _gather_ragged(others, documents[::r]), r, Guided.of(batch, device))

    def duplicates(self, rows: slice) -> Tensor:
        """ignored [rows, C], by equal texts."""
        return duplicates(self.queries[rows], self.all_queries, self.all_documents, self.positives[rows], self.documents_per_query, self.all_other_positives)

    def no_negatives(self, rows: slice, guide_margin: float) -> Tensor:
        """ignored [rows, C]: those, and what the guide takes for false negatives."""
        ignored, guided = self.duplicates(rows), self.guided
        if guided is None:
            return ignored
        return ignored | _guided(guided.queries[rows], guided.all_documents, self.positives[rows], self.documents_per_query, guide_margin)

    def no_negative_queries(self, rows: slice, guide_margin: float) -> Tensor:
        """ignored [rows, W·Q] of the other direction: queries of which the positives of these rows are no negatives."""
        r, guided = self.documents_per_query, self.guided
        ignored = duplicate_queries(self.queries[rows], self.all_queries, self.all_documents, self.positives[rows], r, self.all_other_positives)
        if guided is None:
            return ignored
        return ignored | _guided(guided.positives[rows], guided.all_queries, self.positives[rows] // r, 1, guide_margin)


def _guided(rows: Tensor, candidates: Tensor, positives: Tensor, own: int, margin: float) -> Tensor:
    """`too_alike` of a guide's embeddings. Texts that are one to the guide tie with the positive but for rounding, and must do so

    alike in chunks of any size and on any number of processes: a candidate has to be above by more than that.
    """
    return too_alike(scaled(rows, candidates, 1.0), positives, own, margin - ROUNDING)


@dataclass(frozen=True)
class Outcome:
    """loss: scalar, detached, this process' mean. queries [Q, D], candidates [C, D]: detached, of length 1, for the log.

    tokens: computed, of distinct texts; positions: those and their padding; kept_tokens: whose activations stayed alive.
    """

    loss: Tensor
    queries: Tensor
    candidates: Tensor
    contest: Contest
    config: LossConfig
    tokens: int = 0
    positions: int = 0
    kept_tokens: int = 0

    @property
    def kept(self) -> float:
        """Share of the tokens, 0 to 1."""
        return self.kept_tokens / max(1, self.tokens)


def contrastive_step(encoder: Encoder, batch: Batch, config: LossConfig, *, keep_bytes: float = float("inf"), weight: float = 1.0) -> Outcome:
    """Adds weight · the loss' gradients to the learning parameters'. keep_bytes: of activations that may stay alive."""
    rows, places = distinct([*batch.queries, *batch.documents])
    made = list(encoder.packs(rows))
    parts = _embed(encoder, made, keep_bytes)
    embeddings = encoder.in_order(made, [part.embeddings.detach() for part in parts], len(rows)).requires_grad_()  # [distinct, D]
    loss, outcome = objective(*embeddings[places].split([len(batch.queries), len(batch.documents)]), batch, config)
    (loss * weight).backward()
    after = _random_state(encoder.device)
    for pack, part in zip(made, parts, strict=True):
        part.backward(encoder, pack, embeddings.grad[pack.rows])
    _restore_random_state(after, encoder.device)
    tokens = sum(map(len, made))
    positions = tokens if takes_packs(encoder.trunk) else sum(pack.padded_tokens for pack in made)
    kept = sum(len(pack) for pack, part in zip(made, parts, strict=True) if part.state is None)
    return replace(outcome, tokens=tokens, positions=positions, kept_tokens=kept)


def objective(queries: Tensor, documents: Tensor, batch: Batch, config: LossConfig) -> tuple[Tensor, Outcome]:
    """InfoNCE of this process' queries [Q, D] against the documents [Q·R, D] of all processes."""
    assert config.guide is None or batch.guide_queries is not None, "loss.guide is set and the feed knows no guide; see sgpt/guide.py"
    contest = Contest.of(batch, queries.device)
    queries, candidates = unit(queries), unit(gather_with_gradient(documents))  # [C, D], rank-major
    loss = _cross_entropy(queries, candidates, config, contest.positives, contest.documents_per_query, contest.no_negatives)
    if config.symmetric:  # each positive document finds its query among all queries
        own = positive_rows(len(queries), 1, world()[0], queries.device)
        positives = candidates[contest.positives]
        loss = (loss + _cross_entropy(positives, gather_with_gradient(queries), config, own, 1, contest.no_negative_queries)) / 2
    return loss, Outcome(loss.detach(), queries.detach(), candidates.detach(), contest, config)


def _cross_entropy(
    rows: Tensor, candidates: Tensor, config: LossConfig, positives: Tensor, own: int, no_negatives: Callable[[slice, float], Tensor]
) -> Tensor:
    """`info_nce` of rows of length 1, of which so many are scored at a time that memory stays bounded; their scores are made again backwards."""

    def part(chosen: slice) -> Tensor:
        scores, _ = _scores(rows[chosen], candidates, config, config.scale, positives[chosen], own, no_negatives(chosen, config.guide_margin))
        return F.cross_entropy(scores, positives[chosen], reduction="sum")

    chunks = _chunks(len(rows), len(candidates))
    if len(chunks) == 1:
        return part(chunks[0]) / len(rows)
    return sum(checkpoint(part, chosen, use_reentrant=False, preserve_rng_state=False) for chosen in chunks) / len(rows)


def _scores(
    rows: Tensor, candidates: Tensor, config: LossConfig, scale: float, positives: Tensor, own: int, ignored: Tensor
) -> tuple[Tensor, Tensor]:
    """scale · cosine, -inf where a candidate is no negative, and where that is, both [rows, candidates]."""
    scores = scaled(rows, candidates, scale)
    if config.false_negative_margin is not None:
        ignored = ignored | too_alike(scores.detach(), positives, own, scale * config.false_negative_margin)
    return scores.masked_fill(ignored, float("-inf")), ignored


def _gather_ragged(columns: Tensor, filler: Tensor) -> Tensor:
    """[rows, any] of every process -> [W·rows, most]; filler [rows] fills the shorter ones."""
    most = int(gather(torch.tensor([columns.shape[1]], device=columns.device)).max())
    return gather(torch.cat([columns, filler[:, None].expand(-1, most - columns.shape[1])], dim=1))


def _chunks(rows: int, columns: int) -> list[slice]:
    size = max(1, SCORES_AT_A_TIME // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def health(*outcomes: Outcome) -> dict[str, float | None]:
    """Over all queries of these micro-batches on all processes: mean cosine of the positives and of each query's hardest negative

    (None where nothing is a negative), mean number of negatives, and the share of candidates that were left out as duplicates
    or false negatives.
    """
    positives, hardest, negatives, masked = [], [], [], []
    for outcome in outcomes:
        contest, others = outcome.contest, len(outcome.candidates) - 1
        for chosen in _chunks(len(outcome.queries), len(outcome.candidates)):
            own = contest.positives[chosen]
            cosines, ignored = _scores(
                outcome.queries[chosen], outcome.candidates, outcome.config, 1.0, own, contest.documents_per_query,
                contest.no_negatives(chosen, outcome.config.guide_margin),
            )
            left_out = ignored.sum(1).float()
            positives.append(cosines.gather(1, own[:, None]))
            hardest.append(cosines.scatter_(1, own[:, None], float("-inf")).amax(1))
            negatives.append(others - left_out)
            masked.append(left_out / max(1, others))
    negative = gather(torch.cat(hardest))
    negative = negative[negative.isfinite()]
    return {
        "positive_cosine": gather(torch.cat(positives)).mean().item(),
        "hardest_negative_cosine": negative.mean().item() if len(negative) else None,
        "negatives_per_query": gather(torch.cat(negatives)).mean().item(),
        "masked_share": gather(torch.cat(masked)).mean().item(),
    }


@dataclass
class _Part:
    """One pack's embeddings, with their graph, or without and the random state to make them again."""

    embeddings: Tensor
    state: tuple[Tensor, Tensor | None] | None

    def backward(self, encoder: Encoder, pack: Pack, gradient: Tensor) -> None:
        if self.state is not None:
            _restore_random_state(self.state, encoder.device)
            self.embeddings = encoder.embed_pack(pack)
        if self.embeddings.requires_grad:
            self.embeddings.backward(gradient)
        self.embeddings = None  # the graph goes with it


def _embed(encoder: Encoder, made: list[Pack], keep_bytes: float) -> list[_Part]:
    """Keeps what fits, by what the packs before took for each of their tokens; the first is tried when it may fit at all."""
    parts: list[_Part] = []
    kept_bytes, kept_tokens = 0, 0
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*encoder.trunk.parameters(), *encoder.trunk.buffers())}
    for pack in made:
        state = _random_state(encoder.device)
        expected = kept_bytes / kept_tokens * len(pack) if kept_tokens else 0
        if keep_bytes > 0 and kept_bytes + expected <= keep_bytes:
            with _SavedBytes(weights) as saved:
                embeddings = encoder.embed_pack(pack)
            if kept_bytes + saved.bytes <= keep_bytes:
                kept_bytes, kept_tokens = kept_bytes + saved.bytes, kept_tokens + len(pack)
                parts.append(_Part(embeddings, None))
                continue
            keep_bytes = 0  # what is known now: nothing more fits
            parts.append(_Part(embeddings.detach(), state))
            continue
        with torch.no_grad():
            parts.append(_Part(encoder.embed_pack(pack), state))
    return parts


class _SavedBytes:
    """Counts what autograd keeps for the backward pass: each storage once, and the weights, of which it keeps views, not at all."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.storages = weights, {}

    def __enter__(self) -> "_SavedBytes":
        self.hooks = saved_tensors_hooks(self._count, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
