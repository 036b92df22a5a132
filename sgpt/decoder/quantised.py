"""A frozen trunk in fewer bytes: its linear layers hold 8 or 4 bits a weight, biases and norms stay float32.

    int8   a byte a weight and a float32 scale for each row, as LLM.int8() has them (Dettmers et al. 2022, arXiv
           2208.07339), without its outliers: weights alone are quantised
    nf4    4 bits a weight and a float32 scale for each 64 of them, 4.5 bits in all: NormalFloat of QLoRA (Dettmers et
           al. 2023, arXiv 2305.14314), whose second quantisation, of the scales, is left out

A layer makes its weights again for each product and drops them: for the forward pass, and once more for the backward
pass, which is exact with respect to them; int8 encodes in products of integers instead (sgpt/decoder/int8.py).
Embedding tables stay as they are: they are looked up, not multiplied. So does a language-model head.

Written here in a few lines of torch, on any device, because neither library fits. torchao 0.18 puts the largest weight
of a row at 127.5, which no int8 is; its NF4 refuses a weight whose size is no multiple of 16,384, of which SmolLM2 has
some; and where it is installed, importing transformers imports it and prints four warnings. bitsandbytes 0.50,
whose codes are ours but for ties, fetches compiled code from the hub on some processors while it is imported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgpt.decoder import int8
from sgpt.runtime.errors import InputError

NF4_BLOCK = 64  # weights that share a scale in nf4
SAMPLE = 256  # numbers of a weight by which it is known again
BLOCKS_AT_A_TIME = 2**12  # of nf4, a MB of weights, which stays in a cache of the processor
# quantiles of a normal distribution, with an exact 0: appendix E of QLoRA
NF4_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
RANDOM_TOKENS = (4, 32)  # texts and tokens of each, over which int8 finds its outliers
TINY = torch.finfo(torch.float32).tiny  # instead of the scale 0, where all weights are 0


class WeightSample(NamedTuple):
    """Some numbers of a weight, evenly spread over it, and its shape."""

    shape: tuple[int, ...]
    numbers: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "WeightSample":
        """SAMPLE of its numbers, fewer than twice as many, or all where it has fewer; in its dtype."""
        flat = weight.detach().flatten()
        return cls(tuple(weight.shape), flat[:: max(1, len(flat) // SAMPLE)].clone())


Quantised = tuple[Tensor, Tensor]  # codes and their scales


def _int8(weight: Tensor) -> Quantised:
    """Float32 [out, in] -> int8 [out, in] and float32 [out, 1]: the weight furthest from 0 of a row is 127 or -127."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale.clamp(min=TINY)).round().to(torch.int8), scale


def _from_int8(codes: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    return codes * scale


def _nf4(weight: Tensor) -> Quantised:
    """Float32 [out, in] -> uint8 [out · in / 2], two levels in each, and float32 [out · in / NF4_BLOCK, 1]."""
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    middles = ((NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2).to(weight.device)  # between neighbours
    codes = []
    for part in (blocks / scale.clamp(min=TINY)).split(BLOCKS_AT_A_TIME):
        levels = torch.bucketize(part, middles, out_int32=True).to(torch.uint8).view(-1, 2)
        codes.append(levels[:, 0] << 4 | levels[:, 1])
    return torch.cat(codes), scale


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """The two levels of each byte as one number of 8 bytes, copied whole: 0.3 and not 1.1 ms for 0.9 million weights.

    Not made while this is imported: it would start torch's threads, which a forked process does not have.
    """
    levels = torch.stack([NF4_LEVELS.repeat_interleave(16), NF4_LEVELS.repeat(16)], dim=1)
    return levels.view(torch.int64).flatten().to(device)


def _from_nf4(codes: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    table = _nf4_pairs(codes.device)
    pairs = torch.empty(len(codes), dtype=torch.int64, device=codes.device)
    blocks = pairs.view(torch.float32).view(-1, NF4_BLOCK)
    size = BLOCKS_AT_A_TIME if codes.device.type == "cpu" else max(1, len(blocks))
    parts = zip(codes.split(size * NF4_BLOCK // 2), pairs.split(size * NF4_BLOCK // 2), strict=True)
    scaled = zip(blocks.split(size), scale.split(size), strict=True)
    for (part, pairs_of_part), (blocks_of_part, scale_of_part) in zip(parts, scaled, strict=True):
        torch.index_select(table, 0, part.int(), out=pairs_of_part)
        blocks_of_part.mul_(scale_of_part)
    return blocks.flatten()[: math.prod(shape)].view(shape)


@dataclass(frozen=True)
class Scheme:
    """How a weight is held in fewer bytes."""

    quantise: Callable[[Tensor], Quantised]
    """Float32 [out, in] -> codes and their scales."""
    dequantise: Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]
    """Codes, scales and shape -> float32 [out, in]."""


SCHEMES = {"int8": Scheme(_int8, _from_int8), "nf4": Scheme(_nf4, _from_nf4)}
QUANTISED = tuple(SCHEMES)


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight [out, in] is frozen and held in fewer bytes; the bias is an ordinary parameter.

    name: of the layer in its trunk. source: folder or hub id of the model whose weights these are. `sample` are numbers
    of the weight as it was.
    """

    def __init__(self, linear: nn.Linear, dtype: str, *, name: str, source: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.name, self.source = dtype, name, source
        self.bias = linear.bias
        self.sample = WeightSample.of(linear.weight)
        codes, scale = SCHEMES[dtype].quantise(linear.weight.detach().float())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.train(linear.training)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the layer multiplies with, made anew by each call."""
        return SCHEMES[self.dtype].dequantise(self.codes, self.scale, self.sample.shape).to(dtype)

    @property
    def weight(self) -> Tensor:
        """As `dequantised`, in float32: for readers. What is written into it is lost."""
        return self.dequantised(torch.float32)

    def forward(self, inputs: Tensor) -> Tensor:
        """[…, in] -> […, out], in the dtype of the inputs, or of autocast inside of it.

        Inside of `int8_products` a layer of dtype int8 multiplies integers, and gives no gradient.
        """
        products = int8.current() if self.dtype == "int8" else None
        if products is not None and not torch.is_grad_enabled():
            return products.linear(inputs, self.codes, self.scale, self.bias, self.name)
        return _Product.apply(inputs, self.bias, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype={self.dtype}"


class _Product(torch.autograd.Function):
    """inputs @ weight.T + bias, of which neither the inputs nor the weight are kept for the backward pass."""

    @staticmethod
    def forward(context, inputs: Tensor, bias: Tensor | None, layer: QuantisedLinear) -> Tensor:
        context.layer, context.inputs_dtype = layer, inputs.dtype
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        bias = None if bias is None else bias.to(dtype)
        return F.linear(inputs.to(dtype), layer.dequantised(dtype), bias)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_inputs = of_bias = None
        if context.needs_input_grad[0]:
            of_inputs = (gradient @ context.layer.dequantised(gradient.dtype)).to(context.inputs_dtype)
        if context.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0, dtype=torch.float32)
        return of_inputs, of_bias, None


@torch.no_grad()
def quantise(model: nn.Module, dtype: str, source: str) -> None:
    """Replaces the linear layers of the trunk, one after the other, and makes all other parameters float32, in place.

    source: where the model was opened from. Raises InputError for a trunk with matrices that no nn.Linear multiplies.
    """
    trunk = model.base_model
    linears = {name: module for name, module in trunk.named_modules() if type(module) is nn.Linear}
    _refuse_other_matrices(trunk, linears, dtype, source)
    for name, linear in linears.items():
        replace_module(trunk, name, QuantisedLinear(linear, dtype, name=name, source=source))
    del linears, linear
    for parameter in model.parameters():
        # a copy: one tensor that still lies in the mapped file would hold all of it in memory
        parameter.data = parameter.data.to(torch.float32, copy=True)
    model.config.dtype = torch.float32


def _refuse_other_matrices(trunk: nn.Module, linears: dict[str, nn.Linear], dtype: str, source: str) -> None:
    """GPT-2's are Conv1D, transposed; a mixture of experts has its matrices in one tensor."""
    for path, module in trunk.named_modules():
        if path in linears or isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                raise InputError(
                    f"{source}: {path}.{name} of {type(trunk).__name__} belongs to {type(module).__name__}, and "
                    f"dtype={dtype} is for layers that are nn.Linear; use dtype=bfloat16, or another base"
                )


@torch.no_grad()
def find_outliers(trunk: nn.Module) -> int8.Outliers:
    """Of every layer the channels that are far from 0 in all that it reads, seen over a few random tokens.

    With all parameters as they are now; the trunk is in evaluation mode.
    """
    read: list[tuple[Tensor, Tensor]] = []  # what layers read, and its outliers
    outliers: int8.Outliers = {}

    def look(layer: QuantisedLinear, arguments: tuple[Tensor]) -> None:
        [inputs] = arguments
        if not read or read[-1][0] is not inputs:
            read[:] = [(inputs, int8.outlier_channels(inputs))]
        outliers[layer.name] = read[-1][1]  # one tensor for layers that read the same

    hooks = [layer.register_forward_pre_hook(look) for layer in quantised_layers(trunk).values()]
    vocabulary = trunk.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, RANDOM_TOKENS, generator=torch.Generator().manual_seed(0))
    try:
        trunk(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return outliers


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """By their paths in the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def quantised_dtype(model: nn.Module) -> str | None:
    """int8 or nf4, or None for a model that is not quantised."""
    return next((layer.dtype for layer in quantised_layers(model).values()), None)


def held_weights(model: nn.Module) -> dict[str, Tensor]:
    """All that the model computes with by name: its parameters, and codes and scales of quantised layers."""
    weights = dict(model.named_parameters())
    for path, layer in quantised_layers(model).items():
        weights |= {f"{path}.codes": layer.codes, f"{path}.scale": layer.scale}
    return weights


def num_weights(model: nn.Module) -> int:
    """How many numbers the model has, however they are held."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = quantised_layers(model).values()
    return parameters + sum(layer.in_features * layer.out_features for layer in layers)


def held_bytes(model: nn.Module) -> int:
    """Of the weights as they are held in memory, each storage once."""
    storages = [weight.untyped_storage() for weight in held_weights(model).values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def unquantised_weights(model: nn.Module) -> dict[str, Tensor | WeightSample]:
    """The parameters by name, and of quantised layers the sample of the weight that they were made of."""
    samples = {f"{path}.weight": layer.sample for path, layer in quantised_layers(model).items()}
    return {**dict(model.named_parameters()), **samples}


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` where the model has another one."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
