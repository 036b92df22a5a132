"""What is mined: the corpus as different texts, and the judged queries with what must never be their negative."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgpt.data.formats.beir import RetrievalSet, read_retrieval
from sgpt.data.formats.rows import of_split, rows
from sgpt.data.sources.bad_rows import accepted
from sgpt.data.sources.columns import describe, guess_columns, keys_below, peek_column_names, refuse_late_columns
from sgpt.data.sources.pairs import examples
from sgpt.data.test_sets.own_pairs import as_retrieval_set
from sgpt.mining.config import MineConfig
from sgpt.runtime.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """The corpus as different texts, each with a row.

    document_ids: row -> id of the first document with this text. rows: document id -> row of its text; a blank one has
    none.
    positions [pool]: row -> where that first document stands in the corpus, ascending.
    """

    document_ids: list[str]
    texts: list[str]
    rows: dict[str, int]
    positions: np.ndarray


@dataclass(frozen=True)
class Query:
    """One judged query. positives: row -> document id, most relevant first. barred: rows that are never negatives."""

    id: str
    text: str
    positives: dict[int, str]
    barred: frozenset[int]


@dataclass(frozen=True)
class Task:
    """Everything that is read before mining, equal on all processes."""

    config: MineConfig
    dataset: RetrievalSet
    pool: Pool
    queries: list[Query]
    device: torch.device


def read_task(config: MineConfig, device: torch.device | str = "cpu") -> Task:
    """Reads and checks everything; InputError where there is nothing to mine for."""
    dataset = read_mining_set(config)
    pool = pool_of(dataset.corpus)
    queries = queries_of(dataset, pool, config.limit)
    if not queries:
        raise InputError(
            f"{config.data}, split {config.split!r}: no query has a positive (score above 0) with a text that differs "
            "from the query's, so there is nothing to mine for; give other data, or set split=<another split>"
        )
    return Task(config, dataset, pool, queries, torch.device(device))


def read_mining_set(config: MineConfig) -> RetrievalSet:
    """Reads a BEIR folder, or pairs in a file or in a folder of files."""
    path = Path(config.data)
    is_beir_folder = any((path / name).exists() for name in ("corpus.jsonl", "corpus.jsonl.gz", "qrels"))
    if is_beir_folder or not path.exists():  # reading a BEIR folder says best what is missing
        unread = [f"columns.{role}" for role, name in config.columns.items() if name is not None]
        if config.labels:
            unread.append("labels")
        if config.on_error != "stop":
            unread.append("on_error")
        if unread:
            keys = ", ".join(unread)
            raise InputError(
                f"{keys}: for pairs in a file only, and data={config.data} is read as a BEIR folder; leave out {keys}"
            )
        return read_retrieval(path, config.split)
    rejected = Path(f"{config.output}.rejected.jsonl")
    on_bad_rows = {"on_error": config.on_error, "rejected": rejected, "max_error_share": config.max_error_share}
    with keys_below(""):
        return pairs_as_retrieval_set(path, config.split, config.columns, config.labels, **on_bad_rows)


def pool_of(corpus: dict[str, str]) -> Pool:
    """The different texts of a corpus; blanks around a text do not count."""
    rows: dict[str, int] = {}
    row_of_text: dict[str, int] = {}
    document_ids, positions = [], []
    for position, (document, text) in enumerate(corpus.items()):
        stripped = text.strip()
        if not stripped:
            continue
        rows[document] = row_of_text.setdefault(stripped, len(row_of_text))
        if rows[document] == len(document_ids):  # a text that was not there before
            document_ids.append(document)
            positions.append(position)
    return Pool(document_ids, list(row_of_text), rows, np.array(positions, dtype=np.int64))


def queries_of(dataset: RetrievalSet, pool: Pool, limit: int | None) -> list[Query]:
    """The judged queries that have a text and a positive, one that is not the query itself.

    Queries of equal text bar each other's positives.
    """
    row_of_text = {text: row for row, text in enumerate(pool.texts)}
    texts = {query: dataset.queries[query].strip() for query in dataset.qrels}
    positives: dict[str, dict[int, str]] = {query: {} for query in texts}
    barred: dict[str, set[int]] = {}  # by text
    for text in texts.values():
        barred[text] = {row_of_text[text]} if text in row_of_text else set()
    for query, judged in dataset.qrels.items():
        most_relevant_first = sorted(judged.items(), key=lambda pair: -pair[1])
        for document, score in most_relevant_first:
            if score > 0 and document in pool.rows:
                positives[query].setdefault(pool.rows[document], document)
        barred[texts[query]].update(positives[query])
        positives[query].pop(row_of_text.get(texts[query], -1), None)  # the query itself
    usable = [query for query in list(texts)[:limit] if texts[query] and positives[query]]
    queries = []
    for query in usable:
        queries.append(Query(query, dataset.queries[query], positives[query], frozenset(barred[texts[query]])))
    return queries


def pairs_as_retrieval_set(
    path: Path, split: str, stated: Mapping[str, str | None], labels: Sequence[str] = (), **on_bad_rows: Any
) -> RetrievalSet:  # fmt: skip
    """Pairs as queries to search with: the different positives are the corpus, those of a query are relevant to it.

    labels: as for `examples`. on_bad_rows: as for `accepted`.
    """
    names, table = peek_column_names(rows(path, split))
    columns = guess_columns(names, stated, str(path))
    log.info("%s: %s", path, describe(columns, 0, names, labels))
    if columns.score:
        raise InputError(
            f"{path}: column {columns.score!r} holds scores, and mining takes every pair as a positive; keep only the "
            "positive pairs in the file, and set data.columns.score='' to ignore the column"
        )
    table = refuse_late_columns(of_split(table, split, str(path)), names, columns, stated, 0)
    pairs = accepted(examples(table, columns, num_hard_negatives=0, labels=labels), **on_bad_rows)
    return as_retrieval_set(path.name, pairs)
