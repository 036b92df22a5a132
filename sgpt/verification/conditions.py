"""The conditions under which a server is asked: alone, in batches, in batches without padding, under load.

Each is a list of requests. Servers batch what comes at the same time, so a fault of equal lengths may show under load
alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sgpt.text.tokens import TokenLists


@dataclass(frozen=True)
class Condition:
    """requests: rows of the texts in each. at_once: all requests are sent at the same time. base64: vectors as text."""

    name: str
    requests: list[list[int]]
    at_once: bool = False
    base64: bool = False


def conditions(
    ids: TokenLists, probes: int, around: int, limit: int, *, texts_per_request: int, requests_at_once: int,
    base64: bool = False,
) -> list[Condition]:  # fmt: skip
    """For texts with these token ids, of which markers and special tokens are `around`, and `limit` is the most.

    probes: so many of the first texts, and all as long as the limit, are asked for alone; all are in the batches. Under
    load some texts are asked for several times. base64: some are asked for so as well, as OpenAI's own client does.
    """
    rows = [row for row in range(len(ids)) if ids[row]]
    long = [row for row in rows if len(ids[row]) >= limit]
    short = [row for row in rows if row < probes and len(ids[row]) <= around + 1]
    middle = [row for row in rows if row < probes and row not in {*short, *long}]
    equal = _equal_lengths(rows, ids)
    loaded = [rows[number % len(rows)] for number in range(requests_at_once)]
    # neither of one token nor cut: a mask shows most in between
    between = [group for group in equal if around + 1 < len(ids[group[0]]) < limit]
    most_equal = max(between or equal, key=len, default=[])
    all_conditions = [
        Condition("one at a time", [[row] for row in middle]),
        Condition("empty and of one token", [[row] for row in short]),
        Condition("as long as the limit, and longer", [[row] for row in long]),
        Condition("one batch", _chunks(rows, texts_per_request)),
        Condition("equal lengths together", [part for group in equal for part in _chunks(group, texts_per_request)]),
        Condition(f"{requests_at_once} requests at once", [[row] for row in loaded], at_once=True),
    ]
    if most_equal:
        repeated = [[most_equal[number % len(most_equal)]] for number in range(requests_at_once)]
        name = f"{requests_at_once} at once, equal lengths"
        all_conditions.append(Condition(name, repeated, at_once=True))
    if base64:
        all_conditions.append(Condition("in base64", _chunks(middle, texts_per_request), base64=True))
    return [condition for condition in all_conditions if condition.requests]


def _equal_lengths(rows: Sequence[int], ids: TokenLists) -> list[list[int]]:
    """Rows in groups of one length, of two rows at least. A single token attends to nothing else, and is left out."""
    by_length: dict[int, list[int]] = {}
    for row in rows:
        if len(ids[row]) > 1:
            by_length.setdefault(len(ids[row]), []).append(row)
    return [group for length, group in sorted(by_length.items()) if len(group) > 1]


def _chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
