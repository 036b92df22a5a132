"""InfoNCE over in-batch candidates (van den Oord 2018; as used by SGPT: cosine, scale 20, query to documents).

Letters: Q queries of this process, R documents a query, W processes, C = W·Q·R candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sgpt.errors import InputError


@dataclass
class LossConfig:
    """scale: factor on the cosines, 1 / temperature. symmetric: also document to query, both halves weighing the same.

    false_negative_margin: an in-batch candidate whose cosine with a query is above that of the query's positive less this
    margin is taken for a false negative and left out; null leaves none out. Curated hard negatives always count.
    """

    name: str = "info_nce"
    scale: float = 20.0
    symmetric: bool = False
    false_negative_margin: float | None = None

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise InputError(f"loss.name={self.name!r} is unknown; choose one of {', '.join(LOSSES)}")
        if not self.scale > 0:
            raise InputError(f"loss.scale={self.scale} must be positive; it is 1 / temperature, 20 in SGPT")


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
    other_positives: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """ignored [Q, C]: the candidates that only look like negatives of a query, decided by equal input text.

    Candidate c is ignored for query i when it has the text of i's own positive or of another positive of i, when it is the
    positive of a query with i's text, or when its text is i's. The positive itself and the hard negatives curated for i
    always count. Hashes are int64; query_hashes [Q] of any queries, positives [Q] their rows among the candidates,
    other_positives [Q, any]; all_* are gathered rank-major, [W·Q] and [C].
    """
    r = documents_per_query
    ignored = all_document_hashes[None] == all_document_hashes[positives][:, None]
    ignored |= all_document_hashes[None] == query_hashes[:, None]
    ignored[:, ::r] |= all_query_hashes[None] == query_hashes[:, None]
    for other in other_positives.T if other_positives is not None else ():
        ignored |= all_document_hashes[None] == other[:, None]
    own = positives[:, None] + torch.arange(r, device=positives.device)
    return ignored.scatter_(1, own, False)


def duplicate_queries(
    query_hashes: Tensor, all_query_hashes: Tensor, all_document_hashes: Tensor, positives: Tensor, documents_per_query: int,
    all_other_positives: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """ignored [Q, W·Q] of the other direction: query j is no negative of the positive of i where that one is none of j's in `duplicates`.

    all_other_positives [W·Q, any].
    """
    r = documents_per_query
    own = all_document_hashes[positives][:, None]
    ignored = (own == all_document_hashes[None, ::r]) | (own == all_query_hashes[None]) | (query_hashes[:, None] == all_query_hashes[None])
    for other in all_other_positives.T if all_other_positives is not None else ():
        ignored |= own == other[None]
    return ignored.scatter_(1, positives[:, None] // r, False)


def too_alike(scores: Tensor, positives: Tensor, documents_per_query: int, margin: float) -> Tensor:
    """ignored [Q, C]: in-batch candidates that score above the positive less `margin`, all on one scale; never the query's own documents."""
    ignored = scores > scores.gather(1, positives[:, None]) - margin
    own = positives[:, None] + torch.arange(documents_per_query, device=positives.device)
    return ignored.scatter_(1, own, False)


LOSSES = {"info_nce": info_nce}
