"""What is mined: the corpus as different texts, and the judged queries with what must never be their negative."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sgpt.data.formats.beir import Qrels, RetrievalSet, read_retrieval
from sgpt.data.formats.rows import of_split, rows
from sgpt.data.sources.bad_rows import accepted
from sgpt.data.sources.columns import describe, guess_columns, with_names, without_late_columns
from sgpt.data.sources.pairs import examples
from sgpt.mining.config import MineConfig
from sgpt.runtime.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """The corpus as different texts. names: id of the first document of each; rows: document id -> its text's row, none for a blank.

    places: row -> position in the corpus, ascending.
    """

    names: list[str]
    texts: list[str]
    rows: dict[str, int]
    places: np.ndarray


@dataclass(frozen=True)
class Query:
    """positives: row of the pool -> judged document id, the most relevant first. barred: rows that are never negatives."""

    name: str
    text: str
    positives: dict[int, str]
    barred: frozenset[int]


@dataclass(frozen=True)
class Task:
    """Everything that is read before mining, equal on all processes."""

    config: MineConfig
    chosen: RetrievalSet
    pool: Pool
    queries: list[Query]
    device: torch.device


def read_task(config: MineConfig, device: torch.device | str = "cpu") -> Task:
    chosen = read_set(config)
    pool = pool_of(chosen.corpus)
    queries = queries_of(chosen, pool, config.limit)
    if not queries:
        raise InputError(f"{config.data}, split {config.split!r}: no query has a positive (score above 0) with a text of its own; nothing to mine for")
    return Task(config, chosen, pool, queries, torch.device(device))


def read_set(config: MineConfig) -> RetrievalSet:
    """A BEIR folder, or pairs in a file or in a folder of files."""
    path = Path(config.data)
    if not path.exists() or any((path / name).exists() for name in ("corpus.jsonl", "corpus.jsonl.gz", "qrels")):
        beside = [f"columns.{role}" for role, name in config.columns.items() if name is not None]
        beside += ["labels"] * bool(config.labels) + ["on_error"] * (config.on_error != "stop")
        if beside:
            raise InputError(f"{', '.join(beside)}: of pairs in a file, and data={config.data} is read as a BEIR folder; leave it out")
        return read_retrieval(path, config.split)
    try:
        rejected = Path(f"{config.output}.rejected.jsonl")
        return retrieval_set(
            path, config.split, config.columns, config.labels, on_error=config.on_error, rejected=rejected, max_error_share=config.max_error_share
        )  # fmt: skip
    except InputError as error:
        raise InputError(re.sub(r"\bdata\.(?=columns|labels|on_error|max_error_share)", "", str(error))) from error  # here they are keys by themselves


def pool_of(corpus: dict[str, str]) -> Pool:
    rows: dict[str, int] = {}
    row_of_text: dict[str, int] = {}
    names, places = [], []
    for place, (name, text) in enumerate(corpus.items()):
        if stripped := text.strip():
            rows[name] = row_of_text.setdefault(stripped, len(row_of_text))
            if rows[name] == len(names):
                names.append(name)
                places.append(place)
    return Pool(names, list(row_of_text), rows, np.array(places, dtype=np.int64))


def queries_of(chosen: RetrievalSet, pool: Pool, limit: int | None) -> list[Query]:
    """The judged queries that have a text and a positive, one that is not the query itself. Queries of equal text bar each other's positives."""
    row_of_text = {text: row for row, text in enumerate(pool.texts)}
    texts = {name: chosen.queries[name].strip() for name in chosen.qrels}
    positives: dict[str, dict[int, str]] = {name: {} for name in texts}
    barred: dict[str, set[int]] = {text: {row_of_text[text]} if text in row_of_text else set() for text in texts.values()}
    for name, judged in chosen.qrels.items():
        for document, score in sorted(judged.items(), key=lambda pair: -pair[1]):
            if score > 0 and document in pool.rows:
                positives[name].setdefault(pool.rows[document], document)
        barred[texts[name]].update(positives[name])
        positives[name].pop(row_of_text.get(texts[name], -1), None)  # the query itself
    usable = [name for name in list(texts)[:limit] if texts[name] and positives[name]]
    return [Query(name, chosen.queries[name], positives[name], frozenset(barred[texts[name]])) for name in usable]


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
