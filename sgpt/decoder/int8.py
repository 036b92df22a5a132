"""Products in int8 for encoding on a CPU: int8 weights with activations that are quantised token by token.

A trunk with dtype=int8 holds a byte a weight and a scale for each row (sgpt/decoder/quantised.py). Dequantised for each
product, that saves memory and no time. Inside of `int8_products` an activation becomes int8 as well, with a scale for
each token, so that its largest number is 127 or -127, and the product is one of integers, exact in int32:

    output[t, o] = sum over i of codes[t, i] · weight[o, i], times the scales of token t and of row o, plus the bias

A token's scale is its own: what it is computed together with changes nothing. Some channels are many times as large as
the others in every token, and would leave these a few steps: up to OUTLIERS of a layer's input are multiplied in
float32, as in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), but that they are the same for all texts: they are
found once over a few random tokens (`find_outliers` of quantised.py). Of embeddings of a tuned SmolLM2 the distance to
float32, 1 - cosine, is 0.0017 with them and 0.0054 without; 0.0010 is of the weights.

Processors with VNNI multiply four pairs of int8 where they multiply one of float32: of SmolLM2's shapes a Zen 4 core
takes 400 billion operations a second, 90 in float32 and 190 in bfloat16. `torch._int_mm` multiplies the codes as they
are stored: nothing is packed, and no weight is held twice. Of what else torch has, onednn.qlinear_pointwise is as fast
from 256 tokens on and slower below, and wants a packed copy; dynamic.Linear of fbgemm and oneDNN takes one scale for
all tokens and is slower; _weight_int8pack_mm is for bfloat16 activations, and slower than float32.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)
LARGEST_CODE = 127  # of int8; -128 is left out, so that the codes are symmetric
VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
OUTLIERS = 8  # channels of a layer's input at most that are multiplied in float32
# A channel that is OUTLYING times as far from 0 as the median one is worth a pass over the layer's outputs; those that
# are ALSO_OUTLYING times as far then go with it. In SmolLM2 all q, k and v have such a channel, 26 of 30 down, few
# others.
OUTLYING, ALSO_OUTLYING = 8, 3
SMALLEST = 1e-30  # a token's furthest number counts as at least this, so that 127 / it is finite for one of zeros
Outliers = Mapping[str, Tensor]  # name of a layer -> channels [k] of its inputs


class TokenCodes(NamedTuple):
    """Activations of N tokens in int8: codes [N, in], and float32 scales [N, 1] to multiply them with.

    outliers: float32 [N, k], the channels that are no codes, and are 0 there.
    """

    codes: Tensor
    scale: Tensor
    outliers: Tensor


def quantise_tokens(inputs: Tensor, outliers: Tensor) -> TokenCodes:
    """[…, in] of floats, and the k channels to leave out -> all tokens, whose furthest number from 0 is 127 or -127."""
    tokens = inputs.flatten(0, -2).float()  # [N, in]
    values = tokens.index_select(1, outliers)
    if len(outliers):
        tokens = tokens.index_fill(1, outliers, 0)
    furthest = torch.maximum(tokens.amax(1, keepdim=True), tokens.amin(1, keepdim=True).neg_()).clamp_(min=SMALLEST)
    codes = (tokens * (LARGEST_CODE / furthest)).round_().to(torch.int8)
    return TokenCodes(codes, furthest.div_(LARGEST_CODE), values)


def outlier_channels(inputs: Tensor) -> Tensor:
    """Of […, in] the channels, OUTLIERS at most, that are far from 0; none where not one is very far."""
    furthest = inputs.flatten(0, -2).abs().amax(0)  # [in]
    candidates = furthest.topk(min(OUTLIERS, len(furthest))).indices
    times = furthest[candidates] / furthest.median()
    return candidates[(times >= ALSO_OUTLYING) & (times[0] >= OUTLYING)]


class Int8Products:
    """Linear layers one after the other, which know what the last one read.

    Layers that read the same tensor (queries, keys and values; gate and up) share its codes. It is held until another
    one is quantised, so that no other tensor can take its place in memory; nothing may write into it in between.
    """

    def __init__(self, outliers: Outliers) -> None:
        self.outliers = outliers
        self.read: tuple[Tensor, Tensor] | None = None  # the inputs and their outliers
        self.of_inputs: TokenCodes | None = None

    def linear(self, inputs: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, name: str) -> Tensor:
        """inputs […, in], weight int8 [out, in] with scale [out, 1], bias [out] -> […, out] in the inputs' dtype.

        name: of the layer. Without gradient.
        """
        outliers = self.outliers[name]
        if self.read is None or self.read[0] is not inputs or self.read[1] is not outliers:
            self.read, self.of_inputs = (inputs, outliers), quantise_tokens(inputs, outliers)
        codes, token_scale, values = self.of_inputs
        # each line is one pass over [N, out]: a type for the first, the row's scale, the token's scale with the bias
        output = torch._int_mm(codes, weight.T).float()
        output *= scale.T
        output = output.mul_(token_scale) if bias is None else torch.addcmul(bias, output, token_scale, out=output)
        if len(outliers):
            output.addmm_(values, (weight.index_select(1, outliers) * scale).T)
        return output.view(*inputs.shape[:-1], -1).to(inputs.dtype)


_PRODUCTS: ContextVar[Int8Products | None] = ContextVar("int8_products", default=None)
_WARNED: set[str] = set()


@contextmanager
def int8_products(outliers: Outliers) -> Iterator[None]:
    """Inside, quantised layers of dtype int8 multiply in int8, on a device that `multiplies_int8`."""
    token = _PRODUCTS.set(Int8Products(outliers))
    try:
        yield
    finally:
        _PRODUCTS.reset(token)


def current() -> Int8Products | None:
    """What multiplies here; None outside of `int8_products`."""
    return _PRODUCTS.get()


def multiplies_int8(device: torch.device) -> bool:
    """Whether products in int8 are fast and exact here, so that they are taken; if not, the log says so, once."""
    has_vnni = any(torch.cpu.get_capabilities().get(name) for name in VNNI)
    if device.type == "cpu" and has_vnni and _is_exact():
        return True
    _warn_once(device)
    return False


@cache
def _is_exact() -> bool:
    """Whether the largest codes multiply to what they should.

    Without VNNI, also where ONEDNN_MAX_CPU_ISA takes it away, oneDNN adds pairs of products in 16 bits, which overflow:
    of 576 pairs of 127 it gives 73,440 instead of 9,290,304, and says nothing.
    """
    largest = torch.full((64, 64), LARGEST_CODE, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest) == 64 * LARGEST_CODE**2).all())


def _warn_once(device: torch.device) -> None:
    no_vnni = "this processor has no VNNI, or ONEDNN_MAX_CPU_ISA leaves it unused"
    what = no_vnni if device.type == "cpu" else f"the device is {device.type}"
    if what not in _WARNED:
        _WARNED.add(what)
        log.warning(
            "dtype=int8: %s, so weights are dequantised for each product: int8 saves memory here, and no time", what
        )
