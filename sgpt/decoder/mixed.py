"""Several tuned models over one trunk in one forward pass: each text of a pack has biases of its own.

Models that were tuned by their biases share every matrix. So the tokens of all texts are multiplied together, and the
product of a linear layer is added to rows of biases where it is otherwise added to one bias. That is the same sum in
the same order: in float32 a text gets, bit for bit, the embedding that it gets when the whole pack has its biases
(tests/encoder/test_deltas.py). A row of biases is written where the bias is otherwise copied to, so it costs nothing.
Norms are computed for each run of tokens that have one model, so that their gains can differ as well.

Without gradient, and for trunks that take packs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from threading import Lock, RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sgpt.decoder.model_files import UNUSED
from sgpt.decoder.packing import Pack
from sgpt.runtime.errors import InputError

_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_OF_LOCKS = Lock()
BiasValues = Mapping[str, Tensor]  # by name of a parameter of the trunk, or of the module that is spoken of


def alone_with(trunk: nn.Module) -> RLock:
    """A lock: one thread at a time computes with the trunk, whose values are others while a delta is on."""
    with _OF_LOCKS:
        return _LOCKS.setdefault(trunk, RLock())


@contextmanager
def exchanged(parameters: Mapping[str, nn.Parameter], values: BiasValues) -> Iterator[None]:
    """Inside, the parameters have these values, of their shapes; by name.

    Nothing is copied: each is given other storage, and its own again.
    """
    before = {name: parameters[name].data for name in values}
    _set(parameters, values)
    try:
        yield
    finally:
        _set(parameters, before)


def _set(parameters: Mapping[str, nn.Parameter], values: BiasValues) -> None:
    for name, value in values.items():
        parameters[name].data = value


@contextmanager
def mixed(trunk: nn.Module, pack: Pack, versions: Sequence[BiasValues], of_rows: Sequence[int]) -> Iterator[None]:
    """Inside, the trunk computes each row of `pack`, and nothing else, with the values of its version.

    versions: biases, and gains of norms, by parameter name; what one does not name is the trunk's. of_rows: of each row
    of the pack the number of its version.
    """
    lengths = [length for number, length in pack.blocks for _ in range(number)]
    of_tokens = torch.tensor(of_rows).repeat_interleave(torch.tensor(lengths)).to(pack.input_ids.device)  # [N]
    runs: list[tuple[int, int]] = []  # version and tokens of neighbouring rows that have one version
    for version, rows in groupby(zip(of_rows, lengths, strict=True), key=lambda row: row[0]):
        runs.append((version, sum(length for _, length in rows)))
    forwards = []
    for path, of_module in _by_module(trunk, versions).items():
        module = trunk.get_submodule(path)
        if isinstance(module, nn.Linear | Conv1D):
            forward = _linear(module, [values["bias"] for values in of_module], of_tokens)
        else:
            forward = _by_runs(module, of_module, runs)
        forwards.append((module, module.__dict__.get("forward"), forward))
    try:
        for module, _, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, before, _ in forwards:
            module.__dict__.pop("forward", None)
            if before is not None:  # a fused operation (sgpt/decoder/fused.py)
                module.forward = before


def _by_module(trunk: nn.Module, versions: Sequence[BiasValues]) -> dict[str, list[dict[str, Tensor]]]:
    """Path -> of each version the values of that module's parameters, of all that some version names.

    InputError for a matrix, which would be the trunk's for all.
    """
    modules: dict[str, list[dict[str, Tensor]]] = {}
    for name in dict.fromkeys(name for values in versions for name in values):
        if UNUSED.search(name):
            continue
        path, _, leaf = name.rpartition(".")
        of_module = modules.setdefault(path, [{} for _ in versions])
        own = trunk.get_parameter(name).data
        if own.ndim > 1:
            raise InputError(
                f"{name}: is a matrix, and all texts of a batch are multiplied by the same; encode each model's texts "
                "in a call of their own"
            )
        for values, of_version in zip(versions, of_module, strict=True):
            of_version[leaf] = values.get(name, own)
    return modules


def _linear(module: nn.Linear | Conv1D, biases: Sequence[Tensor], of_tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """The forward pass of a linear layer with a bias [out] for each version; of_tokens [N]: which version."""

    def forward(inputs: Tensor) -> Tensor:
        device, shape = inputs.device.type, (*inputs.shape[:-1], len(biases[0]))
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        table = torch.stack([bias.to(dtype) for bias in biases])  # [versions, out]
        rows = table.index_select(0, of_tokens)  # [N, out]
        if type(module) not in (nn.Linear, Conv1D):  # a quantised one, whose product is its own
            return rows.add_(_without_bias(module, inputs).view(len(rows), -1)).view(shape)
        weight = module.weight if isinstance(module, Conv1D) else module.weight.T  # [in, out]
        return rows.addmm_(inputs.reshape(len(rows), -1).to(dtype), weight.to(dtype)).view(shape)

    return forward


def _without_bias(module: nn.Linear, inputs: Tensor) -> Tensor:
    bias, module.bias = module.bias, None
    try:
        return type(module).forward(module, inputs)
    finally:
        module.bias = bias


def _by_runs(
    module: nn.Module, of_module: Sequence[BiasValues], runs: Sequence[tuple[int, int]]
) -> Callable[[Tensor], Tensor]:
    """The forward pass of any module that computes each token by itself, with the values of each run's version."""
    whole, parameters = module.forward, dict(module.named_parameters(recurse=False))
    sizes = [tokens for _, tokens in runs]

    def forward(inputs: Tensor) -> Tensor:
        dim = _tokens_dim(inputs, sum(sizes))
        outputs = []
        for (version, _), part in zip(runs, inputs.split(sizes, dim), strict=True):
            with exchanged(parameters, of_module[version]):
                outputs.append(whole(part))
        return torch.cat(outputs, dim)

    return forward


def _tokens_dim(inputs: Tensor, tokens: int) -> int:
    """Which dimension the N tokens are: the outermost in memory of that size, as projections write token by token.

    Norms see [1, N, D], [N, D], [1, N, heads, head size] or, transposed, [1, heads, N, head size].
    """
    of_size = [dim for dim in range(inputs.ndim - 1) if inputs.shape[dim] == tokens]
    assert of_size, f"{tuple(inputs.shape)} has no dimension of {tokens} tokens"
    return max(of_size, key=inputs.stride)
