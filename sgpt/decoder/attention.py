"""Attention that knows where one text of a pack ends and the next begins, for Hugging Face's own modules.

`prepare` gives a trunk this attention. Outside of `packed` it is scaled-dot-product attention over padded rows, as
transformers calls it; inside, the one row that it is given holds the tokens of many texts (sgpt/decoder/packing.py),
and each block of equally long texts is attended to by itself: no padding, no [N, N] mask. On a GPU in half precision
one kernel takes all texts (sgpt/decoder/varlen.py).

Most families have an attention interface, in which ours is registered. GPT-Neo, GPT-J and BLOOM have none, compute the
[rows, heads, T, T] scores eagerly and keep them for the backward pass: their attention methods are replaced;
projections, parameters and checkpoints stay as they are. Kept exactly: GPT-Neo's local layers see the last
`window_size` positions and its scores are not divided by sqrt(head size); BLOOM's ALiBi adds slope · position to the
scores.

For scoring (sgpt/decoder/continuation.py) the texts of a pack may also follow a `PrefixCache`, whose keys and values
they read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import MethodType

import numpy as np
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

from sgpt.decoder import int8, varlen
from sgpt.decoder.families import family_of
from sgpt.decoder.fused import fuse
from sgpt.decoder.packing import Pack, PrefixCache

NAME = "sgpt"  # of our attention in transformers' tables
_PACK: ContextVar["PackContext | None"] = ContextVar("pack", default=None)
SHORT = 128  # tokens of a text whose scores are kept for the backward pass: T numbers for each token and head
FITTING = 384  # tokens of a text whose scores, without a backward pass, stay in a core's cache until they are dropped
FAST_BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
Layers = list[tuple[Tensor, Tensor]]  # of every layer, keys and values [heads, N, head size]


@dataclass(frozen=True)
class Reading:
    """The keys and values that each text of a pack reads, for one kernel over all texts.

    places: int64 [K], text after text, among the tokens of the prefix with the pack's behind them. ends: int32
    [texts + 1], on the device: 0, and where each text's end in `places`. longest: of the text with the most.
    """

    places: Tensor
    ends: Tensor
    longest: int


class PackContext:
    """The pack that is being computed, and the masks that its layers share."""

    def __init__(self, pack: Pack, prefix: PrefixCache | None = None, kept: Layers | None = None) -> None:
        self.blocks = pack.blocks
        self.position_ids = pack.position_ids
        self.prefix = prefix
        self.kept = kept
        self.layer = 0  # attentions are called in the order of the layers
        self.masks: dict[tuple, Tensor] = {}

    @property
    def texts(self) -> list[list[int]]:
        """The lengths of the texts of each block."""
        if self.prefix is not None and self.prefix.texts is not None:
            return self.prefix.texts
        return [[length] * number for number, length in self.blocks]

    @cached_property
    def ends(self) -> Tensor:
        """int32 [texts + 1], on the device: 0, and where each text of the pack ends."""
        return self._ends([length for texts in self.texts for length in texts])

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(max(texts) for texts in self.texts)

    @cached_property
    def starts(self) -> list[int]:
        """Where each block begins in the pack, in tokens."""
        sizes = [number * length for number, length in self.blocks]
        return [0, *accumulate(sizes)][:-1]

    @cached_property
    def text_of_token(self) -> Tensor:
        """int64 [N]: which text a token belongs to."""
        lengths = self.ends.diff()
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    @cached_property
    def reading(self) -> Reading | None:
        """Of a pack behind a prefix; None where texts read themselves alone."""
        if self.prefix is None:
            return None
        places, lengths = [], []
        start = len(self.prefix)  # the pack's tokens are joined to the prefix's
        for spans, texts in zip(self.prefix.spans, self.texts, strict=True):
            before = np.concatenate([np.arange(span.start, span.stop) for span in spans])
            for length in texts:
                places += [before, np.arange(start, start + length)]
                lengths.append(len(before) + length)
                start += length
        joined = torch.from_numpy(np.concatenate(places)).to(self.position_ids.device)
        return Reading(joined, self._ends(lengths), max(lengths))

    def _ends(self, lengths: list[int]) -> Tensor:
        """int32 [texts + 1], on the device: 0, and where each text ends."""
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return ends.to(self.position_ids.device, non_blocking=True)

    @property
    def caches(self) -> bool:
        """Whether keys and values of a cache are read, or kept for one."""
        return self.prefix is not None or self.kept is not None


@contextmanager
def packed(pack: Pack, prefix: PrefixCache | None = None, kept: Layers | None = None) -> Iterator[None]:
    """Inside, a prepared trunk takes the pack's tokens as one row [1, N].

    Without gradient or dropout: `prefix` is what its texts follow, and `kept` is given the keys and values of every
    layer.
    """
    token = _PACK.set(PackContext(pack, prefix, kept))
    try:
        yield
    finally:
        _PACK.reset(token)


def prepare(trunk: nn.Module) -> nn.Module:
    """Gives a trunk of a packed family our attention, and every trunk its fused operations, in place; returns it."""
    if family_of(trunk.config.model_type).packed:  # another one may add its mask to the scores, and ours is boolean
        trunk.config._attn_implementation = NAME
    fuse(trunk)
    # of the process: cuDNN makes a plan for each shape of attention, and texts have hundreds; 6 times slower on an H200
    torch.backends.cuda.enable_cudnn_sdp(False)
    for module in trunk.modules():
        if isinstance(module, GPTNeoSelfAttention):
            module._attn = MethodType(_gpt_neo_attention, module)
        elif isinstance(module, GPTJAttention):
            module._attn = MethodType(_gpt_j_attention, module)
        elif isinstance(module, BloomAttention):
            module.forward = MethodType(_bloom_attention, module)
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, FastGELUActivation, BloomGelu)):
                # the same function; theirs is eight operations that keep seven tensors for the backward pass
                setattr(module, name, GELUTanh())
    return trunk


def _interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """transformers' attention interface: [rows, heads, T, head size] in, [rows, T, heads, head size] out."""
    context = _PACK.get()
    if context is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    attended = _by_blocks(
        query, key, value, context, scale=options.get("scaling"), dropout=options.get("dropout", 0.0),
        window=options.get("sliding_window"), causal=causal,
    )  # fmt: skip
    return attended.transpose(1, 2), None


def _mask(*arguments, **options) -> Tensor | None:
    return None if _PACK.get() else sdpa_mask(*arguments, **options)


AttentionInterface.register(NAME, _interface)
AttentionMaskInterface.register(NAME, _mask)


def _gpt_neo_attention(
    self: GPTNeoSelfAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """query, key, value [rows, heads, T, head size]; attention_mask [rows, 1, T, T] boolean, True where it may look, or
    None.
    """
    window = self.config.window_size if self.attention_type == "local" else None
    dropout = self.attn_dropout.p if self.training else 0.0
    if context := _PACK.get():
        return _by_blocks(query, key, value, context, scale=1.0, dropout=dropout, window=window), None
    queries, keys = query.shape[-2], key.shape[-2]
    if window and window < keys:  # within the window a local layer is an ordinary causal one
        seen = self.bias[:, :, keys - queries : keys, :keys]
        attention_mask = seen if attention_mask is None else attention_mask & seen
    return _attend(query, key, value, attention_mask, scale=1.0, dropout=dropout), None


def _gpt_j_attention(
    self: GPTJAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """As above; rotary embedding was applied by the caller, which may hand on float32 queries and keys."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    dropout = self.attn_dropout.p if self.training else 0.0
    if context := _PACK.get():
        return _by_blocks(query, key, value, context, dropout=dropout), None
    return _attend(query, key, value, attention_mask, dropout=dropout), None


def _bloom_attention(
    self: BloomAttention,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    **ignored,
) -> tuple[Tensor, None]:
    """hidden_states [rows, T, D]; alibi [rows·heads, 1, T], slope · position; attention_mask as above."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    dropout = self.attention_dropout.p if self.training else 0.0
    if context := _PACK.get():
        # ALiBi of a row of two tokens: at position 1 it is the slope itself
        two = torch.ones(1, 2, dtype=torch.long, device=query.device)
        slopes = build_alibi_tensor(two, self.num_heads, torch.float32)[:, :, 1:]
        attended = _by_blocks(query, key, value, context, dropout=dropout, slopes=slopes)
    else:
        allowed = _causal_mask(query.shape[2], query.device) if attention_mask is None else attention_mask
        bias = alibi.view(len(hidden_states), self.num_heads, 1, -1).to(_wide(query).dtype)
        attended = _attend(query, key, value, bias.masked_fill(~allowed, float("-inf")), dropout=dropout)
    merged = attended.transpose(1, 2).flatten(2)
    return dropout_add(self.dense(merged), residual, self.hidden_dropout, self.training), None


def _by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: PackContext,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    slopes: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention of every text of the pack to itself, [1, heads, N, head size].

    query, key, value [1, heads, N, head size], with fewer heads of keys and values allowed. window: the positions that
    a token sees, the last ones with its own; where not `causal` as many ahead. slopes [heads, 1, 1]: of ALiBi.
    """
    device = query.device.type
    if device in varlen.DEVICES and torch.is_autocast_enabled(device):
        # as torch's own attention would under autocast: rotary embedding gives float32, which the kernel does not take
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if context.caches:
        return _with_cache(query, key, value, context, scale, window, slopes)
    if slopes is None and varlen.takes(query, dropout):
        return _in_one_kernel(query, key, value, context, scale, window, causal)
    return _Blocks.apply(query, key, value, context, scale, dropout, window, slopes, causal)


class _Blocks(torch.autograd.Function):
    """Attention of each block as a small graph of its own, whose results are written straight to where they belong.

    Autograd over slices of query, key and value would fill and add a whole [N, heads, head size] for every block.
    """

    @staticmethod
    def forward(ctx, query, key, value, context: PackContext, scale, dropout, window, slopes, causal) -> Tensor:
        keep = any(ctx.needs_input_grad[:3])
        tokens_first = query.transpose(1, 2)  # in memory, as the output projection reads them
        attended = torch.empty_like(tokens_first, memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.graphs = []
        longest = SHORT if keep else FITTING
        by_products = causal and not dropout and _rounds_to_bfloat16(query, key, value, keep)
        for start, (number, length) in zip(context.starts, context.blocks, strict=True):
            leaves = []
            for tensor in (query, key, value):
                leaves.append(_block(tensor, start, number, length).detach().requires_grad_(keep))
            with torch.set_grad_enabled(keep):
                mask = _block_mask(context, length, window, slopes, causal, query)
                if by_products and mask is None and length <= longest:
                    bias = _causal_bias(context, length, query.shape[1] // key.shape[1], query.device)
                    block = _by_products(*(leaf.bfloat16() for leaf in leaves), bias, scale)
                else:
                    block = _attend(*leaves, mask, scale=scale, dropout=dropout, causal=causal)
            _block(attended, start, number, length).copy_(block.detach())
            if keep:
                ctx.graphs.append((start, number, length, leaves, block))
        return attended

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradients: list[Tensor | None] = [None, None, None]  # of query, key and value
        wanted = [index for index in range(3) if ctx.needs_input_grad[index]]
        for start, number, length, leaves, block in ctx.graphs:
            of_block = _block(gradient, start, number, length)
            parts = torch.autograd.grad(block, [leaves[index] for index in wanted], of_block)
            for index, part in zip(wanted, parts, strict=True):
                if gradients[index] is None:
                    shape = (1, gradient.shape[2], part.shape[1], part.shape[3])
                    gradients[index] = part.new_empty(shape).transpose(1, 2)
                _block(gradients[index], start, number, length).copy_(part)
        ctx.graphs = None
        return (*gradients, None, None, None, None, None, None)


def _with_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: PackContext,
    scale: float | None,
    window: int | None,
    slopes: Tensor | None,
) -> Tensor:
    """As `_by_blocks`, causal and without gradient: the prefix's keys and values are read, and the pack's are kept."""
    layer = context.layer
    context.layer += 1
    if context.kept is not None:
        context.kept.append((key[0].contiguous(), value[0].contiguous()))
    if slopes is None and varlen.takes(query, 0.0):
        return _in_one_kernel(query, key, value, context, scale, window, layer=layer)
    attended = torch.empty_like(query)
    for index, (number, length) in enumerate(context.blocks):
        start = context.starts[index]
        queries, keys, values = (_block(tensor, start, number, length) for tensor in (query, key, value))
        if context.prefix is not None:
            old_keys, old_values = context.prefix.of(layer, index)
            keys = torch.cat([old_keys.expand(number, -1, -1, -1), keys], 2)
            values = torch.cat([old_values.expand(number, -1, -1, -1), values], 2)
        mask = _cache_mask(context, index, keys.shape[2], window, slopes)
        _block(attended, start, number, length).copy_(_attend(queries, keys, values, mask, scale=scale))
    return attended


def _in_one_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: PackContext,
    scale: float | None,
    window: int | None,
    causal: bool = True,
    layer: int = 0,
) -> Tensor:
    """As `_by_blocks`, and as `_with_cache` where there is a prefix, whose keys and values are copied for each text."""
    query, *read = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # tokens first
    options = {"scale": scale, "window": window, "causal": causal}
    if reading := context.reading:
        before = context.prefix.layers[layer]
        read = [torch.cat([old.transpose(0, 1), own])[reading.places] for old, own in zip(before, read, strict=True)]
        options |= {"ends_of_keys": reading.ends, "longest_of_keys": reading.longest}
    return varlen.attend(query, *read, context.ends, context.longest, **options).transpose(0, 1)[None]


def _cache_mask(
    context: PackContext, index: int, keys: int, window: int | None, slopes: Tensor | None
) -> Tensor | None:
    """As `_block_mask`, [T, keys], for a block: a token sees its prefix and what stands before it in its own text."""
    start, length = context.starts[index], context.blocks[index][1]
    several = context.prefix is not None and context.prefix.texts is not None
    if keys == length and slopes is None and (window is None or window >= length):
        return None
    shape = index if several else (length, keys)  # blocks of one shape share a mask where a row is one text
    key = (shape, window, slopes is not None)
    if key not in context.masks:
        positions = context.position_ids[start : start + length]
        seen = torch.cat([torch.arange(keys - length, device=positions.device), positions])
        allowed = seen[None] <= positions[:, None]
        if window is not None:
            allowed &= positions[:, None] - seen[None] < window
        if several:
            own = context.text_of_token[start : start + length]
            allowed[:, keys - length :] &= own[:, None] == own[None]
        if slopes is None:
            context.masks[key] = allowed
        else:
            bias = (slopes * seen).expand(-1, length, -1)
            context.masks[key] = bias.masked_fill(~allowed, float("-inf"))
    return context.masks[key]


def _block(packed_heads: Tensor, start: int, number: int, length: int) -> Tensor:
    """View [number, heads, length, head size] of [1, heads, N, head size]."""
    tokens = packed_heads[0, :, start : start + number * length]
    return tokens.unflatten(1, (number, length)).transpose(0, 1)


def _block_mask(
    context: PackContext, length: int, window: int | None, slopes: Tensor | None, causal: bool, like: Tensor
) -> Tensor | None:
    """None where causality (or nothing) says it all; else boolean [T, T] for a window or floating [heads, T, T] for
    ALiBi.
    """
    if slopes is None and (window is None or window >= length):
        return None
    key = (length, window, slopes is not None)
    if key not in context.masks:
        if slopes is not None:
            bias = (slopes * torch.arange(length, device=like.device)).expand(-1, length, -1).to(_wide(like).dtype)
            context.masks[key] = bias.masked_fill(~_causal_mask(length, like.device), float("-inf"))
        else:
            everything = torch.ones(length, length, dtype=torch.bool, device=like.device)
            context.masks[key] = everything.tril(0 if causal else window - 1).triu(1 - window)
    return context.masks[key]


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """Scaled-dot-product attention, [rows, heads, T, head size] in and out; some heads of queries may share one of keys
    and values. mask: None is causal, or all if not `causal`.

    On a CPU in float32, also under autocast: the bfloat16 kernel's backward pass is three times slower than casting.
    """
    causal = causal and mask is None and query.shape[-2] > 1
    grouped = query.shape[1] != key.shape[1]
    wide = [_wide(tensor) for tensor in (query, key, value)]
    if grouped and query.device.type == "cuda":
        # its kernels for float32 or with a mask know no heads that are shared; without one all scores are kept
        times = query.shape[1] // key.shape[1]
        wide[1:] = [tensor.repeat_interleave(times, 1) for tensor in wide[1:]]
        grouped = False
    with torch.autocast("cpu", enabled=False):
        attended = scaled_dot_product_attention(
            *wide, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return attended.to(query.dtype)


def _rounds_to_bfloat16(query: Tensor, key: Tensor, value: Tensor, keep: bool) -> bool:
    """Whether attention on this processor is fast in bfloat16 and loses nothing by it: its inputs are that already, or
    the products of int8 around it round more coarsely. keep: for a backward pass.
    """
    given = {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}
    between_int8 = int8.current() is not None and not keep
    return query.device.type == "cpu" and FAST_BFLOAT16 and (given or between_int8)


def _by_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """Causal attention as products of matrices in bfloat16, [rows, heads, T, head size] in and out; bias [heads that
    share keys · T, T].

    No head of keys is repeated. Where the processor multiplies bfloat16, texts of 64 tokens take half the time that
    scaled-dot-product attention takes in float32, those of 180 and 300 two thirds; from 512 on that is the faster.
    """
    rows, heads, length, size = query.shape
    shared = key.shape[1]
    queries = query.reshape(rows * shared, -1, size)  # heads that share keys stand below each other
    keys, values = key.reshape(-1, length, size), value.reshape(-1, length, size)
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=size**-0.5 if scale is None else scale)
    return (scores.softmax(-1) @ values).view(rows, heads, length, size)


def _causal_bias(context: PackContext, length: int, times: int, device: torch.device) -> Tensor:
    """[times · T, T] in bfloat16: 0 where a token may look and -inf elsewhere."""
    key = (length, times)
    if key not in context.masks:
        everything = torch.full((length, length), float("-inf"), dtype=torch.bfloat16, device=device)
        context.masks[key] = everything.triu(1).repeat(times, 1)
    return context.masks[key]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "cpu" and tensor.dtype.itemsize < 4 else tensor
