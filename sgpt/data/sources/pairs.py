"""From rows to examples: what a row, a label or a score makes of a pair.

Columns are recognised in columns.py, bad rows counted in bad_rows.py. In short, what sgpt/data/readers.py does with a
file of rows (`_fill_rows`):

    all_rows = rows(path)
    names, all_rows = peek_column_names(all_rows)
    columns = guess_columns(names, stated)
    parsed_rows = examples(all_rows, columns, num_hard_negatives=1)
    good = accepted(parsed_rows, on_error="skip", rejected=folder / "rejected.jsonl")
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sgpt.data.feed.example import Example, checked_example, checked_text
from sgpt.data.formats.row import PlacedRows, attempt, listed, shown, spells_nothing
from sgpt.data.sources.columns import LABELS, Columns
from sgpt.runtime.errors import InputError

log = logging.getLogger(__name__)
# (where a row lies, what it became); None: the row is in order and waits in a group (`examples`)
ParsedRows = Iterator[tuple[str, "Example | InputError | GroupedExample | None"]]
# (a label or score, where its row lies) -> True: a positive; False: a hard negative; None: neither
Judge = Callable[[object, str], bool | None]
LIST = re.compile(r"""\[\s*(?P<quote>['"]).*(?P=quote)\s*,?\s*\]""", re.DOTALL)
NUMBER = re.compile(r"-?[0-9]+(\.0+)?")
# columns of labels where 1 is a positive by their very names
SETTLED = ("is_duplicate", "duplicate", "is_relevant", "relevance")
# second texts of inference and of paraphrase data, which number labels the other way round
SENTENCES = ("hypothesis", "sentence2", "text2", "sentence")


@dataclass(frozen=True)
class GroupedExample:
    """An example made of several judged pairs of one query; each of these rows was yielded before, as None."""

    example: Example


def examples(
    rows: PlacedRows, columns: Columns, *, num_hard_negatives: int,
    labels: Sequence[str] = (), positive_score: float | None = None, negative_score: float | None = None,
    keep_negatives: bool | None = None,
) -> ParsedRows:  # fmt: skip
    """("<file>, line n", example or what is wrong with the row). InputError at once for settings that fit no row.

    All positives of a row are kept, and all hard negatives, of which it has `num_hard_negatives` at least;
    keep_negatives: None keeps them where that is more than 0. Judged
    pairs (`columns.label`, `columns.score`) are grouped by query, in the order in which queries first appear, which
    holds all their texts in memory. For them None stands for a row that is in order and went into a group; the groups
    follow after the last row. labels: what numbers in the column of labels mean, in their order from 0.
    """
    keep = bool(num_hard_negatives) if keep_negatives is None else keep_negatives
    rows = _warned_of_odd_texts(rows, (columns.query, columns.positive, *(columns.negatives if keep else ())))
    if columns.score:
        judge = _score_judge(columns.score, positive_score, negative_score, num_hard_negatives)
        return _grouped(rows, columns, columns.score, judge, num_hard_negatives, keep)
    if positive_score is not None or negative_score is not None:
        key = "data.negative_score" if positive_score is None else "data.positive_score"
        raise InputError(f"{key} is set, but no column of scores is used; set data.columns.score=<column>")
    if columns.label:
        return _grouped(rows, columns, columns.label, _label_judge(columns, labels), num_hard_negatives, keep)
    if labels:
        raise InputError(
            "data.labels names the numbers of labels, but no column of labels is used; "
            "set data.columns.label=<column>, or leave it out"
        )
    if num_hard_negatives and not columns.negatives:
        raise InputError(
            f"data.num_hard_negatives={num_hard_negatives}, but no column of hard negatives is known; "
            "set data.columns.negative=<column>, or data.num_hard_negatives=0"
        )
    return (
        (
            where,
            row if isinstance(row, InputError) else attempt(_example, row, columns, num_hard_negatives, keep, where),
        )
        for where, row in rows
    )


def _warned_of_odd_texts(rows: PlacedRows, columns: Sequence[str]) -> PlacedRows:
    """The rows; after the last one a warning, if some texts look like missing values or like lists.

    That is nan, None …, and a list as Python or JSON writes it.
    """
    kinds = {"a word for no value": spells_nothing, "a list written as text": _spells_list}
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for where, row in rows:
        texts = [row.get(column) for column in columns] if isinstance(row, dict) else ()
        for kind, is_odd in kinds.items():
            if odd := next(filter(is_odd, texts), None):
                first.setdefault(kind, f"{where}: {shown(odd)}")
                counts[kind] += 1
        yield where, row
    for kind, where in first.items():
        log.warning(
            "%s is %s and is read as a text, in %d rows; leave such cells empty, or write them anew",
            where,
            kind,
            counts[kind],
        )


def _spells_list(text: object) -> bool:
    """As a cell of a table that was given a list: ['a', 'b'] or ["a"], also numpy's without commas."""
    return isinstance(text, str) and LIST.fullmatch(text.strip()) is not None


def _example(row: dict, columns: Columns, num_hard_negatives: int, keep_negatives: bool, where: str) -> Example:
    query, positives = _cell(row, columns.query, "query", where), _cell(row, columns.positive, "positive", where)
    if positives == []:
        raise InputError(
            f"{where}, column {columns.positive!r}: the list of positives is empty; remove the row or give it a text"
        )
    negatives = _row_negatives(row, columns.negatives, where) if keep_negatives else []
    _check_enough(len(negatives), num_hard_negatives, " or ".join(map(repr, columns.negatives)), where)
    positive, *others = positives if isinstance(positives, list) else [positives]
    return checked_example(query, positive, negatives, where, others, columns.query, columns.positive)


def _cell(row: dict, column: str, role: str, where: str) -> object:
    if column not in row:
        raise InputError(
            f"{where}: no column {column!r}; it has {listed(list(row))}. Name it by data.columns.{role}=<column>"
        )
    return row[column]


def _row_negatives(row: dict, columns: Sequence[str], where: str) -> list[object]:
    """None is no negative, nor are NaN and an empty cell, as CSV cannot say None."""
    values = [row.get(column) for column in columns]
    if odd := next((column for column, value in zip(columns, values, strict=True) if _spells_list(value)), None):
        raise InputError(
            f"{where}, column {odd!r}: {shown(row[odd])} is a list written as one text; "
            "write JSON lines or Parquet, which have lists, or a column for each text: negative_1, negative_2"
        )
    given = [value for value in values if value not in (None, "") and value == value]  # NaN equals nothing
    return [text for value in given for text in (value if isinstance(value, list) else [value])]


def _check_enough(count: int, num_hard_negatives: int, source: str, where: str) -> None:
    if count < num_hard_negatives:
        raise InputError(
            f"{where}: {count} hard negatives in column {source}, data.num_hard_negatives asks for "
            f"{num_hard_negatives}; lower it, name the column by data.columns.negative=<column>, or skip such rows "
            "with data.on_error=skip"
        )


def _label_judge(columns: Columns, labels: Sequence[str]) -> Judge:
    """labels: names of the numbers from 0 on. Without them 1 is a positive, but where sets differ in that."""
    if odd := next((name for name in labels if name.strip().lower() not in LABELS), None):
        raise InputError(f"data.labels: {odd!r:.80} is none of {', '.join(LABELS)}; name each number by one of them")
    unsettled = columns.positive.lower() in SENTENCES and (columns.label or "").lower() not in SETTLED

    def judge(value: object, where: str) -> bool | None:
        word = str(value).strip().lower()
        is_number = NUMBER.fullmatch(word) is not None
        if is_number and labels:
            number = int(float(word))
            if not 0 <= number < len(labels):
                raise InputError(
                    f"{where}, column {columns.label!r}: data.labels names the numbers 0 to {len(labels) - 1}, "
                    f"and the label is {shown(value)}"
                )
            return LABELS[labels[number].strip().lower()]
        if is_number and unsettled:
            raise InputError(
                f"{where}, column {columns.label!r}: the label {shown(value)} of two sentences is ambiguous, as "
                "paraphrase data call a pair 1 that inference data call 0; say what the numbers mean, from 0 on: "
                "data.labels=[not_duplicate,duplicate] or [entailment,neutral,contradiction]"
            )
        if word not in LABELS or not isinstance(value, str | int | float):
            raise InputError(
                f"{where}, column {columns.label!r}: the label {shown(value)} is none of {', '.join(LABELS)}; "
                "map it to one of them, name scores by data.columns.score=<column>, or set data.columns.label='' to "
                "take every pair as a positive"
            )
        return LABELS[word]

    return judge


def _score_judge(
    column: str, positive_score: float | None, negative_score: float | None, num_hard_negatives: int
) -> Judge:
    if positive_score is None:
        raise InputError(
            f"column {column!r} scores the pairs, and from which score on a pair is a positive is not said; "
            "set data.positive_score=<score>, or data.columns.score='' to take every pair as a positive"
        )
    if negative_score is None and num_hard_negatives:
        raise InputError(
            f"data.num_hard_negatives={num_hard_negatives}, but below which score in column {column!r} a pair is a "
            "hard negative is not said; set data.negative_score=<score>, or data.num_hard_negatives=0"
        )
    if negative_score is not None and negative_score > positive_score:
        raise InputError(
            f"data.negative_score={negative_score} is above data.positive_score={positive_score}; "
            "a pair cannot be both"
        )

    def judge(value: object, where: str) -> bool | None:
        score = _number(value, f"{where}, column {column!r}")
        if score >= positive_score:
            return True
        if negative_score is not None and score < negative_score:
            return False
        return None

    return judge


def _number(value: object, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # CSV gives texts
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: expected a number, got {type(value).__name__} {value!r:.80}; fix or remove the row")
    return number


@dataclass
class _Group:
    """Pairs of one query: `documents` says of each whether it is a positive."""

    where: str
    documents: dict[str, bool] = field(default_factory=dict)


def _grouped(
    rows: PlacedRows, columns: Columns, judged_by: str, judge: Judge, num_hard_negatives: int, keep_negatives: bool
) -> ParsedRows:
    """Pairs that are neither, and queries without a positive, are left out and counted.

    In judged data they are no mistake, nor are queries without a hard negative.
    """
    groups: dict[str, _Group] = {}
    pairs = neither = 0
    for where, row in rows:
        pair = row if isinstance(row, InputError) else attempt(_judged, row, columns, judged_by, judge, where)
        added = pair if isinstance(pair, InputError) else attempt(_add, groups, *pair, where)
        pairs += not isinstance(added, InputError)
        neither += added is None
        yield where, added if isinstance(added, InputError) else None
    without = short = 0
    for query, group in groups.items():
        positives = [text for text, is_positive in group.documents.items() if is_positive]
        negatives = [text for text, is_positive in group.documents.items() if not is_positive]
        if not positives:
            without += 1
            continue
        short += len(negatives) < num_hard_negatives
        used = negatives if keep_negatives else ()
        yield group.where, GroupedExample(checked_example(query, positives[0], used, group.where, positives[1:]))
    few = ""
    if short:
        few = (
            f"; {short} have fewer than {num_hard_negatives} hard negatives, and positives of other queries are used "
            "instead"
        )
    log.info(
        f"{pairs} pairs judged by {judged_by!r}: {neither} left out as neither positive nor hard negative; "
        f"{without} of {len(groups)} queries left out for want of a positive{few}"
    )


def _judged(row: dict, columns: Columns, judged_by: str, judge: Judge, where: str) -> tuple[str, str, bool | None]:
    query, document = _cell(row, columns.query, "query", where), _cell(row, columns.positive, "positive", where)
    meaning = judge(_cell(row, judged_by, "score" if columns.score else "label", where), where)
    if meaning:
        checked_example(query, document, (), where, (), columns.query, columns.positive)
    query_text = checked_text(query, f"{where}, query (column {columns.query!r})")
    document_text = checked_text(document, f"{where}, document (column {columns.positive!r})")
    return query_text, document_text, meaning


def _add(groups: dict[str, _Group], query: str, document: str, meaning: bool | None, where: str) -> bool | None:
    """True when the pair went into a group, None when it is neither.

    A query is known from its first pair on, whatever that is.
    """
    group = groups.setdefault(query, _Group(where))
    if meaning is None:
        return None
    if group.documents.setdefault(document, meaning) is not meaning:
        raise InputError(
            f"{where}: the same pair was a {'hard negative' if meaning else 'positive'} before: {document!r:.80}; "
            "remove one of them"
        )
    return True
