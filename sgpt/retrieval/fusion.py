"""Runs fused into one, by ranks (any number) or by scores (two); and the top of a run ordered again.

Runs in, a run out; nothing is changed in place.
"""

from sgpt.data.formats.trec import Run, cut, ranked

RANK_CONSTANT = 60  # k of the paper: how little a rank near the top is worth more than the next


def reciprocal_rank_fusion(runs: list[Run], depth: int, k: int = RANK_CONSTANT) -> Run:
    """The best `depth` of each query by the sum of 1 / (k + rank) over the runs that hold a document, ranks from 1.

    Source: Cormack, Clarke, Büttcher 2009, Reciprocal rank fusion outperforms Condorcet and individual rank learning
    methods.
    """
    fused: dict[str, dict[str, float]] = {}
    for run in runs:
        for query, documents in run.items():
            scores = fused.setdefault(query, {})
            for rank, document in enumerate(ranked(documents), 1):
                scores[document] = scores.get(document, 0.0) + 1 / (k + rank)
    return cut(fused, depth)


def interpolated(first: Run, second: Run, weight: float, depth: int) -> Run:
    """The best `depth` of each query by (1 - weight) · first + weight · second.

    Each query's scores are brought to 0 … 1 before. A document that one run does not hold scores 0 there, the lowest.
    """
    first_scaled, second_scaled = min_max(first), min_max(second)
    fused: Run = {}
    for query in {**first_scaled, **second_scaled}:
        first_scores, second_scores = first_scaled.get(query, {}), second_scaled.get(query, {})
        scores = {}
        for document in {**first_scores, **second_scores}:
            of_first, of_second = first_scores.get(document, 0.0), second_scores.get(document, 0.0)
            scores[document] = (1 - weight) * of_first + weight * of_second
        fused[query] = scores
    return cut(fused, depth)


def min_max(run: Run) -> Run:
    """Each query's scores from 0 (its lowest) to 1 (its best).

    Where all are equal they are 1: a document that was retrieved counts more than one that was not.
    """
    scaled: Run = {}
    for query, documents in run.items():
        low, high = min(documents.values(), default=0.0), max(documents.values(), default=0.0)
        if high > low:
            scaled[query] = {document: (score - low) / (high - low) for document, score in documents.items()}
        else:
            scaled[query] = dict.fromkeys(documents, 1.0)
    return scaled


def reordered(first: Run, scores: Run, depth: int) -> Run:
    """The first `depth` documents of `first` by `scores`, the others behind them in their old order.

    So recall stays what it was. A document without a score stays behind those that have one. The scores of the result
    count down from the number of documents to 1.
    """
    result: Run = {}
    for query, documents in first.items():
        old_order, new_scores = ranked(documents), scores.get(query, {})
        scored = {document: new_scores[document] for document in old_order[:depth] if document in new_scores}
        order = [*ranked(scored), *(document for document in old_order if document not in scored)]
        result[query] = {document: float(len(order) - rank) for rank, document in enumerate(order)}
    return result
