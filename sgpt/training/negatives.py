"""Who is no negative of whom, over all processes: equal texts, further positives, a guide's false negatives."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sgpt.data.feed.collate import Batch
from sgpt.runtime.distributed import gather, world

ROUNDING = 1e-6  # of a cosine in float32


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


def _gather_ragged(columns: Tensor, filler: Tensor) -> Tensor:
    """[rows, any] of every process -> [W·rows, most]; filler [rows] fills the shorter ones."""
    most = int(gather(torch.tensor([columns.shape[1]], device=columns.device)).max())
    return gather(torch.cat([columns, filler[:, None].expand(-1, most - columns.shape[1])], dim=1))
