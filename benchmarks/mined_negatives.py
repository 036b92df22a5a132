"""Is training with mined hard negatives better than with random ones? nDCG@10 on the test split, by the ways that
users take.

    python benchmarks/mined_negatives.py [--sets scifact-titles squad] [--seeds 0 1 2] [--steps 60] [--batch 16]
        [--hard-negatives 3]
        [--ranks 1 20] [--arms bm25 itself] [--teacher <model>] [--hold-out 0]
        [--base data/nano] [--set pooling=mean …] [--folder mined_negatives] [--threads 2]

The arms train on the same queries in the same order, from the same base, for as many steps; only the negatives differ.
random: `sgpt.mining` of a run that ranks documents by chance. bm25: `sgpt.mining` with BM25, drawn from --ranks.
itself: the same with the model that the random arm of that seed made (as in ANCE, Xiong et al. 2021, once). teacher:
with the model of --teacher, whose cosines also leave out what it finds more than RATIO as near as the positive
(NV-Retriever, arXiv 2407.15831). Training is `train/biencoder.py` with data=file; a finished run is not run again, so
a stopped benchmark resumes. scifact-titles trains on SciFact's corpus alone: a title is a query, the text below it the
one document that answers it, so what is mined next to it is no answer; claims are scored as ever. --hold-out scores
training queries that were kept back from training: settings are chosen without the test split. The difference of a
query is the mean over the seeds; its interval is a paired bootstrap over queries.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from measure.report import about

from sgpt.data.formats.beir import RetrievalSet, read_retrieval
from sgpt.data.formats.jsonl import read_rows, write_rows
from sgpt.encoder.encoder import Encoder
from sgpt.mining.config import MineConfig
from sgpt.mining.mine import mine
from sgpt.retrieval.dense import retrieve
from sgpt.retrieval.metrics import difference, ranking_per_query

WORK = Path("runs/mined_negatives")
SETS = {
    "scifact": ["markers.query_max_tokens=64", "markers.document_max_tokens=128", "optim.learning_rate=5e-2"],
    "scifact-titles": ["markers.query_max_tokens=64", "markers.document_max_tokens=128", "optim.learning_rate=5e-2"],
    "squad": ["markers.query_max_tokens=48", "markers.document_max_tokens=128", "optim.learning_rate=5e-2"],
}
TITLES = "-titles"
ARMS = ("bm25", "itself", "teacher")  # each is compared with random ones
RATIO = 0.95
NEGATIVES = 8  # of each query; an epoch takes the next one
BY_CHANCE = 50  # documents of each query in the run of random negatives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", default="../shared/data", help="folder of the sets (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["scifact-titles", "squad"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument(
        "--batch", type=int, default=16,
        help="queries a step: the fewer, the more the hard negatives weigh (default: %(default)s)"
    )
    parser.add_argument("--hard-negatives", type=int, default=3, help="of each query (default: %(default)s)")
    parser.add_argument(
        "--ranks", type=int, nargs=2, default=[1, 20], metavar=("FIRST", "LAST"),
        help="window of what is mined (default: %(default)s)"
    )
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["bm25", "itself"], help="next to random (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher", help="model of the arm of that name: run, export, base or sentence-transformers folder"
    )
    parser.add_argument(
        "--hold-out", type=int, default=0,
        help="training queries to score in place of the test split (default: %(default)s)"
    )
    parser.add_argument("--base", default="data/nano", help="default: %(default)s")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE",
        help="further keys of train/biencoder.py, in a --folder of their own"
    )
    parser.add_argument("--folder", default="mined_negatives", help="of the runs, below runs/ (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--output", default="runs/bench/mined_negatives.jsonl", help="each row is appended to it (default: %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    described = about(options)
    for name in options.sets:
        queries = common_queries(name, options)
        judged = read_retrieval(
            Path(options.shared) / name.removesuffix(TITLES), "train" if options.hold_out else "test"
        )
        if options.hold_out:
            kept_back = list(judged.qrels)[: options.hold_out]
            judged = replace(
                judged, qrels={query: judged.qrels[query] for query in kept_back},
                queries={query: judged.queries[query] for query in kept_back}
            )
            queries = [query for query in queries if query not in judged.qrels]
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ("random", *options.arms)}
        for seed in options.seeds:
            for arm in found:
                started = time.perf_counter()
                found[arm].append(per_query := scores(name, arm, seed, queries, judged, options))
                row = {
                    "set": name, "arm": arm, "seed": seed, "ndcg@10": statistics.mean(per_query.values()),
                    "seconds": time.perf_counter() - started
                }
                print(
                    f"{name:8s}  seed {seed}  {arm:7s} nDCG@10 × 100 {100 * row['ndcg@10']:6.2f}   "
                    f"{row['seconds']:5.0f} s",
                    flush=True
                )
                append(options.output, described | row | {"per_query": per_query})
        for arm in options.arms:
            verdict(name, arm, found, described, options)


def common_queries(name: str, options: argparse.Namespace) -> list[str]:
    """The training queries for which every arm that is not itself has negatives enough."""
    sources = ["random", "bm25", *(["teacher"] if "teacher" in options.arms else [])]
    by_arm = [{row["ids"]["query"]: None for _, row in read_rows(mined(name, arm, 0, options))} for arm in sources]
    shared = [query for query in by_arm[1] if all(query in mined_for for mined_for in by_arm)]
    print(f"{name}: {len(shared):,} training queries, {NEGATIVES} negatives each", flush=True)
    return shared


def mined(name: str, arm: str, seed: int, options: argparse.Namespace) -> Path:
    """The rows that `sgpt.mining` writes for an arm; only those of `itself` differ with the seed."""
    first, last = options.ranks if arm != "random" else (1, BY_CHANCE)
    output = WORK / name / (
        f"{Path(run_name(name, arm, seed, options)).name}.all.jsonl" if arm == "itself"
        else f"{arm}-{first}-{last}.all.jsonl"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    if arm == "random":
        source = {"source": "run", "trec": str(by_chance(name, options))}
    elif arm == "bm25":
        source = {"source": "bm25", "pick": "random"}
    elif arm == "teacher":
        source = {"source": "model", "model": options.teacher, "pick": "random", "score_ratio": RATIO}
    else:
        source = {
            "source": "model", "model": f"runs/{run_name(name, 'random', seed, options)}/export", "pick": "random"
        }
    mine(MineConfig(
        data=str(training_set(name, options)), output=str(output), **source, first_rank=first, last_rank=last,
        negatives_per_query=NEGATIVES, on_few="drop",
        threads=options.threads, resume=True,
    ))  # fmt: skip
    return output


def training_set(name: str, options: argparse.Namespace) -> Path:
    """The set's own folder, or one made of its corpus, where each title that is there once is the query of the text
    below it.
    """
    if not name.endswith(TITLES):
        return Path(options.shared) / name
    folder = WORK / name / "set"
    if (folder / "qrels" / "train.tsv").is_file():  # written last
        return folder
    rows = [row for _, row in read_rows(Path(options.shared) / name.removesuffix(TITLES) / "corpus.jsonl.gz")]
    times = Counter(row["title"] for row in rows)
    rows = [row for row in rows if row["text"] and row["title"] and times[row["title"]] == 1]
    write_rows(folder / "corpus.jsonl", ({"_id": row["_id"], "text": row["text"]} for row in rows))
    write_rows(folder / "queries.jsonl", ({"_id": f"title-{row['_id']}", "text": row["title"]} for row in rows))
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"title-{row['_id']}\t{row['_id']}\t1\n" for row in rows)
    )
    return folder


def run_name(name: str, arm: str, seed: int, options: argparse.Namespace) -> str:
    window = "" if arm == "random" else f"-{options.ranks[0]}-{options.ranks[1]}"
    # titles hold no claim that could be kept back
    held = f"-without-{options.hold_out}" if options.hold_out and not name.endswith(TITLES) else ""
    return (
        f"{options.folder}/{name}-{arm}{window}-{options.steps}-{options.batch}-{options.hard_negatives}{held}-{seed}"
    )


def by_chance(name: str, options: argparse.Namespace) -> Path:
    """A run that ranks BY_CHANCE documents of each training query by chance, the same every time."""
    file, train = WORK / name / "by-chance.json", read_retrieval(training_set(name, options), "train")
    draw, documents = random.Random(0), list(train.corpus)
    chosen = {
        query: {document: draw.random() for document in draw.sample(documents, min(BY_CHANCE, len(documents)))}
        for query in train.qrels
    }
    file.write_text(json.dumps(chosen))
    return file


def scores(
    name: str, arm: str, seed: int, queries: list[str], judged: RetrievalSet, options: argparse.Namespace
) -> dict[str, float]:
    """nDCG@10 of each test query, by the export of a run that trains on `queries`, in their order."""
    rows = {row["ids"]["query"]: row for _, row in read_rows(mined(name, arm, seed, options))}
    run = run_name(name, arm, seed, options)
    file = WORK / name / f"{Path(run).name}.jsonl"
    write_rows(file, (rows[query] for query in queries))
    command = [
        sys.executable, "train/biencoder.py", "data=file", f"data.path={file}",
        f"data.num_hard_negatives={options.hard_negatives}", *SETS[name],
        f"model.path={options.base}", f"trainer.queries_per_process={options.batch}",
        f"trainer.max_steps={options.steps}", "trainer.epochs=1000", *options.set,
        f"trainer.seed={seed}", f"trainer.threads={options.threads}", f"name={run}", "resume=true",
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stderr[-2000:]}")
    encoder = Encoder.from_pretrained(f"runs/{run}/export")
    return {
        query: metrics["ndcg@10"] for query,
        metrics in ranking_per_query(judged.qrels, retrieve(encoder, judged)).items()
    }


def verdict(
    name: str, arm: str, found: dict[str, list[dict[str, float]]], described: dict, options: argparse.Namespace
) -> None:
    """Of the mean difference a query, and of each seed alone."""
    queries = sorted(found[arm][0])
    mean = {side: [statistics.mean(run[query] for run in found[side]) for query in queries] for side in (arm, "random")}
    gain = difference(mean[arm], mean["random"])
    each = [
        statistics.mean(hard.values()) - statistics.mean(drawn.values()) for hard,
        drawn in zip(found[arm], found["random"], strict=True)
    ]
    decided = (
        "mined is better" if gain.low > 0 else "random is better" if gain.high < 0
        else "no verdict: the interval holds 0"
    )
    print(
        f"{name}: {arm} − random, nDCG@10 × 100: {100 * gain.mean:+.2f}, 95 % interval {100 * gain.low:+.2f} to "
        f"{100 * gain.high:+.2f}, "
          f"{len(queries)} queries, seeds {', '.join(f'{100 * value:+.2f}' for value in each)}: {decided}", flush=True)
    append(
        options.output,
        described
        | {
            "set": name, "arm": arm, "difference": gain.mean, "low": gain.low, "high": gain.high, "seeds": each,
            "what": decided
        }
    )


def append(output: str, row: dict) -> None:
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
