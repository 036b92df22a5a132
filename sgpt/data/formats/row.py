"""One row of anyone's file: its checks, and how a bad one becomes a value instead of an exception."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from sgpt.runtime.errors import InputError
from sgpt.text.tokens import is_whole_text

Checked = TypeVar("Checked")
PlacedRows = Iterator[tuple[str, dict | InputError]]  # ("<file>, line n", the row or what is wrong with it)
NOTHING = ("nan", "none", "null", "n/a", "<na>", "nat")  # how programs write a missing value as text
LISTED = 12  # names that a message shows
SPLITS = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "eval": "dev",
    "test": "test",
}


def same_split(one: str, other: str) -> bool:
    """By their usual names: validation, dev and Val are one."""
    return meaning_of_split(one) == meaning_of_split(other)


def meaning_of_split(split: str) -> str:
    name = split.strip().lower()
    return SPLITS.get(name, name)


def attempt(make: Callable[..., Checked], *arguments: object) -> Checked | InputError:
    """What `make` returns, or the InputError it raises, as a value: an exception would end the generator it is raised
    in.
    """
    try:
        return make(*arguments)
    except InputError as error:
        return error


def listed(names: Iterable[str]) -> str:
    """For a message: not too many, none too long, and in one line."""
    names = list(names)
    shown = [f"{name if name.isprintable() else repr(name):.40}" for name in names[:LISTED]]
    return ", ".join(shown) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def spells_nothing(text: object) -> bool:
    """What programs write as text where there is no value.

    It may be meant, as in texts about Python, so it is warned of and not changed.
    """
    return isinstance(text, str) and text.strip().lower() in NOTHING


def shown(value: object) -> str:
    """Cut to 80 characters, in quotes; bytes as the text they may be."""
    return repr(value[:320].decode(errors="backslashreplace")[:80] if isinstance(value, bytes) else value)[:82]


def repeated(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def checked_row(row: dict, where: str) -> dict:
    """`row`, if its texts can be stored and tokenised: JSON's escapes can spell NUL, and half of a character."""
    for column, value in row.items():
        for text in (column, *_texts(value)):
            if "\0" in text:
                raise InputError(f"{where}, column {shown(column)}: a NUL character in {shown(text)}; remove it")
            if not is_whole_text(text):
                raise InputError(
                    f"{where}, column {shown(column)}: half of a surrogate pair in {shown(text)}, "
                    "which is no character; remove it"
                )
    return row


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def checked_names(given: list[str], where: str) -> list[str]:
    names = [name.strip() for name in given]
    if not all(names):
        position = next(position for position, name in enumerate(names, 1) if not name)
        raise InputError(
            f"{where}: column {position} of {shown(', '.join(given)[:80])} has no name; name or remove it (pandas: "
            "to_csv(index=False))"
        )
    if len({*names}) < len(names):
        raise InputError(f"{where}: two columns are called {shown(repeated(names))}; rename or remove one")
    return names


def short_reason(error: BaseException) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.200}"
