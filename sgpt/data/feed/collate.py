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
from sgpt.text.tokens import Rows


@dataclass(frozen=True)
class Batch:
    """Q examples of one process. documents are query-major: query i's positive is row i·R, its hard negatives follow.

    The hashes [Q] and [Q·R] are int64 of the texts, by which equal texts are known over all processes;
    other_positive_hashes [Q, any] those of further positives, which are no negatives (the positive's own where there are fewer).
    guide_queries [Q, G], guide_documents [Q·R, G]: embeddings of length 1 by a frozen guide, None without one.
    """

    queries: Rows
    documents: Rows
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


class Drawn(NamedTuple):
    """One example of a batch, as numbers of texts of `examples`, with the frames and the guide's embeddings of its source."""

    examples: Examples
    tokens: Tokens
    frames: dict[Role, Frame]
    query: int
    documents: tuple[int, ...]
    other_positives: tuple[int, ...]
    guide: dict[Role, Embeddings] | None = None


def batch_of(drawn: Sequence[Drawn]) -> Batch:
    most = max(len(one.other_positives) for one in drawn)
    guided = all(one.guide is not None for one in drawn)
    return Batch(
        [one.frames["query"].put_around(one.tokens[one.query]) for one in drawn],
        [one.frames["document"].put_around(one.tokens[text]) for one in drawn for text in one.documents],
        torch.tensor([one.examples.hashes[one.query] for one in drawn]),
        torch.tensor([one.examples.hashes[text] for one in drawn for text in one.documents]),
        torch.tensor([
            [one.examples.hashes[text] for text in (*one.other_positives, *(one.documents[0] for _ in range(most - len(one.other_positives))))]
            for one in drawn
        ]).view(len(drawn), most).long(),
        torch.from_numpy(np.stack([one.guide["query"][one.query] for one in drawn])) if guided else None,
        torch.from_numpy(np.stack([one.guide["document"][text] for one in drawn for text in one.documents])) if guided else None,
    )  # fmt: skip


def collate(examples: Sequence[Example], tokenizer, frames: dict[Role, Frame]) -> Batch:
    """A batch of strings: the first positive and all hard negatives of each."""
    kept = Examples.of(examples)
    tokens = Tokens(kept, tokenizer, max(frame.content_tokens for frame in frames.values()))
    return batch_of([
        Drawn(kept, tokens, frames, kept.queries[row], (kept.positives[row][0], *kept.hard_negatives[row]), tuple(kept.positives[row][1:]))
        for row in range(len(kept))
    ])  # fmt: skip
