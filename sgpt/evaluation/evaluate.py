"""Evaluation of an encoder in training: retrieval over BEIR folders, similarity of sentence pairs, BM25 next to it.

train/evaluate.py compares more systems on the same sets (sgpt/evaluation/systems.py, compare.py).

Exact search in chunks, and embeddings beyond a gigabyte in a file: besides the texts, memory is bounded whatever the
corpus.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch.nn import functional as F

from sgpt.data.formats.beir import RetrievalSet, fewer_documents
from sgpt.data.formats.scored_pairs import PairSet, fewer_pairs, read_pairs
from sgpt.data.sources.columns import COLUMN_ROLES, keys_below
from sgpt.data.test_sets.beir_sets import find_beir_folders, read_beir_folder
from sgpt.data.test_sets.own_pairs import read_own_pairs
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.bm25 import bm25_run
from sgpt.retrieval.dense import name_in_errors, retrieve
from sgpt.retrieval.metrics import (
    MAIN_METRICS,
    correlations,
    difference,
    mean_ranking,
    ranking,
    ranking_per_query,
)
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import log_progress
from sgpt.runtime.values import FINITE, check_ranges

BEIR_ROOT = "data/raw/beir"  # where sets of BEIR are looked for and downloaded to
Results = dict[str, dict[str, float]]
QueryScores = dict[str, dict[str, float]]  # set -> query id -> the main metric
log = logging.getLogger(__name__)


@dataclass
class EvaluationConfig:
    """Keys of `evaluation` and `dev` of a training run: what is scored before and after it, or while it trains."""

    retrieval: list[str] = field(default_factory=list)
    """BEIR folders, or names of BEIR's sets."""
    sts: list[str] = field(default_factory=list)
    """Files of scored sentence pairs."""
    pairs: list[str] = field(default_factory=list)
    """Files of pairs or triplets, as for data.path: each query is to find its positives among all documents there."""
    columns: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(COLUMN_ROLES))
    """Of these files, as data.columns: query, positive, negative, label, score; null goes by the usual names."""
    labels: list[str] = field(default_factory=list)
    """What numbers as labels mean in these files, as data.labels."""
    positive_score: float | None = None
    """Of scored pairs in these files the least score of a positive; all others are hard negatives."""
    split: str | None = "test"
    """Of all; null is each set's own, which is test but for BEIR's msmarco."""
    bm25: bool = True
    """BM25 is scored on the retrieval sets, too."""
    limit: int | None = None
    """So many queries and pairs, with the queries' documents and as many others; for trying things out."""

    def __post_init__(self) -> None:
        check_ranges(self, positive_score=FINITE)
        stated = {f"columns.{role}": name for role, name in self.columns.items() if name is not None}
        stated |= {"labels": self.labels} if self.labels else {}
        stated |= {} if self.positive_score is None else {"positive_score": self.positive_score}
        if stated and not self.pairs:
            keys = ", ".join(f"{key}={value}" for key, value in stated.items())
            raise InputError(
                f"{keys} of evaluation or dev: is for its `pairs` alone, and none are named; name some, or leave it out"
            )


@dataclass(frozen=True)
class Sets:
    """What is evaluated, read and checked."""

    retrieval: list[RetrievalSet]
    sts: list[PairSet]


def check_there(config: EvaluationConfig, made: Sequence[str] = ()) -> None:
    """InputError for a set of `retrieval` or `sts` that is not there, before training data is read for an hour.

    made: folders that are written when the training data is read, and may hold sets.
    """
    for file in config.sts:
        if not Path(file).exists():
            raise InputError(f"{file}: no such file; check the path")
    folders = [Path(folder).resolve() for folder in made]
    others = [name for name in config.retrieval if not any(map(Path(name).resolve().is_relative_to, folders))]
    find_beir_folders(others, config.split, Path(BEIR_ROOT))


def read_sets(config: EvaluationConfig, key: str = "evaluation") -> Sets:
    """Reads every file now: what is missing or cannot be scored must stop a run before it trains, not after.

    key: of the config in a run, for messages.
    """
    folders = find_beir_folders(config.retrieval, config.split, Path(BEIR_ROOT))
    retrieval = [read_beir_folder(folder) for folder in folders]
    stated = (config.columns, config.labels, config.positive_score)
    with keys_below(f"{key}."):
        retrieval += [read_own_pairs(Path(file), config.split or "test", *stated) for file in config.pairs]
    pairs: list[PairSet] = []
    for file in config.sts:
        pairs += read_pairs(Path(file), config.split or "test")  # SemEval's files give a set a year
    names = [dataset.name for dataset in (*retrieval, *pairs)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(
            f"two evaluation sets are called {twice!r}, and results are kept by name; "
            "rename a folder, or evaluate one after the other"
        )
    sets = Sets(retrieval, pairs)
    return sets if config.limit is None else _limited(sets, config.limit, key)


def _limited(sets: Sets, limit: int, key: str) -> Sets:
    """The first queries and pairs of each set; InputError where nothing that can be scored is among them."""
    sets = Sets(
        [fewer_documents(dataset, limit) for dataset in sets.retrieval],
        [fewer_pairs(dataset, limit) for dataset in sets.sts],
    )
    for dataset in sets.retrieval:
        if not any(
            score > 0 and document in dataset.corpus
            for judged in dataset.qrels.values()
            for document, score in judged.items()
        ):
            raise InputError(
                f"{key}.limit={limit}: the first queries of {dataset.name} have no relevant document; "
                "raise it"
            )
    for dataset in sets.sts:
        if len(set(dataset.scores)) < 2:
            raise InputError(
                f"{key}.limit={limit}: the first pairs of {dataset.name} have one score, "
                "nothing to correlate; raise it"
            )
    return sets


def evaluate(encoder: Encoder, sets: Sets) -> Results:
    """Set name -> metrics."""
    return evaluate_queries(encoder, sets)[0]


def evaluate_queries(encoder: Encoder, sets: Sets) -> tuple[Results, QueryScores]:
    """The metrics of each set, and of each query of a retrieval set the first of MAIN_METRICS, for intervals."""
    results: Results = {}
    scores: QueryScores = {}
    for dataset in sets.retrieval:
        with log_progress(
            f"evaluating on {dataset.name}, {len(dataset.qrels):,} queries and {len(dataset.corpus):,} documents"
        ):
            per_query = ranking_per_query(dataset.qrels, retrieve(encoder, dataset))
        results[dataset.name] = mean_ranking(per_query)
        scores[dataset.name] = {query: row[MAIN_METRICS[0]] for query, row in per_query.items()}
    for pairs in sets.sts:
        with log_progress(f"evaluating on {pairs.name}, {len(pairs.scores):,} pairs"):
            results[pairs.name] = correlations(pairs.scores, cosines(encoder, pairs))
    return results, scores


def gains(after: QueryScores, before: QueryScores) -> dict[str, dict[str, float | None]]:
    """Of each set that both have, the mean difference with its 95 % interval: fields of `Difference`."""
    of_sets = {}
    for name in (name for name in after if name in before):
        queries = sorted(after[name].keys() & before[name].keys())
        of_set = ([scores[name][query] for query in queries] for scores in (after, before))
        of_sets[name] = asdict(difference(*of_set))
    return of_sets


def cosines(encoder: Encoder, pairs: PairSet) -> list[float]:
    """Both sides are encoded as queries: a similarity of equals has one role."""
    with name_in_errors(pairs.name):
        sides = (pairs.first, pairs.second)
        first, second = (encoder.encode_queries(side, normalize=True, as_tensor=True) for side in sides)
    return (first * second).sum(1).tolist()


def bm25(sets: Sets) -> Results:
    """BM25 (bm25s, Lucene's variant, English stop words) on the retrieval sets."""
    results: Results = {}
    for dataset in sets.retrieval:
        with log_progress(f"BM25 on {dataset.name}, {len(dataset.corpus):,} documents"):
            results[dataset.name] = ranking(dataset.qrels, bm25_run(dataset))
    return results


def metrics_table(columns: Mapping[str, Results], title: str):
    """A rich table: a row for each set and metric, a column for each system."""
    from rich.table import Table

    rows = Table("set", "metric", *columns, title=title)
    names = dict.fromkeys(name for results in columns.values() for name in results)
    for name in names:
        of_systems = [results.get(name, {}) for results in columns.values()]
        for metric in dict.fromkeys(metric for metrics in of_systems for metric in metrics):
            cells = (f"{100 * metrics[metric]:.2f}" if metric in metrics else "–" for metrics in of_systems)
            rows.add_row(name, metric, *cells)
    return rows


def similarity_sample(encoder: Encoder, queries: Sequence[str], positives: Sequence[str]) -> dict[str, list[float]]:
    """Cosines of matching pairs and of each query with the document of the one before, for the report's histogram."""
    left = F.normalize(encoder.encode_queries(queries, as_tensor=True), dim=1)
    right = F.normalize(encoder.encode_documents(positives, as_tensor=True), dim=1)
    return {"positive": (left * right).sum(1).tolist(), "negative": (left * right.roll(1, 0)).sum(1).tolist()}
