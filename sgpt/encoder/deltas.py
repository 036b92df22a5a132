"""The deltas that an encoder has loaded, by name: many tuned models of kilobytes over one trunk."""

from collections.abc import Sequence
from numbers import Real
from pathlib import Path

from torch import Tensor, nn

from sgpt.decoder.added_biases import added_biases, remove_biases
from sgpt.decoder.families import position_limit
from sgpt.encoder.adapter import check_tokenizer, read_delta
from sgpt.encoder.contract import Contract
from sgpt.encoder.delta import Delta, bias_delta_folder, untuned_values
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import FINITE
from sgpt.text.markers import ROLES, MarkersConfig, frames

DeltaNames = str | Sequence[str | None] | None  # for all texts, or one a text; None is the encoder as it was opened
Strengths = float | Sequence[float | None] | None  # None is the strength that the delta was loaded with


class Deltas(dict[str, Delta]):
    """Name -> delta.

    biases: names of those, zeros outside of the deltas, that the trunk has for them alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.biases: set[str] = set()
        # hashes of a base and its tokenizer, once checked -> the base's values, where the trunk differs
        self._untuned: dict[tuple[str, str], dict[str, Tensor]] = {}

    def load(self, trunk: nn.Module, tokenizer, name: str, path: str | Path, strength: float) -> None:
        """As `Encoder.load_delta`."""
        if not isinstance(name, str) or not name:
            raise InputError(f"load_delta: the name is {name!r:.60}; give a text")
        if name in self:
            raise InputError(
                f"load_delta: {name!r} is loaded already, from {self[name].folder}; choose another name, or call "
                f"unload_delta({name!r}) first"
            )
        check_strength(strength)
        folder = bias_delta_folder(path)
        markers = Contract.load(folder).markers
        check_limits(markers, trunk)
        stated = read_delta(folder)
        base = (stated["base_hash"], stated.get("tokenizer_hash", ""))
        if base not in self._untuned:  # the other deltas of a base are known by its hashes
            check_tokenizer(tokenizer, folder)
            self._untuned[base] = untuned_values(trunk, folder)
        before = {*added_biases(trunk)}
        try:
            delta = Delta(trunk, folder, strength=strength, untuned=self._untuned[base])
            delta.frames = frames(markers, tokenizer)
        except InputError:
            remove_biases(trunk, {*added_biases(trunk)} - before)
            raise
        self.biases |= {*added_biases(trunk)} - before
        self[name] = delta

    def unload(self, trunk: nn.Module, name: str) -> None:
        """InputError where there is none of that name."""
        self.named(name).forget()
        del self[name]
        needed = {parameter for delta in self.values() for parameter in delta.trained}
        remove_biases(trunk, self.biases - needed)
        self.biases &= needed

    def named(self, name: str, strength: float | None = None) -> Delta:
        """The delta of that name, in another strength where one is given; InputError where there is none."""
        if name not in self:
            raise InputError(f"there is no delta {name!r:.60}; loaded are {', '.join(map(repr, self)) or 'none'}")
        return self[name] if strength is None else self[name].at(check_strength(strength))

    def of_rows(self, rows: int, delta: DeltaNames = None, strength: Strengths = None) -> list[Delta | None]:
        """Of each of the rows its delta in its strength; None for one that is embedded by the encoder as it was opened.

        Equal ones are one object. Raises InputError for unknown names, for a strength that is no number or that has no
        delta, and for lists of another length.
        """
        names = [delta] * rows if delta is None or isinstance(delta, str) else list(delta)
        for_all = strength is None or isinstance(strength, Real)
        strengths = [strength] * rows if for_all else list(strength)
        for key, values in (("delta", names), ("strength", strengths)):
            if len(values) != rows:
                raise InputError(f"{key} has {len(values)} entries for {rows} texts; give one for all, or one a text")
        if rows and strength is not None and for_all and not any(names):
            raise InputError(f"strength={strength!r:.60} has no effect without a delta; name one, or leave it out")
        different: dict[tuple, Delta | None] = {(None, None): None}
        of_rows: list[Delta | None] = []
        for name, value in zip(names, strengths, strict=True):
            if name is None and value is not None and not for_all:
                raise InputError(f"strength={value!r:.60} has no effect on a text without a delta; give None for it")
            key = (name, None if name is None else value)
            if key not in different:
                different[key] = self.named(name, value)
            of_rows.append(different[key])
        return of_rows


def check_strength(strength: float) -> float:
    """InputError for what is no number."""
    if not isinstance(strength, Real) or isinstance(strength, bool) or strength not in FINITE:
        raise InputError(f"strength={strength!r:.60} must be a number; 1 is the tuned model, 0 its base")
    return float(strength)


def check_limits(markers: MarkersConfig, trunk: nn.Module) -> None:
    """InputError for texts that may be longer than the trunk has positions."""
    limit = position_limit(trunk)
    for role in ROLES:
        if limit is not None and markers.max_tokens(role) > limit:
            raise InputError(
                f"markers.{role}_max_tokens={markers.max_tokens(role)} is more than the {limit} positions of "
                f"{type(trunk).__name__}; lower it to {limit} or less"
            )
