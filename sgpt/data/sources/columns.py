"""Which column of a file is what: stated, or guessed by its usual names."""

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

from sgpt.data.formats.row import PlacedRows, listed
from sgpt.runtime.errors import InputError

log = logging.getLogger(__name__)
NAMES = {  # the first that is there is taken
    "query": ("query", "anchor", "question", "sentence1", "text1", "question1", "premise"),
    "positive": (
        "positive",
        "pos",
        "document",
        "answer",
        "passage",
        "response",
        "sentence2",
        "text2",
        "question2",
        "hypothesis",
    ),
    "label": ("label", "labels", "gold_label", "is_duplicate", "duplicate", "is_relevant", "relevance"),
    "score": ("score", "similarity", "similarity_score", "relevance_score"),
    "title": ("title", "heading", "headline"),
    "text": ("text", "content", "body", "document", "passage", "abstract"),
}
NEGATIVE = re.compile(r"(?:hard_)?neg(?:ative)?s?(?:_?([0-9]{1,6}))?")
COLUMN_ROLES = ("query", "positive", "negative", "label", "score")
LABELS = {  # True: positive; False: hard negative; None: neither
    "1": True, "1.0": True, "true": True, "entailment": True, "duplicate": True, "equivalent": True,
    "0": False, "0.0": False, "false": False, "contradiction": False, "not_duplicate": False, "not_equivalent": False,
    "neutral": None, "not_entailment": None, "-": None,
}  # fmt: skip


KEYS = re.compile(r"\bdata\.(?=columns|labels|positive_score|negative_score|on_error|max_error_share)")


@contextmanager
def keys_below(prefix: str) -> Iterator[None]:
    """Inside, an InputError of pairs names its keys as a configuration has them that is not of training data.

    prefix: "evaluation." where data.labels is evaluation.labels; "" where it is labels.
    """
    try:
        yield
    except InputError as error:
        raise InputError(KEYS.sub(prefix, str(error))) from error


@dataclass(frozen=True)
class Columns:
    """The file's own names.

    negatives: columns that hold a text or a list of texts. Of label and score at most one, and then no negatives.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    label: str | None = None
    score: str | None = None


@dataclass(frozen=True)
class DocumentColumns:
    """The file's own names of a document's parts; title: None where it has none."""

    text: str
    title: str | None


def peek_column_names(rows: PlacedRows, first: int = 100) -> tuple[list[str], PlacedRows]:
    """All column names of the first rows (in JSON lines a row may lack some), and an iterator over all rows again."""
    head = list(islice(rows, first))
    names = dict.fromkeys(name for _, row in head if not isinstance(row, InputError) for name in row)
    if not names and head and isinstance(error := head[0][1], InputError):
        raise error
    return list(names), chain(head, rows)


def guess_columns(names: Sequence[str], stated: Mapping[str, str | None], where: str = "the data") -> Columns:
    """What `stated` names is used; a role that is None there is guessed by the usual names.

    negative, label or score stated as "" is not used. A label or a score is guessed only where there are no negatives,
    which say the same.
    """
    named = _stated(stated, names, where)
    free = [name for name in names if name not in named.values()]
    query, positive = (named.get(role) or _first(free, role) for role in ("query", "positive"))
    if not query or not positive:
        missing = [
            f"data.columns.{role}=<column>" for role, name in (("query", query), ("positive", positive)) if not name
        ]
        raise InputError(
            f"{where}: which columns hold the texts is not clear from their names: {listed(names)}; "
            f"set {' and '.join(missing)}"
        )
    label, score = named.get("label"), named.get("score")
    if "negative" in named:
        negatives = _numbered(named["negative"], free)
    elif label or score:
        negatives = ()
    else:
        negatives = _negatives(free)
    if not (negatives or label or score):
        label = _first(free, "label") if label is None else None
        score = _first(free, "score") if score is None and not label else None
    return Columns(query, positive, negatives, label or None, score or None)


def guess_document_columns(
    names: Sequence[str], stated: Mapping[str, str | None], where: str = "the data"
) -> DocumentColumns:
    """Of documents alone: `stated["positive"]` names the column of texts, `stated["query"]` that of titles ("": none).

    What is None there is guessed by the usual names.
    """
    named = _stated(stated, names, where)
    if judged := next((role for role in ("negative", "label", "score") if named.get(role)), None):
        raise InputError(
            f"{where}: data.columns.{judged} is set, and documents alone have no negatives, labels or scores; "
            "leave it out, or read pairs with data=file"
        )
    free = [name for name in names if name not in named.values()]
    text = named.get("positive") or _first(free, "text")
    if not text:
        raise InputError(
            f"{where}: which column holds the documents is not clear from their names: {listed(names)}; "
            "set data.columns.positive=<column>"
        )
    title = _first([name for name in free if name != text], "title") if named.get("query") is None else named["query"]
    return DocumentColumns(text, title or None)


def _stated(stated: Mapping[str, str | None], names: Sequence[str], where: str) -> dict[str, str]:
    """Role -> column, for the roles that are stated; every column is there and has one role."""
    if odd := stated.keys() - {*COLUMN_ROLES}:
        raise InputError(f"data.columns has the unknown key {min(odd)!r}; it maps {', '.join(COLUMN_ROLES)}")
    named = {role: name for role, name in stated.items() if name is not None}
    for role, name in named.items():
        if name and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{where}: data.columns.{role}={name!r} names no column; it has {listed(names)}{hint}")
        if name and (other := next(role for role in named if named[role] == name)) != role:
            raise InputError(
                f"{where}: data.columns.{other} and data.columns.{role} both name the column {name!r}; "
                "give each its own"
            )
    ways = [f"data.columns.{role}" for role in ("negative", "label", "score") if named.get(role)]
    if len(ways) > 1:
        raise InputError(
            f"{where}: {' and '.join(ways)} are both set, and each says which texts are hard negatives; keep one"
        )
    return named


def _first(names: Sequence[str], role: str) -> str | None:
    by_lower_name = {name.lower(): name for name in reversed(names)}
    return next((by_lower_name[usual] for usual in NAMES[role] if usual in by_lower_name), None)


def _negatives(names: Sequence[str]) -> tuple[str, ...]:
    """`negative`, `negatives`, `neg`, `hard_negatives` … and the numbered ones, by their numbers."""
    numbered = [(int(match[1] or 0), name) for name in names if (match := NEGATIVE.fullmatch(name.lower()))]
    return tuple(name for _, name in sorted(numbered, key=lambda pair: pair[0]))


def _numbered(stated: str, names: Sequence[str]) -> tuple[str, ...]:
    """The column and, where there are more, `<column>_2`, `<column>_3` …."""
    numbers = [
        int(name[len(stated) + 1 :]) for name in names if re.fullmatch(re.escape(stated) + r"_[1-9][0-9]{0,5}", name)
    ]
    return (stated, *(f"{stated}_{number}" for number in sorted(numbers))) if stated else ()


def refuse_late_columns(
    rows: PlacedRows, names: Sequence[str], columns: Columns, stated: Mapping[str, str | None], num_hard_negatives: int
) -> PlacedRows:
    """The rows, with an error in place of each that has a label, score or negative column which the first rows lack.

    Columns are guessed from the first rows, so such a late one would be ignored, and what it says would be lost. Only
    roles that are guessed are checked: what is stated, or stated as "" (none), is left alone.
    """
    judged = columns.label or columns.score
    wanted = {
        "label": not judged and not columns.negatives,
        "score": not judged and not columns.negatives,
        "negative": num_hard_negatives and not judged,
    }
    roles = [role for role, guessed in wanted.items() if guessed and stated.get(role) is None]
    known = {*names}
    for where, row in rows:
        late = [name for name in row if name not in known] if isinstance(row, dict) else []
        guess = next(((role, name) for role in roles for name in late if _means(name, role)), None)
        if guess:
            remedy = f"write it into the first row too, or set data.columns.{guess[0]}='' to leave it out"
            yield where, InputError(
                f"{where}: the column {guess[1]!r}, which is in none of the first rows, would be taken for a "
                f"{guess[0]}; {remedy}"
            )
        else:
            yield where, row


def _means(name: str, role: str) -> bool:
    return bool(_negatives([name])) if role == "negative" else name.lower() in NAMES[role]


def describe(columns: Columns, num_hard_negatives: int, names: Sequence[str] = (), labels: Sequence[str] = ()) -> str:
    """One line for the log."""
    negatives = (
        f"hard negatives from {', '.join(map(repr, columns.negatives))}" if columns.negatives else "no hard negatives"
    )
    if columns.label:
        yes, no = (", ".join(name for name, meaning in LABELS.items() if meaning is value) for value in (True, False))
        numbers = ", ".join(f"{number} is {name}" for number, name in enumerate(labels))
        judged = f"pairs judged by {columns.label!r}{f', where {numbers}' if labels else ''}"
        negatives = f"{judged}: {yes} make a positive; {no} a hard negative of the same query; others are left out"
    if columns.score:
        negatives = (
            f"pairs judged by {columns.score!r}: data.positive_score and more make a positive; "
            "less than data.negative_score a hard negative of the same query; others are left out"
        )
    idle = bool(columns.negatives or columns.label or columns.score) and not num_hard_negatives
    hint = "; data.num_hard_negatives=0 uses no hard negatives, 1 one for each query" if idle else ""
    used = {columns.query, columns.positive, *columns.negatives, columns.label, columns.score}
    unused = [name for name in names if name not in used]
    rest = f"; not used: {listed(unused)}" if unused else ""
    return f"query from {columns.query!r}, positive from {columns.positive!r}; {negatives}{hint}{rest}"
