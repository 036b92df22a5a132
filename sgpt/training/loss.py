"""What a training step minimises: losses over in-batch candidates, by default InfoNCE.

InfoNCE: van den Oord 2018; as used by SGPT: cosine, scale 20, query to documents.

Letters: Q queries of this process, R documents a query, W processes, C = W·Q·R candidates.

`objective` is what a training step minimises: the loss that `loss.name` names in LOSSES, one way or both. Who is no
negative of whom is decided in sgpt/training/negatives.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sgpt.data.feed.collate import Batch
from sgpt.runtime.distributed import gather_with_gradient, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import FINITE, POSITIVE, check_choice, check_ranges
from sgpt.training.negatives import Negatives, positive_rows, scaled_cosines, unit

SCORES_AT_A_TIME = 2**23  # 32 MB in float32, a few times that while they are computed

Ignored = Callable[[slice, Tensor, float], Tensor]
"""(rows of the queries, their scores [rows, C], scale) -> [rows, C] boolean, True where a candidate is no negative.

A function and not a mask, because [Q, C] need not fit in memory: `Negatives.ignored_documents`.
"""


class Loss(Protocol):
    """A row of LOSSES: from embeddings of length 1 to the mean over the queries, a scalar; arguments as `info_nce`."""

    def __call__(
        self, queries: Tensor, candidates: Tensor, scale: float, positives: Tensor, ignored: Ignored | None = None
    ) -> Tensor: ...


def info_nce(
    queries: Tensor, candidates: Tensor, scale: float, positives: Tensor, ignored: Ignored | None = None
) -> Tensor:
    """Mean over the queries of the cross-entropy between the scaled cosines and the positive's row, in nats.

    queries [Q, D] and candidates [C, D], of length 1 (`unit`); positives [Q], the row of each query's positive; ignored
    says who is no negative (never true at a positive). Softmax in float32 or wider.

    Memory is bounded: SCORES_AT_A_TIME exist at a time, and where that is not all of them, each chunk of rows computes
    its scores again in the backward pass.
    """

    def summed(rows: slice) -> Tensor:
        scores, _ = score(queries, candidates, scale, rows, ignored)
        return F.cross_entropy(scores, positives[rows], reduction="sum")

    chunks = row_chunks(len(queries), len(candidates))
    if len(chunks) == 1:
        return summed(chunks[0]) / len(queries)
    # nothing random happens inside, so no random state has to be kept for the second time
    sums = [checkpoint(summed, rows, use_reentrant=False, preserve_rng_state=False) for rows in chunks]
    return sum(sums) / len(queries)


LOSSES: dict[str, Loss] = {"info_nce": info_nce}


def score(
    queries: Tensor, candidates: Tensor, scale: float, rows: slice, ignored: Ignored | None = None
) -> tuple[Tensor, Tensor]:
    """Of some rows of the queries: scale · cosine, -inf where ignored, and where that is; both [rows, C]."""
    scores = scaled_cosines(queries[rows], candidates, scale)
    if ignored is None:
        return scores, torch.zeros_like(scores, dtype=torch.bool)
    is_ignored = ignored(rows, scores.detach(), scale)
    return scores.masked_fill(is_ignored, float("-inf")), is_ignored


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Rows that are scored together, against so many columns."""
    size = max(1, SCORES_AT_A_TIME // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


@dataclass
class LossConfig:
    """What a training step minimises, and which candidates are left out as false negatives."""

    name: str = "info_nce"
    """Loss, a row of LOSSES."""
    scale: float = 20.0
    """Factor on the cosines, 1 / temperature; SGPT's 20 is a temperature of 0.05."""
    symmetric: bool = False
    """Whether each document also finds its query among all queries; both directions weigh the same."""
    false_negative_margin: float | None = None
    """An in-batch candidate with a cosine above that of the query's positive less this is left out as a false negative.

    In cosines; null leaves none out. Curated hard negatives always count.
    """
    guide: str | None = None
    """Folder of a run, export or sentence-transformers model, frozen, that judges candidates by its own cosines.

    GISTEmbed (Solatorio 2024, arXiv 2402.16829) leaves out curated hard negatives too; here they always count. With
    false_negative_margin as well, either leaves a candidate out.
    """
    guide_margin: float = 0.0
    """An in-batch candidate that the guide scores above the query's positive less this is left out; in cosines."""

    def __post_init__(self) -> None:
        check_choice("loss.name", self.name, LOSSES)
        margin = "a number; it is a difference of cosines, or null to leave no candidate out"
        check_ranges(
            self,
            "loss.",
            scale=replace(POSITIVE, words="positive; it is 1 / temperature, 20 in SGPT"),
            guide_margin=replace(FINITE, words="a number; it is a difference of cosines, 0 in GISTEmbed"),
            false_negative_margin=replace(FINITE, words=margin),
        )
        if self.guide_margin and not self.guide:
            raise InputError(
                f"loss.guide_margin={self.guide_margin} has no effect without a guide; "
                "set loss.guide=<folder of a model>, or leave it 0"
            )


@dataclass(frozen=True)
class StepResult:
    """What a step computed, without its graph.

    loss: scalar, this process' mean. queries [Q, D], candidates [C, D]: of length 1, for the log. scale: of cosines.
    tokens: how many were computed, of distinct texts. positions: tokens and their padding. kept_tokens: how many
    tokens' activations stayed alive.
    """

    loss: Tensor
    queries: Tensor
    candidates: Tensor
    negatives: Negatives
    scale: float
    tokens: int = 0
    positions: int = 0
    kept_tokens: int = 0

    @property
    def kept_share(self) -> float:
        """Share of the tokens, 0 to 1."""
        return self.kept_tokens / max(1, self.tokens)


def objective(queries: Tensor, documents: Tensor, batch: Batch, config: LossConfig) -> tuple[Tensor, StepResult]:
    """The loss of this process' queries [Q, D] against the documents of all processes, a scalar with its graph.

    documents [Q·R, D]: of this process, query-major. The loss is the mean over this process' queries, so the mean of
    the gradients of all processes is that of the whole batch. All processes call it.
    """
    assert config.guide is None or batch.guide_queries is not None, (
        "loss.guide is set, and the batch brings no embeddings of a guide; see sgpt/training/guide.py"
    )
    loss_of = LOSSES[config.name]
    negatives = Negatives.of(
        batch,
        queries.device,
        guide_margin=config.guide_margin,
        false_negative_margin=config.false_negative_margin,
    )
    queries = unit(queries)
    candidates = unit(gather_with_gradient(documents))  # [C, D], rank-major
    loss = loss_of(queries, candidates, config.scale, negatives.positives, negatives.ignored_documents)
    if config.symmetric:  # each positive document finds its query among all queries
        positives = candidates[negatives.positives]  # [Q, D]
        all_queries = gather_with_gradient(queries)  # [W·Q, D]
        own_queries = positive_rows(len(queries), 1, world()[0], queries.device)
        back = loss_of(positives, all_queries, config.scale, own_queries, negatives.ignored_queries)
        loss = (loss + back) / 2
    return loss, StepResult(loss.detach(), queries.detach(), candidates.detach(), negatives, config.scale)
