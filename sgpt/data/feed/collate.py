"""Examples to token ids: marked, truncated, query-major."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgpt.data.feed.embeddings import Embeddings
from sgpt.data.feed.example import Example
from sgpt.data.feed.store import Examples, Tokens
from sgpt.text.markers import Frame, Role
from sgpt.text.tokens import TokenLists


@dataclass(frozen=True)
class Batch:
    """Q examples of one process. documents are query-major: query i's positive is row i·R, its hard negatives follow.

    The hashes [Q] and [Q·R] are int64 of the texts, by which equal texts are known over all processes;
    other_positive_hashes [Q, any] those of further positives, which are no negatives (the positive's own where there
    are fewer). guide_queries [Q, G], guide_documents [Q·R, G]: embeddings of length 1 by a frozen guide, None without
    one.
    """

    queries: TokenLists
    documents: TokenLists
    query_hashes: Tensor
    document_hashes: Tensor
    other_positive_hashes: Tensor
    guide_queries: Tensor | None = None
    guide_documents: Tensor | None = None

    @property
    def documents_per_query(self) -> int:
        return len(self.documents) // len(self.queries)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.queries)) + sum(map(len, self.documents))


class DrawnExample(NamedTuple):
    """One example of a batch, its texts by their numbers in `examples`, with the markers and the guide of its source.

    documents: the positive, then the H hard negatives.
    """

    examples: Examples
    tokens: Tokens
    frames: dict[Role, Frame]
    query: int
    documents: tuple[int, ...]
    other_positives: tuple[int, ...]
    guide: dict[Role, Embeddings] | None = None


def make_batch(draws: Sequence[DrawnExample]) -> Batch:
    """Token ids, hashes and the guide's embeddings of these examples."""
    most = max(len(draw.other_positives) for draw in draws)
    queries, documents, query_hashes, document_hashes, other_hashes = [], [], [], [], []
    for draw in draws:
        hashes = draw.examples.hashes
        queries.append(draw.frames["query"].put_around(draw.tokens[draw.query]))
        documents += [draw.frames["document"].put_around(draw.tokens[text]) for text in draw.documents]
        query_hashes.append(hashes[draw.query])
        document_hashes += [hashes[text] for text in draw.documents]
        missing = most - len(draw.other_positives)
        others = [*draw.other_positives, *[draw.documents[0]] * missing]
        other_hashes.append([hashes[text] for text in others])
    guide_queries, guide_documents = _guide_embeddings(draws)
    return Batch(
        queries,
        documents,
        torch.tensor(query_hashes),
        torch.tensor(document_hashes),
        torch.tensor(other_hashes).view(len(draws), most).long(),  # where most = 0 torch takes it for float
        guide_queries,
        guide_documents,
    )


def _guide_embeddings(draws: Sequence[DrawnExample]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Of queries [Q, G] and of documents [Q·R, G]; None where a source has no guide."""
    queries, documents = [], []
    for draw in draws:
        if draw.guide is None:
            return None, None
        queries.append(draw.guide["query"][draw.query])
        documents += [draw.guide["document"][text] for text in draw.documents]
    return torch.from_numpy(np.stack(queries)), torch.from_numpy(np.stack(documents))


def collate(examples: Sequence[Example], tokenizer, frames: dict[Role, Frame]) -> Batch:
    """A batch of strings, for tests and benchmarks: the first positive and all hard negatives of each. A run calls
    `make_batch`.
    """
    kept = Examples.of(examples)
    tokens = Tokens(kept, tokenizer, max(frame.content_tokens for frame in frames.values()))
    draws = []
    for query, positives, hard_negatives in zip(kept.queries, kept.positives, kept.hard_negatives, strict=True):
        documents = (positives[0], *hard_negatives)
        draws.append(DrawnExample(kept, tokens, frames, query, documents, tuple(positives[1:])))
    return make_batch(draws)
