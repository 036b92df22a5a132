"""BEIR folders, `corpus.jsonl[.gz]`, `queries.jsonl[.gz]`, `qrels/<split>.tsv`: as test sets and as training data."""

import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path

from sgpt.data.feed.example import Example, checked_example
from sgpt.data.formats.lines import checked_lines, json_rows
from sgpt.data.formats.row import PlacedRows, attempt, listed, same_split, shown, spells_nothing
from sgpt.data.formats.rows import rows
from sgpt.runtime.errors import InputError
from sgpt.text.markers import Role

Qrels = Mapping[str, Mapping[str, int]]  # query id -> document id -> relevance
log = logging.getLogger(__name__)
Bad = list[tuple[str, InputError]]  # what cannot be used, and where it stands
# trec_eval holds an array as long as the largest judgement, and beyond 64 bits it stops the process
MAX_RELEVANCE = 10_000
HEADER = re.compile(r"\W*(query|queries|question|topic|anchor|qid)", re.IGNORECASE)
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,15}")


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


def read_retrieval(
    folder: Path, split: str, *, name: str | None = None, skip_empty: bool = False, skip_own_id: bool = False
) -> RetrievalSet:
    """The judged queries of a split and the whole corpus. Every id in the qrels must exist.

    name: None is the folder's. skip_empty: documents with an empty text are no candidates, whatever their title and
    judgements. What leaves nothing to score is refused here: no judgement above 0, no candidate, no relevant document
    among the candidates.
    """
    queries, qrels = read_judged(folder, split)
    table, file = _by_id(rows(_table(folder, "corpus"))), qrels_file(folder, split)
    for document in (document for documents in qrels.values() for document in documents):
        if document not in table:
            raise InputError(
                f"{file}: document id {shown(document)} is not in {folder}/corpus.jsonl; "
                "the files do not belong together"
            )
    corpus = {identifier: _document(row) for identifier, row in table.items() if row["text"] or not skip_empty}
    _check_judgements(qrels, corpus, folder, file)
    return RetrievalSet(name or folder.absolute().name, corpus, queries, qrels, skip_own_id)


def _check_judgements(qrels: Qrels, corpus: dict[str, str], folder: Path, file: Path) -> None:
    """There is something to score: refused here, it is before anything is written."""
    if not any(map(str.strip, corpus.values())):
        raise InputError(f"{folder}/corpus.jsonl: every document's text is empty; give the documents their texts")
    relevant = [[document for document, score in judged.items() if score > 0] for judged in qrels.values()]
    if not any(relevant):
        raise InputError(
            f"{file}: no judgement is above 0, so no document is relevant to any query; "
            "judge those that are by 1 or more"
        )
    answerable = [documents for documents in relevant if documents]
    lost = sum(1 for documents in answerable if not any(document in corpus for document in documents))
    if lost == len(answerable):
        raise InputError(
            f"{file}: every relevant document has an empty text, and those are no candidates; "
            f"give them texts in {folder}/corpus.jsonl"
        )
    if lost:
        log.warning(
            "%s: of %d queries every relevant document has an empty text and is no candidate, so they score 0",
            file,
            lost,
        )


def read_judged(folder: Path, split: str) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """The queries that a split judges, id -> text, and its qrels."""
    qrels_file(folder, split)  # what is not there is said before the queries are read
    queries = read_queries(folder)
    qrels = read_qrels(folder, split, known=queries)
    for query in qrels:
        if query not in queries:
            file = qrels_file(folder, split)
            raise InputError(
                f"{file}: query id {shown(query)} is not in {folder}/queries.jsonl; the files do not belong together"
            )
    if blank := [query for query in qrels if not queries[query].strip()]:
        log.warning("%s: %d judged queries have an empty text, the first is %s", folder, len(blank), shown(blank[0]))
    return {query: queries[query] for query in qrels}, qrels


def read_queries(folder: Path) -> dict[str, str]:
    """id -> text of all of them."""
    return {identifier: row["text"] for identifier, row in _by_id(rows(_table(folder, "queries"))).items()}


def read_corpus(path: Path) -> dict[str, str]:
    """id -> title and text, of a folder, or of a file with the columns _id and text.

    Titles are optional; a document may be empty, as some are in the old test collections.
    """
    file = path if path.is_file() else _table(path, "corpus")
    table = rows(file) if file.suffix else json_rows(file)
    return {identifier: _document(row) for identifier, row in _by_id(table).items()}


def stream_texts(path: Path, role: Role) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents or the queries of a BEIR folder, or of a file, one after the other.

    As `read_corpus` reads them, but that only ids are held in memory.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    file = path if path.is_file() else _table(path, "corpus" if role == "document" else "queries")
    table = rows(file) if file.suffix else json_rows(file)
    for row in _identified(table):
        yield row["_id"], _document(row) if role == "document" else row["text"]


def split_files(folder: Path) -> list[Path]:
    """A file of judgements for each split that the folder has."""
    return sorted((folder / "qrels").glob("*.tsv"))


def qrels_file(folder: Path, split: str) -> Path:
    """The split's file by its name, or the one whose name means the same, as `validation` and `dev` do.

    InputError without one.
    """
    files = split_files(folder)
    of_split = [file for file in files if file.stem == split]
    of_split = of_split or [file for file in files if same_split(file.stem, split)]
    if not of_split:
        has = listed(file.stem for file in files) or "none"
        raise InputError(
            f"{folder / 'qrels' / split}.tsv: no such file; {folder} has the splits: {has}; set split=<one of them>"
        )
    if len(of_split) > 1:
        raise InputError(
            f"{folder}/qrels: {listed(file.name for file in of_split)} are names of one split; "
            "set split=<one of them>, as it is written"
        )
    return of_split[0]


def read_qrels(
    folder: Path, split: str, bad: Bad | None = None, known: Collection[str] = ()
) -> dict[str, dict[str, int]]:
    """query id -> document id -> relevance.

    bad: see `_reject`. known: ids of queries; a line that begins with one is no header.
    """
    file = qrels_file(folder, split)
    qrels: dict[str, dict[str, int]] = {}
    for where, fields in _tsv(
        file, lambda fields: len(fields) == 3 and not _is_number(fields[2]) and fields[0] not in known
    ):
        if len(fields) != 3:
            counts = (
                f"{len(fields)} tab-separated fields, 3 are needed (query-id, corpus-id, score): "
                f"{shown(' '.join(fields))}"
            )
            _reject(bad, where, f"{counts}; write these three, with tabs between them")
            continue
        query, document, score = fields
        if not WHOLE_NUMBER.fullmatch(score.strip()) or abs(relevance := int(score)) > MAX_RELEVANCE:
            _reject(bad, where, (
                f"relevance {shown(score)} is no whole number up to {MAX_RELEVANCE:,}; "
                "write 0 for not relevant, 1 or more for relevant"
            ))
            continue
        if (before := qrels.setdefault(query, {}).setdefault(document, relevance)) != relevance:
            _reject(bad, where, (
                f"document {shown(document)} of query {shown(query)} was judged {before} before and is {relevance} "
                "here; keep one line"
            ))
    if not qrels:
        raise InputError(
            f"{file}: no judgements; the file is empty. Write a line of query-id, corpus-id and score for each, "
            "with tabs between them"
        )
    return qrels


def beir_examples(
    folder: Path, split: str, triples: str | None, num_hard_negatives: int
) -> Iterator[tuple[str, Example | InputError | None]]:
    """("file, line n", example or what is wrong there) of each line of `triples`, else of each query of the qrels.

    A line of triples is query-id, positive-id, negative-id …; a query of the qrels comes with all its positives. Before
    them stand None for each row of the corpus and the queries that is in order, and the errors of the other rows.
    """
    bad: Bad = []
    corpus = {identifier: _document(row) for identifier, row in _by_id(rows(_table(folder, "corpus")), bad).items()}
    queries = {identifier: row["text"] for identifier, row in _by_id(rows(_table(folder, "queries")), bad).items()}
    if triples:
        lines = _tsv(folder / triples, lambda fields: not (fields[0] in queries or {*fields[1:]} & corpus.keys()))
    elif num_hard_negatives:
        raise InputError(
            f"{folder}: qrels name no hard negatives; set data.num_hard_negatives=0 or data.triples=<file>"
        )
    else:
        qrels, file = read_qrels(folder, split, bad, known=queries), qrels_file(folder, split)
        judged = {
            query: [document for document, score in documents.items() if score > 0]
            for query, documents in qrels.items()
        }
        lines = (
            (f"{file}, query {query:.80}", [query, *positives]) for query, positives in judged.items() if positives
        )
        if without := sum(not positives for positives in judged.values()):
            log.info("%s: %d of %d queries have no judgement above 0 and are left out", file, without, len(judged))
    yield from repeat((str(folder), None), len(corpus) + len(queries))
    yield from bad
    for where, ids in lines:
        yield where, attempt(_example, folder, queries, corpus, ids, num_hard_negatives if triples else None, where)


def _example(
    folder: Path,
    queries: dict[str, str],
    corpus: dict[str, str],
    ids: list[str],
    num_hard_negatives: int | None,
    where: str,
) -> Example:
    """Of a line of triples, or of a query and all its positives where num_hard_negatives is None."""
    query, *documents = ids
    if len(documents) < 1 + (num_hard_negatives or 0):
        raise InputError(
            f"{where}: {len(ids)} tab-separated fields, {2 + (num_hard_negatives or 0)} are needed: "
            f"{shown(' '.join(ids))}; fix the line"
        )
    if query not in queries:
        raise InputError(
            f"{where}: query id {shown(query)} is not in {folder}/queries.jsonl; fix the id, or remove the line"
        )
    if odd := [document for document in documents if document not in corpus]:
        raise InputError(
            f"{where}: document id {shown(odd[0])} is not in {folder}/corpus.jsonl; fix the id, or remove the line"
        )
    positive, *others = (corpus[document] for document in documents)
    if num_hard_negatives is None:
        return checked_example(queries[query], positive, (), where, others)
    return checked_example(queries[query], positive, others if num_hard_negatives else (), where)


def _document(row: dict) -> str:
    title = row.get("title")
    return row["text"].strip() if _is_none(title) else f"{title} {row['text']}".strip()


def _table(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; a BEIR folder with corpus.jsonl, queries.jsonl and qrels/ is needed"
        )
    return next(
        (file for file in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if file.is_file()),
        folder / f"{name}.jsonl",
    )


def _by_id(table: PlacedRows, bad: Bad | None = None) -> dict[str, dict]:
    return {row["_id"]: row for row in _identified(table, bad)}


def _identified(table: PlacedRows, bad: Bad | None = None) -> Iterator[dict]:
    """Rows with text as id and text, and a title that is text or none, which null and NaN are; ids stay in memory."""
    ids: set[str] = set()
    nothing: list[str] = []
    for where, row in table:
        if isinstance(row, InputError):
            _reject(bad, where, row)
        elif odd := _no_text(row):
            _reject(bad, where, f"{odd} is {shown(row[odd])}, which is no text; {_as_text(odd, row[odd])}")
        elif not row.keys() >= {"_id", "text"}:
            _reject(
                bad,
                where,
                f"needs the columns _id and text; it has {listed(row) or 'none'}; rename its columns, or fix the row",
            )
        elif not row["_id"].strip():
            _reject(bad, where, f"_id is {row['_id']!r:.80}; give the row an id")
        elif row["_id"] in ids:
            _reject(bad, where, f"id {shown(row['_id'])} was used before; ids must be unique")
        else:
            ids.add(row["_id"])
            if word := next(filter(spells_nothing, (row["text"], row.get("title"))), None):
                nothing.append(f"{where}: {shown(word)}")
            yield row
    if nothing:
        log.warning(
            "%s is a word for no value and is read as a text or title, in %d rows; leave it empty if it is none",
            nothing[0],
            len(nothing),
        )


def _no_text(row: dict) -> str | None:
    """The first column whose value should be text and is not."""
    given = {key: row[key] for key in ("_id", "text", "title") if key in row}
    if _is_none(given.get("title")):
        given.pop("title", None)
    return next((key for key, value in given.items() if not isinstance(value, str)), None)


def _as_text(column: str, value: object) -> str:
    """What to do with it."""
    if _is_none(value):
        return "give the row an id" if column == "_id" else 'write "" for an empty one'
    return "write it as one text" if isinstance(value, list | dict) else "write it in quotes"


def _is_none(value: object) -> bool:
    """As JSON and tables say it."""
    return value is None or value != value


def _reject(bad: Bad | None, where: str, problem: str | InputError) -> None:
    """Raised, or put on the list of what the caller counts and leaves out."""
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
    """("file, line n", fields) of the lines that are not blank; the first of them is left out when it is a header."""
    first = True
    for where, line in checked_lines(file):
        if not line.strip():
            continue
        fields = line.split("\t")
        if not first or not is_header(fields):
            yield where, fields
        elif not HEADER.match(line):
            log.warning("%s: %s is taken for a header, as none of it is an id or a judgement", where, shown(line))
        first = False


def fewer_queries(dataset: RetrievalSet, limit: int | None) -> RetrievalSet:
    """The first `limit` queries, all if None, over the whole corpus."""
    qrels = dict(islice(dataset.qrels.items(), limit))
    return replace(dataset, queries={query: dataset.queries[query] for query in qrels}, qrels=qrels)


def fewer_documents(dataset: RetrievalSet, limit: int) -> RetrievalSet:
    """The first `limit` queries, their judged documents, and as many others, the first ones of the corpus."""
    few = fewer_queries(dataset, limit)
    judged = {document for documents in few.qrels.values() for document in documents}
    kept = judged | set(islice((document for document in dataset.corpus if document not in judged), len(judged)))
    return replace(few, corpus={document: text for document, text in dataset.corpus.items() if document in kept})


def read_search_corpus(path: Path) -> dict[str, str]:
    """id -> text of a BEIR folder or of a file of rows, JSON lines for example, with `_id` and `text`."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    if not (documents := read_corpus(path)):
        raise InputError(f"{path}: no documents in it; give a file with at least one")
    return documents
