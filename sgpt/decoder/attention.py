"""Attention that knows where one text of a pack ends and the next begins, for Hugging Face's own modules.

`prepare` gives a trunk this attention. Outside of `packed` it is scaled-dot-product attention over padded rows, as
transformers calls it; inside, the one row that it is given holds the tokens of many texts (sgpt/decoder/packing.py), and each
block of equally long texts is attended to by itself: no padding, no [N, N] mask. On a GPU in half precision one kernel takes
all texts (sgpt/decoder/varlen.py).

Most families have an attention interface, in which ours is registered. GPT-Neo, GPT-J and BLOOM have none, compute the
[rows, heads, T, T] scores eagerly and keep them for the backward pass: their attention methods are replaced; projections,
parameters and checkpoints stay as they are. Kept exactly: GPT-Neo's local layers see the last `window_size` positions and
its scores are not divided by sqrt(head size); BLOOM's ALiBi adds slope · position to the scores.

For scoring (sgpt/decoder/continuation.py) the texts of a pack may also go on from a `Past`, whose keys and values they read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from itertools import accumulate
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu, build_alibi_tensor, dropout_add
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention

from sgpt.decoder import varlen
from sgpt.decoder.families import PACKED_FAMILIES
from sgpt.decoder.packing import Pack, Past

NAME = "sgpt"  # of our attention in transformers' tables
_PACK: ContextVar["_Borders | None"] = ContextVar("pack", default=None)
Layers = list[tuple[Tensor, Tensor]]  # of every layer, keys and values [heads, N, head size]


class _Borders:
    """Of the pack that is being computed, and the masks that its layers share."""

    def __init__(self, pack: Pack, past: Past | None = None, kept: Layers | None = None) -> None:
        self.blocks, self.masks = pack.blocks, {}
        self.position_ids, self.past, self.kept = pack.position_ids, past, kept
        self.layer = 0  # attentions are called in the order of the layers

    @cached_property
    def ends(self) -> Tensor:
        """int32 [texts + 1], on the device: 0, and where each text of the pack ends."""
        lengths = [length for number, length in self.blocks for _ in range(number)]
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(self.position_ids.device, non_blocking=True)

    @property
    def continues(self) -> bool:
        return self.past is not None or self.kept is not None


@contextmanager
def packed(pack: Pack, past: Past | None = None, kept: Layers | None = None) -> Iterator[None]:
    """Inside, a prepared trunk takes the pack's tokens as one row [1, N].

    Without gradient or dropout: `past` is what its texts go on from, and `kept` is given the keys and values of every layer.
    """
    token = _PACK.set(_Borders(pack, past, kept))
    try:
        yield
    finally:
        _PACK.reset(token)


def prepare(trunk: nn.Module) -> nn.Module:
    """Gives every attention of `trunk` ours, if it is of a packed family, and every tanh-GELU its fused kernel, in place; returns the trunk."""
    if trunk.config.model_type in PACKED_FAMILIES:  # another one may add its mask to the scores, and ours is boolean
        trunk.config._attn_implementation = NAME
    for module in trunk.modules():
        if isinstance(module, GPTNeoSelfAttention):
            module._attn = MethodType(_gpt_neo_attention, module)
        elif isinstance(module, GPTJAttention):
            module._attn = MethodType(_gpt_j_attention, module)
        elif isinstance(module, BloomAttention):
            module.forward = MethodType(_bloom_attention, module)
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, FastGELUActivation, BloomGelu)):
                setattr(module, name, GELUTanh())  # the same function; theirs is eight operations that keep seven tensors
    return trunk


def _interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """transformers' attention interface: [rows, heads, T, head size] in, [rows, T, heads, head size] out."""
    borders = _PACK.get()
    if borders is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = options.get("is_causal")
    attended = _by_blocks(
        query, key, value, borders, scale=options.get("scaling"), dropout=options.get("dropout", 0.0), window=options.get("sliding_window"),
        causal=getattr(module, "is_causal", True) if causal is None else causal,
    )  # fmt: skip
    return attended.transpose(1, 2), None


def _mask(*arguments, **options) -> Tensor | None:
    return None if _PACK.get() else sdpa_mask(*arguments, **options)


AttentionInterface.register(NAME, _interface)
AttentionMaskInterface.register(NAME, _mask)


def _gpt_neo_attention(self: GPTNeoSelfAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
    """query, key, value [rows, heads, T, head size]; attention_mask [rows, 1, T, T] boolean, True where it may look, or None."""
    window = self.config.window_size if self.attention_type == "local" else None
    dropout = self.attn_dropout.p if self.training else 0.0
    if borders := _PACK.get():
        return _by_blocks(query, key, value, borders, scale=1.0, dropout=dropout, window=window), None
    queries, keys = query.shape[-2], key.shape[-2]
    if window and window < keys:  # within the window a local layer is an ordinary causal one
        seen = self.bias[:, :, keys - queries : keys, :keys]
        attention_mask = seen if attention_mask is None else attention_mask & seen
    return _attend(query, key, value, attention_mask, scale=1.0, dropout=dropout), None


def _gpt_j_attention(self: GPTJAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None):
    """As above; rotary embedding was applied by the caller, which may hand on float32 queries and keys."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    dropout = self.attn_dropout.p if self.training else 0.0
    if borders := _PACK.get():
        return _by_blocks(query, key, value, borders, dropout=dropout), None
    return _attend(query, key, value, attention_mask, dropout=dropout), None


def _bloom_attention(self: BloomAttention, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Tensor | None, **ignored):
    """hidden_states [rows, T, D]; alibi [rows·heads, 1, T], slope · position; attention_mask as above."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    dropout = self.attention_dropout.p if self.training else 0.0
    if borders := _PACK.get():
        slopes = build_alibi_tensor(torch.ones(1, 2, device=query.device), self.num_heads, torch.float32)[:, :, 1:]
        attended = _by_blocks(query, key, value, borders, dropout=dropout, slopes=slopes)
    else:
        allowed = _causal_mask(query.shape[2], query.device) if attention_mask is None else attention_mask
        bias = alibi.view(len(hidden_states), self.num_heads, 1, -1).to(query.dtype).masked_fill(~allowed, float("-inf"))
        attended = _attend(query, key, value, bias, dropout=dropout)
    merged = attended.transpose(1, 2).flatten(2)
    return dropout_add(self.dense(merged), residual, self.hidden_dropout, self.training), None


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, borders: _Borders, *,
    scale: float | None = None, dropout: float = 0.0, window: int | None = None, slopes: Tensor | None = None, causal: bool = True,
) -> Tensor:  # fmt: skip
    """query, key, value [1, heads, N, head size], with fewer heads of keys and values allowed; slopes [heads, 1, 1]; as query out."""
    device = query.device.type
    if device in varlen.DEVICES and torch.is_autocast_enabled(device):  # as torch's own attention would: rotary embedding gives float32
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    if borders.continues:
        return _continued(query, key, value, borders, scale, window, slopes)
    if slopes is None and varlen.takes(query, dropout):
        tokens_first = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        attended = varlen.attend(*tokens_first, borders.ends, borders.blocks[0][1], scale=scale, window=window, causal=causal)
        return attended.transpose(0, 1)[None]
    return _Blocks.apply(query, key, value, borders, scale, dropout, window, slopes, causal)


class _Blocks(torch.autograd.Function):
    """Attention of each block as a small graph of its own, whose results are written straight to their places.

    Autograd over slices of query, key and value would fill and add a whole [N, heads, head size] for every block.
    """

    @staticmethod
    def forward(ctx, query, key, value, borders: _Borders, scale, dropout, window, slopes, causal) -> Tensor:
        keep = any(ctx.needs_input_grad[:3])
        attended = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)  # tokens first, as the projections have it
        ctx.graphs = []
        for start, (number, length) in zip(_starts(borders.blocks), borders.blocks, strict=True):
            leaves = [_block(tensor, start, number, length).detach().requires_grad_(keep) for tensor in (query, key, value)]
            with torch.set_grad_enabled(keep):
                mask = _block_mask(borders, length, window, slopes, causal, query)
                block = _attend(*_alike(*leaves), mask, scale=scale, dropout=dropout, causal=causal)
            _block(attended, start, number, length).copy_(block.detach())
            if keep:
                ctx.graphs.append((start, number, length, leaves, block))
        return attended

    @staticmethod
    def backward(ctx, gradient: Tensor):
        given: list[Tensor | None] = [None, None, None]
        wanted = [place for place in range(3) if ctx.needs_input_grad[place]]
        for start, number, length, leaves, block in ctx.graphs:
            parts = torch.autograd.grad(block, [leaves[place] for place in wanted], _block(gradient, start, number, length))
            for place, part in zip(wanted, parts, strict=True):
                if given[place] is None:
                    shape = (1, gradient.shape[2], part.shape[1], part.shape[3])
                    given[place] = part.new_empty(shape).transpose(1, 2)
                _block(given[place], start, number, length).copy_(part)
        ctx.graphs = None
        return (*given, None, None, None, None, None, None)


def _continued(query: Tensor, key: Tensor, value: Tensor, borders: _Borders, scale: float | None, window: int | None, slopes: Tensor | None) -> Tensor:
    """As `_by_blocks`, causal and without gradient, for texts with a past."""
    layer, borders.layer = borders.layer, borders.layer + 1
    if borders.kept is not None:
        borders.kept.append((key[0].contiguous(), value[0].contiguous()))
    attended = torch.empty_like(query)
    for place, (start, (number, length)) in enumerate(zip(_starts(borders.blocks), borders.blocks, strict=True)):
        queries, keys, values = (_block(tensor, start, number, length) for tensor in (query, key, value))
        if borders.past is not None:
            old_keys, old_values = borders.past.of(layer, place)
            keys = torch.cat([old_keys.expand(number, -1, -1, -1), keys], 2)
            values = torch.cat([old_values.expand(number, -1, -1, -1), values], 2)
        mask = _continued_mask(borders, place, start, length, keys.shape[2], window, slopes)
        _block(attended, start, number, length).copy_(_attend(*_alike(queries, keys, values), mask, scale=scale))
    return attended


def _continued_mask(borders: _Borders, place: int, start: int, length: int, keys: int, window: int | None, slopes: Tensor | None) -> Tensor | None:
    """As `_block_mask`, [T, keys]: a token sees its past and what stands before it in its own row."""
    rows = None if borders.past is None else borders.past.rows
    if keys == length and slopes is None and (window is None or window >= length):
        return None
    shared = (length, keys) if rows is None else place  # blocks of one shape look alike
    key = (shared, window, slopes is not None)
    if key not in borders.masks:
        positions = borders.position_ids[start : start + length]
        seen = torch.cat([torch.arange(keys - length, device=positions.device), positions])
        allowed = seen[None] <= positions[:, None]
        if window is not None:
            allowed &= positions[:, None] - seen[None] < window
        if rows is not None:
            own = rows[start : start + length]
            allowed[:, keys - length :] &= own[:, None] == own[None]
        borders.masks[key] = allowed if slopes is None else (slopes * seen).expand(-1, length, -1).masked_fill(~allowed, float("-inf"))
    return borders.masks[key]


def _starts(blocks: tuple[tuple[int, int], ...]) -> list[int]:
    starts = [0]
    for number, length in blocks[:-1]:
        starts.append(starts[-1] + number * length)
    return starts


def _block(packed_heads: Tensor, start: int, number: int, length: int) -> Tensor:
    """View [number, heads, length, head size] of [1, heads, N, head size]."""
    return packed_heads[0, :, start : start + number * length].unflatten(1, (number, length)).transpose(0, 1)


def _block_mask(borders: _Borders, length: int, window: int | None, slopes: Tensor | None, causal: bool, like: Tensor) -> Tensor | None:
    """None where causality (or nothing) says it all; else boolean [T, T] for a window or floating [heads, T, T] for ALiBi."""
    if slopes is None and (window is None or window >= length):
        return None
    key = (length, window, slopes is not None)
    if key not in borders.masks:
        if slopes is not None:
            bias = (slopes * torch.arange(length, device=like.device)).expand(-1, length, -1).to(_wide(like).dtype)
            borders.masks[key] = bias.masked_fill(~_causal_mask(length, like.device), float("-inf"))
        else:
            allowed = _causal_mask(length, like.device) if causal else torch.ones(length, length, dtype=torch.bool, device=like.device)
            borders.masks[key] = allowed.triu(1 - window)
    return borders.masks[key]


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each head of keys and values as often as heads of queries share it."""
    times = query.shape[1] // key.shape[1]
    return (query, key, value) if times == 1 else (query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None = None, dropout: float = 0.0, causal: bool = True) -> Tensor:
    causal = causal and mask is None and query.shape[-2] > 1
    wide = [_wide(tensor) for tensor in (query, key, value)]
    return scaled_dot_product_attention(*wide, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale).to(query.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """On a CPU in float32: the bfloat16 kernel's backward pass is several times slower than casting."""
    return tensor.float() if tensor.device.type == "cpu" and tensor.dtype.itemsize < 4 else tensor
