"""What is re-ranking by SGPT-CE worth? BM25, the bi-encoder, both fused and both re-ranked, on real sets; honest where
it loses.

    python benchmarks/rerank_quality.py --encoder runs/pydocs [--sets scifact squad cranfield cacm cisi quora]
        [--queries 40]
        [--rankers data/nano …] [--bfloat16]

The first reranker gets `compare.run_systems`'s whole table, that of train/evaluate.py; every other one re-ranks BM25.
Only the first --queries of each set, over its whole corpus. quora is a file of question pairs: its duplicates of the
test part are queries and their answers, all questions of the part but the queries the corpus, the prompt is the
symmetric one. --bfloat16 scores once more with the first reranker in bfloat16: nDCG@10 and Kendall's tau between the
two orders of each query's documents, mean and least.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from measure.report import about
from rich.console import Console
from scipy.stats import kendalltau

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.data.formats.beir import RetrievalSet, fewer_queries, read_judged, read_retrieval
from sgpt.data.formats.jsonl import read_rows
from sgpt.data.formats.trec import Run
from sgpt.data.test_sets.beir_sets import splits
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation import compare
from sgpt.evaluation.table import systems_table
from sgpt.retrieval.fusion import reordered
from sgpt.retrieval.metrics import ranking
from sgpt.retrieval.rerank import rerank
from sgpt.runtime.errors import InputError

SETS = ("scifact", "squad", "cranfield", "cacm", "cisi", "quora")
PROMPTS = {"quora": "quoraD"}
TUNED_ON = ("dev", "train")  # the split that the weight of the fusion by scores is tuned on, where there is one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="run, export or adapter of a bi-encoder")
    parser.add_argument("--rankers", nargs="+", default=["data/nano"], help="decoders (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--queries", type=int, default=40, help="of each set (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=100, help="documents re-ranked (default: %(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="the first reranker once more in bfloat16")
    parser.add_argument("--shared", default="../shared/data", help="folder of the sets (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--output", default="runs/bench/rerank_quality.jsonl", help="each set is appended to it (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    described, encoder = about(options), Encoder.from_pretrained(options.encoder)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    for name in options.sets:
        started = time.perf_counter()
        found = described | {"set": name, **results(name, encoder, options)}
        with Path(options.output).open("a", encoding="utf-8") as out:
            out.write(json.dumps(found | {"seconds": time.perf_counter() - started}) + "\n")


def results(name: str, encoder: Encoder, options: argparse.Namespace) -> dict:
    folder, prompt = Path(options.shared) / name, PROMPTS.get(name, "G")
    whole = read_duplicates(folder) if name == "quora" else read_retrieval(folder, "test")
    chosen = fewer_queries(whole, options.queries)
    first, *others = options.rankers
    systems = compare.run_systems(
        encoder, chosen, tuning_set(name, folder, whole, options.queries), rerank=scorer(first, prompt),
        depth=options.depth
    )
    measured = compare.system_metrics(chosen, systems, options.depth)
    Console(width=200).print(
        systems_table({name: measured}, f"{name}, {len(chosen.queries)} queries, re-ranked by {first}, prompt {prompt}")
    )
    found = {"systems": measured, "others": {}}
    bm25 = systems["bm25"].run
    for other in others:
        try:
            scores = scorer(other, prompt)(chosen, bm25, options.depth)
        except InputError as error:  # a query that does not fit its positions, for one
            print(f"{name}: {other} is left out: {error}", flush=True)
            continue
        row = {
            str(top): ranking(chosen.qrels, reordered(bm25, scores, top))["ndcg@10"]
            for top in (compare.SHALLOW, options.depth)
        }
        print(
            f"{name}: BM25 → {other}, nDCG@10 × 100: "
            + ", ".join(f"top {top} {100 * value:.2f}" for top, value in row.items()),
            flush=True
        )
        found["others"][other] = row
    if options.bfloat16:
        half = scorer(first, prompt, "bfloat16")(chosen, bm25, options.depth)
        value, taus = ranking(
            chosen.qrels, reordered(bm25, half, options.depth)
        )["ndcg@10"], agreement(systems["bm25_reranked"].scores, half)
        found["bfloat16"] = {"ndcg@10": value, "tau": sum(taus) / len(taus), "least_tau": min(taus)}
        print(
            f"{name}: in bfloat16 nDCG@10 × 100 {100 * value:.2f}; Kendall's tau to float32 "
            f"{sum(taus) / len(taus):.4f}, least {min(taus):.4f}",
            flush=True
        )
    return found


def scorer(reranker: str, prompt: str, dtype: str = "float32") -> compare.RerankRun:
    return partial(rerank, CrossEncoder.from_pretrained(reranker, prompt, dtype=dtype))


def agreement(left: Run, right: Run) -> list[float]:
    """Kendall's tau of each query's documents, of which there are at least two."""
    return [
        kendalltau(list(scores.values()), [right[query][name] for name in scores]).statistic for query,
        scores in left.items() if len(scores) > 1
    ]


def tuning_set(name: str, folder: Path, whole: RetrievalSet, queries: int) -> RetrievalSet | None:
    """Other judged queries over the same corpus, as many."""
    if name == "quora":  # queries of the same part that are not scored
        kept = dict(list(whole.qrels.items())[queries : 2 * queries])
        return RetrievalSet(whole.name, whole.corpus, {query: whole.queries[query] for query in kept}, kept)
    split = next((split for split in TUNED_ON if split in splits(folder)), None)
    if split is None:
        return None
    judged, qrels = read_judged(folder, split)
    return fewer_queries(RetrievalSet(name, whole.corpus, judged, qrels), queries)


def read_duplicates(folder: Path) -> RetrievalSet:
    """Each first question of a duplicate pair looks for its second ones."""
    rows = [row for _, row in read_rows(folder / "pairs.jsonl.gz") if row["split"] == "test"]
    pairs = [
        (row["question1"], row["question2"]) for row in rows if row["duplicate"]
        and row["question1"] != row["question2"]
    ]
    queries = {text: f"q{number}" for number, text in enumerate(dict.fromkeys(first for first, _ in pairs))}
    others = dict.fromkeys(row[side] for row in rows for side in ("question1", "question2"))
    corpus = {text: f"d{number}" for number, text in enumerate(text for text in others if text not in queries)}
    qrels: dict[str, dict[str, int]] = {}
    for first, second in pairs:
        if second in corpus:
            qrels.setdefault(queries[first], {})[corpus[second]] = 1
    texts = {name: text for text, name in queries.items()}
    return RetrievalSet(
        "quora", {name: text for text, name in corpus.items()}, {query: texts[query] for query in qrels}, qrels
    )


if __name__ == "__main__":
    main()
