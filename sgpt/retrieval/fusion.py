"""Two rankings made one: by ranks, or by scores. And a part of a ranking ordered anew. Runs in, a run out, nothing changed in place."""

from sgpt.data.formats.trec import Run, cut, ranked

RANK_CONSTANT = 60  # k of the paper: how little a rank near the top is worth more than the next


def reciprocal_rank_fusion(runs: list[Run], depth: int, k: int = RANK_CONSTANT) -> Run:
    """A document scores the sum of 1 / (k + rank) over the runs that hold it, ranks from 1; the best `depth` of each query.

    Source: Cormack, Clarke, Büttcher 2009, Reciprocal rank fusion outperforms Condorcet and individual rank learning methods.
    """
    fused: dict[str, dict[str, float]] = {}
    for run in runs:
        for query, documents in run.items():
            scores = fused.setdefault(query, {})
            for rank, document in enumerate(ranked(documents), 1):
                scores[document] = scores.get(document, 0.0) + 1 / (k + rank)
    return cut(fused, depth)


def interpolated(first: Run, second: Run, weight: float, depth: int) -> Run:
    """(1 - weight) · first + weight · second, each query's scores brought to 0 … 1 before; the best `depth` of each query.

    A document that one run does not hold has its lowest score there, 0.
    """
    left, right = min_max(first), min_max(second)
    fused = {}
    for query in {**left, **right}:
        ours, theirs = left.get(query, {}), right.get(query, {})
        fused[query] = {document: (1 - weight) * ours.get(document, 0.0) + weight * theirs.get(document, 0.0) for document in {**ours, **theirs}}
    return cut(fused, depth)


def min_max(run: Run) -> Run:
    """Each query's scores from 0 (its lowest) to 1 (its best). Where all are equal they are 1: found counts more than not found."""
    scaled = {}
    for query, documents in run.items():
        low, high = min(documents.values(), default=0.0), max(documents.values(), default=0.0)
        scaled[query] = {document: (score - low) / (high - low) if high > low else 1.0 for document, score in documents.items()}
    return scaled


def reordered(first: Run, scores: Run, depth: int) -> Run:
    """The first `depth` documents of `first` by `scores`, the others behind them in their old order, so that recall stays what it was.

    A document without a score stays behind those that have one. The scores of the result are places, best highest.
    """
    again = {}
    for query, documents in first.items():
        order, found = ranked(documents), scores.get(query, {})
        moved = dict.fromkeys(ranked({document: found[document] for document in order[:depth] if document in found}))
        again[query] = [*moved, *(document for document in order if document not in moved)]
    return {query: {document: float(len(order) - place) for place, document in enumerate(order)} for query, order in again.items()}
