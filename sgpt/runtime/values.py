"""What the numbers and texts of a configuration may be.

Anything else is refused by key, with the value and what is allowed.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sgpt.runtime.errors import InputError
from sgpt.runtime.overrides import argument

MOST = 2**31 - 1  # of a count: what 32 bits hold, in libraries and in files
MOST_THREADS = 1024  # each costs memory, and beyond what a system gives a process ends without a word
LARGEST = 1e30  # of any other number: float32 holds it, and its product with another one of a configuration


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; without `low` itself where `above`, without `high` itself where `below`.

    words: what messages say after "must be".
    """

    words: str
    low: float = -LARGEST
    high: float = LARGEST
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Not a number, nan, is in none."""
        excluded = (self.above and value == self.low) or (self.below and value == self.high)
        return self.low <= value <= self.high and not excluded

    def or_null(self, meaning: str) -> "Range":
        return replace(self, words=f"{self.words}, or null {meaning}".rstrip())

    def describe(self, value: float) -> str:
        """What is allowed instead of `value`. A bound that only machines have is named to those alone who pass it."""
        too_large = self.high in (MOST, LARGEST, MOST_THREADS) and self.high < value < math.inf
        return f"at most {self.high:.10g}" if too_large else self.words


COUNT = Range("1 or more", 1, MOST)
COUNT_OR_NONE = Range("0 or more", 0, MOST)
SEED = Range("a whole number from 0 to 4294967295", 0, 2**32 - 1)  # numpy's
THREADS = Range("1 or more", 1, MOST_THREADS)
POSITIVE = Range("positive", 0, above=True)
NOT_NEGATIVE = Range("0 or more", 0)
FINITE = Range("a number")
SHARE = Range("from 0 to 1", 0, 1)
BELOW_ONE = Range("0 or more and below 1", 0, 1, below=True)


def check_ranges(config: Any, prefix: str = "", **ranges: Range) -> None:
    """InputError for the first field out of its range; None is in every one. prefix: of the key, with its dot."""
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise InputError(f"{prefix}{name}={value} must be {allowed.describe(value)}")


def check_choice(key: str, value: str, choices: Collection[str]) -> None:
    """InputError, with the choices, for a value that is none of them. choices: names, or a table's rows by name."""
    if value not in choices:
        *others, last = choices
        listed = f"{', '.join(others)} or {last}" if others else last
        raise InputError(f"{key}={value!r} is unknown; choose {listed}")


def check_unused(config: Any, keys: Collection[str], without: str) -> None:
    """InputError for the first of these fields that is not its default. without: what else it needs to have an effect.

    The value is not named, as it may be a secret.
    """
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in keys and getattr(config, field.name) != default:
            raise InputError(f"{field.name} has no effect without {without}")


def check_api_key(api_key: str | None) -> None:
    """InputError for a key that no header can carry as it is; null is no key."""
    if api_key is None or re.fullmatch("[!-~]+", api_key):
        return
    problem = "holds a blank, or what is no ASCII" if api_key else "is empty"  # and is not shown: others may read logs
    raise InputError(f"api_key {problem}; set one of letters, digits and signs, or api_key=null for none")


def check_path_of_choice(config: Any, key: str, paths: Mapping[str, str | None]) -> None:
    """InputError for a choice that is none of `paths`, without the path that it reads, or next to that of another one.

    paths: choice -> the key that holds its path, None for a choice that reads none.
    """
    chosen = getattr(config, key)
    check_choice(key, chosen, paths)
    for choice, path_key in paths.items():
        if path_key is None:
            continue
        path = getattr(config, path_key)
        if choice == chosen and not path:
            raise InputError(f"{key}={chosen} needs {path_key}=<path>")
        if choice != chosen and path:
            raise InputError(f"{key}={chosen} does not read {path_key}={path}; set {key}={choice}, or leave it out")


def check_shapes(schema: type, tree: Any, key: str = "") -> None:
    """InputError for the first key that holds keys, a list or a single value where the schema has another of the three.
    """
    if is_dataclass(schema) or (get_origin(schema) or schema) is dict:
        if not isinstance(tree, dict):
            example = f"{key}.{fields(schema)[0].name}=…" if is_dataclass(schema) else f"{key}.<name>=…"
            raise InputError(f"{key}={tree!r}: {key} is a group of keys; set them one by one, for example {example}")
        kinds = get_type_hints(schema) if is_dataclass(schema) else dict.fromkeys(tree, str)
        for name in tree.keys() & kinds.keys():
            options = get_args(kinds[name]) if isinstance(kinds[name], UnionType) else [kinds[name]]
            kind = next(option for option in options if option is not type(None))
            may_be_null = kind is not kinds[name]
            if tree[name] is not None or not may_be_null:
                check_shapes(kind, tree[name], f"{key}.{name}" if key else str(name))
    elif get_origin(schema) is list:
        if not isinstance(tree, list):
            raise InputError(f"{key}={tree!r} is not a list; write {argument(key, [str(tree)])}")
        for number, inner in enumerate(tree):
            check_shapes(get_args(schema)[0], inner, f"{key}[{number}]")
    elif isinstance(tree, dict | list):
        raise InputError(f"{key}={tree!r} must be a single value; write it without brackets and braces, or in quotes")


def check_texts(config: Any, prefix: str = "") -> None:
    """InputError for the first text, at any depth, that no file, no log and no tokenizer could take.

    Or that is empty where null would be meant.
    """
    kinds = get_type_hints(type(config))
    for field in fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if value == "" and type(None) in getattr(kinds[field.name], "__args__", ()):
            raise InputError(f"{key} is empty; set it, or leave it null")
        _check_text(key, value)


def _check_text(key: str, value: Any) -> None:
    if is_dataclass(value):
        check_texts(value, f"{key}.")
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_text(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_text(f"{key}[{number}]", inner)
    elif isinstance(value, str):
        if "\0" in value:
            raise InputError(f"{key}={value!r} holds a zero byte, which no path and no text can; leave it out")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{key}={value!r} is not in UTF-8, so it cannot be written into the files of a run; rename it"
            ) from None
