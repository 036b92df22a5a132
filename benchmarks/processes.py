"""How much faster are more processes? Training and encoding by 1, 2, 4 … processes of this machine, a core each.

    python benchmarks/processes.py [--processes 1 2 4] [--model data/nano] [--texts <BEIR folder>]

Training takes as many queries in each process, so a step of twice the processes has twice the queries; encoding cuts
the same texts. Where there are fewer cores than processes, they share them, and the row says so.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
UNMEASURED = 2  # steps


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments.add_argument("--model", default="data/nano")
    arguments.add_argument("--data", default="data/raw/pydocs/train.jsonl", help="pairs; harvested by make train")
    arguments.add_argument("--texts", default="data/raw/pydocs/pydocs_test", help="a BEIR folder")
    arguments.add_argument("--steps", type=int, default=10, help="measured ones (default: %(default)s)")
    options = arguments.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{'processes':>9} {'queries/s':>10} {'':6} {'texts/s':>8}")
    first: tuple[float, float] | None = None
    for processes in options.processes:
        queries, texts = train(processes, options), encode(processes, options)
        first = first or (queries, texts)
        shared = "" if processes <= cores else f"   {processes} on {cores} core(s)"
        ratios = [value / of_one for value, of_one in zip((queries, texts), first, strict=True)]
        print(f"{processes:9} {queries:10.1f} {ratios[0]:5.2f}x {texts:8.1f} {ratios[1]:5.2f}x{shared}", flush=True)


def train(processes: int, options: argparse.Namespace) -> float:
    """Queries a second of all processes."""
    with tempfile.TemporaryDirectory(prefix="sgpt-processes-") as folder:
        run(processes, "train/biencoder.py", [
            "experiment=pydocs", "data=file", f"data.path={Path(options.data).resolve()}", "data.num_hard_negatives=1",
            f"data.cache={folder}/cache", "evaluation.retrieval=[]", "dev.retrieval=[]", "trainer.threads=1",
            f"model.path={options.model}", f"trainer.max_steps={UNMEASURED + options.steps}",
            f"trainer.log_every_steps={UNMEASURED}", f"runs={folder}", "name=run",
        ])  # fmt: skip
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    before, after = json.loads(lines[0]), json.loads(lines[-1])
    seconds = (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
    return 64 * processes / seconds  # trainer.queries_per_process of experiment=pydocs


def encode(processes: int, options: argparse.Namespace) -> float:
    """Texts a second of all processes, without the start."""
    with tempfile.TemporaryDirectory(prefix="sgpt-processes-") as folder:
        said = run(processes, "train/encode.py", [
            f"model={options.model}", f"texts={options.texts}", f"output={folder}/vectors", "threads=1",
            "texts_per_shard=64",
        ])  # fmt: skip
    return float(re.search(r"([\d.]+) texts/s", said)[1])


def run(processes: int, script: str, overrides: list[str]) -> str:
    """What the script says on stderr and stdout."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*torchrun, script, *overrides], cwd=REPOSITORY, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if ended.returncode:
        raise SystemExit(ended.stdout)
    return ended.stdout


if __name__ == "__main__":
    main()
