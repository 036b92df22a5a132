"""MS MARCO passages with mined hard negatives, as SGPT trains on them. They are read from a folder with these files:

    collection.tsv                  pid, tab, passage
    queries.train.tsv               qid, tab, query
    msmarco-hard-negatives.jsonl    {"qid": 5, "pos": [pid, …], "neg": {"bm25": [pid, …], …}}, by system, best first
    cross-encoder-ms-marco-MiniLM-L-6-v2-scores.jsonl      {"qid": 5, "<pid>": score, …}

each of them gzipped or not. The older form of the third file, with {"pid": …, "ce-score": …} for every pid, has the
scores in it and needs no fourth. The first two are MS MARCO's passage ranking data, the others the hub's data set
sentence-transformers/msmarco-hard-negatives. It has the scores as a pickle, which may run any code when it is loaded
and is never loaded here. It is turned into lines once, by a reader that knows dictionaries and numbers and refuses
everything that could run code, in a process that can hold 160 million scores as dictionaries:

    import gzip, json, pickle
    class Numbers(pickle.Unpickler):
        def find_class(self, module, name):
            numbers = {("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("numpy", "dtype")}
            if (module, name) not in numbers:
                raise pickle.UnpicklingError(f"{module}.{name} is no number")
            return super().find_class(module, name)
    name = "cross-encoder-ms-marco-MiniLM-L-6-v2-scores"
    with gzip.open(f"{name}.pkl.gz") as source, gzip.open(f"{name}.jsonl.gz", "wt", compresslevel=4) as lines:
        for qid, scores in Numbers(source).load().items():
            row = {"qid": int(qid)} | {str(pid): float(score) for pid, score in scores.items()}
            lines.write(json.dumps(row) + "\\n")

The rules are those of `train_bi-encoder_mnrl.py` (Muennighoff/sgpt, after sentence-transformers). The threshold of a
query is the lowest score of its positives minus the margin. Of each mining system, in turn, its list is walked from the
best; passages that score above the threshold and those taken before are skipped, until so many new ones are taken.
These negatives are shuffled once; which of them and of the positives an epoch takes is the caller's. Without a
filter the systems and their order are those of the first query that has positives and systems. A query without
positives is always left out, one without negatives unless all queries are wanted. Lines are stripped before they are
split, so texts keep blanks at their beginning.

What differs: the negatives keep their order until the seeded shuffle, where the original shuffles a set. A positive is
never a negative of its query; the original lets it when the margin is 0 or less. `limit` counts examples; the
original's --train_dataset_max_size counts lines and reads two more. Ids that occur twice are refused; the original
takes the last.

The collection passes through memory line by line. What stays is a number or two of each passage at most, the text of
the queries, and where the scores of each query lie in their file; a gzipped one is unpacked into a temporary file for
that.
"""

import gzip
import json
import logging
import math
import random
import re
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sgpt.data.feed.store import Writer
from sgpt.data.formats.row import listed
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import progress_bar

COLLECTION, QUERIES, MINED = "collection.tsv", "queries.train.tsv", "msmarco-hard-negatives.jsonl"
SCORES = "cross-encoder-ms-marco-MiniLM-L-6-v2-scores.jsonl"
TOO_LARGE = 10**18  # for an id, which takes 64 bits
LINES_AT_A_TIME = 10_000  # between two steps of a progress bar
QID_FIRST = re.compile(rb'\{\s*"qid"\s*:\s*(\d{1,18})\s*[,}]')
log = logging.getLogger(__name__)


def fill(
    folder: Path,
    writer: Writer,
    *,
    systems: Sequence[str] = (),
    negatives_per_system: int = 5,
    score_margin: float = 3.0,
    use_all_queries: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> None:
    """Writes every passage, in the order of the collection, then the queries in use and their rows.

    The number of a passage in the store is its place in the collection.
    writer: an empty one. systems: take negatives of these only, in this order. limit: at most so many examples.
    """
    assert writer.texts.count == 0, "the place of a passage is its number"
    if negatives_per_system < 1 or not math.isfinite(score_margin) or (limit is not None and limit < 1):
        raise InputError(
            f"negatives_per_system={negatives_per_system} and limit={limit} must be 1 or more, "
            f"score_margin={score_margin} a number"
        )
    files = _found(folder)
    with _scores(files.scores) as scores:
        queries = _Queries(files.queries)
        passages = _write_collection(files.collection, writer)
        mining = _Mining(files.mined, scores, tuple(systems), negatives_per_system, score_margin, use_all_queries)
        draw = random.Random(seed)
        for line, negatives in islice(mining, limit):
            draw.shuffle(negatives)
            places = passages.look_up(
                [*line.positives, *negatives],
                lambda pid, where=line.where: f"{where}: passage id {pid} is not in {files.collection}",
            )
            query = writer.text(queries.text(line.qid, line.where))
            writer.row(query, places[: len(line.positives)], places[len(line.positives) :])
    mining.conclude(writer.rows.count, whole=writer.rows.count != limit)


@dataclass(frozen=True)
class _Files:
    """scores: None when they are in `mined`."""

    collection: Path
    queries: Path
    mined: Path
    scores: Path | None


def _found(folder: Path) -> _Files:
    """Everything that is needed is there, which is said before minutes of reading."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; one with {COLLECTION}, {QUERIES} and {MINED} is needed")
    collection, queries, mined, scores = (
        _plain_or_gzipped(folder / name) for name in (COLLECTION, QUERIES, MINED, SCORES)
    )
    for name, file in ((COLLECTION, collection), (QUERIES, queries), (MINED, mined)):
        if file is None:
            raise InputError(
                f"{folder / name}: no such file, nor {name}.gz; sgpt/data/sources/msmarco.py says where it is from"
            )
    if _has_scores(mined):
        return _Files(collection, queries, mined, None)
    if scores is None:
        if pickled := next(iter(sorted(folder.glob("*.pkl*"))), None):
            raise InputError(
                f"{pickled}: a pickle may run any code when it is loaded, so it is not; "
                f"turn it into {SCORES} once, as sgpt/data/sources/msmarco.py shows"
            )
        raise InputError(
            f"{folder / SCORES}: no such file, nor {SCORES}.gz, and {mined} has no scores in it; "
            "sgpt/data/sources/msmarco.py says where they are from"
        )
    return _Files(collection, queries, mined, scores)


def _plain_or_gzipped(file: Path) -> Path | None:
    return next((candidate for candidate in (file, file.with_name(f"{file.name}.gz")) if candidate.is_file()), None)


def _has_scores(mined: Path) -> bool:
    """By the first query that has positives."""
    positives = next((row["pos"] for _, row in _rows(mined) if row.get("pos")), None)
    return isinstance(positives, list) and isinstance(positives[0], dict)


@dataclass(frozen=True)
class _Line:
    """One query of the mined file.

    positives: each once. negatives: by system, best first. scores: of a pid, as it stands in the file.
    """

    where: str
    qid: int
    positives: list[int]
    negatives: dict[str, list[int]]
    scores: Callable[[int], object]

    def score(self, pid: int) -> float:
        score = self.scores(pid)
        if type(score) not in (int, float) or not math.isfinite(score):
            what = "missing" if score is None else f"{score!r:.80}"
            raise InputError(
                f"{self.where}: the score of passage {pid} for query {self.qid} is {what}; "
                "it must be a number, fix it or remove the passage"
            )
        return score


@dataclass
class _Mining:
    """Iterates over (line, its negatives) of every query in use, counting what is left out.

    scores: of a query, None when they are in `file`.
    """

    file: Path
    scores: Callable[[int, str], Callable[[int], object]] | None
    systems: tuple[str, ...]
    negatives_per_system: int
    margin: float
    use_all: bool
    left_out: Counter = field(default_factory=Counter)
    seen: dict[str, None] = field(default_factory=dict)  # systems, in the order of the file

    def __post_init__(self) -> None:
        self.named = bool(self.systems)

    def __iter__(self) -> Iterator[tuple[_Line, list[int]]]:
        qids: set[int] = set()
        for line in self._lines():
            if line.qid in qids:
                raise InputError(
                    f"{line.where}: query id {line.qid} was used before; ids must be unique, join the lines"
                )
            qids.add(line.qid)
            self.systems = self.systems or tuple(line.negatives)
            self.seen |= dict.fromkeys(line.negatives)
            negatives = self._choose_negatives(line)
            if negatives or self.use_all:
                yield line, negatives
            else:
                self.left_out["without negatives"] += 1

    def _lines(self) -> Iterator[_Line]:
        for where, row in _rows(self.file):
            if row.get("pos") == []:
                self.left_out["without positives"] += 1
            else:
                yield _parsed(row, where, self.scores)

    def _choose_negatives(self, line: _Line) -> list[int]:
        # of the weakest positive: what scores higher may well be a positive that nobody judged
        threshold = min(map(line.score, line.positives)) - self.margin
        negatives: dict[int, None] = {}
        for system in self.systems:
            fresh = (
                pid
                for pid in line.negatives.get(system, ())
                if pid not in negatives and pid not in line.positives and line.score(pid) <= threshold
            )
            for pid in islice(fresh, self.negatives_per_system):
                negatives[pid] = None
        return list(negatives)

    def conclude(self, num_examples: int, whole: bool) -> None:
        """Says what was read, and refuses what gave nothing. whole: the file was read to its end."""
        left_out = "".join(f", {count} {why} left out" for why, count in self.left_out.items())
        log.info("%s: %d examples%s; negatives of %s", self.file, num_examples, left_out, ", ".join(self.systems))
        if self.named and whole and (unknown := [system for system in self.systems if system not in self.seen]):
            raise InputError(
                f"{self.file}: no negatives of the system {unknown[0]!r}; it has {', '.join(self.seen) or 'none'}"
            )
        if num_examples == 0:
            raise InputError(
                f"{self.file}: no examples in it{left_out}; lower the score margin {self.margin}, or use all queries"
            )
        if not self.named and (late := [system for system in self.seen if system not in self.systems]):
            log.warning(
                (
                    "%s: no negatives of %s are used, as the first query has none and its systems are those of all; "
                    "name the systems to use"
                ),
                self.file,
                ", ".join(late),
            )


def _parsed(row: dict, where: str, scores: Callable | None) -> _Line:
    qid, positives, negatives = (row.get(name) for name in ("qid", "pos", "neg"))
    if not _is_id(qid) or not isinstance(positives, list) or not isinstance(negatives, dict):
        columns = listed(f"{name}: {type(value).__name__}" for name, value in row.items()) or "nothing"
        raise InputError(
            f"{where}: needs qid, a number, pos, a list of passage ids, and neg, lists of them by system; "
            f"it has {columns}"
        )
    for system, ranked in negatives.items():
        if not isinstance(ranked, list):
            raise InputError(
                f"{where}, neg, {system}: expected a list of passage ids, got {type(ranked).__name__} {ranked!r:.80}; "
                "give a list"
            )
    inline: dict[int, object] | None = None if scores else {}
    pos = list(dict.fromkeys(_pids(positives, f"{where}, pos", inline)))
    neg = {system: _pids(ranked, f"{where}, neg, {system}", inline) for system, ranked in negatives.items()}
    return _Line(where, qid, pos, neg, scores(qid, where) if scores else inline.get)


def _pids(items: list, where: str, inline: dict[int, object] | None) -> list[int]:
    """Ids as they are, or out of {"pid": …, "ce-score": …}, whose scores go to `inline` when that is given."""
    pids = items
    if inline is not None:
        for item in items:
            if not isinstance(item, dict) or not {"pid", "ce-score"} <= item.keys():
                raise InputError(
                    f"{where}: expected an object with pid and ce-score, as the first query's, got {item!r:.80}; "
                    "fix or remove it"
                )
        pids = [item["pid"] for item in items]
    # quicker than one by one
    if not {*map(type, pids)} <= {int} or (pids and not 0 <= min(pids) <= max(pids) < TOO_LARGE):
        odd = next(item for item in pids if not _is_id(item))
        raise InputError(f"{where}: passage id {odd!r:.80} is no whole number; fix or remove it")
    if inline is not None:
        inline |= {item["pid"]: item["ce-score"] for item in items}
    return pids


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < TOO_LARGE


class _Places:
    """Whole-number ids -> their place in a file, one a line; nothing is kept when they are 0, 1, 2 …, else two numbers
    of each.
    """

    def __init__(self, ids: array, file: Path) -> None:
        in_file_order = np.frombuffer(ids, np.int64) if ids else np.empty(0, np.int64)
        self.count, self.ids = len(in_file_order), None
        if not (in_file_order == np.arange(self.count)).all():
            self.order = np.argsort(in_file_order, kind="stable")
            self.ids = in_file_order[self.order]
            if (twice := np.flatnonzero(self.ids[1:] == self.ids[:-1])).size:
                first, second = (int(line) + 1 for line in self.order[twice[0] : twice[0] + 2])
                raise InputError(
                    f"{file}, line {second}: id {self.ids[twice[0]]} was used before, in line {first}; "
                    "ids must be unique"
                )

    def look_up(self, ids: Sequence[int], refusal: Callable[[int], str]) -> list[int]:
        """The place of each; InputError with what `refusal` says of the first unknown one."""
        wanted = np.asarray(ids, np.int64)
        if self.ids is None:
            known, places = (wanted >= 0) & (wanted < self.count), wanted
        else:
            near = np.searchsorted(self.ids, wanted).clip(max=self.count - 1)
            known, places = self.ids[near] == wanted, self.order[near]
        if not known.all():
            raise InputError(f"{refusal(ids[int(np.argmin(known))])}; the files do not belong together")
        return places.tolist()


class _Queries:
    """Texts by query id, as bytes behind each other: as strings they would take five times that."""

    def __init__(self, file: Path) -> None:
        self.file, self.texts = file, bytearray()
        ids, self.ends = array("q"), array("q", [0])
        for qid, text in _id_and_text(file, "reading the queries"):
            self.texts += text.encode()
            ids.append(qid)
            self.ends.append(len(self.texts))
        self.places = _Places(ids, file)

    def text(self, qid: int, where: str) -> str:
        (place,) = self.places.look_up([qid], lambda qid: f"{where}: query id {qid} is not in {self.file}")
        return self.texts[self.ends[place] : self.ends[place + 1]].decode()


def _write_collection(file: Path, writer: Writer) -> _Places:
    ids = array("q")
    for pid, text in _id_and_text(file, "reading the collection"):
        writer.text(text)
        ids.append(pid)
    return _Places(ids, file)


def _id_and_text(file: Path, title: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_lines(file, title), 1):
        try:
            identifier, text = line.decode().strip().split("\t")
            if not _is_id(whole := int(identifier)):
                raise ValueError
        except ValueError as error:  # a UnicodeDecodeError is one
            why = (
                f"not UTF-8 ({error})"
                if isinstance(error, UnicodeDecodeError)
                else "expected an id, a whole number, one tab and a text"
            )
            raise InputError(
                f"{file}, line {number}: {why}, got {line[:80].decode(errors='replace').strip()!r}; "
                "fix or remove the line"
            ) from None
        yield whole, text


def _lines(file: Path, title: str) -> Iterator[bytes]:
    """Each line with its end."""
    try:
        with file.open("rb") as source, progress_bar(title, file.stat().st_size) as advance:
            done = 0
            for number, line in enumerate(gzip.GzipFile(fileobj=source) if file.suffix == ".gz" else source):
                yield line
                if number % LINES_AT_A_TIME == 0:
                    advance(source.tell() - done)
                    done = source.tell()
    except (zlib.error, EOFError, OSError) as error:  # a BadGzipFile is an OSError
        raise InputError(f"{file}: cannot be read ({error}); it should be text, gzipped when it ends in .gz") from error


def _rows(file: Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", row) of JSON lines.

    Like sgpt.data.formats.jsonl's, with a progress bar: there are gigabytes of them.
    """
    for number, line in enumerate(_lines(file, "choosing hard negatives"), 1):
        if line.strip():
            yield (where := f"{file}, line {number}"), _json(line, where)


@contextmanager
def _scores(file: Path | None) -> Iterator[Callable[[int, str], Callable[[int], object]] | None]:
    """What gives the scores of a query; None without a file."""
    if file is None:
        yield None
        return
    with tempfile.TemporaryFile() if file.suffix == ".gz" else file.open("rb") as lines:
        yield _Scores(file, lines).of


class _Scores:
    """In memory is where each query's line begins; the lines are read when they are needed, from `lines`, unpacked into
    it when it is not the file.
    """

    def __init__(self, file: Path, lines: BinaryIO) -> None:
        self.file, self.lines = file, lines
        ids, self.starts, start = array("q"), array("q"), 0
        for number, line in enumerate(_lines(file, "reading the scores"), 1):
            if lines.writable():
                lines.write(line)
            ids.append(_qid(line, f"{file}, line {number}"))
            self.starts.append(start)
            start += len(line)
        self.places = _Places(ids, file)

    def of(self, qid: int, where: str) -> Callable[[int], object]:
        """What gives the value that the file has for a pid of this query; None without one."""
        (place,) = self.places.look_up([qid], lambda qid: f"{where}: query id {qid} has no line in {self.file}")
        self.lines.seek(self.starts[place])
        row = _json(self.lines.readline(), f"{self.file}, line {place + 1}")
        return lambda pid: row.get(str(pid))


def _qid(line: bytes, where: str) -> int:
    """By its beginning, if that is enough: reading all the scores here would take as long as using them."""
    if beginning := QID_FIRST.match(line):
        return int(beginning[1])
    qid = _json(line, where).get("qid")
    if not _is_id(qid):
        raise InputError(
            f"{where}: qid {qid!r:.80} is no whole number; write qid and, by passage id, the scores, one query a line"
        )
    return qid


def _json(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: not JSON ({str(error)[:200]}): {line[:80].decode(errors='replace').strip()!r}; "
            "fix or remove the line"
        ) from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}; write one object a line")
    return row
