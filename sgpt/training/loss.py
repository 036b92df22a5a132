"""InfoNCE over in-batch candidates (van den Oord 2018; as used by SGPT: cosine, scale 20, query to documents).

Letters: Q queries of this process, R documents a query, W processes, C = W·Q·R candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sgpt.data.feed.collate import Batch
from sgpt.runtime.distributed import gather, gather_with_gradient, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import FINITE, POSITIVE, check_ranges
from sgpt.training.negatives import Contest, positive_rows, scaled, too_alike, unit

SCORES_AT_A_TIME = 2**23  # 32 MB in float32, a few times that while they are computed


@dataclass
class LossConfig:
    """scale: factor on the cosines, 1 / temperature. symmetric: also document to query, both halves weighing the same.

    false_negative_margin: an in-batch candidate whose cosine with a query is above that of the query's positive less this
    margin is taken for a false negative and left out; null leaves none out. Curated hard negatives always count.

    guide: folder of a run, export or sentence-transformers model, frozen, that judges in its place: an in-batch candidate which
    it scores above the query's positive less guide_margin, in cosines, is left out (GISTEmbed, Solatorio 2024, arXiv 2402.16829,
    who leaves out curated hard negatives too; here they count). With both margins, either leaves out.
    """

    name: str = "info_nce"
    scale: float = 20.0
    symmetric: bool = False
    false_negative_margin: float | None = None
    guide: str | None = None
    guide_margin: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise InputError(f"loss.name={self.name!r} is unknown; choose one of {', '.join(LOSSES)}")
        check_ranges(self, "loss.", scale=replace(POSITIVE, words="positive; it is 1 / temperature, 20 in SGPT"),
                     guide_margin=replace(FINITE, words="a number; it is a difference of cosines, 0 in GISTEmbed"),
                     false_negative_margin=replace(FINITE, words="a number; it is a difference of cosines, or null to leave no candidate out"))
        if self.guide_margin and not self.guide:
            raise InputError(f"loss.guide_margin={self.guide_margin} has no effect without a guide; set loss.guide=<folder of a model>, or leave it 0")


def info_nce(queries: Tensor, candidates: Tensor, scale: float, positives: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Mean over the queries of the cross-entropy between the scaled cosines and the positive's row, in nats.

    queries [Q, D]; candidates [C, D]; positives [Q], the row of each query's positive; ignored [Q, C] boolean, True where
    a candidate is no negative of that query (never true at its positive). Softmax in float32 or wider.
    """
    return F.cross_entropy(scaled(unit(queries), unit(candidates), scale, ignored), positives)


def similarities(queries: Tensor, candidates: Tensor, scale: float, ignored: Tensor | None = None) -> Tensor:
    """scale · cosine [Q, C], -inf where ignored."""
    return scaled(unit(queries), unit(candidates), scale, ignored)


LOSSES = {"info_nce": info_nce}


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


def objective(queries: Tensor, documents: Tensor, batch: Batch, config: LossConfig) -> tuple[Tensor, Outcome]:
    """InfoNCE of this process' queries [Q, D] against the documents [Q·R, D] of all processes."""
    assert config.guide is None or batch.guide_queries is not None, "loss.guide is set and the feed knows no guide; see sgpt/training/guide.py"
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
