"""BEIR folders: `corpus.jsonl[.gz]`, `queries.jsonl[.gz]`, `qrels/<split>.tsv`; and files of scored sentence pairs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from sgpt.data.example import Example, checked_example
from sgpt.data.jsonl import read_rows
from sgpt.data.rows import attempt, rows
from sgpt.errors import InputError
from sgpt.metrics import Qrels

Bad = list[tuple[str, InputError]]  # what cannot be used, and where it stands


@dataclass(frozen=True)
class RetrievalSet:
    """corpus and queries: id -> text (title and text joined by a blank); qrels: query id -> document id -> relevance.

    skip_own_id: a query's results never hold the document of its id, which is the query itself.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: Qrels
    skip_own_id: bool = False


@dataclass(frozen=True)
class PairSet:
    """Sentence pairs with a gold score each, any range."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


def read_retrieval(folder: Path, split: str, *, name: str | None = None, skip_empty: bool = False, skip_own_id: bool = False) -> RetrievalSet:
    """The judged queries of a split and the whole corpus. Every id in the qrels must exist.

    name: None is the folder's. skip_empty: documents with an empty text are no candidates, whatever their title and judgements.
    """
    queries, qrels = read_judged(folder, split)
    rows = _by_id(_table(folder, "corpus"))
    for document in (document for documents in qrels.values() for document in documents):
        if document not in rows:
            file = folder / "qrels" / f"{split}.tsv"
            raise InputError(f"{file}: document id {document!r} is not in {folder}/corpus.jsonl; the files do not belong together")
    corpus = {identifier: _document(row) for identifier, row in rows.items() if row["text"] or not skip_empty}
    return RetrievalSet(name or folder.absolute().name, corpus, queries, qrels, skip_own_id)


def read_judged(folder: Path, split: str) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """The queries that a split judges, id -> text, and its qrels."""
    qrels = read_qrels(folder, split)
    queries = {identifier: row["text"] for identifier, row in _by_id(_table(folder, "queries")).items()}
    for query in qrels:
        if query not in queries:
            file = folder / "qrels" / f"{split}.tsv"
            raise InputError(f"{file}: query id {query!r} is not in {folder}/queries.jsonl; the files do not belong together")
    return {query: queries[query] for query in qrels}, qrels


def read_corpus(folder: Path) -> dict[str, str]:
    """id -> title and text. Titles are optional; a document may be empty, as some are in the old test collections."""
    return {identifier: _document(row) for identifier, row in _by_id(_table(folder, "corpus")).items()}


def read_qrels(folder: Path, split: str, bad: Bad | None = None) -> dict[str, dict[str, int]]:
    """query id -> document id -> relevance. bad: see `_refuse`."""
    file = folder / "qrels" / f"{split}.tsv"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))) or "none"
        raise InputError(f"{file}: no such file; {folder} has the splits: {there}")
    qrels: dict[str, dict[str, int]] = {}
    for where, fields in _tsv(file, lambda fields: len(fields) == 3 and not _is_number(fields[2])):
        if len(fields) != 3:
            _refuse(bad, where, f"{len(fields)} tab-separated fields, 3 are needed (query-id, corpus-id, score): {' '.join(fields)[:80]!r}")
            continue
        query, document, score = fields
        try:
            relevance = int(score)
        except ValueError:
            _refuse(bad, where, f"relevance {score!r} is no whole number")
            continue
        if (before := qrels.setdefault(query, {}).setdefault(document, relevance)) != relevance:
            _refuse(bad, where, f"document {document!r} of query {query!r} was judged {before} before and is {relevance} here; keep one line")
    if not qrels:
        raise InputError(f"{file}: no judgements; the file is empty")
    return qrels


def read_examples(folder: Path, split: str, triples: str | None, num_hard_negatives: int) -> Iterator[tuple[str, Example | InputError | None]]:
    """(place, example or what is wrong there): a line of `triples` (query-id, positive-id, negative-id …) each, else a query of the

    qrels with all its positives. Before them None for each row of the corpus and the queries that is in order, and the others' errors.
    """
    bad: Bad = []
    corpus = {identifier: _document(row) for identifier, row in _by_id(_table(folder, "corpus"), bad).items()}
    queries = {identifier: row["text"] for identifier, row in _by_id(_table(folder, "queries"), bad).items()}
    if triples:
        lines = _tsv(folder / triples, lambda fields: not (fields[0] in queries or {*fields[1:]} & corpus.keys()))
    elif num_hard_negatives:
        raise InputError(f"{folder}: qrels name no hard negatives; set data.num_hard_negatives=0 or data.triples=<file>")
    else:
        judged = ((query, [document for document, score in documents.items() if score > 0]) for query, documents in read_qrels(folder, split, bad).items())
        lines = ((f"{folder}/qrels/{split}.tsv, query {query}", [query, *positives]) for query, positives in judged if positives)
    yield from repeat((str(folder), None), len(corpus) + len(queries))
    yield from bad
    for where, ids in lines:
        yield where, attempt(_example, folder, queries, corpus, ids, num_hard_negatives if triples else None, where)


def _example(folder: Path, queries: dict[str, str], corpus: dict[str, str], ids: list[str], num_hard_negatives: int | None, where: str) -> Example:
    """Of a line of triples, or of a query and all its positives where num_hard_negatives is None."""
    query, *documents = ids
    if len(documents) < 1 + (num_hard_negatives or 0):
        raise InputError(f"{where}: {len(ids)} tab-separated fields, {2 + (num_hard_negatives or 0)} are needed: {' '.join(ids)[:80]!r}")
    if query not in queries:
        raise InputError(f"{where}: query id {query!r} is not in {folder}/queries.jsonl")
    if odd := [document for document in documents if document not in corpus]:
        raise InputError(f"{where}: document id {odd[0]!r} is not in {folder}/corpus.jsonl")
    positive, *others = (corpus[document] for document in documents)
    if num_hard_negatives is None:
        return checked_example(queries[query], positive, (), where, others)
    return checked_example(queries[query], positive, others if num_hard_negatives else (), where)


def read_pairs(file: Path, split: str) -> list[PairSet]:
    """`sentence1`, `sentence2`, `score` a line; lines of another `split` are left out. A `label` may stand for the score.

    The SemEval files of 2012 to 2016 hold several years and sources: with columns `year` (a number) and `part` (their word for the
    split) the file gives a set a year, STS12, STS13 …, the sources of a year in one list as SentEval's "all" and MTEB have them.
    """
    plain = file.absolute().parent.name if file.name.startswith("pairs.") else file.name.split(".")[0]
    sets: dict[str, PairSet] = {}
    for where, row in read_rows(file):
        if row.get("split", row.get("part", split)) != split:
            continue
        score = row.get("score", row.get("duplicate", row.get("label")))
        first, second = row.get("sentence1", row.get("question1")), row.get("sentence2", row.get("question2"))
        if not isinstance(score, int | float) or not math.isfinite(score) or not isinstance(first, str) or not isinstance(second, str):
            raise InputError(f"{where}: needs sentence1, sentence2 and a numeric score; it has {', '.join(row)}")
        name = f"STS{row['year'] % 100:02}" if "part" in row and isinstance(row.get("year"), int) else plain
        pairs = sets.setdefault(name, PairSet(name, [], [], []))
        pairs.first.append(first)
        pairs.second.append(second)
        pairs.scores.append(float(score))
    for pairs in sets.values() or [PairSet(plain, [], [], [])]:
        if len(set(pairs.scores)) < 2:
            raise InputError(
                f"{file}: {len(pairs.scores)} pairs{f' of {pairs.name}' if pairs.name != plain else ''} in split {split!r} "
                "with fewer than two different scores; nothing to correlate"
            )
    return list(sets.values())


def _document(row: dict) -> str:
    return f"{row.get('title') or ''} {row['text']}".strip()


def _table(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a BEIR folder with corpus.jsonl, queries.jsonl and qrels/ is needed")
    return next((file for file in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if file.is_file()), folder / f"{name}.jsonl")


def _by_id(file: Path, bad: Bad | None = None) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for where, row in rows(file):
        if isinstance(row, InputError):
            _refuse(bad, where, row)
        elif odd := next((key for key in ("_id", "text") if not isinstance(row.get(key, ""), str)), None):
            _refuse(bad, where, f"{odd} is {row[odd]!r:.80}, which is no text; write it in quotes")
        elif not row.keys() >= {"_id", "text"}:
            _refuse(bad, where, f"needs the columns _id and text; it has {', '.join(row)}")
        elif row["_id"] in found:
            _refuse(bad, where, f"id {row['_id']!r} was used before; ids must be unique")
        else:
            found[row["_id"]] = row
    return found


def _refuse(bad: Bad | None, where: str, problem: str | InputError) -> None:
    """Raised, or put on the list of what the caller counts and goes on without."""
    error = problem if isinstance(problem, InputError) else InputError(f"{where}: {problem}")
    if bad is None:
        raise error
    bad.append((where, error))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _tsv(file: Path, is_header: Callable[[list[str]], bool]) -> Iterator[tuple[str, list[str]]]:
    """("file, line n", fields); the first line is left out when it is a header."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; check the path")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); it should be UTF-8 text") from error
    for number, line in enumerate(lines, 1):
        fields = line.removesuffix("\r").split("\t")
        if not line and number == len(lines):
            continue  # behind the last line's end
        if number > 1 or not is_header(fields):
            yield f"{file}, line {number}", fields
