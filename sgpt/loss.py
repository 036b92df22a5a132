"""InfoNCE over in-batch candidates (van den Oord 2018; as used by SGPT: cosine, scale 20, query to documents).

Letters: Q queries of this process, R documents a query, W processes, C = W·Q·R candidates.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sgpt.errors import InputError
from sgpt.values import FINITE, POSITIVE, check_ranges


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


def unit(embeddings: Tensor) -> Tensor:
    """Length 1, in float32 or wider."""
    return F.normalize(embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings, dim=1)


def scaled(queries: Tensor, candidates: Tensor, scale: float, ignored: Tensor | None = None) -> Tensor:
    """As `similarities`, of rows that have length 1."""
    with torch.autocast(queries.device.type, enabled=False):  # else a bfloat16 product: 0.4 % of the scale off
        scores = scale * queries @ candidates.T
    return scores if ignored is None else scores.masked_fill(ignored, float("-inf"))


def positive_rows(num_queries: int, documents_per_query: int, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """[Q]: query i's positive is row i·R of its process' documents, row (rank·Q + i)·R after the gather."""
    return (rank * num_queries + torch.arange(num_queries, device=device)) * documents_per_query


def duplicates(
    query_hashes: Tensor, all_query_hashes: Tensor, all_document_hashes: Tensor, positives: Tensor, documents_per_query: int,
    all_other_positives: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """ignored [Q, C]: the candidates that only look like negatives of a query, decided by equal input text.

    Candidate c is ignored for query i when it has the text of an answer to i (see `answers`), wherever it stands, or i's own
    text. The positive itself and the hard negatives curated for i always count; what others curated for themselves does not.
    Hashes are int64; query_hashes [Q] of any queries, positives [Q] their rows among the candidates; all_* are gathered
    rank-major, [W·Q] and [C], all_other_positives [W·Q, any].
    """
    r = documents_per_query
    given = _positives(all_document_hashes, r, all_other_positives)
    ignored = answers(query_hashes, all_query_hashes, given, all_document_hashes) | (all_document_hashes[None] == query_hashes[:, None])
    own = positives[:, None] + torch.arange(r, device=positives.device)
    return ignored.scatter_(1, own, False)


def duplicate_queries(
    query_hashes: Tensor, all_query_hashes: Tensor, all_document_hashes: Tensor, positives: Tensor, documents_per_query: int,
    all_other_positives: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """ignored [Q, W·Q] of the other direction: query j is no negative of the positive of i where that one is none of j's in `duplicates`."""
    r, own = documents_per_query, all_document_hashes[positives]
    given = _positives(all_document_hashes, r, all_other_positives)
    ignored = answers(all_query_hashes, all_query_hashes, given, own).T | (own[:, None] == all_query_hashes[None])
    ignored |= query_hashes[:, None] == all_query_hashes[None]
    return ignored.scatter_(1, positives[:, None] // r, False)


def answers(query_hashes: Tensor, all_query_hashes: Tensor, all_positive_hashes: Tensor, document_hashes: Tensor) -> Tensor:
    """[Q, C] boolean: whether a document has the text of a positive of any query that has the text of this one.

    query_hashes [Q], document_hashes [C]: of any; all_query_hashes [W·Q] with all their positives, all_positive_hashes [W·Q, any].
    Through a table of the different texts: comparing every query with every other and all their positives would be cubic.
    """
    queries, of_query = query_hashes.unique(return_inverse=True)
    documents, of_document = document_hashes.unique(return_inverse=True)
    asked = torch.searchsorted(queries, all_query_hashes).clamp(max=len(queries) - 1)
    given = torch.searchsorted(documents, all_positive_hashes).clamp(max=len(documents) - 1)
    there = (queries[asked] == all_query_hashes)[:, None] & (documents[given] == all_positive_hashes)  # [W·Q, any]
    table = torch.zeros(len(queries), len(documents), dtype=torch.bool, device=query_hashes.device)
    table[asked[:, None].expand_as(given)[there], given[there]] = True
    return table[of_query][:, of_document]


def _positives(all_document_hashes: Tensor, documents_per_query: int, all_other_positives: Tensor | None) -> Tensor:
    """Of every query [W·Q, 1 + any]."""
    drawn = all_document_hashes[::documents_per_query, None]
    return drawn.contiguous() if all_other_positives is None else torch.cat([drawn, all_other_positives], dim=1)


def too_alike(scores: Tensor, positives: Tensor, documents_per_query: int, margin: float) -> Tensor:
    """ignored [Q, C]: in-batch candidates that score above the positive less `margin`, all on one scale; never the query's own documents."""
    ignored = scores > scores.gather(1, positives[:, None]) - margin
    own = positives[:, None] + torch.arange(documents_per_query, device=positives.device)
    return ignored.scatter_(1, own, False)


LOSSES = {"info_nce": info_nce}
