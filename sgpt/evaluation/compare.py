"""Every way to search one set, side by side: BM25, the bi-encoder, both fused, both re-ranked by a cross-encoder.

`run_systems` ranks, `system_metrics` scores. Next to the metrics each system gets its speed, the size of its index, and
the difference to BM25 and to its first stage with a 95 % interval; each first stage gets the score of a perfect
re-ranker, which is as much as re-ranking could gain.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from sgpt.data.formats.beir import Qrels, RetrievalSet, read_judged, read_retrieval
from sgpt.data.formats.row import same_split
from sgpt.data.formats.trec import Run, check_ids, write_run
from sgpt.data.test_sets.beir_sets import BeirFolder, splits
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.table import FIRST_STAGES, SYSTEMS, Systems
from sgpt.retrieval.bm25 import bm25_index, bm25_run
from sgpt.retrieval.dense import DEPTH, embed_corpus, retrieve
from sgpt.retrieval.fusion import interpolated, reciprocal_rank_fusion, reordered
from sgpt.retrieval.metrics import SHALLOW, difference, perfect_rerank, ranking, ranking_per_query

WEIGHTS = [step / 20 for step in range(21)]
RerankRun = Callable[[RetrievalSet, Run, int], Run]  # scores of the best `depth` documents of each query


@dataclass(frozen=True)
class SystemRun:
    """One system's results on one set.

    seconds: for all queries, from their texts on, with the documents indexed before. index_bytes: a document, None if
    not measured. scores: of the re-ranked documents. weight: of the bi-encoder, where it was tuned.
    """

    run: Run
    seconds: float
    index_bytes: float | None = None
    scores: Run | None = None
    weight: float | None = None


def run_systems(
    encoder: Encoder,
    dataset: RetrievalSet,
    dev: RetrievalSet | None = None,
    *,
    bm25: bool = True,
    fuse: bool = True,
    rerank: RerankRun | None = None,
    depth: int = DEPTH,
) -> dict[str, SystemRun]:
    """System -> its results on `dataset`, in the order of SYSTEMS.

    dev: tunes the fusion by scores, which is left out without it. rerank: scores the best `depth` documents of BM25 and
    of the encoder again.
    """
    kept = max(depth, DEPTH)  # documents of a query that every ranking holds
    systems: dict[str, SystemRun] = {}
    if bm25:
        index = bm25_index(list(dataset.corpus.values()))
        run, seconds = _timed(lambda: bm25_run(dataset, kept, index))
        systems["bm25"] = SystemRun(run, seconds, index_bytes(index) / len(dataset.corpus))
    documents = embed_corpus(encoder, dataset)  # [documents, D]
    run, seconds = _timed(lambda: retrieve(encoder, dataset, kept, documents))
    systems["model"] = SystemRun(run, seconds, documents.shape[1] * documents.element_size())
    if bm25 and fuse:
        seconds_of_both = systems["bm25"].seconds + systems["model"].seconds
        both = [systems["bm25"].run, systems["model"].run]
        run, seconds = _timed(lambda: reciprocal_rank_fusion(both, kept))
        systems["reciprocal_rank"] = SystemRun(run, seconds_of_both + seconds)
        if dev:
            if dev.corpus is not dataset.corpus:  # of a folder of its own
                index, documents = bm25_index(list(dev.corpus.values())), embed_corpus(encoder, dev)
            weight = best_weight(dev.qrels, bm25_run(dev, kept, index), retrieve(encoder, dev, kept, documents), kept)
            run, seconds = _timed(lambda: interpolated(*both, weight, kept))
            systems["interpolated"] = SystemRun(run, seconds_of_both + seconds, weight=weight)
    for name, first in FIRST_STAGES.items() if rerank else ():
        if stage := systems.get(first):
            scores, seconds = _timed(lambda stage=stage: rerank(dataset, stage.run, depth))
            systems[name] = SystemRun(
                reordered(stage.run, scores, depth), stage.seconds + seconds, stage.index_bytes, scores
            )
    return {name: systems[name] for name in SYSTEMS if name in systems}


def best_weight(qrels: Qrels, first: Run, second: Run, depth: int) -> float:
    """Of the second run, 0 to 1 in steps of 0.05: the best nDCG@10; of equals the nearest to one half."""
    scores = {weight: ranking(qrels, interpolated(first, second, weight, depth))["ndcg@10"] for weight in WEIGHTS}
    return max(WEIGHTS, key=lambda weight: (round(scores[weight], 9), -abs(weight - 0.5)))


def tuning_set(
    beir_folder: BeirFolder, dataset: RetrievalSet, split: str, dev_folder: str | None = None
) -> tuple[RetrievalSet | None, str]:
    """The queries of another split, of the same folder or of `dev_folder`; None and the reason when there is none."""
    folder = Path(dev_folder) if dev_folder else beir_folder.folder
    left_out = f"{dataset.name}: {SYSTEMS['interpolated']} is left out, for its weight is tuned"
    itself = folder.resolve() == beir_folder.folder.resolve()
    if itself and same_split(split, beir_folder.split):
        return None, f"{left_out} on split {split!r}, which is what is scored; set dev_split=<another>"
    known = splits(folder)
    if not any(same_split(split, other) for other in known):
        others = [other for other in known if not itself or other != beir_folder.split]
        remedy = "no other split is there; set dev_folder=<a BEIR folder of other queries>"
        if others:
            remedy = f"set dev_split={' or dev_split='.join(others)}"
        return None, f"{left_out} on split {split!r}, and {folder} has: {', '.join(known)}; {remedy}"
    queries, qrels = read_judged(folder, split)
    if not any(score > 0 for judged in qrels.values() for score in judged.values()):
        return None, f"{left_out} on split {split!r}, where no judgement is above 0; set dev_split=<another>"
    return replace(dataset, queries=queries, qrels=qrels) if itself else read_retrieval(folder, split), ""


def system_metrics(dataset: RetrievalSet, systems: Mapping[str, SystemRun], depth: int = DEPTH) -> Systems:
    """What there is to say of each system.

    metrics: as `ranking`. reranking: nDCG@10 with fewer documents re-ranked, or with the best ones in perfect order.
    cost: speed, size of the index, weight of the bi-encoder. differences: other system -> mean, low and high of the
    difference of nDCG@10, 95 %.
    """
    ndcg = {  # of each query
        name: [row["ndcg@10"] for row in ranking_per_query(dataset.qrels, system.run).values()]
        for name, system in systems.items()
    }
    results: Systems = {}
    top = min(SHALLOW, depth)
    for name, system in systems.items():
        first = FIRST_STAGES.get(name)
        other_runs: dict[str, Run] = {}  # whose nDCG@10 is shown next to the system's own
        if system.scores:
            other_runs[f"ndcg@10_reranked_top_{top}"] = reordered(systems[first].run, system.scores, top)
        elif name in FIRST_STAGES.values():
            for limit in sorted({depth, top}):
                other_runs[f"ndcg@10_perfect_top_{limit}"] = perfect_rerank(dataset.qrels, system.run, limit)
        cost = {
            "queries_per_second": len(dataset.queries) / max(system.seconds, 1e-9),
            "bytes_per_document": system.index_bytes,
            "weight": system.weight,
        }
        others = dict.fromkeys(other for other in ("bm25", first) if other in systems and other != name)
        results[name] = {
            "metrics": ranking(dataset.qrels, system.run),
            "reranking": {metric: ranking(dataset.qrels, run)["ndcg@10"] for metric, run in other_runs.items()},
            "cost": {metric: number for metric, number in cost.items() if number is not None},
            "differences": {other: vars(difference(ndcg[name], ndcg[other])) for other in others},
        }
    return results


def write_runs(folder: Path, dataset: RetrievalSet, systems: Mapping[str, SystemRun]) -> None:
    """`<folder>/<set>.<system>.trec` each, as deep as it was measured."""
    for name, system in systems.items():
        write_run(_run_file(folder, dataset, name), system.run, name)


def check_runs(folder: Path, dataset: RetrievalSet) -> None:
    """InputError for an id that `write_runs` cannot write, before anything is ranked."""
    check_ids(_run_file(folder, dataset, "model"), chain(dataset.queries, dataset.corpus))


def _run_file(folder: Path, dataset: RetrievalSet, system: str) -> Path:
    return folder / f"{dataset.name.replace('/', '_')}.{system}.trec"


def index_bytes(index) -> int:
    """What bm25s holds in memory for its scores, and the words; the map from word to number counts with the word's own
    bytes only.
    """
    return sum(part.nbytes for part in index.scores.values() if hasattr(part, "nbytes")) + sum(
        len(word.encode()) for word in index.vocab_dict
    )


def _timed(work: Callable[[], Run]) -> tuple[Run, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started
