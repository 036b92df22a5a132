"""Who is no negative of whom, over all processes: equal texts, further positives, and false negatives.

In a batch every query is scored against the documents of all queries, and what is not its own is taken for wrong. Some
of it is not: a document that answers the query, too, or the query's own text. Training away from those does harm, so
each query ignores them. Three things decide it, from the surest to the guess:

- equal texts, known by their hashes (`duplicates`, `duplicate_queries`);
- a frozen guide, which scores them above the positive (`loss.guide`);
- the model in training itself, which does (`loss.false_negative_margin`).

A query's curated hard negatives always count, whatever the three say: somebody chose them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sgpt.data.feed.collate import Batch
from sgpt.runtime.distributed import gather, world

ROUNDING = 1e-6  # of a cosine in float32


def unit(embeddings: Tensor) -> Tensor:
    """The embeddings [rows, D] at length 1, in float32 or wider."""
    return F.normalize(embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings, dim=1)


def scaled_cosines(queries: Tensor, candidates: Tensor, scale: float) -> Tensor:
    """scale · cosine [Q, C] of queries [Q, D] and candidates [C, D], all of length 1 (`unit`)."""
    with torch.autocast(queries.device.type, enabled=False):  # else a bfloat16 product: 0.4 % of the scale off
        return scale * queries @ candidates.T


def positive_rows(num_queries: int, documents_per_query: int, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """[Q]: query i's positive is row i·R of its process' documents, row (rank·Q + i)·R after the gather."""
    return (rank * num_queries + torch.arange(num_queries, device=device)) * documents_per_query


def duplicates(
    query_hashes: Tensor,
    all_query_hashes: Tensor,
    all_document_hashes: Tensor,
    positives: Tensor,
    documents_per_query: int,
    all_other_positives: Tensor | None = None,
) -> Tensor:
    """ignored [Q, C]: the candidates that only look like negatives of a query, decided by equal input text.

    Candidate c is ignored for query i when it has the text of an answer to i (`answer_mask`), wherever it stands, or
    i's own text. The positive itself and the hard negatives curated for i always count; what others curated for
    themselves does not. Hashes are int64; query_hashes [Q] of any queries, positives [Q] their rows among the
    candidates; all_* are gathered rank-major, [W·Q] and [C], all_other_positives [W·Q, any].
    """
    all_positives = _all_positives(all_document_hashes, documents_per_query, all_other_positives)
    is_answer = answer_mask(query_hashes, all_query_hashes, all_positives, all_document_hashes)
    is_own_text = all_document_hashes[None] == query_hashes[:, None]
    return _never_own(is_answer | is_own_text, positives, documents_per_query)


def duplicate_queries(
    query_hashes: Tensor,
    all_query_hashes: Tensor,
    all_document_hashes: Tensor,
    positives: Tensor,
    documents_per_query: int,
    all_other_positives: Tensor | None = None,
) -> Tensor:
    """ignored [Q, W·Q] of the other direction, where each positive document finds its query among all queries.

    Query j is ignored for the positive of i where that positive answers j, where it has the text of j, and where i and
    j have the same text. Arguments as in `duplicates`.
    """
    own_positives = all_document_hashes[positives]
    all_positives = _all_positives(all_document_hashes, documents_per_query, all_other_positives)
    is_answer = answer_mask(all_query_hashes, all_query_hashes, all_positives, own_positives).T
    is_own_text = own_positives[:, None] == all_query_hashes[None]
    is_same_query = query_hashes[:, None] == all_query_hashes[None]
    return _never_own(is_answer | is_own_text | is_same_query, positives // documents_per_query, 1)


def answer_mask(
    query_hashes: Tensor, all_query_hashes: Tensor, all_positive_hashes: Tensor, document_hashes: Tensor
) -> Tensor:
    """[queries, documents] boolean: whether a document has the text of a positive of any query with this query's text.

    query_hashes [queries] and document_hashes [documents] are of any texts; all_query_hashes [W·Q] and
    all_positive_hashes [W·Q, any] say which texts answer which. Through a table of the different texts: comparing every
    query with every other and all their positives would be cubic.
    """
    query_texts, query_numbers = query_hashes.unique(return_inverse=True)
    document_texts, document_numbers = document_hashes.unique(return_inverse=True)
    # searchsorted gives a number to texts that are not in the table as well, so each is compared with what is there
    asked = torch.searchsorted(query_texts, all_query_hashes).clamp(max=len(query_texts) - 1)
    given = torch.searchsorted(document_texts, all_positive_hashes).clamp(max=len(document_texts) - 1)
    is_known_query = query_texts[asked] == all_query_hashes
    is_known = is_known_query[:, None] & (document_texts[given] == all_positive_hashes)  # [W·Q, any]
    table = torch.zeros(len(query_texts), len(document_texts), dtype=torch.bool, device=query_hashes.device)
    table[asked[:, None].expand_as(given)[is_known], given[is_known]] = True
    return table[query_numbers][:, document_numbers]


def _all_positives(
    all_document_hashes: Tensor, documents_per_query: int, all_other_positives: Tensor | None
) -> Tensor:
    """Hashes of every query's positives [W·Q, 1 + any]: the one in the batch first."""
    in_batch = all_document_hashes[::documents_per_query, None]
    if all_other_positives is None:
        return in_batch.contiguous()
    return torch.cat([in_batch, all_other_positives], dim=1)


def above_margin(scores: Tensor, positives: Tensor, documents_per_query: int, margin: float) -> Tensor:
    """ignored [Q, C]: in-batch candidates that score above the query's positive less `margin`; never its own documents.

    scores [Q, C] and margin are on one scale.
    """
    threshold = scores.gather(1, positives[:, None]) - margin
    return _never_own(scores > threshold, positives, documents_per_query)


def _never_own(ignored: Tensor, positives: Tensor, documents_per_query: int) -> Tensor:
    """`ignored` with each query's own documents, its positive and its curated hard negatives, taken out again."""
    own = positives[:, None] + torch.arange(documents_per_query, device=positives.device)  # [Q, R]
    return ignored.scatter(1, own, False)


@dataclass(frozen=True)
class GuideEmbeddings:
    """A frozen guide's embeddings of the texts of a batch, of length 1.

    queries [Q, G] and positives [Q, G] of this process, all_queries [W·Q, G] and all_documents [C, G] of all.
    """

    queries: Tensor
    positives: Tensor
    all_queries: Tensor
    all_documents: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "GuideEmbeddings | None":
        if batch.guide_queries is None or batch.guide_documents is None:
            return None
        queries, documents = batch.guide_queries.to(device), batch.guide_documents.to(device)
        return cls(queries, documents[:: batch.documents_per_query], gather(queries), gather(documents))


@dataclass(frozen=True)
class Negatives:
    """Who counts as a negative of whom in a batch, over all processes, on the device.

    Hashes of own queries [Q], of all queries [W·Q] and of all documents [C]; positives [Q], the row of each own query's
    positive among the candidates; all_other_positives [W·Q, any], further positives of all queries; guide, None without
    one. The margins are differences of cosines; a false_negative_margin of None leaves no candidate out.
    """

    queries: Tensor
    all_queries: Tensor
    all_documents: Tensor
    positives: Tensor
    all_other_positives: Tensor
    documents_per_query: int
    guide: GuideEmbeddings | None = None
    guide_margin: float = 0.0
    false_negative_margin: float | None = None

    @classmethod
    def of(
        cls,
        batch: Batch,
        device: torch.device,
        *,
        guide_margin: float = 0.0,
        false_negative_margin: float | None = None,
    ) -> "Negatives":
        """All processes call it, with as many queries each."""
        others = batch.other_positive_hashes
        q, r = len(batch.query_hashes), batch.documents_per_query
        own = torch.cat([batch.query_hashes, batch.document_hashes, torch.tensor([others.shape[1]])]).to(device)
        of_all = gather(own).view(-1, len(own))  # one exchange for all three: on a slow link each waits for its delay
        queries, documents, _ = own.split([q, q * r, 1])
        all_queries, all_documents, numbers_of_others = of_all.split([q, q * r, 1], dim=1)
        return cls(
            queries=queries,
            all_queries=all_queries.flatten(),
            all_documents=all_documents.flatten(),
            positives=positive_rows(q, r, world()[0], device),
            all_other_positives=_gather_ragged(others.to(device), documents[::r], int(numbers_of_others.max())),
            documents_per_query=r,
            guide=GuideEmbeddings.of(batch, device),
            guide_margin=guide_margin,
            false_negative_margin=false_negative_margin,
        )

    def duplicates(self, rows: slice) -> Tensor:
        """ignored [rows, C] by equal texts, of some of this process' queries."""
        return duplicates(
            self.queries[rows], self.all_queries, self.all_documents, self.positives[rows], self.documents_per_query,
            self.all_other_positives,
        )  # fmt: skip

    def ignored_documents(self, rows: slice, scores: Tensor, scale: float) -> Tensor:
        """ignored [rows, C]: documents that are no negatives of these queries, whose scores are scale · cosine."""
        positives, r = self.positives[rows], self.documents_per_query
        ignored = self.duplicates(rows)
        if self.guide is not None:
            ignored |= self._above_guide(self.guide.queries[rows], self.guide.all_documents, positives, r)
        if self.false_negative_margin is not None:
            ignored |= above_margin(scores, positives, r, scale * self.false_negative_margin)
        return ignored

    def ignored_queries(self, rows: slice, scores: Tensor, scale: float) -> Tensor:
        """ignored [rows, W·Q] of the other direction: queries of which these queries' positives are no negatives."""
        ignored = duplicate_queries(
            self.queries[rows], self.all_queries, self.all_documents, self.positives[rows], self.documents_per_query,
            self.all_other_positives,
        )  # fmt: skip
        own_rows = self.positives[rows] // self.documents_per_query
        if self.guide is not None:
            ignored |= self._above_guide(self.guide.positives[rows], self.guide.all_queries, own_rows, 1)
        if self.false_negative_margin is not None:
            ignored |= above_margin(scores, own_rows, 1, scale * self.false_negative_margin)
        return ignored

    def _above_guide(self, rows: Tensor, candidates: Tensor, positives: Tensor, documents_per_query: int) -> Tensor:
        """ignored [rows, C] by the guide's embeddings of rows and candidates.

        Texts that are equal to the guide score like the positive up to rounding, which depends on chunk and process;
        ROUNDING keeps such ties from being decided by it.
        """
        cosines = scaled_cosines(rows, candidates, 1.0)
        return above_margin(cosines, positives, documents_per_query, self.guide_margin - ROUNDING)


def _gather_ragged(columns: Tensor, filler: Tensor, most: int) -> Tensor:
    """[rows, any] of every process -> [W·rows, most]; filler [rows] fills the shorter ones."""
    if most == 0:
        return columns.new_zeros(world()[1] * len(columns), 0)
    filling = filler[:, None].expand(-1, most - columns.shape[1])
    return gather(torch.cat([columns, filling], dim=1))
