"""Ranking metrics by trec_eval's own code, correlations by scipy. Nothing here is computed by hand."""

from collections.abc import Mapping

Qrels = Mapping[str, Mapping[str, int]]  # query id -> document id -> relevance
Run = Mapping[str, Mapping[str, float]]  # query id -> document id -> score

RANKING_METRICS = {"ndcg@10": "ndcg_cut_10", "map@100": "map_cut_100", "recall@100": "recall_100", "mrr@10": "recip_rank"}
MAIN_METRICS = ("ndcg@10", "spearman_cosine")


def ranking(qrels: Qrels, run: Run) -> dict[str, float]:
    """nDCG@10, MAP@100, Recall@100, MRR@10, each the mean over all queries of `qrels`; a query without results counts 0."""
    per_query = ranking_per_query(qrels, run)
    return {name: sum(row[name] for row in per_query.values()) / max(1, len(per_query)) for name in RANKING_METRICS}


def ranking_per_query(qrels: Qrels, run: Run) -> dict[str, dict[str, float]]:
    """As `ranking`, a row for each query of `qrels`. Ties rank by document id, descending, as trec_eval does."""
    import pytrec_eval

    judged = {query: dict(documents) for query, documents in qrels.items() if any(score > 0 for score in documents.values())}
    scores = {query: dict(run.get(query, {})) for query in judged}
    whole = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "map_cut.100", "recall.100"}).evaluate(scores)
    # recip_rank knows no cut-off: give it ten documents
    top = {query: dict(_top(documents, 10)) for query, documents in scores.items()}
    reciprocal = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(top)
    rows = {}
    for query in judged:
        values = {**whole.get(query, {}), **reciprocal.get(query, {})}
        rows[query] = {name: values.get(key, 0.0) for name, key in RANKING_METRICS.items()}
    return rows


def correlations(scores: list[float], cosines: list[float]) -> dict[str, float]:
    """Spearman and Pearson correlation of gold scores and cosines."""
    from scipy.stats import pearsonr, spearmanr

    return {
        "spearman_cosine": float(spearmanr(scores, cosines).statistic),
        "pearson_cosine": float(pearsonr(scores, cosines).statistic),
    }


def main_metric(metrics: Mapping[str, float]) -> tuple[str, float]:
    return next((name, metrics[name]) for name in MAIN_METRICS if name in metrics)


def _top(documents: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    return sorted(documents.items(), key=lambda item: (item[1], item[0]), reverse=True)[:count]
