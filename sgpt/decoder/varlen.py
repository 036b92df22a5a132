"""Attention over all texts of a pack in one kernel, each behind its cached prefix where it has one, where a GPU can:
FlashAttention for sequences of various lengths (Dao 2023).

torch.nn.attention.varlen calls it: half precision only, no dropout, no bias on the scores. Before its first use on a
device it has to agree there with plain attention in float32, forwards and backwards. Where it does not, or cannot run,
a warning says so, and attention stays with one call for each length (sgpt/decoder/attention.py).
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger(__name__)
DEVICES = {"cuda"}
AGREEMENT = 0.03  # of numbers around 1, of which bfloat16 keeps 8 bits


def takes(query: Tensor, dropout: float) -> bool:
    """query [.., head size]: whether the kernel is there for such tensors, and right."""
    fits = query.device.type in DEVICES and query.dtype in (torch.bfloat16, torch.float16) and not dropout
    head_size = query.shape[-1]
    return fits and head_size % 8 == 0 and head_size <= 256 and _agrees(query.device, query.dtype, head_size)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    *,
    scale: float | None,
    window: int | None,
    causal: bool,
    ends_of_keys: Tensor | None = None,
    longest_of_keys: int | None = None,
) -> Tensor:
    """query [N, heads, head size], key and value with as many heads or fewer; as query out.

    ends: int32 [texts + 1] on the device, 0 and where each text ends. longest: tokens of the longest. window: the
    positions that a token sees, the last ones with its own; where not `causal` as many ahead. ends_of_keys,
    longest_of_keys: the same of keys and values, where a text has more of them: its queries are its last tokens.
    """
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1  # positions before a token's own that it sees; -1 is all
    right = 0 if causal else left
    options = {"scale": scale, "window_size": (left, right)}
    if key.shape[1] < query.shape[1] and "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True  # torch before 2.12 takes fewer heads without being told
    ends_of_keys = ends if ends_of_keys is None else ends_of_keys
    return varlen_attn(query, key, value, ends, ends_of_keys, longest, longest_of_keys or longest, **options)


@lru_cache
def _agrees(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether results and gradients are right, with two heads of queries and one of keys, causal, in a window of 3; and
    the results of the last tokens alone, in the window and without.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            worst = _largest_difference(device, dtype, head_size)
    except (ImportError, RuntimeError, TypeError) as error:
        # torch before 2.10, a GPU before Ampere, a build without the kernel
        log.warning(
            "no variable-length attention on %s (%s); texts of each length are attended to by a call of their own",
            device,
            str(error).splitlines()[0],
        )
        return False
    agrees = worst <= AGREEMENT  # NaN is not
    if not agrees:
        log.warning(
            "variable-length attention on %s is off by %.1f %%; texts of each length are attended to by a call of "
            "their own",
            device,
            100 * worst,
        )
    return agrees


def _largest_difference(device: torch.device, dtype: torch.dtype, head_size: int) -> float:
    """Of the result, the three gradients and the result of the last tokens alone to plain attention in float32, as a
    share of the largest number of each.
    """
    lengths, window = (6, 4, 1), 3
    generator = torch.Generator().manual_seed(0)
    wide = []  # query, key, value and the result's gradient: in float32, and exact in the half type
    for heads in (2, 1, 1, 2):
        numbers = torch.randn(sum(lengths), heads, head_size, generator=generator)
        wide.append(numbers.to(dtype).float().to(device))
    *inputs, gradient = wide
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, ends, max(lengths), scale=None, window=window, causal=True)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _plain(query, key, value, lengths, window)

    expected = _with_gradients(plain, inputs, gradient)
    computed = _with_gradients(kernel, [tensor.to(dtype) for tensor in inputs], gradient.to(dtype))
    lasts = (2, 4, 1)  # of each text, as behind a cache
    tails = torch.cat([torch.arange(end - last, end) for end, last in zip(accumulate(lengths), lasts, strict=True)])
    own_ends = torch.tensor([0, *accumulate(lasts)], dtype=torch.int32, device=device)
    query, key, value = (tensor.to(dtype) for tensor in inputs)
    for seen in (window, None):
        expected.append(_plain(*inputs, lengths, seen or max(lengths))[tails.to(device)])
        computed.append(attend(
            query[tails.to(device)], key, value, own_ends, max(lasts), scale=None, window=seen, causal=True,
            ends_of_keys=ends, longest_of_keys=max(lengths),
        ))  # fmt: skip
    differences = []
    for right, other in zip(expected, computed, strict=True):
        differences.append((other.float() - right).abs().max() / right.abs().max())
    return torch.stack(differences).max().item()  # of torch, whose max of NaN is NaN


def _with_gradients(attention: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The result and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    result = attention(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, gradient)]


def _plain(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], window: int) -> Tensor:
    """Text by text."""
    texts = []
    by_text = (tensor.split(lengths) for tensor in (query, key, value))
    for q, k, v in zip(*by_text, strict=True):
        mask = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril().triu(1 - window)
        heads_first = (tensor.transpose(0, 1) for tensor in (q, k, v))
        attended = scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
        texts.append(attended.transpose(0, 1))
    return torch.cat(texts)
