"""Is training with mined hard negatives better than with random ones? nDCG@10 on the test split, by the roads that users take.

    python benchmarks/mined_negatives.py [--sets scifact squad] [--seeds 0 1 2] [--steps 60] [--batch 16] [--hard-negatives 3]
        [--source bm25] [--ranks 1 20] [--threads 2]

Both arms train on the same queries in the same order, from the same base, for as many steps; only the negatives differ. Mined:
`sgpt.mine` with BM25 (or a model: --source <its folder>), drawn from --ranks. Random: `sgpt.mine` of a run that ranks documents by
chance. Training is `train/biencoder.py` with data=file; finished runs are found finished, so a stopped benchmark goes on. The
difference of a query is the mean over the seeds; its interval is a paired bootstrap over queries.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure.report import about

from sgpt.data.beir import RetrievalSet, read_retrieval
from sgpt.data.jsonl import read_rows, write_rows
from sgpt.encoder import Encoder
from sgpt.evaluate import retrieve
from sgpt.metrics import difference, ranking_per_query
from sgpt.mine import MineConfig, mine

WORK = Path("runs/mined_negatives")
SETS = {
    "scifact": ["markers.query_max_tokens=64", "markers.document_max_tokens=128", "optim.learning_rate=5e-2"],
    "squad": ["markers.query_max_tokens=48", "markers.document_max_tokens=128", "optim.learning_rate=5e-2"],
}
ARMS = ("random", "mined")
NEGATIVES = 8  # of each query; an epoch takes the next one
BY_CHANCE = 50  # documents of each query in the run of random negatives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", default="../shared/data", help="folder of the sets (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="queries a step: the fewer, the more the hard negatives weigh (default: %(default)s)")
    parser.add_argument("--hard-negatives", type=int, default=3, help="of each query (default: %(default)s)")
    parser.add_argument("--source", default="bm25", help="bm25, or the folder of a model (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs=2, default=[1, 20], metavar=("FIRST", "LAST"), help="window of what is mined (default: %(default)s)")
    parser.add_argument("--base", default="data/nano", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", default="runs/bench/mined_negatives.jsonl", help="each row is appended to it (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    described = about(options)
    for name in options.sets:
        files, judged = rows(name, options), read_retrieval(Path(options.shared) / name, "test")
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for seed in options.seeds:
            for arm in ARMS:
                started = time.perf_counter()
                found[arm].append(per_query := scores(name, arm, seed, files[arm], judged, options))
                row = {"set": name, "arm": arm, "seed": seed, "ndcg@10": statistics.mean(per_query.values()), "seconds": time.perf_counter() - started}
                print(f"{name:8s}  seed {seed}  {arm:7s} nDCG@10 × 100 {100 * row['ndcg@10']:6.2f}   {row['seconds']:5.0f} s", flush=True)
                append(options.output, described | row | {"per_query": per_query})
        verdict(name, found, described, options)


def rows(name: str, options: argparse.Namespace) -> dict[str, Path]:
    """The training files of both arms: those queries, in one order, for which both have negatives enough."""
    folder, data = WORK / mined_from(name, options), str(Path(options.shared) / name)
    folder.mkdir(parents=True, exist_ok=True)
    common = {"data": data, "negatives_per_query": NEGATIVES, "on_few": "drop", "threads": options.threads, "resume": True}
    given = {"source": "bm25"} if options.source == "bm25" else {"source": "model", "model": options.source}
    window = dict(zip(("first_rank", "last_rank"), options.ranks, strict=True))
    mine(MineConfig(**common, **given, **window, pick="random", output=str(folder / "mined.all.jsonl")))
    mine(MineConfig(**common, source="run", trec=str(by_chance(name, options)), first_rank=1, last_rank=BY_CHANCE, output=str(folder / "random.all.jsonl")))
    read = {arm: {row["ids"]["query"]: row for _, row in read_rows(folder / f"{arm}.all.jsonl")} for arm in ARMS}
    both = [query for query in read["mined"] if query in read["random"]]
    files = {arm: folder / f"{arm}.jsonl" for arm in ARMS}
    for arm, file in files.items():
        write_rows(file, (read[arm][query] for query in both))
    print(f"{name}: {len(both):,} training queries, {NEGATIVES} negatives each; mined by {options.source}", flush=True)
    return files


def mined_from(name: str, options: argparse.Namespace) -> str:
    first, last = options.ranks
    return f"{name}-{Path(options.source).name}-{first}-{last}"


def by_chance(name: str, options: argparse.Namespace) -> Path:
    """A run that ranks BY_CHANCE documents of each training query by chance, the same every time."""
    file, train = WORK / f"{name}.by-chance.json", read_retrieval(Path(options.shared) / name, "train")
    draw, documents = random.Random(0), list(train.corpus)
    chosen = {query: {document: draw.random() for document in draw.sample(documents, min(BY_CHANCE, len(documents)))} for query in train.qrels}
    file.write_text(json.dumps(chosen))
    return file


def scores(name: str, arm: str, seed: int, file: Path, judged: RetrievalSet, options: argparse.Namespace) -> dict[str, float]:
    """nDCG@10 of each test query, by the export of a run."""
    run = f"mined_negatives/{mined_from(name, options)}-{arm}-{options.steps}-{options.batch}-{options.hard_negatives}-{seed}"
    command = [
        sys.executable, "train/biencoder.py", "data=file", f"data.path={file}", f"data.num_hard_negatives={options.hard_negatives}", *SETS[name],
        f"model.path={options.base}", f"trainer.queries_per_process={options.batch}", f"trainer.max_steps={options.steps}", "trainer.epochs=1000",
        f"trainer.seed={seed}", f"trainer.threads={options.threads}", f"name={run}", "resume=true",
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stderr[-2000:]}")
    encoder = Encoder.from_pretrained(f"runs/{run}/export")
    return {query: metrics["ndcg@10"] for query, metrics in ranking_per_query(judged.qrels, retrieve(encoder, judged)).items()}


def verdict(name: str, found: dict[str, list[dict[str, float]]], described: dict, options: argparse.Namespace) -> None:
    """Of the mean difference a query, and of each seed alone."""
    queries = sorted(found["mined"][0])
    mean = {arm: [statistics.mean(run[query] for run in runs) for query in queries] for arm, runs in found.items()}
    made = difference(mean["mined"], mean["random"])
    each = [statistics.mean(mined.values()) - statistics.mean(drawn.values()) for mined, drawn in zip(found["mined"], found["random"], strict=True)]
    decided = "mined is better" if made.low > 0 else "random is better" if made.high < 0 else "no verdict: the interval holds 0"
    print(f"{name}: mined − random, nDCG@10 × 100: {100 * made.mean:+.2f}, 95 % interval {100 * made.low:+.2f} to {100 * made.high:+.2f}, "
          f"{len(queries)} queries, seeds {', '.join(f'{100 * value:+.2f}' for value in each)}: {decided}", flush=True)  # fmt: skip
    append(options.output, described | {"set": name, "difference": made.mean, "low": made.low, "high": made.high, "seeds": each, "verdict": decided})


def append(output: str, row: dict) -> None:
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
