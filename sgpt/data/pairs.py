"""From raw rows to examples: which column is what, what a label or a score makes of a pair, and which rows are good.

    found = rows(path)
    names, found = with_names(found)
    columns = guess_columns(names, stated)
    good = accepted(examples(found, columns, num_hard_negatives=1), on_error="skip", rejected=folder / "rejected.jsonl")
"""

import difflib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from sgpt.data.beir import RetrievalSet
from sgpt.data.example import Example, checked_example, checked_text
from sgpt.data.rows import Rows, attempt, listed, of_split, rows, shown, spells_nothing
from sgpt.errors import InputError
from sgpt.metrics import Qrels

log = logging.getLogger(__name__)
Candidates = Iterator[tuple[str, "Example | InputError | OfRows | None"]]
Judge = Callable[[object, str], bool | None]

NAMES = {  # the first that is there is taken
    "query": ("query", "anchor", "question", "sentence1", "text1", "question1", "premise"),
    "positive": ("positive", "pos", "document", "answer", "passage", "response", "sentence2", "text2", "question2", "hypothesis"),
    "label": ("label", "labels", "gold_label", "is_duplicate", "duplicate", "is_relevant", "relevance"),
    "score": ("score", "similarity", "similarity_score", "relevance_score"),
}
NEGATIVE = re.compile(r"(?:hard_)?neg(?:ative)?s?(?:_?([0-9]{1,6}))?")
ROLES = ("query", "positive", "negative", "label", "score")
LABELS = {  # True: positive; False: hard negative; None: neither
    "1": True, "1.0": True, "true": True, "entailment": True, "duplicate": True, "equivalent": True,
    "0": False, "0.0": False, "false": False, "contradiction": False, "not_duplicate": False, "not_equivalent": False,
    "neutral": None, "not_entailment": None, "-": None,
}  # fmt: skip
LIST = re.compile(r"""\[\s*(?P<quote>['"]).*(?P=quote)\s*,?\s*\]""", re.DOTALL)
NUMBER = re.compile(r"-?[0-9]+(\.0+)?")
SETTLED = ("is_duplicate", "duplicate", "is_relevant", "relevance")  # columns of labels where 1 is a positive by their very names
SENTENCES = ("hypothesis", "sentence2", "text2", "sentence")  # second texts of inference and of paraphrase data, which number labels the other way round
ROWS_BEFORE_SHARE, HOPELESS = 100, 0.5  # of fewer rows a share says little; with more of them bad the rest need not be read


@dataclass(frozen=True)
class Columns:
    """The file's own names. negatives: columns that hold a text or a list of texts. Of label and score at most one, and then no negatives."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    label: str | None = None
    score: str | None = None


def with_names(rows: Rows, first: int = 100) -> tuple[list[str], Rows]:
    """The columns of the first rows together (in JSON lines some may be left out of a row), and all the rows again."""
    head = list(islice(rows, first))
    names = dict.fromkeys(name for _, row in head if not isinstance(row, InputError) for name in row)
    if not names and head and isinstance(error := head[0][1], InputError):
        raise error
    return list(names), chain(head, rows)


def guess_columns(names: Sequence[str], stated: Mapping[str, str | None], where: str = "the data") -> Columns:
    """What is stated wins, None is not stated; the rest goes by the usual names. Stated as "", negative, label or score is not used.

    A label or a score is looked for only where there are no negatives: it says the same in another way.
    """
    chosen = _stated(stated, names, where)
    free = [name for name in names if name not in chosen.values()]
    query, positive = (chosen.get(role) or _first(free, role) for role in ("query", "positive"))
    if not query or not positive:
        missing = [f"data.columns.{role}=<column>" for role, name in (("query", query), ("positive", positive)) if not name]
        raise InputError(f"{where}: which columns hold the texts is not clear from their names: {listed(names)}; set {' and '.join(missing)}")
    label, score = chosen.get("label"), chosen.get("score")
    negatives = _numbered(chosen["negative"], free) if "negative" in chosen else () if label or score else _negatives(free)
    if not (negatives or label or score):
        label = _first(free, "label") if label is None else None
        score = _first(free, "score") if score is None and not label else None
    return Columns(query, positive, negatives, label or None, score or None)


def _stated(stated: Mapping[str, str | None], names: Sequence[str], where: str) -> dict[str, str]:
    """Role -> column, for the roles that are stated; every column is there and has one role."""
    if odd := stated.keys() - {*ROLES}:
        raise InputError(f"data.columns has the unknown key {min(odd)!r}; it maps {', '.join(ROLES)}")
    chosen = {role: name for role, name in stated.items() if name is not None}
    for role, name in chosen.items():
        if name and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{where}: data.columns.{role}={name!r} names no column; it has {listed(names)}{hint}")
        if name and (other := next(role for role in chosen if chosen[role] == name)) != role:
            raise InputError(f"{where}: data.columns.{other} and data.columns.{role} both name the column {name!r}; give each its own")
    ways = [f"data.columns.{role}" for role in ("negative", "label", "score") if chosen.get(role)]
    if len(ways) > 1:
        raise InputError(f"{where}: {' and '.join(ways)} are both set, and each says which texts are hard negatives; keep one")
    return chosen


def _first(names: Sequence[str], role: str) -> str | None:
    there = {name.lower(): name for name in reversed(names)}
    return next((there[usual] for usual in NAMES[role] if usual in there), None)


def _negatives(names: Sequence[str]) -> tuple[str, ...]:
    """`negative`, `negatives`, `neg`, `hard_negatives` … and the numbered ones, by their numbers."""
    found = [(int(match[1] or 0), name) for name in names if (match := NEGATIVE.fullmatch(name.lower()))]
    return tuple(name for _, name in sorted(found, key=lambda pair: pair[0]))


def _numbered(stated: str, names: Sequence[str]) -> tuple[str, ...]:
    """The column and, where there are more, `<column>_2`, `<column>_3` …."""
    numbers = [int(name[len(stated) + 1 :]) for name in names if re.fullmatch(re.escape(stated) + r"_[1-9][0-9]{0,5}", name)]
    return (stated, *(f"{stated}_{number}" for number in sorted(numbers))) if stated else ()


def without_late_columns(rows: Rows, names: Sequence[str], columns: Columns, stated: Mapping[str, str | None], num_hard_negatives: int) -> Rows:
    """A column that is in none of the first rows and would have been guessed as label, score or negatives is an error of its row:

    what it says would be lost. What is stated is not guessed, "" for none too.
    """
    judged = columns.label or columns.score
    wanted = {"label": not judged and not columns.negatives, "score": not judged and not columns.negatives, "negative": num_hard_negatives and not judged}
    roles, known = [role for role, guessed in wanted.items() if guessed and stated.get(role) is None], {*names}
    for where, row in rows:
        late = [name for name in row if name not in known] if isinstance(row, dict) else []
        found = next(((role, name) for role in roles for name in late if _means(name, role)), None)
        if found:
            remedy = f"write it into the first row too, or set data.columns.{found[0]}='' to go on without"
            yield where, InputError(f"{where}: the column {found[1]!r}, which is in none of the first rows, would be taken for a {found[0]}; {remedy}")
        else:
            yield where, row


def _means(name: str, role: str) -> bool:
    return bool(_negatives([name])) if role == "negative" else name.lower() in NAMES[role]


def describe(columns: Columns, num_hard_negatives: int, names: Sequence[str] = (), labels: Sequence[str] = ()) -> str:
    """One line for the log."""
    negatives = f"hard negatives from {', '.join(map(repr, columns.negatives))}" if columns.negatives else "no hard negatives"
    if columns.label:
        yes, no = (", ".join(name for name, meaning in LABELS.items() if meaning is value) for value in (True, False))
        numbers = ", ".join(f"{number} is {name}" for number, name in enumerate(labels))
        judged = f"pairs judged by {columns.label!r}{f', where {numbers}' if labels else ''}"
        negatives = f"{judged}: {yes} make a positive; {no} a hard negative of the same query; others are left out"
    if columns.score:
        negatives = (
            f"pairs judged by {columns.score!r}: data.positive_score and more make a positive; less than data.negative_score a hard negative "
            "of the same query; others are left out"
        )
    idle = bool(columns.negatives or columns.label or columns.score) and not num_hard_negatives
    hint = "; data.num_hard_negatives=0 uses no hard negatives, 1 one for each query" if idle else ""
    used = {columns.query, columns.positive, *columns.negatives, columns.label, columns.score}
    unused = [name for name in names if name not in used]
    rest = f"; not used: {listed(unused)}" if unused else ""
    return f"query from {columns.query!r}, positive from {columns.positive!r}; {negatives}{hint}{rest}"


# --- examples ---


@dataclass(frozen=True)
class OfRows:
    """What several rows made together, each of which was a candidate before."""

    example: Example


def examples(
    rows: Rows, columns: Columns, *, num_hard_negatives: int,
    labels: Sequence[str] = (), positive_score: float | None = None, negative_score: float | None = None,
) -> Candidates:  # fmt: skip
    """(place, example or what is wrong with the row). InputError at once for settings that fit no row.

    All positives and hard negatives of a row are kept; of none of the latter when `num_hard_negatives` is 0. Judged pairs
    (`columns.label`, `columns.score`) are grouped by query, in the order in which queries first appear, which holds all their
    texts in memory. There, None stands for a row that is in order and went into a group; the groups come behind the last row.
    labels: what numbers in the column of labels mean, in their order from 0.
    """
    rows = _told_of_odd_texts(rows, (columns.query, columns.positive, *(columns.negatives if num_hard_negatives else ())))
    if columns.score:
        judge = _score_judge(columns.score, positive_score, negative_score, num_hard_negatives)
        return _grouped(rows, columns, columns.score, judge, num_hard_negatives)
    if positive_score is not None or negative_score is not None:
        raise InputError("data.positive_score or data.negative_score is set, but no column of scores is used; set data.columns.score=<column>")
    if columns.label:
        return _grouped(rows, columns, columns.label, _label_judge(columns, labels), num_hard_negatives)
    if labels:
        raise InputError("data.labels names the numbers of labels, but no column of labels is used; set data.columns.label=<column>, or leave it out")
    if num_hard_negatives and not columns.negatives:
        raise InputError(
            f"data.num_hard_negatives={num_hard_negatives}, but no column of hard negatives is known; "
            "set data.columns.negative=<column>, or data.num_hard_negatives=0"
        )
    return ((where, row if isinstance(row, InputError) else attempt(_example, row, columns, num_hard_negatives, where)) for where, row in rows)


def _told_of_odd_texts(rows: Rows, columns: Sequence[str]) -> Rows:
    """The rows; at the end a warning for texts that are most likely none: nan, None, a list as Python or JSON writes it."""
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
    for kind, place in first.items():
        log.warning("%s is %s and is read as a text, in %d rows; leave such cells empty, or write them anew", place, kind, counts[kind])


def _spells_list(text: object) -> bool:
    """As a cell of a table that was given a list: ['a', 'b'] or ["a"], also numpy's without commas."""
    return isinstance(text, str) and LIST.fullmatch(text.strip()) is not None


def _example(row: dict, columns: Columns, num_hard_negatives: int, where: str) -> Example:
    query, positives = _cell(row, columns.query, "query", where), _cell(row, columns.positive, "positive", where)
    if positives == []:
        raise InputError(f"{where}, column {columns.positive!r}: the list of positives is empty; remove the row or give it a text")
    negatives = _row_negatives(row, columns.negatives, where) if num_hard_negatives else []
    _check_enough(len(negatives), num_hard_negatives, " or ".join(map(repr, columns.negatives)), where)
    positive, *others = positives if isinstance(positives, list) else [positives]
    return checked_example(query, positive, negatives, where, others, columns.query, columns.positive)


def _cell(row: dict, column: str, role: str, where: str) -> object:
    if column not in row:
        raise InputError(f"{where}: no column {column!r}; it has {listed(list(row))}. Name it by data.columns.{role}=<column>")
    return row[column]


def _row_negatives(row: dict, columns: Sequence[str], where: str) -> list[object]:
    """None is no negative, nor are NaN and an empty cell, as CSV cannot say None."""
    values = [row.get(column) for column in columns]
    if odd := next((column for column, value in zip(columns, values, strict=True) if _spells_list(value)), None):
        raise InputError(
            f"{where}, column {odd!r}: {shown(row[odd])} is a list written as one text; write JSON lines or Parquet, which have lists, "
            "or a column for each text: negative_1, negative_2"
        )
    there = [value for value in values if value not in (None, "") and value == value]  # NaN equals nothing
    return [text for value in there for text in (value if isinstance(value, list) else [value])]


def _check_enough(found: int, num_hard_negatives: int, source: str, where: str) -> None:
    if found < num_hard_negatives:
        raise InputError(
            f"{where}: {found} hard negatives in column {source}, data.num_hard_negatives asks for {num_hard_negatives}; "
            "lower it, or name the column by data.columns.negative=<column>"
        )


# --- judged pairs ---


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
                raise InputError(f"{where}, column {columns.label!r}: data.labels names the numbers 0 to {len(labels) - 1}, and the label is {shown(value)}")
            return LABELS[labels[number].strip().lower()]
        if is_number and unsettled:
            raise InputError(
                f"{where}, column {columns.label!r}: the label {shown(value)} of two sentences says nothing certain, as paraphrase data call a pair 1 that "
                "inference data call 0; name the numbers from 0 on: data.labels=[not_duplicate,duplicate] or [entailment,neutral,contradiction]"
            )
        if word not in LABELS or not isinstance(value, str | int | float):
            raise InputError(
                f"{where}, column {columns.label!r}: the label {shown(value)} is none of {', '.join(LABELS)}; map it to one of them, "
                "name scores by data.columns.score=<column>, or set data.columns.label='' to take every pair as a positive"
            )
        return LABELS[word]

    return judge


def _score_judge(column: str, positive_score: float | None, negative_score: float | None, num_hard_negatives: int) -> Judge:
    if positive_score is None:
        raise InputError(
            f"column {column!r} scores the pairs, and from which score on a pair is a positive is not said; set data.positive_score=<score>, "
            "or data.columns.score='' to take every pair as a positive"
        )
    if negative_score is None and num_hard_negatives:
        raise InputError(
            f"data.num_hard_negatives={num_hard_negatives}, but below which score in column {column!r} a pair is a hard negative is not said; "
            "set data.negative_score=<score>, or data.num_hard_negatives=0"
        )
    if negative_score is not None and negative_score > positive_score:
        raise InputError(f"data.negative_score={negative_score} is above data.positive_score={positive_score}; a pair cannot be both")

    def judge(value: object, where: str) -> bool | None:
        score = _number(value, f"{where}, column {column!r}")
        return True if score >= positive_score else False if negative_score is not None and score < negative_score else None

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


def _grouped(rows: Rows, columns: Columns, judged_by: str, judge: Judge, num_hard_negatives: int) -> Candidates:
    """Pairs that are neither, and queries without a positive, are left out and counted: in judged data they are no mistake, nor are

    queries without a hard negative.
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
        positives, negatives = ([text for text, positive in group.documents.items() if positive is wanted] for wanted in (True, False))
        if positives:
            yield group.where, OfRows(checked_example(query, positives[0], negatives if num_hard_negatives else (), group.where, positives[1:]))
            short += len(negatives) < num_hard_negatives
        without += not positives
    few = f"; {short} have fewer than {num_hard_negatives} hard negatives, and positives of other queries are used instead" if short else ""
    log.info(
        f"{pairs} pairs judged by {judged_by!r}: {neither} left out as neither positive nor hard negative; "
        f"{without} of {len(groups)} queries left out for want of a positive{few}"
    )


def _judged(row: dict, columns: Columns, judged_by: str, judge: Judge, where: str) -> tuple[str, str, bool | None]:
    query, document = _cell(row, columns.query, "query", where), _cell(row, columns.positive, "positive", where)
    meaning = judge(_cell(row, judged_by, "score" if columns.score else "label", where), where)
    if meaning:
        checked_example(query, document, (), where, (), columns.query, columns.positive)
    asked = checked_text(query, f"{where}, query (column {columns.query!r})")
    return asked, checked_text(document, f"{where}, document (column {columns.positive!r})"), meaning


def _add(groups: dict[str, _Group], query: str, document: str, meaning: bool | None, where: str) -> bool | None:
    """True when the pair went into a group, None when it is neither. A query is known from its first pair on, whatever that is."""
    group = groups.setdefault(query, _Group(where))
    if meaning is None:
        return None
    if group.documents.setdefault(document, meaning) is not meaning:
        raise InputError(f"{where}: the same pair was a {'hard negative' if meaning else 'positive'} before: {document!r:.80}; remove one of them")
    return True


def retrieval_set(path: Path, split: str, stated: Mapping[str, str | None], labels: Sequence[str] = (), **on_bad_rows: object) -> RetrievalSet:
    """Pairs as queries to search with: the different positives are the corpus, those of a query are relevant to it; ids are numbers.

    labels: as for `examples`. on_bad_rows: as for `accepted`.
    """
    names, found = with_names(rows(path, split))
    columns = guess_columns(names, stated, str(path))
    log.info("%s: %s", path, describe(columns, 0, names, labels))
    if columns.score:
        raise InputError(f"{path}: column {columns.score!r} scores the pairs, and which are positives is not said; keep those, and set data.columns.score=''")
    found = without_late_columns(of_split(found, split, str(path)), names, columns, stated, 0)
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: Qrels = {}
    for example in accepted(examples(found, columns, num_hard_negatives=0, labels=labels), **on_bad_rows):
        asked = queries.setdefault(example.query, str(len(queries)))
        for text in (example.positive, *example.other_positives):
            qrels.setdefault(asked, {})[documents.setdefault(text, str(len(documents)))] = 1
    corpus, texts = ({number: text for text, number in table.items()} for table in (documents, queries))
    return RetrievalSet(path.name, corpus, texts, qrels)


# --- what becomes of bad rows ---


def accepted(candidates: Candidates, *, on_error: str = "stop", rejected: Path | None = None, max_error_share: float = 0.01) -> Iterator[Example]:
    """The examples. on_error "stop" raises the first error. "skip" writes each to `rejected` as {"where", "reason"} and goes on,

    InputError when at the end more than max_error_share of the rows were errors; and as soon as, of a hundred or more, half are.
    """
    if on_error not in ("stop", "skip"):
        raise InputError(f"data.on_error={on_error!r} is unknown; choose stop or skip")
    if not 0 <= max_error_share <= 1:
        raise InputError(f"data.max_error_share={max_error_share} must be between 0 and 1")
    return _skipping(candidates, rejected, max_error_share) if on_error == "skip" else _stopping(candidates)


def _stopping(candidates: Candidates) -> Iterator[Example]:
    for _, candidate in candidates:
        if isinstance(candidate, InputError):
            raise candidate
        if candidate is not None:
            yield _example_of(candidate)


def _example_of(candidate: Example | OfRows) -> Example:
    return candidate.example if isinstance(candidate, OfRows) else candidate


def _skipping(candidates: Candidates, rejected: Path | None, max_error_share: float) -> Iterator[Example]:
    tally = _Tally(rejected, max_error_share)
    with _opened(rejected) as out:
        try:
            for where, candidate in candidates:
                tally.seen += not isinstance(candidate, OfRows)
                if isinstance(candidate, InputError):
                    tally.count(candidate)
                    if out:  # whole after a kill, too
                        out.write(json.dumps({"where": where, "reason": str(candidate)}, ensure_ascii=False) + "\n")
                        out.flush()
                    tally.check_hopeless()
                elif candidate is not None:
                    yield _example_of(candidate)
            tally.check()
        finally:  # also when the reader needs no more
            if tally.bad:
                log.warning(tally.summary())


def _opened(rejected: Path | None):
    """Emptied at the start: what an earlier run rejected is not this run's. Half characters of file names are escaped."""
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
        return f"{self.bad} of {self.seen} rows rejected{f', listed in {self.rejected}' if self.rejected else ''}; the first: {self.first}"

    def check(self, most: float | None = None) -> None:
        if self.bad > (self.max_error_share if most is None else most) * self.seen:
            raise InputError(f"{self.summary()}. More than data.max_error_share={self.max_error_share} are not skipped; fix the rows or raise it")

    def check_hopeless(self) -> None:
        if self.seen >= ROWS_BEFORE_SHARE:
            self.check(max(self.max_error_share, HOPELESS))
