"""What bias-only training of `nano` is worth: before, after and BM25 on four tasks, by the scripts that users call.

    python benchmarks/quality.py [--shared ../shared/data] [--seeds 0 1 2] [--tasks pydocs squad scifact nli]

Every run is `train/biencoder.py`; a finished run is not run again, so a stopped benchmark resumes. nDCG@10 on the test
split of each retrieval set (pydocs: packages never trained on), Spearman on STS-B test for NLI; ± is the half width of
the 95 % interval over seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from ablation import estimate

TASKS = {
    "pydocs": ["experiment=pydocs"],
    "squad": [
        "data=beir", "data.path={shared}/squad", "data.triples=triples.train.tsv", "data.num_hard_negatives=1",
        "markers.query_max_tokens=48", "markers.document_max_tokens=192", "evaluation.retrieval=[{shared}/squad]",
        "optim.learning_rate=5e-2", "trainer.max_steps=60",
    ],
    "scifact": [
        "data=beir", "data.path={shared}/scifact", "markers.query_max_tokens=64", "markers.document_max_tokens=256",
        "evaluation.retrieval=[{shared}/scifact]", "optim.learning_rate=5e-2", "trainer.queries_per_process=64",
        "trainer.epochs=3",
    ],
    "nli": [
        "data=file", "data.path={shared}/nli/triplets.train.jsonl.gz", "data.columns.query=anchor",
        "data.num_hard_negatives=1", "markers=none",
        "evaluation.sts=[{shared}/stsb/pairs.jsonl.gz]", "optim.learning_rate=2e-2",  # of five, the best on dev
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", default="../shared/data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args()
    for task in options.tasks:
        runs = [results(task, seed, options.shared) for seed in options.seeds]
        for name in runs[0]["after"]:
            metric = next(metric for metric in ("ndcg@10", "spearman_cosine") if metric in runs[0]["after"][name])
            before, after = ([100 * run[when][name][metric] for run in runs] for when in ("before", "after"))
            beside = f", BM25 {100 * runs[0]['bm25'][name][metric]:.2f}" if name in runs[0]["bm25"] else ""
            print(
                f"{task}: {name} {metric} × 100, seeds {options.seeds}: before {before[0]:.2f}, after "
                f"{estimate(after)} ({', '.join(f'{value:.2f}' for value in after)}), ratio "
                  f"{statistics.mean(after) / before[0]:.2f}{beside}",
                  flush=True)


def results(task: str, seed: int, shared: str) -> dict:
    name = f"quality/{task}-{seed}"
    overrides = [override.format(shared=shared) for override in TASKS[task]]
    command = [sys.executable, "train/biencoder.py", *overrides, f"name={name}", f"trainer.seed={seed}", "resume=true"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((Path("runs") / name / "results.json").read_text())


if __name__ == "__main__":
    main()
