"""Ranking metrics by trec_eval's own code, correlations and intervals by scipy. Nothing here is computed by hand."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sgpt.data.formats.beir import Qrels
from sgpt.data.formats.trec import Run, cut, ranked

SHALLOW = 10  # a second, shallower depth of re-ranking, from the same scores: a weak scorer does less harm there
log = logging.getLogger(__name__)
# Name -> trec_eval's measure, computed for each query; DEPTH (sgpt/retrieval/dense.py) is to be as deep as the deepest.
RANKING_METRICS = {
    "ndcg@10": "ndcg_cut_10",
    "map@100": "map_cut_100",
    "recall@100": "recall_100",
    "mrr@10": "recip_rank",
}
TOP = {"mrr@10": 10}  # metrics whose measure knows no cut-off -> so many documents of a query are given to it
CORRELATIONS = ("spearman_cosine", "pearson_cosine")
MAIN_METRICS = ("ndcg@10", "spearman_cosine")


def ranking(qrels: Qrels, run: Run) -> dict[str, float]:
    """Means of RANKING_METRICS over the queries that have a relevant document; no results count 0."""
    return mean_ranking(ranking_per_query(qrels, run))


def mean_ranking(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of what `ranking_per_query` returns."""
    return {name: sum(row[name] for row in per_query.values()) / max(1, len(per_query)) for name in RANKING_METRICS}


def ranking_per_query(qrels: Qrels, run: Run) -> dict[str, dict[str, float]]:
    """As `ranking`, a row for each query that has a relevant document. Ties rank by document id, descending, as
    trec_eval does.
    """
    import pytrec_eval

    judged = {}
    for query, documents in qrels.items():
        if any(score > 0 for score in documents.values()):  # without a relevant document there is nothing to find
            judged[query] = dict(documents)
    scores = {query: dict(run.get(query, {})) for query in judged}
    rows: dict[str, dict[str, float]] = {query: {} for query in judged}
    for top in dict.fromkeys(TOP.get(name) for name in RANKING_METRICS):
        measures = {name: measure for name, measure in RANKING_METRICS.items() if TOP.get(name) == top}
        given = scores if top is None else cut(scores, top)
        values = pytrec_eval.RelevanceEvaluator(judged, set(measures.values())).evaluate(given)
        for query, row in rows.items():
            row |= {name: values.get(query, {}).get(measure, 0.0) for name, measure in measures.items()}
    return rows


def correlations(scores: list[float], cosines: list[float]) -> dict[str, float]:
    """Spearman and Pearson correlation of gold scores and cosines; 0 and a warning where all cosines are equal."""
    from scipy.stats import pearsonr, spearmanr

    if len({*cosines}) < 2:
        message = "all %d cosines are %g, so they correlate with nothing, which counts as 0; has the model collapsed?"
        log.warning(message, len(cosines), cosines[0])
        return {"spearman_cosine": 0.0, "pearson_cosine": 0.0}

    return {
        "spearman_cosine": float(spearmanr(scores, cosines).statistic),
        "pearson_cosine": float(pearsonr(scores, cosines).statistic),
    }


def main_metric(metrics: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the first of MAIN_METRICS that is there."""
    return next((name, metrics[name]) for name in MAIN_METRICS if name in metrics)


def perfect_rerank(qrels: Qrels, run: Run, depth: int) -> Run:
    """The run after a perfect re-ranker: its best `depth` documents by their relevance, then the others in their order.

    No re-ranker of this run at this depth does better.
    """
    best: Run = {}
    for query, scores in run.items():
        order, judged = ranked(scores), qrels.get(query, {})
        best[query] = {document: float(judged.get(document, 0)) for document in order[:depth]}
        best[query] |= {document: -1.0 - rank for rank, document in enumerate(order[depth:])}
    return best


@dataclass(frozen=True)
class Difference:
    """Of two systems. mean: over queries. low, high: its 95 % interval; None with fewer than two queries."""

    mean: float
    low: float | None
    high: float | None


def difference(ours: Sequence[float], theirs: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Paired bootstrap over queries: both systems are resampled together, so that hard queries are hard for both.

    ours, theirs: one number for each query, in the same order. The interval holds the 2.5 % to 97.5 % percentiles of
    the mean. Source: Sakai 2006, Evaluating evaluation metrics based on the bootstrap.
    """
    from scipy.stats import bootstrap

    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)  # [queries]
    if len(differences) < 2:
        return Difference(float(differences.mean()) if len(differences) else 0.0, None, None)
    batch = max(1, 4_000_000 // len(differences))  # resamples × queries in memory at once: 32 MB of indices
    generator = np.random.default_rng(seed)
    result = bootstrap(
        (differences,), np.mean, n_resamples=resamples, batch=batch, method="percentile", rng=generator
    )  # fmt: skip
    interval = result.confidence_interval
    return Difference(float(differences.mean()), float(interval.low), float(interval.high))
