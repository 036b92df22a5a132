"""Bias deltas: tuned models of kilobytes over a frozen trunk that others use as well."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from sgpt.decoder.families import is_norm
from sgpt.decoder.mixed import exchanged
from sgpt.decoder.quantised import WeightSample, quantised_dtype, unquantised_weights
from sgpt.decoder.trunk import load_trunk
from sgpt.encoder.adapter import (
    DELTA,
    base_config,
    is_its_base,
    read_delta,
    read_trained,
    refuse_other_base,
    trained_shapes,
)
from sgpt.encoder.contract import Contract
from sgpt.encoder.model_folder import find_model
from sgpt.runtime.errors import InputError
from sgpt.text.markers import Frame, Role

OPENED_ALONE = "open it alone, with Encoder.from_pretrained"


class Delta:
    """A tuned model as what it changes of a trunk that others use too: inside `with delta:` the trunk has it.

    contract: markers, limits, pooling and normalisation of its training. trained: its tensors, by parameter name.
    strength: the share of the change that the trunk gets, base + strength · (trained - base); 1 is the trained tensors
    bit for bit, 0 the base. frames: of each role, where the delta is one of an encoder's `deltas`.

    untuned: by name, the base's values where the trunk has others outside of every delta (`untuned_values`); None looks
    whether it is the base, and raises InputError if not. Low-rank adapters are refused, as they change the modules
    themselves.
    """

    def __init__(
        self, trunk: nn.Module, folder: Path, *, strength: float = 1.0, untuned: dict[str, Tensor] | None = None
    ) -> None:
        if problem := _low_rank(folder):
            raise InputError(f"{folder} is no change that could be put on and off: {problem}; {OPENED_ALONE}")
        if untuned is None:
            refuse_other_base(trunk, folder)
        self.folder, self.strength = folder, strength
        self.contract = Contract.load(folder)
        self.frames: dict[Role, Frame] = {}
        trained = read_trained(folder, trunk)
        self.untuned: dict[str, Tensor] = {} if untuned is None else untuned
        parameters = dict(trunk.named_parameters())
        self.norms = _norms_of(trunk, trained)
        names = [*self.untuned, *trained, *(name for norm in self.norms for name in norm)]
        self.parameters = {name: parameters[name] for name in names}
        self.trained = {name: value.to(parameters[name].device) for name, value in trained.items()}
        self._exchange: AbstractContextManager | None = None

    @property
    def nbytes(self) -> int:
        """Of the trained tensors: all that is held for this model next to the trunk."""
        return sum(value.nbytes for value in self.trained.values())

    @property
    def inside(self) -> bool:
        """Whether the trunk has it now."""
        return self._exchange is not None

    def at(self, strength: float) -> "Delta":
        """The same in another strength; the trained tensors are shared."""
        if strength == self.strength:
            return self
        other = copy.copy(self)
        other.strength, other._exchange = strength, None
        return other

    def forget(self) -> None:
        """From now on it is refused, in every strength: the trunk may no longer have the biases that it moves."""
        self.parameters.clear()

    def values(self) -> dict[str, Tensor]:
        """What the trunk gets, by parameter name; made anew where the strength is neither 0 nor 1.

        The trunk must be outside of every delta. Raises InputError where it was unloaded.
        """
        if self.trained and not self.parameters:
            raise InputError(f"the delta of {self.folder} was unloaded; load it again with load_delta")
        for name, base in self.untuned.items():
            if base.device != self.parameters[name].device:  # the trunk was moved since
                self.untuned[name] = base.to(self.parameters[name].device)
        values = dict(self.untuned)
        for name, trained in self.trained.items():
            base = self.untuned[name] if name in self.untuned else self.parameters[name].data
            if trained.device != base.device:  # the trunk was moved since
                trained = self.trained[name] = trained.to(base.device)
            values[name] = moved(base, [(trained, self.strength)])
        for norm in self.norms:  # a norm of half precision takes no float32 bias
            whole = {name: values.get(name, self.parameters[name].data) for name in norm}
            if len({value.dtype for value in whole.values()}) > 1:
                values |= {name: value.float() for name, value in whole.items()}
        return values

    def __enter__(self) -> None:
        assert not self.inside, "entered twice, its base would be the tuned trunk"
        self._exchange = exchanged(self.parameters, self.values())
        self._exchange.__enter__()

    def __exit__(self, *failure) -> None:
        exchange, self._exchange = self._exchange, None
        exchange.__exit__(*failure)


def moved(base: Tensor, changes: list[tuple[Tensor, float]]) -> Tensor:
    """base + the sum of weight · (trained - base), in float64 and rounded once, in the dtype of the trained tensors.

    changes: trained tensors, each with its weight. A tensor with weight 1 alone is given itself, and where all weights
    are 0 the base is: (trained - base) + base would not be trained, bit for bit.
    """
    changes = [(trained, weight) for trained, weight in changes if weight != 0]
    if not changes:
        return base
    if len(changes) == 1 and changes[0][1] == 1:
        return changes[0][0]
    start = base.double()
    total = start.clone()
    for trained, weight in changes:
        total += weight * (trained.double() - start)
    return total.to(changes[0][0].dtype)


def _norms_of(trunk: nn.Module, trained: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of all parameters of each norm of which some are trained."""
    norms = []
    for path, module in trunk.named_modules():
        names = [f"{path}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        if is_norm(module) and not trained.keys().isdisjoint(names):
            norms.append(names)
    return norms


def bias_delta_folder(path: str | Path) -> Path:
    """The adapter folder of a run or adapter, which holds biases and gains of norms and nothing else.

    Raises InputError for everything else.
    """
    folder = find_model(path, ("adapter",)).folder
    if problem := why_no_bias_delta(folder):
        raise InputError(f"{problem}; {OPENED_ALONE if (folder / DELTA).is_file() else 'give a run or its adapter/'}")
    return folder


def why_no_bias_delta(folder: Path) -> str | None:
    """Why a folder is no adapter whose trunk others can use, the beginning of a sentence; None where it is one."""
    problem = _low_rank(folder)
    if problem is None:
        matrix = next((name for name, shape in trained_shapes(folder).items() if len(shape) > 1), None)
        problem = None if matrix is None else f"it changes the matrix {matrix}"  # as tuning=full does
    return problem and f"{folder} is not the bias delta that tuning=bitfit or bitfit_norm saves: {problem}"


def _low_rank(folder: Path) -> str | None:
    if not (folder / DELTA).is_file():
        return f"there is no {DELTA}"
    is_low_rank = read_delta(folder)["form"] == "peft"
    return "it is of low rank and changes the modules themselves" if is_low_rank else None


def untuned_values(trunk: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The values of the base where `trunk` has others, by name: none over the base itself.

    folder: a bias delta over that base, which is opened for a moment to compare, where the trunk is a tuned model of
    it, or the base in a narrower dtype. A bias that the base has not is zero. Raises InputError where anything but
    biases and gains differs, by its name.
    """
    stated = read_delta(folder)
    _refuse_unrounded(trunk, folder, stated)
    if is_its_base(trunk, folder):
        return {}
    base = load_trunk(base_config(folder, "float32"))
    refuse_other_base(base, folder)
    now, of_base = unquantised_weights(trunk), dict(base.named_parameters())
    untuned: dict[str, Tensor] = {}
    differs = next((name for name in of_base if name not in now), None)
    for name, value in now.items():
        if name not in of_base:
            if not name.endswith(".bias"):
                differs = differs or name
            elif value.any():
                untuned[name] = torch.zeros_like(value)
        elif not _equal(value, of_base[name]):
            if of_base[name].ndim > 1 or of_base[name].shape != value.shape:
                differs = differs or name
            else:
                untuned[name] = of_base[name].detach().to(value)  # in the trunk's dtype, too
    if differs is not None:
        first = f"the first {stated['layers']} blocks of " if stated["layers"] else ""
        raise InputError(
            f"{folder}: made from {first}{stated['base']}, and {differs} of this {type(trunk).__name__} is another; "
            "open that base, or a model whose biases were tuned over it"
        )
    return untuned


def _refuse_unrounded(trunk: nn.Module, folder: Path, stated: Mapping) -> None:
    """InputError for a trunk whose weights were rounded in training, and are not here."""
    weights = WeightSample.of(trunk.get_input_embeddings().weight).numbers
    rounded = weights.to(getattr(torch, stated["dtype"])).to(weights.dtype)
    if quantised_dtype(trunk) is None and not torch.equal(rounded, weights):
        raise InputError(
            f"{folder}: trained over {stated['base']} in {stated['dtype']}, and this trunk has its weights in "
            f"{trunk.dtype}, unrounded; open the base with dtype={stated['dtype']}"
        )


def _equal(value: Tensor | WeightSample, of_base: Tensor) -> bool:
    """In the dtype of `value`, of which a quantised trunk has kept a sample."""
    if isinstance(value, WeightSample):
        sample = WeightSample.of(of_base)
        return sample.shape == value.shape and _equal(value.numbers, sample.numbers)
    return value.shape == of_base.shape and torch.equal(value, of_base.to(value.device, value.dtype))
