"""Texts of any lengths as one run of tokens, so that no padding is computed.

On real text a batch padded to its longest row is two to three times its real tokens. A linear layer, a norm or an
activation does not care where one text ends, so a trunk runs over the tokens of many texts laid end to end; attention
alone must know the borders, and rows of equal length stand together, so that it sees them as one dense block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sgpt.text.tokens import Rows


@dataclass(frozen=True)
class Pack:
    """Some rows of a batch laid end to end, longest first. N tokens in all.

    rows: their places in the batch. blocks: (number of rows, tokens of each) of every run of equally long rows, in order.
    input_ids, position_ids: [N]; positions count from 0 in every row.
    """

    rows: list[int]
    blocks: tuple[tuple[int, int], ...]
    input_ids: Tensor
    position_ids: Tensor

    def __len__(self) -> int:
        """N, tokens."""
        return len(self.input_ids)

    @property
    def padded_tokens(self) -> int:
        """Positions that its rows take when padded to the longest."""
        return len(self.rows) * self.blocks[0][1]

    def split(self, tokens: Tensor) -> list[Tensor]:
        """[N, …] -> of each block [rows, T, …]; views."""
        parts = tokens.split([number * length for number, length in self.blocks])
        return [part.unflatten(0, block) for part, block in zip(parts, self.blocks, strict=True)]

    def padded(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [rows, T], padded on the right, for trunks that cannot be told the borders."""
        ids = [row for block in self.split(self.input_ids) for row in block]
        masks = [torch.ones_like(row) for row in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(ids, batch_first=True, padding_value=pad_id), pad(masks, batch_first=True)

    def to(self, device: torch.device | str) -> "Pack":
        return Pack(self.rows, self.blocks, self.input_ids.to(device, non_blocking=True), self.position_ids.to(device, non_blocking=True))


@dataclass(frozen=True)
class Past:
    """What the texts of a pack go on from: the keys and values of M tokens that were computed before.

    layers: of each layer keys and values [heads, M, head size]. spans: of each block of the pack, the slices of the M tokens
    that stand before it, together at positions 0, 1, …. rows [N]: where a block of one row holds several texts, which one a
    token belongs to; tokens of different texts do not see each other.
    """

    layers: list[tuple[Tensor, Tensor]]
    spans: list[tuple[slice, ...]]
    rows: Tensor | None = None

    def of(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, tokens, head size] that stand before a block."""
        keys, values = self.layers[layer]
        return (torch.cat([keys[:, span] for span in self.spans[block]], 1), torch.cat([values[:, span] for span in self.spans[block]], 1))


def packs(rows: Rows, tokens_per_pack: int, *, padded: bool = False) -> Iterator[Pack]:
    """Every row with a token is in exactly one pack of at most `tokens_per_pack` tokens (one row, if that alone is longer).

    padded: they will be padded, so count that, and let no pack hold rows much shorter than its longest.
    """
    chosen: list[int] = []
    tokens = longest = 0
    for row in sorted((row for row in range(len(rows)) if rows[row]), key=lambda row: -len(rows[row])):
        length = len(rows[row])
        full = longest * (len(chosen) + 1) > tokens_per_pack if padded else tokens + length > tokens_per_pack
        unlike = padded and length < 0.8 * longest and longest * len(chosen) >= tokens_per_pack // 8
        if chosen and (full or unlike):
            yield _pack(rows, chosen)
            chosen, tokens = [], 0
        longest = length if not chosen else longest
        chosen.append(row)
        tokens += length
    if chosen:
        yield _pack(rows, chosen)


def distinct(rows: Rows) -> tuple[Rows, list[int]]:
    """The different rows, and for each given row its place among them: equal texts are computed once."""
    places: dict[tuple[int, ...], int] = {}
    numbers = [places.setdefault(tuple(row), len(places)) for row in rows]
    return [list(row) for row in places], numbers


def _pack(rows: Rows, chosen: list[int]) -> Pack:
    blocks = tuple((sum(1 for _ in equal), length) for length, equal in groupby(len(rows[row]) for row in chosen))
    return Pack(
        chosen, blocks,
        torch.tensor([token for row in chosen for token in rows[row]]),
        torch.cat([torch.arange(length).repeat(number) for number, length in blocks]),
    )
