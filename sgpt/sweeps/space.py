"""The search space of a study: of each key of the configuration, what it may be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgpt.runtime.errors import InputError
from sgpt.runtime.values import FINITE, POSITIVE, check_ranges

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass
class Dimension:
    """What one key of a configuration may be: a number from low to high, or one of some choices."""

    key: str = ""
    """Key, or group of options, of the configuration of train/biencoder.py."""
    low: float | None = None
    """Smallest number."""
    high: float | None = None
    """Largest number."""
    log: bool = False
    """Whether numbers are drawn evenly by their logarithm, as of learning rates; low must be positive then."""
    step: float | None = None
    """Distance from one number to the next, counted from low: 1 gives whole numbers; null gives all."""
    choices: list[str] | None = None
    """Values to choose from, as the command line takes them, instead of numbers: also options of groups."""

    def __post_init__(self) -> None:
        check_ranges(self, low=FINITE, high=FINITE, step=POSITIVE.or_null("for all numbers"))


def check_space(space: Sequence[Dimension]) -> None:
    """InputError for the first key that is given too little, or two things at once."""
    if not space:
        raise InputError("space is empty; for example space=[{key: optim.learning_rate, low: 1e-4, high: 0.1}]")
    keys = [dimension.key for dimension in space]
    for dimension in space:
        where = f"space: {dimension.key}"
        numbers = (dimension.low, dimension.high, dimension.step, dimension.log or None)
        if not dimension.key or keys.count(dimension.key) > 1:
            raise InputError(f"space has the keys {keys}; each member needs a key, and each key one member")
        if dimension.choices is not None:
            if any(number is not None for number in numbers):
                raise InputError(f"{where} has choices and numbers; leave one of them out")
            if len(set(dimension.choices)) < max(2, len(dimension.choices)):
                raise InputError(f"{where} has the choices {dimension.choices}; give two or more that differ")
        elif dimension.low is None or dimension.high is None:
            raise InputError(f"{where} needs low and high, or choices")
        elif not dimension.low < dimension.high:
            raise InputError(f"{where} has low={dimension.low:g}, which must be below high={dimension.high:g}")
        elif dimension.log and dimension.low <= 0:
            raise InputError(f"{where} has low={dimension.low:g}, which must be positive with log")
        elif dimension.log and dimension.step:
            raise InputError(f"{where} has log and step; leave one of them out")


def draw(trial: "Trial", space: Sequence[Dimension]) -> None:
    """Has the study's sampler draw a value of each key, into `trial.params`."""
    for item in space:
        if item.choices is not None:
            trial.suggest_categorical(item.key, item.choices)
        else:
            trial.suggest_float(item.key, item.low, item.high, log=item.log, step=item.step)


def drawn_overrides(values: Mapping[str, str | float]) -> list[str]:
    """`key=value` of each, with whole numbers as such: a key that counts takes no 16.0."""
    overrides = []
    for key, value in values.items():
        is_whole = isinstance(value, float) and value.is_integer()
        overrides.append(f"{key}={int(value) if is_whole else value}")
    return overrides


def example_values(space: Sequence[Dimension]) -> dict[str, str | float]:
    """Of a trial that may be drawn: the first choices and the smallest numbers."""
    return {item.key: item.choices[0] if item.choices else item.low for item in space}


def drawn_fractions(item: Dimension) -> list[float]:
    """Numbers with a fraction that may be drawn, near low and in the middle; none where all are whole."""
    if item.choices is not None:
        return []
    near, middle = item.low + (item.step or min(0.5, (item.high - item.low) / 2)), (item.low + item.high) // 2 + 0.5
    drawn = [near] if item.step else [near, middle]
    return [value for value in drawn if item.low <= value <= item.high and not float(value).is_integer()]


def check_values(space: Sequence[Dimension], check: Callable[[list[str]], object]) -> None:
    """InputError where training refuses what may be drawn: the example's values, or fractions for a whole-number key.

    check: raises InputError for overrides of a trial that training refuses.
    """
    example = example_values(space)
    check(drawn_overrides(example))
    for item in space:
        for value in drawn_fractions(item):
            try:
                check(drawn_overrides({**example, item.key: value}))
            except InputError as error:  # of the fraction, since low was not refused
                other = "log" if item.log else f"step: {item.step:g}" if item.step else ""
                remedy = "step: 1" + (f" in place of {other}" if other else "")
                raise InputError(
                    f"space: {item.key} may be drawn as {value:g}, which training refuses ({error}); give it {remedy}, "
                    "which draws whole numbers"
                ) from None
