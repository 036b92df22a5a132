"""The ablation of SGPT at the size of `nano`: pooling x tuning x markers x batch size, three seeds each.

    python benchmarks/ablation.py --output docs [--jobs-at-a-time 2] [--seeds 0 1 2]
        [--overrides markers.document_max_tokens=48 evaluation.limit=300]

The task is pydocs: nDCG@10 on packages never trained on. All train on equally many pairs, so a batch of more queries
takes fewer steps; each tuning has the middle one of the learning rates that `benchmarks/tunings.py` tries. Every
combination of tuning and batch is a sweep of `train/biencoder.py`, so a finished run is not run again and a stopped
benchmark resumes. Writes `ablation.md` and `ablation.png` into --output. Seventy-two runs, unless other values are
given; with the overrides above two minutes of a core each.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from math import isnan, nan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

from sgpt.report.page import DRAWING, LIGHT

RATES = {"bitfit": 5e-2, "full": 3e-4}  # learning rate of each tuning
VALUES = {
    "pooling": ["weighted_mean", "mean", "last_token"],
    "tuning": [*RATES],
    "markers": ["brackets", "none"],
    "queries": ["64", "16"],
}  # the first of each is what the others are compared with
SGPT = {  # what the paper reports, in section 4 and its model cards
    "pooling": "weighted mean above mean above the last token",
    "tuning": "biases alone about as good as all weights",
    "markers": "brackets above none, where queries and documents differ",
    "queries": "more queries a batch are better",
}
METRIC = ("pydocs_test", "ndcg@10")


class Scored(NamedTuple):
    """A run: the value of each factor, its seed, and nDCG@10 x 100."""

    values: dict[str, str]
    seed: int
    score: float


class Estimate(NamedTuple):
    """A mean over seeds with the half width of its 95 % interval (Student's t); None of a single seed.

    Of no run at all the mean is nan.
    """

    mean: float
    half: float | None

    def __str__(self) -> str:
        if isnan(self.mean):
            return "failed"
        return f"{self.mean:.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of ablation.md and ablation.png")
    parser.add_argument("--jobs-at-a-time", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=2560, help="pairs that each run trains on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for factor, values in VALUES.items():
        parser.add_argument(f"--{factor}", nargs="+", default=values)
    parser.add_argument("--name", default="ablation", help="folder below runs/")
    parser.add_argument("--overrides", nargs="*", default=[], help="of all runs, as typed behind train/biencoder.py")
    options = parser.parse_args()
    runs: list[Scored] = []
    for tuning, queries in product(options.tuning, options.queries):
        runs += swept(options, tuning, int(queries))
    options.output.mkdir(parents=True, exist_ok=True)
    factors = {factor: getattr(options, factor) for factor in VALUES}
    draw(runs, factors, options.output / "ablation.png")
    text = report(runs, factors, f"python {' '.join(sys.argv)}")
    (options.output / "ablation.md").write_text(text, encoding="utf-8")
    print(text)


def swept(options: argparse.Namespace, tuning: str, queries: int) -> Iterator[Scored]:
    """Runs, or finds finished, all poolings, markers and seeds of one tuning and batch size."""
    name = f"{options.name}/{tuning}-{queries}"
    command = [
        sys.executable, "train/biencoder.py", "-m", "hydra/launcher=accelerate",
        f"hydra.launcher.jobs_at_a_time={options.jobs_at_a_time}", "experiment=pydocs", f"name={name}",
        f"tuning={tuning}", f"optim.learning_rate={RATES[tuning]}", f"trainer.queries_per_process={queries}",
        f"trainer.max_steps={max(1, options.pairs // queries)}", "evaluation.bm25=false", *options.overrides,
        f"pooling={','.join(options.pooling)}", f"markers={','.join(options.markers)}",
        f"trainer.seed={','.join(map(str, options.seeds))}",
    ]  # fmt: skip
    content = Path("runs") / f"{name}-sweep" / "sweep.json"
    before = content.stat().st_mtime_ns if content.exists() else None
    ended = subprocess.run(command)  # jobs that failed are named by it, and left out of the tables
    if ended.returncode and (not content.exists() or content.stat().st_mtime_ns == before):
        sys.exit(ended.returncode)  # it was refused, and what lies there are the results of other values
    for job in json.loads(content.read_text())["jobs"]:
        if job["status"] == "finished":
            given = dict(item.split("=", 1) for item in job["overrides"] if "=" in item)
            values = {key: given[key] for key in ("pooling", "tuning", "markers")} | {"queries": str(queries)}
            yield Scored(values, int(given["trainer.seed"]), 100 * job["after"][METRIC[0]][METRIC[1]])


def estimate(values: list[float]) -> Estimate:
    """Of seeds that failed the value is nan, and they are left out."""
    values = [value for value in values if not isnan(value)]
    if len(values) < 2:
        return Estimate(values[0] if values else nan, None)
    return Estimate(mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values)))


def by_seed(runs: list[Scored], of: Callable[[list[Scored]], float]) -> Estimate:
    """The estimate of a number that can be computed from the runs of each seed alone."""
    seeds = sorted({run.seed for run in runs})
    return estimate([of([run for run in runs if run.seed == seed]) for seed in seeds])


def effect(runs: list[Scored], factor: str, value: str, reference: str) -> Estimate:
    """How much the value changes, mean over all combinations of the other factors that were run with both."""

    def of_seed(runs_of_seed: list[Scored]) -> float:
        scores = {tuple(run.values.items()): run.score for run in runs_of_seed}
        pairs = []
        for run in runs_of_seed:
            other = scores.get(tuple((run.values | {factor: reference}).items()))
            if run.values[factor] == value and other is not None:
                pairs.append(run.score - other)
        return mean(pairs) if pairs else nan

    return by_seed(runs, of_seed)


def report(runs: list[Scored], factors: dict[str, list[str]], command: str) -> str:
    """The page: what each factor changes, and all combinations."""
    seeds = sorted({run.seed for run in runs})
    lines = [
        "# What SGPT's choices are worth on a small base", "",
        f"`{command}`: `nano` on pydocs, nDCG@10 × 100 on packages never trained on, {len(runs)} runs with the seeds "
        f"{', '.join(map(str, seeds))}. ± is the half width of the 95 % interval over seeds (Student's t).", "",
        "![Scores of all runs by pooling, tuning, markers and queries of a batch](ablation.png)", "",
        "Differences are to the first value of each factor: mean over all combinations of the others, and with the "
        "first value of each of them, which is SGPT's.", "",
        "| factor | value | score | difference | with SGPT's others | SGPT reports |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for factor, values in factors.items():
        others = {other: choices[0] for other, choices in factors.items() if other != factor}
        as_sgpt = [run for run in runs if run.values.items() >= others.items()]
        for value in values:
            score = by_seed([run for run in runs if run.values[factor] == value], mean_score)
            if value == values[0]:
                lines.append(f"| {factor} | {value} | {score} | – | – | {SGPT[factor]} |")
                continue
            gain, gain_as_sgpt = (effect(among, factor, value, values[0]) for among in (runs, as_sgpt))
            lines.append(f"| {factor} | {value} | {score} | {gain} | {gain_as_sgpt} | |")
    lines += ["", f"| {' | '.join(factors)} | nDCG@10 × 100 |", f"|{'---|' * (len(factors) + 1)}"]
    for values in product(*factors.values()):
        of_values = [run for run in runs if run.values == dict(zip(factors, values, strict=True))]
        score = estimate([run.score for run in of_values])
        lines.append(f"| {' | '.join(values)} | {score} |")
    return "\n".join(lines) + "\n"


def mean_score(runs: list[Scored]) -> float:
    return mean(run.score for run in runs)


def draw(runs: list[Scored], factors: dict[str, list[str]], file: Path) -> None:
    """A PNG with a panel for each factor: all runs, and the mean of each value with its interval."""
    with rc_context(DRAWING):
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        panels = figure.subplots(1, len(factors), sharey=True)
        for axes, (factor, values) in zip(panels, factors.items(), strict=True):
            _draw_factor(axes, runs, factor, values)
        panels[0].set_ylabel("nDCG@10 × 100")
        figure.savefig(file, dpi=110)


def _draw_factor(axes: Axes, runs: list[Scored], factor: str, values: list[str]) -> None:
    for place, value in enumerate(values):
        of_value = [run for run in runs if run.values[factor] == value]
        scores = [run.score for run in of_value]
        axes.plot([place] * len(scores), scores, "o", color=LIGHT["grey"], alpha=0.4, markersize=3)
        middle = by_seed(of_value, mean_score)
        axes.errorbar(place, middle.mean, middle.half or 0, fmt="o", color=LIGHT["blue"], capsize=4, markersize=6)
    axes.set_xticks(range(len(values)), [value.replace("_", " ") for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_title("queries a batch" if factor == "queries" else factor, fontsize=9)
    axes.grid(axis="x", visible=False)


if __name__ == "__main__":
    main()
