"""What is re-ranking BM25 by SGPT-CE worth, by depth, alone and fused with BM25, over all queries of each set?

    python benchmarks/rerank_depths.py --model data/raw/smollm2_135m --dtype bfloat16
        [--sets scifact cranfield cacm quora] [--depths 10 20] [--limit 1000]

No training and no encoder: a decoder scores the best documents of BM25 by the log-probability of the query (prompt G;
quora: quoraD). Fused: min-max scores of both, the decoder's weight tuned on half of the queries and used for the other
half, both ways, so that no query is scored by a weight that it has helped to choose. Differences to BM25 with 95 %
intervals, paired bootstrap over queries. Scores are kept in --output as TREC runs; a killed run resumes.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch
from rerank_quality import PROMPTS, read_duplicates

from sgpt.data.formats.beir import Qrels, RetrievalSet
from sgpt.data.formats.jsonl import write_rows
from sgpt.data.formats.trec import Run, cut, read_run
from sgpt.evaluation.compare import best_weight
from sgpt.retrieval.bm25 import bm25_run
from sgpt.retrieval.dense import DEPTH
from sgpt.retrieval.fusion import interpolated, reordered
from sgpt.retrieval.metrics import difference, ranking_per_query
from sgpt.retrieval.rerank import RerankConfig, read_reranking_set, run_rerank
from sgpt.runtime.device import default_device

SETS = ("scifact", "cranfield", "cacm", "quora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a decoder with its language-model head")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--sets", nargs="+", default=SETS, help="default: %(default)s")
    parser.add_argument("--depths", nargs="+", type=int, default=[10, 20], help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=None, help="the first queries of each set; default: all")
    parser.add_argument("--shared", default="../shared/data", help="folder of the sets (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", default="runs/bench/rerank_depths", help="folder (default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    print("| set | queries | BM25 | depth | SGPT-CE | difference | fused | difference | weights |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.sets:
        folder = Path(options.output) / "quora_pairs" if name == "quora" else Path(options.shared) / name
        if name == "quora":
            write_beir_folder(read_duplicates(Path(options.shared) / name), folder)
        depth = max(options.depths)
        config = RerankConfig(
            data=str(folder), model=options.model, dtype=options.dtype, depth=depth, limit=options.limit,
            output=str(Path(options.output) / f"{name}.trec"), prompt=PROMPTS.get(name, "G"), threads=options.threads,
            resume=True,
        )  # fmt: skip
        run_rerank(config, default_device())
        print_rows(name, config, options.depths)


def print_rows(name: str, config: RerankConfig, depths: list[int]) -> None:
    dataset = read_reranking_set(config)
    scores = read_run(Path(config.output), Path(config.data), dataset, "trec")
    dataset = replace(dataset, qrels={query: dataset.qrels[query] for query in scores if query in dataset.qrels})
    ranked = cut(bm25_run(dataset, max(DEPTH, config.depth)), config.depth)  # as re-ranking does: ties fall alike
    first = {query: documents for query, documents in ranked.items() if query in scores}
    bm25 = ndcg(dataset.qrels, first)
    for depth in depths:
        alone = ndcg(dataset.qrels, reordered(first, scores, depth))
        fused_run, weights = fused(dataset.qrels, first, scores, depth)
        both = ndcg(dataset.qrels, fused_run)
        print(
            f"| {name} | {len(bm25)} | {mean(bm25)} | {depth} | {mean(alone)} | {shown(alone, bm25)} | {mean(both)} | "
            f"{shown(both, bm25)} | {weights[0]:.2f}, {weights[1]:.2f} |", flush=True,
        )  # fmt: skip


def fused(qrels: Qrels, first: Run, scores: Run, depth: int) -> tuple[Run, list[float]]:
    """BM25's best `depth` documents by both scores, and the weights: each half of the queries has the other's."""
    best = cut(first, depth)
    of_best = {query: {name: scores[query][name] for name in documents} for query, documents in best.items()}
    result, weights = {}, []
    for half in (0, 1):
        own = list(best)[half::2]
        other = [query for query in best if query not in {*own}]
        weight = best_weight(
            {query: qrels[query] for query in other}, {query: best[query] for query in other},
            {query: of_best[query] for query in other}, depth,
        )  # fmt: skip
        weights.append(weight)
        mixed = interpolated(
            {query: best[query] for query in own}, {query: of_best[query] for query in own}, weight, depth
        )
        result |= reordered({query: first[query] for query in own}, mixed, depth)
    return result, weights


def ndcg(qrels: Qrels, run: Run) -> dict[str, float]:
    return {query: row["ndcg@10"] for query, row in ranking_per_query(qrels, run).items()}


def mean(values: dict[str, float]) -> str:
    return f"{100 * sum(values.values()) / len(values):.2f}"


def shown(ours: dict[str, float], theirs: dict[str, float]) -> str:
    found = difference([ours[query] for query in theirs], list(theirs.values()))
    return f"{100 * found.mean:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"


def write_beir_folder(dataset: RetrievalSet, folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_rows(folder / "corpus.jsonl", ({"_id": name, "text": text} for name, text in dataset.corpus.items()))
    write_rows(folder / "queries.jsonl", ({"_id": name, "text": text} for name, text in dataset.queries.items()))
    lines = [f"{query}\t{name}\t{score}\n" for query, judged in dataset.qrels.items() for name, score in judged.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
