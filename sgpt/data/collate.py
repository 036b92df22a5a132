"""Examples to token ids: marked, truncated, query-major, and cut into right-padded groups of like length."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgpt.data.example import Example
from sgpt.markers import Frame, Role

Rows = list[list[int]]  # token ids of one text each, ragged
ALIKE = 0.8  # of the longest row's length


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


@dataclass(frozen=True)
class Group:
    """Rows of like length, right-padded: `rows` are their places in the batch, tensors [len(rows), T]."""

    rows: list[int]
    input_ids: Tensor
    attention_mask: Tensor


def length_groups(rows: Rows, pad_id: int, tokens_per_group: int) -> Iterator[Group]:
    """Longest first, each group at most `tokens_per_group` positions (or one row). Every row is in exactly one group.

    On text a batch padded to its longest row is two to three times its real tokens. A group ends, too, at a row much shorter
    than its longest, unless it is still so small that computing one more group would cost more than the padding.
    """
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    start = 0
    while start < len(order):
        width = max(1, len(rows[order[start]]))
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * width <= tokens_per_group:
            if len(rows[order[stop]]) < ALIKE * width and (stop - start) * width >= tokens_per_group // 8:
                break
            stop += 1
        members = order[start:stop]
        input_ids = torch.full((len(members), width), pad_id)
        attention_mask = torch.zeros(len(members), width, dtype=torch.long)
        for line, row in enumerate(members):
            length = len(rows[row])
            input_ids[line, :length] = torch.tensor(rows[row], dtype=torch.long)
            attention_mask[line, :length] = 1
        yield Group(members, input_ids, attention_mask)
        start = stop


def padding_share(rows: Rows, tokens_per_group: int) -> float:
    """Share of computed positions that are padding, 0 to 1."""
    groups = list(length_groups(rows, 0, tokens_per_group))
    positions = sum(group.input_ids.numel() for group in groups)
    return 1 - sum(map(len, rows)) / max(1, positions)
