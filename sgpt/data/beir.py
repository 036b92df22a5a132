"""BEIR folders: `corpus.jsonl[.gz]`, `queries.jsonl[.gz]`, `qrels/<split>.tsv`; and files of scored sentence pairs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sgpt.data.example import Example, checked_example
from sgpt.data.jsonl import read_rows
from sgpt.errors import InputError
from sgpt.metrics import Qrels


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


def read_qrels(folder: Path, split: str) -> dict[str, dict[str, int]]:
    file = folder / "qrels" / f"{split}.tsv"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))) or "none"
        raise InputError(f"{file}: no such file; {folder} has the splits: {there}")
    qrels: dict[str, dict[str, int]] = {}
    for where, (query, document, score) in _tsv(file, 3, lambda fields: not fields[2].lstrip("-").isdigit()):
        try:
            relevance = int(score)
        except ValueError:
            raise InputError(f"{where}: relevance {score!r} is no whole number") from None
        if (before := qrels.setdefault(query, {}).setdefault(document, relevance)) != relevance:
            raise InputError(f"{where}: document {document!r} of query {query!r} was judged {before} before and is {relevance} here; keep one line")
    if not qrels:
        raise InputError(f"{file}: no judgements; the file is empty")
    return qrels


def read_examples(folder: Path, split: str, triples: str | None, num_hard_negatives: int) -> Iterator[Example]:
    """Training examples: a line of `triples` (query-id, positive-id, negative-id …) each, else a query of the qrels with all its positives."""
    corpus = read_corpus(folder)
    queries = {identifier: row["text"] for identifier, row in _by_id(_table(folder, "queries")).items()}
    if triples:
        rows = _tsv(folder / triples, 2 + num_hard_negatives, lambda fields: fields[0] not in queries)
    elif num_hard_negatives:
        raise InputError(f"{folder}: qrels name no hard negatives; set data.num_hard_negatives=0 or data.triples=<file>")
    else:
        judged = ((query, [document for document, score in documents.items() if score > 0]) for query, documents in read_qrels(folder, split).items())
        rows = ((f"{folder}/qrels/{split}.tsv, query {query}", [query, *positives]) for query, positives in judged if positives)
    for where, (query, *documents) in rows:
        if query not in queries:
            raise InputError(f"{where}: query id {query!r} is not in {folder}/queries.jsonl")
        for document in documents:
            if document not in corpus:
                raise InputError(f"{where}: document id {document!r} is not in {folder}/corpus.jsonl")
        texts = [corpus[document] for document in documents]
        if triples:
            yield checked_example(queries[query], texts[0], texts[1:], where)
        else:
            yield checked_example(queries[query], texts[0], (), where, texts[1:])


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


def _by_id(file: Path) -> dict[str, dict]:
    rows: dict[str, dict] = {}
    for where, row in read_rows(file):
        identifier, text = row.get("_id"), row.get("text")
        if not isinstance(identifier, str) or not isinstance(text, str):
            raise InputError(f"{where}: needs text columns _id and text; it has {', '.join(f'{k}: {type(v).__name__}' for k, v in row.items())}")
        if identifier in rows:
            raise InputError(f"{where}: id {identifier!r} was used before; ids must be unique")
        rows[identifier] = row
    if not rows:
        raise InputError(f"{file}: no rows; the file is empty")
    return rows


def _tsv(file: Path, columns: int, is_header: Callable[[list[str]], bool]) -> Iterator[tuple[str, list[str]]]:
    """("file, line n", fields); the first line is left out when it is a header."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; check the path")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); it should be UTF-8 text") from error
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if not line and number == len(lines):
            continue  # behind the last line's end
        if len(fields) < columns:
            raise InputError(f"{file}, line {number}: {len(fields)} tab-separated fields, {columns} are needed: {line.strip()[:80]!r}")
        if number > 1 or not is_header(fields):
            yield f"{file}, line {number}", fields[:columns]
