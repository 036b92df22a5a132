"""Texts of any lengths as one run of tokens, so that no padding is computed.

On real text a batch padded to its longest row is two to three times its real tokens. A linear layer, a norm or an
activation does not care where one text ends, so a trunk runs over the tokens of many texts laid end to end; attention
alone must know where texts end, and rows of equal length are next to each other, so that it sees them as one dense
block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from sgpt.text.tokens import TokenLists

TOKENS_ON_CPU = 2048  # more is no faster, and takes more memory
TOKENS_ON_GPU = 65_536  # at most: with more, torch's layer norm has no gradient for a bias alone (pytorch#193016)
SMALL_PACK = 512  # positions, padding included, up to which another pass would cost more than any row's padding
BLOCK_PRODUCTS = 1e12  # multiplications in a block's weights: some ms of a GPU, more than it takes to start its kernels
HALF_BYTES, WIDE_BYTES = 70, 170  # that a token keeps in a block for each of D, at most: Gemma's, by LoRA
SHARE_OF_GPU = 0.4  # of its memory, which the activations of a pack may take
PADDED_AT_MOST = 8  # positions for each token


@dataclass(frozen=True)
class Pack:
    """Some rows of a batch laid end to end, longest first. N tokens in all.

    rows: their indices in the batch. blocks: (number of rows, tokens of each) of every run of equally long rows, in
    order. input_ids, position_ids: [N]; positions count from 0 in every row.
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
        """input_ids and attention_mask [rows, T], padded on the right, for trunks that do not take packs."""
        ids, mask = self.pad(self.input_ids)
        return ids.masked_fill(mask == 0, pad_id), mask

    def pad(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[N, …] -> [rows, T, …] with zeros on the right, and attention_mask [rows, T]; in few operations, whatever
        the lengths.
        """
        shape = len(self.rows), self.blocks[0][1]
        places = ((self.position_ids == 0).cumsum(0) - 1) * shape[1] + self.position_ids
        rows = tokens.new_zeros(math.prod(shape), *tokens.shape[1:]).index_copy_(0, places, tokens)
        mask = places.new_zeros(math.prod(shape)).index_fill_(0, places, 1)
        return rows.unflatten(0, shape), mask.unflatten(0, shape)

    def to(self, device: torch.device | str) -> "Pack":
        input_ids = self.input_ids.to(device, non_blocking=True)
        position_ids = self.position_ids.to(device, non_blocking=True)
        return Pack(self.rows, self.blocks, input_ids, position_ids)


@dataclass(frozen=True)
class PrefixCache:
    """A KV cache of M tokens that were computed before, which the texts of a pack follow.

    layers: of each layer keys and values [heads, M, head size]. spans: of each block of the pack, the slices of the M
    tokens that stand before it, together at positions 0, 1, …. texts: where the one row of a block holds several texts,
    their lengths, of each block; tokens of different texts do not see each other.
    """

    layers: list[tuple[Tensor, Tensor]]
    spans: list[tuple[slice, ...]]
    texts: list[list[int]] | None = None

    def __len__(self) -> int:
        """M, tokens."""
        return self.layers[0][0].shape[1]

    def of(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, tokens, head size] that stand before a block."""
        keys, values = self.layers[layer]
        spans = self.spans[block]
        before = torch.cat([keys[:, span] for span in spans], 1)
        return before, torch.cat([values[:, span] for span in spans], 1)


def packs(rows: TokenLists, tokens_per_pack: int, *, padded: bool = False) -> Iterator[Pack]:
    """Every row with a token is in exactly one pack of at most `tokens_per_pack` tokens (one row, if that alone is
    longer).

    padded: they will be padded, so count that, and let no pack hold rows much shorter than its longest.
    """
    members: list[int] = []
    tokens = longest = 0
    small = max(SMALL_PACK, tokens_per_pack // 8)
    with_tokens = [row for row in range(len(rows)) if rows[row]]
    for row in sorted(with_tokens, key=lambda row: -len(rows[row])):
        length = len(rows[row])
        size = longest * (len(members) + 1) if padded else tokens + length
        full = size > tokens_per_pack
        # padding of a fifth is accepted, and more in small packs
        unlike = padded and length < 0.8 * longest and longest * len(members) >= small
        if members and (full or unlike):
            yield _pack(rows, members)
            members, tokens = [], 0
        longest = length if not members else longest
        members.append(row)
        tokens += length
    if members:
        yield _pack(rows, members)


def fitting_tokens(trunk: nn.Module, device: torch.device, on_cpu: int = TOKENS_ON_CPU) -> int:
    """Tokens of a pack where nobody has stated them: on a GPU so many that it is busy for longer than its kernels take
    to start, and within SHARE_OF_GPU of its memory.
    """
    if device.type != "cuda":
        return on_cpu
    width, half = trunk.config.hidden_size, trunk.get_input_embeddings().weight.dtype.itemsize < 4
    busy = BLOCK_PRODUCTS / (12 * width**2)  # 4 D² of attention's weights and 8 D² of the MLP's
    memory = SHARE_OF_GPU * torch.cuda.get_device_properties(device).total_memory
    fitting = memory / ((HALF_BYTES if half else WIDE_BYTES) * width * trunk.config.num_hidden_layers)
    return max(on_cpu, min(TOKENS_ON_GPU, int(busy), int(fitting)))


def distinct(rows: TokenLists) -> tuple[TokenLists, list[int]]:
    """The different rows, and for each given row its index among them: equal texts are computed once."""
    numbers: dict[tuple[int, ...], int] = {}
    indices = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    return [list(row) for row in numbers], indices


def _pack(rows: TokenLists, members: list[int]) -> Pack:
    """members: indices of rows, longest first."""
    lengths = [len(rows[row]) for row in members]
    blocks = tuple((sum(1 for _ in equal), length) for length, equal in groupby(lengths))
    input_ids = torch.tensor([token for row in members for token in rows[row]])
    position_ids = torch.cat([torch.arange(length).repeat(number) for number, length in blocks])
    return Pack(members, blocks, input_ids, position_ids)
