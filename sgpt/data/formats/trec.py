"""Runs, which are ranked lists, in files: TREC's six columns, read and written; BEIR's JSON, read; plain or .gz."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from sgpt.data.formats.beir import RetrievalSet, read_queries
from sgpt.data.formats.lines import begins_with, checked_lines, read_json_file
from sgpt.data.formats.row import shown
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole

Run = Mapping[str, Mapping[str, float]]  # query id -> document id -> score
log = logging.getLogger(__name__)


def write_run(file: Path, run: Run, system: str) -> None:
    """Six columns, `query-id Q0 document-id rank score system`, ranked as trec_eval ranks; it orders by score and reads
    no rank.

    InputError as by `check_ids`.
    """
    check_ids(file, ids_of(run))
    tag = "".join("_" if letter.isspace() else letter for letter in system)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(
        f"{query} Q0 {document} {rank} {documents[document]!r} {tag}\n"
        for query, documents in run.items() for rank, document in enumerate(ranked(documents), 1)
    ))  # fmt: skip


def ids_of(run: Run) -> Iterator[str]:
    """Of its queries and documents."""
    for query, documents in run.items():
        yield query
        yield from documents


def check_ids(file: Path, ids: Iterable[str]) -> None:
    """InputError for an id with a blank inside, which a TREC run cannot hold. file: the one that would be written."""
    for identifier in ids:
        if len(identifier.split()) != 1:
            raise InputError(
                f"{file}: id {identifier!r} is empty or holds a blank, and a TREC run is separated by blanks; "
                "rename it, or write no TREC run"
            )


def read_run(file: Path, data: Path, dataset: RetrievalSet, key: str) -> dict[str, dict[str, float]]:
    """query id -> document id -> score, of the judged queries.

    Every id must be one of the folder `data`. key: what the user named the file by.
    """
    if not file.is_file():
        raise InputError(f"{key}={file}: no such file; check the path")
    queries, unjudged = read_queries(data), set()
    run: dict[str, dict[str, float]] = {}
    for where, query, document, score in _run_lines(file):
        for kind, identifier, known in (("query", query, queries), ("document", document, dataset.corpus)):
            if identifier not in known:
                raise InputError(
                    f"{where}: {kind} id {shown(identifier)} is not in {data}; the run belongs to another folder"
                )
        if query not in dataset.qrels:
            unjudged.add(query)
            continue
        if document in run.setdefault(query, {}):
            raise InputError(
                f"{where}: document id {shown(document)} stands twice under query id {shown(query)}; "
                "remove one of them"
            )
        run[query][document] = score
    if run and all(len(scores) > 1 and len({*scores.values()}) == 1 for scores in run.values()):
        log.warning(
            "%s: all scores of a query are equal, so the run ranks nothing; write scores that fall with the rank", file
        )
    if unjudged:
        log.info("%s: %d queries of it are not judged in this split and are left out", file, len(unjudged))
    return run


def _run_lines(file: Path) -> Iterator[tuple[str, str, str, float]]:
    """Its place ("file, line n"), query id, document id and score of each line."""
    return _json_run(file) if begins_with(file, b"{") else _trec_run(file)


def _json_run(file: Path) -> Iterator[tuple[str, str, str, float]]:
    run = read_json_file(file, "write the run again")
    for query, scores in run.items():
        where = f"{file}, query id {shown(query)}"
        if not isinstance(scores, dict):
            raise InputError(
                f"{where}: holds {type(scores).__name__}, expected document ids with scores; write an object of them"
            )
        for document, score in scores.items():
            if (value := _finite(score)) is None:
                raise InputError(f"{where}: score {shown(score)} of {shown(document)} is no finite number; fix it")
            yield where, query, document, value


def _trec_run(file: Path) -> Iterator[tuple[str, str, str, float]]:
    """The order is that of the scores, as trec_eval reads it, so the ranks must say the same.

    What the ranks contradict, or know alone, is refused.
    """
    ranked_by: dict[str, list[tuple[int, float, str]]] = {}  # query -> rank, score, "file, line n"
    for where, line in checked_lines(file):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 6:
            raise InputError(
                f"{where}: {len(fields)} fields, a TREC run has 6, query-id Q0 document-id rank score tag: "
                f"{shown(line.strip())}; fix the line"
            )
        query, _, document, stated_rank, stated_score, _ = fields
        try:
            rank, score = int(stated_rank), float(stated_score)
        except ValueError:
            problem = f"rank {shown(stated_rank)} or score {shown(stated_score)} is no number"
            raise InputError(
                f"{where}: {problem}; the fields are query-id Q0 document-id rank score tag, fix them"
            ) from None
        if not math.isfinite(score):
            raise InputError(f"{where}: score {shown(stated_score)} is not finite; fix it")
        ranked_by.setdefault(query, []).append((rank, score, where))
        yield where, query, document, score
    for rows in ranked_by.values():
        _check_order(sorted(rows))
    _check_scores_tell_ranks_apart(file, ranked_by)


def _check_scores_tell_ranks_apart(file: Path, ranked_by: Mapping[str, list[tuple[int, float, str]]]) -> None:
    """A run whose scores are all 0 has its order in the ranks alone, which nobody reads."""
    flat = []
    for query, rows in ranked_by.items():
        ranks = {rank for rank, _, _ in rows}
        scores = {score for _, score, _ in rows}
        if len(scores) == 1 and len(ranks) > 1:
            flat.append(query)
    if not flat:
        return
    problem = (
        f"all scores of query {shown(flat[0])} are equal while its ranks differ, and the order is that of the scores, "
        "as trec_eval reads it"
    )
    if len(flat) == sum(len(rows) > 1 for rows in ranked_by.values()):
        raise InputError(
            f"{file}: {problem}; write scores that fall with the rank: awk '{{$5 = -$4; print}}' <run> > <new run>"
        )
    log.warning("%s: %s; %d of %d queries are like it", file, problem, len(flat), len(ranked_by))


def _check_order(rows: list[tuple[int, float, str]]) -> None:
    """rows: rank, score and line of one query, by rank. In single precision, as `ranked` puts them in order."""
    for (rank, score, _), (below, more, where) in pairwise(rows):
        if below > rank and np.float32(more) > np.float32(score):
            contrary = f"rank {below} scores {more:g}, more than rank {rank} with {score:g}"
            raise InputError(f"{where}: {contrary}; higher must be better, so negate distances")


def _finite(score: object) -> float | None:
    try:
        value = math.nan if isinstance(score, bool | str) else float(score)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def ranked(documents: Mapping[str, float]) -> list[str]:
    """Best first, as trec_eval ranks: by the score in single precision, ties by document id from the end of the
    alphabet.
    """
    return sorted(documents, key=lambda document: (np.float32(documents[document]), document), reverse=True)


def cut(run: Run, depth: int) -> Run:
    """The best `depth` documents of each query, best first."""
    return {
        query: {document: documents[document] for document in ranked(documents)[:depth]}
        for query, documents in run.items()
    }
