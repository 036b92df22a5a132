"""What becomes of bad rows: the first one stops the run, or they are listed and counted."""

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sgpt.data.feed.example import Example
from sgpt.data.sources.pairs import GroupedExample, ParsedRows
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import check_choice

log = logging.getLogger(__name__)
# of fewer rows a share says little; with more of them bad the rest need not be read
ROWS_BEFORE_SHARE, HOPELESS = 100, 0.5


def accepted(
    parsed_rows: ParsedRows, *, on_error: str = "stop", rejected: Path | None = None, max_error_share: float = 0.01,
    limit: int | None = None,
) -> Iterator[Example]:  # fmt: skip
    """The examples among the parsed rows, the first `limit` of them.

    on_error: "stop" raises the first error; "skip" writes each to `rejected` as {"where", "reason"} and leaves the row
    out. InputError when at the end more than max_error_share of the rows were errors, of a hundred or more where the
    limit was the end; and as soon as, of a hundred or more, half are.
    """
    check_choice("data.on_error", on_error, ("stop", "skip"))
    if not 0 <= max_error_share <= 1:
        raise InputError(f"data.max_error_share={max_error_share} must be between 0 and 1")
    if on_error == "stop":
        return islice(_stopping(parsed_rows), limit)
    return _skipping(parsed_rows, rejected, max_error_share, limit)


def _stopping(parsed_rows: ParsedRows) -> Iterator[Example]:
    for _, parsed in parsed_rows:
        if isinstance(parsed, InputError):
            raise parsed
        if parsed is not None:
            yield _example_of(parsed)


def _example_of(parsed: Example | GroupedExample) -> Example:
    return parsed.example if isinstance(parsed, GroupedExample) else parsed


def _skipping(
    parsed_rows: ParsedRows, rejected: Path | None, max_error_share: float, limit: int | None
) -> Iterator[Example]:
    tally = _Tally(rejected, max_error_share)
    taken = 0
    with _opened(rejected) as out:
        try:
            for where, parsed in parsed_rows:
                tally.seen += not isinstance(parsed, GroupedExample)
                if isinstance(parsed, InputError):
                    tally.count(parsed)
                    if out:  # whole after a kill, too
                        out.write(json.dumps({"where": where, "reason": str(parsed)}, ensure_ascii=False) + "\n")
                        out.flush()
                    tally.check_hopeless()
                elif parsed is not None:
                    yield _example_of(parsed)
                    taken += 1
                    if taken == limit:
                        break
            if taken != limit or tally.seen >= ROWS_BEFORE_SHARE:
                tally.check()
        finally:  # also when the reader needs no more
            if tally.bad:
                log.warning(tally.summary())


def _opened(rejected: Path | None):
    """The file for rejected rows, empty: what an earlier run rejected is not this run's.

    A message may quote a file name that is not UTF-8, so what cannot be encoded is escaped.
    """
    if rejected is None:
        return nullcontext()
    rejected.parent.mkdir(parents=True, exist_ok=True)
    return rejected.open("w", encoding="utf-8", errors="backslashreplace")


@dataclass
class _Tally:
    rejected: Path | None
    max_error_share: float
    seen: int = 0
    bad: int = 0
    first: str = ""

    def count(self, error: InputError) -> None:
        self.bad += 1
        self.first = self.first or str(error)

    def summary(self) -> str:
        return (
            f"{self.bad} of {self.seen} rows rejected{f', listed in {self.rejected}' if self.rejected else ''}; "
            f"the first: {self.first}"
        )

    def check(self, most: float | None = None) -> None:
        if self.bad > (self.max_error_share if most is None else most) * self.seen:
            raise InputError(
                f"{self.summary()}. More than data.max_error_share={self.max_error_share} are not skipped; "
                "fix the rows or raise it"
            )

    def check_hopeless(self) -> None:
        if self.seen >= ROWS_BEFORE_SHARE:
            self.check(max(self.max_error_share, HOPELESS))
