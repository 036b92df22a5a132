"""What every reader yields, and the checks that hold for all of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from sgpt.runtime.errors import InputError


@dataclass(frozen=True)
class Example:
    """A query with its documents, as plain strings.

    Of hard negatives a run takes H at a time; 0 is allowed. Of several positives one is drawn each epoch, and the
    others are never negatives of this query.
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
    query: object, positive: object, hard_negatives: Iterable[object], where: str,
    other_positives: Iterable[object] = (), query_column: str = "query", positive_column: str = "positive",
) -> Example:  # fmt: skip
    """An example of checked texts; InputError, with `where`, for one that cannot be trained on.

    query_column, positive_column: the source's own names, for messages.
    """
    example = Example(
        checked_text(query, f"{where}, {_role('query', query_column)}"),
        checked_text(positive, f"{where}, {_role('positive', positive_column)}"),
        tuple(checked_text(text, f"{where}, hard negative {i + 1}") for i, text in enumerate(hard_negatives)),
        tuple(checked_text(text, f"{where}, positive {i + 2}") for i, text in enumerate(other_positives)),
    )
    positives = {example.positive, *example.other_positives}
    if example.query in positives:
        remedy = "such a pair teaches nothing, remove it, or skip such rows with data.on_error=skip"
        raise InputError(f"{where}: the positive equals the query {example.query!r:.80}; {remedy}")
    twice = positives & {*example.hard_negatives}
    if twice:
        raise InputError(f"{where}: a hard negative equals the positive {twice.pop()!r:.80}; remove one of them")
    return example


def _role(role: str, column: str) -> str:
    return role if column == role else f"{role} (column {column!r})"
