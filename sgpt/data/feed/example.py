"""What every reader yields, and the checks that hold for all of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from sgpt.runtime.errors import InputError


@dataclass(frozen=True)
class Example:
    """Plain strings. Of hard negatives a run takes H at a time; 0 is allowed. Of several positives one is drawn each epoch,

    and the others are never negatives of this query.
    """

    query: str
    positive: str
    hard_negatives: tuple[str, ...] = ()
    other_positives: tuple[str, ...] = ()


def checked_text(value: object, where: str) -> str:
    """`value` if it is text with something in it; InputError naming `where` otherwise."""
    if not isinstance(value, str):
        raise InputError(f"{where}: expected text, got {type(value).__name__} {value!r:.80}; give a string")
    if not value.strip():
        raise InputError(f"{where}: the text is blank; remove the row or give it text")
    return value


def checked_example(
    query: object, positive: object, hard_negatives: Iterable[object], where: str, other_positives: Iterable[object] = (),
    query_column: str = "query", positive_column: str = "positive",
) -> Example:  # fmt: skip
    """Columns as messages name them, the source's own."""
    made = Example(
        checked_text(query, f"{where}, {_role('query', query_column)}"),
        checked_text(positive, f"{where}, {_role('positive', positive_column)}"),
        tuple(checked_text(text, f"{where}, hard negative {i + 1}") for i, text in enumerate(hard_negatives)),
        tuple(checked_text(text, f"{where}, positive {i + 2}") for i, text in enumerate(other_positives)),
    )
    if made.query == made.positive or made.query in made.other_positives:
        remedy = "such a pair teaches nothing, remove it, or go on without by data.on_error=skip"
        raise InputError(f"{where}: the positive equals the query {made.query!r:.80}; {remedy}")
    if twice := {made.positive, *made.other_positives} & {*made.hard_negatives}:
        raise InputError(f"{where}: a hard negative equals the positive {twice.pop()!r:.80}; remove one of them")
    return made


def _role(role: str, column: str) -> str:
    return role if column == role else f"{role} (column {column!r})"
