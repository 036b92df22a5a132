"""USEB's results: average precision in four tasks, and their mean (Wang, Reimers, Gurevych 2021; SGPT, section 4.1).

Texts of one kind are compared, so both sides are encoded as queries, of length 1, newlines as blanks. Average precision
is trec_eval's: equal cosines rank by id, where the original's tools leave their order to chance or count them together.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean

from torch import Tensor

from sgpt.data.formats.beir import Qrels, RetrievalSet
from sgpt.data.formats.scored_pairs import PairSet
from sgpt.data.formats.trec import Run
from sgpt.data.test_sets.useb import NEITHER, CandidateSet, UsebTask
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import Results
from sgpt.retrieval.dense import DEPTH, as_run, name_in_errors, search
from sgpt.retrieval.metrics import correlations

# of each task, all average precision
MAIN = {"askubuntu": "map", "cqadupstack": "map@100", "twitterpara": "ap", "scidocs": "map"}


def useb(encoder: Encoder, tasks: Sequence[UsebTask]) -> Results:
    """useb_<task> -> metrics, 0 to 1; and useb, the mean of the four main metrics, when all four are there."""
    results = {}
    for task in tasks:
        with name_in_errors(f"useb_{task.name}"):
            results[f"useb_{task.name}"] = SCORERS[task.name](encoder, task.parts)
    if len(results) < len(MAIN):
        return results
    return {
        **results,
        "useb": {"average_precision": mean(results[f"useb_{name}"][metric] for name, metric in MAIN.items())},
    }


def _askubuntu(encoder: Encoder, parts: Sequence[CandidateSet]) -> dict[str, float]:
    """Of equal cosines the better by BM25 is first."""
    [dataset] = parts
    ordered: dict[str, dict[str, float]] = {}
    for query, scores in _scored(encoder, dataset).items():
        order = sorted(scores, key=scores.__getitem__, reverse=True)  # stable, and `scores` is in BM25's order
        ordered[query] = {document: float(-rank) for rank, document in enumerate(order)}
    metrics = _trec(dataset.qrels, ordered, "map", "P_1", "P_5", "recip_rank")
    return {"map": metrics["map"], "p@1": metrics["P_1"], "p@5": metrics["P_5"], "mrr": metrics["recip_rank"]}


def _scidocs(encoder: Encoder, parts: Sequence[CandidateSet]) -> dict[str, float]:
    by_kind = {dataset.name: _trec(dataset.qrels, _scored(encoder, dataset), "map", "ndcg") for dataset in parts}
    means = {metric: mean(metrics[metric] for metrics in by_kind.values()) for metric in ("map", "ndcg")}
    return means | {f"map_{kind}": metrics["map"] for kind, metrics in by_kind.items()}


def _cqadupstack(encoder: Encoder, forums: Sequence[RetrievalSet]) -> dict[str, float]:
    """map@100 divides by the relevant documents among the hundred, as the original does, not by all of them."""
    by_forum = []
    for forum in forums:
        queries, documents = list(forum.queries), list(forum.corpus)
        rows = search(_embedded(encoder, forum.queries.values()), _embedded(encoder, forum.corpus.values()), DEPTH)
        run = as_run(queries, documents, *rows)
        hits = {query: {name: 1 for name in names if name in forum.qrels[query]} for query, names in run.items()}
        judged = {query: relevant for query, relevant in forum.qrels.items() if relevant}
        ndcg = _trec(judged, run, "ndcg_cut_10")["ndcg_cut_10"]
        by_forum.append({"map@100": _trec(hits, run, "map")["map"], "ndcg@10": ndcg})
    return {metric: mean(metrics[metric] for metrics in by_forum) for metric in ("map@100", "ndcg@10")}


def _twitterpara(encoder: Encoder, sources: Sequence[PairSet]) -> dict[str, float]:
    aps, spearmans = {}, []
    for pairs in sources:
        first, second = (_embedded(encoder, side) for side in (pairs.first, pairs.second))
        cosines = (first * second).sum(1).tolist()
        spearmans.append(correlations(pairs.scores, cosines)["spearman_cosine"])
        # one query, "pairs", whose documents are the pairs that annotators decided on, by their number
        decided = {f"{number:06}": number for number, score in enumerate(pairs.scores) if score != NEITHER}
        qrels = {"pairs": {name: int(pairs.scores[number] > NEITHER) for name, number in decided.items()}}
        run = {"pairs": {name: cosines[number] for name, number in decided.items()}}
        aps[f"ap_{pairs.name}"] = _trec(qrels, run, "map")["map"]
    return {"ap": mean(aps.values()), "spearman": mean(spearmans), **aps}


SCORERS: dict[str, Callable[[Encoder, Sequence], dict[str, float]]] = {
    "askubuntu": _askubuntu, "cqadupstack": _cqadupstack, "twitterpara": _twitterpara, "scidocs": _scidocs,
}  # fmt: skip


def _scored(encoder: Encoder, dataset: CandidateSet) -> Run:
    """Cosines of each query with its candidates. A text that several queries need is encoded once."""
    names = list(dict.fromkeys(name for query, documents in dataset.candidates.items() for name in (query, *documents)))
    rows = {name: row for row, name in enumerate(names)}
    embeddings = _embedded(encoder, (dataset.texts[name] for name in names))  # [names, D]
    cosines: dict[str, dict[str, float]] = {}
    for query, documents in dataset.candidates.items():
        if documents:
            candidates = embeddings[[rows[name] for name in documents]]  # [candidates, D]
            scores = candidates @ embeddings[rows[query]]
            cosines[query] = dict(zip(documents, scores.tolist(), strict=True))
    return cosines


def _embedded(encoder: Encoder, texts: Iterable[str]) -> Tensor:
    return encoder.encode_queries([text.strip().replace("\n", " ") for text in texts], normalize=True, as_tensor=True)


def _trec(qrels: Qrels, run: Run, *measures: str) -> dict[str, float]:
    """Means over the queries of the run that are judged; a query without a relevant document counts 0."""
    import pytrec_eval

    judged = {query: dict(qrels[query]) for query in run if qrels.get(query)}
    names = {measure.replace("_cut_", "_cut.").replace("P_", "P.") for measure in measures}
    by_query: dict[str, dict[str, float]] = {}
    if judged:
        scored = {query: dict(run[query]) for query in judged}
        by_query = pytrec_eval.RelevanceEvaluator(judged, names).evaluate(scored)
    return {
        measure: mean(by_query.get(query, {}).get(measure, 0.0) for query in run if query in qrels)
        for measure in measures
    }
