"""Runs as files: TREC's six columns, or BEIR's JSON of query id -> document id -> score; plain or .gz. Read and written."""

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sgpt.data.beir import RetrievalSet
from sgpt.data.jsonl import read_rows
from sgpt.errors import InputError
from sgpt.files import write_whole
from sgpt.metrics import Run, ranked


def write_run(file: Path, run: Run, system: str) -> None:
    """Six columns, `query-id Q0 document-id rank score system`, ranked as trec_eval ranks; it orders by score and reads no rank.

    InputError as by `check_ids`.
    """
    check_ids(file, run)
    tag = "".join("_" if letter.isspace() else letter for letter in system)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(
        f"{query} Q0 {document} {rank} {documents[document]!r} {tag}\n"
        for query, documents in run.items() for rank, document in enumerate(ranked(documents), 1)
    ))  # fmt: skip


def check_ids(file: Path, run: Run) -> None:
    """InputError for an id with a blank inside, which a TREC run cannot hold. file: the one that would be written."""
    for identifier in (name for query, documents in run.items() for name in (query, *documents)):
        if len(identifier.split()) != 1:
            raise InputError(
                f"{file}: id {identifier!r} is empty or holds a blank, and a TREC run is separated by blanks; rename it, or write no TREC run"
            )


def read_run(file: Path, data: Path, chosen: RetrievalSet, key: str) -> dict[str, dict[str, float]]:
    """query id -> document id -> score, of the judged queries. Every id must be one of the folder `data`. key: what the user named the file by."""
    if not file.is_file():
        raise InputError(f"{key}={file}: no such file; check the path")
    table = next(path for path in (data / "queries.jsonl", data / "queries.jsonl.gz") if path.is_file())
    queries = {row["_id"] for _, row in read_rows(table)}
    run: dict[str, dict[str, float]] = {}
    for where, query, document, score in _run_lines(file):
        for kind, identifier, known in (("query", query, queries), ("document", document, chosen.corpus)):
            if identifier not in known:
                raise InputError(f"{where}: {kind} id {identifier!r} is not in {data}; the run belongs to another folder")
        if query not in chosen.qrels:
            continue
        if document in run.setdefault(query, {}):
            raise InputError(f"{where}: document id {document!r} stands twice under query id {query!r}; remove one of them")
        run[query][document] = score
    return run


def _run_lines(file: Path) -> Iterator[tuple[str, str, str, float]]:
    """("file, line n", query id, document id, score)"""
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            is_json = lines.read(100).lstrip().startswith("{")
            lines.seek(0)
            yield from (_json_run if is_json else _trec_run)(file, lines)
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read ({error}); it should be UTF-8 text, gzipped when it ends in .gz") from error


def _json_run(file: Path, lines: TextIO) -> Iterator[tuple[str, str, str, float]]:
    try:
        run = json.load(lines)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}); write the run again") from None
    for query, scores in run.items():
        where = f"{file}, query id {query!r}"
        if not isinstance(scores, dict):
            raise InputError(f"{where}: holds {type(scores).__name__}, expected document ids with scores")
        for document, score in scores.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise InputError(f"{where}: score {score!r} of {document!r} is no finite number; fix it")
            yield where, query, document, float(score)


def _trec_run(file: Path, lines: TextIO) -> Iterator[tuple[str, str, str, float]]:
    before = ("", 0, 0.0)
    for number, line in enumerate(lines, 1):
        where, fields = f"{file}, line {number}", line.split()
        if not fields:
            continue
        if len(fields) != 6:
            raise InputError(f"{where}: {len(fields)} fields, a TREC run has 6, query-id Q0 document-id rank score tag: {line.strip()[:80]!r}")
        query, _, document, rank, score, _ = fields
        try:
            now = (query, int(rank), float(score))
        except ValueError:
            raise InputError(f"{where}: rank {rank!r} or score {score!r} is no number; the fields are query-id Q0 document-id rank score tag") from None
        if not math.isfinite(now[2]):
            raise InputError(f"{where}: score {score!r} is not finite; fix it")
        if before[0] == query and now[1] > before[1] and now[2] > before[2]:
            raise InputError(f"{where}: rank {rank} scores {score}, more than rank {before[1]} with {before[2]:g}; higher must be better, so negate distances")
        before = now
        yield where, query, document, now[2]
