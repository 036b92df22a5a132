"""Files of scored sentence pairs, as STS benchmarks have them."""

import logging
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sgpt.data.formats.jsonl import read_rows
from sgpt.data.formats.row import SPLITS, listed, same_split, shown
from sgpt.data.formats.rows import kind_of, rows, say_unsplit
from sgpt.runtime.errors import InputError

log = logging.getLogger(__name__)
NEEDED = "needs sentence1, sentence2 and a numeric score"


@dataclass(frozen=True)
class PairSet:
    """Sentence pairs with a gold score each, any range."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


def read_pairs(file: Path, split: str) -> list[PairSet]:
    """`sentence1`, `sentence2`, `score` a row; rows of another `split` are left out.

    A `label` may take the place of the score.

    The SemEval files of 2012 to 2016 hold several years and sources: with columns `year` (a number) and `part` (their
    word for the split) the file gives a set a year, STS12, STS13 …, the sources of a year in one list as SentEval's
    "all" and MTEB have them.
    """
    plain = file.absolute().parent.name if file.name.startswith("pairs.") else file.name.split(".")[0]
    sets: dict[str, PairSet] = {}
    others: Counter[str] = Counter()
    named_any = False
    for where, row in rows(file) if file.is_file() and kind_of(file) else read_rows(file):
        if isinstance(row, InputError):
            raise row
        named = row.get("split", row.get("part"))
        if named is not None and not isinstance(named, str):
            raise InputError(
                f"{where}: split is {shown(named)}, which is no text; write train, dev or test, or leave it out"
            )
        named_any |= named is not None
        if named is not None and not same_split(named, split):
            others[named] += 1
            continue
        given = row.get("score", row.get("duplicate", row.get("label")))
        score = _score(given)
        first, second = row.get("sentence1", row.get("question1")), row.get("sentence2", row.get("question2"))
        for sentence in (first, second):
            if sentence is not None and not isinstance(sentence, str):
                raise InputError(f"{where}: {NEEDED}; {shown(sentence)} is no text, write it in quotes")
        if first is None or second is None or given is None:
            raise InputError(
                f"{where}: {NEEDED}; it has {listed(name for name in row if row[name] is not None) or 'none'}; "
                "fix or remove the row"
            )
        if score is None:
            raise InputError(f"{where}: {NEEDED}; the score is {shown(given)}; fix or remove the row")
        name = f"STS{row['year'] % 100:02}" if "part" in row and isinstance(row.get("year"), int) else plain
        pairs = sets.setdefault(name, PairSet(name, [], [], []))
        pairs.first.append(first)
        pairs.second.append(second)
        pairs.scores.append(score)
    if not named_any:
        say_unsplit(file, split)
    left_out = listed(f"{count:,} of {name!r:.40}" for name, count in others.items())
    for pairs in sets.values() or [PairSet(plain, [], [], [])]:
        if len(set(pairs.scores)) < 2:
            of = f" of {pairs.name}" if pairs.name != plain else ""
            remedy = f". It has {left_out}; set the split" if others else ""
            raise InputError(
                f"{file}: {len(pairs.scores)} pairs{of} in split {split!r} "
                f"with fewer than two different scores; nothing to correlate{remedy}"
            )
    if blank := sum(not text.strip() for pairs in sets.values() for text in (*pairs.first, *pairs.second)):
        log.warning("%s: %d sentences are empty; fix or remove their rows", file, blank)
    if others:
        usual = all(name.strip().lower() in SPLITS for name in others)
        log.log(
            logging.INFO if usual else logging.WARNING,
            "%s: %s left out; %r is the split to read",
            file,
            left_out,
            split,
        )
    return list(sets.values())


def _score(given: object) -> float | None:
    """None for what is no finite number. Tables of text hold numbers as texts."""
    try:
        score = float(given) if isinstance(given, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return score if math.isfinite(score) else None


def fewer_pairs(pairs: PairSet, limit: int) -> PairSet:
    return PairSet(pairs.name, pairs.first[:limit], pairs.second[:limit], pairs.scores[:limit])
