"""Examples to token ids: marked, truncated, query-major."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgpt.data.example import Example
from sgpt.markers import Frame, Role
from sgpt.packing import Rows


@dataclass(frozen=True)
class Batch:
    """Q examples of one process. documents are query-major: query i's positive is row i·R, its hard negatives follow.

    The hashes [Q] and [Q·R] are int64 of the texts, by which equal texts are known over all processes.
    """

    queries: Rows
    documents: Rows
    query_hashes: Tensor
    document_hashes: Tensor

    @property
    def documents_per_query(self) -> int:
        return len(self.documents) // len(self.queries)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.queries)) + sum(map(len, self.documents))


def collate(examples: Sequence[Example], tokenizer, frames: dict[Role, Frame]) -> Batch:
    queries = [example.query for example in examples]
    documents = [text for example in examples for text in (example.positive, *example.hard_negatives)]
    return Batch(
        marked(queries, tokenizer, frames["query"]), marked(documents, tokenizer, frames["document"]),
        hashes(queries), hashes(documents),
    )


def marked(texts: Sequence[str], tokenizer, frame: Frame) -> Rows:
    """Token ids in their frame. The content is tokenised alone: nothing can merge with a marker."""
    return [frame.put_around(ids) for ids in content_ids(texts, tokenizer)]


def content_ids(texts: Sequence[str], tokenizer) -> Rows:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"] if texts else []


def hashes(texts: Sequence[str]) -> Tensor:
    """[rows] int64."""
    return torch.tensor([int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True) for text in texts])
