"""What pretraining buys: quality of `nano` before and after bias-only training, against the tokens that its blocks have
seen.

    python benchmarks/nano_curve.py [--pretraining runs/nano] [--steps 160 480 800 1040 1280 1400] [--shared
        ../shared/data]

Reads the checkpoints that `make nano` left, trains each by train/biencoder.py experiment=pydocs, and scores the dev
split: nDCG@10 on packages of pydocs never trained on, Spearman on STS-B. A finished run is not run again. The picture
is data/nano/quality.png.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

from sgpt.pretraining.model import PretrainConfig, build_model, save_model

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pretraining", type=Path, default=Path("runs/nano"))
    arguments.add_argument("--steps", type=int, nargs="+", default=[160, 480, 800, 1040, 1280, 1400])
    arguments.add_argument("--shared", default="../shared/data")
    arguments.add_argument("--output", type=Path, default=Path("data/nano/quality.png"))
    options = arguments.parse_args()
    points = []
    for step in options.steps:
        state = torch.load(options.pretraining / f"step-{step}.pt", weights_only=True)
        results = trained(step, state["model"], options.pretraining, options.shared)
        points.append({"tokens": state["tokens"], **results})
        print(step, json.dumps(points[-1]), flush=True)
    draw(points, options.output)


def trained(step: int, weights: dict, pretraining: Path, shared: str) -> dict[str, dict[str, float]]:
    """"before" and "after" -> set -> its metric × 100."""
    config = replace(PretrainConfig(), folder=str(pretraining), output=f"runs/nano_curve/base-{step}")
    model = build_model(config.nano, config.seed)
    model.load_state_dict(weights)
    save_model(model, config)
    name = f"nano_curve/{step}"
    command = [
        sys.executable, "train/biencoder.py", "experiment=pydocs", f"model.path={config.output}", f"name={name}",
        "resume=true", "evaluation.split=dev",
        "evaluation.bm25=false", "evaluation.retrieval=[data/raw/pydocs/pydocs_dev]",
        f"evaluation.sts=[{shared}/stsb/pairs.jsonl.gz]",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = json.loads(Path("runs", name, "results.json").read_text(encoding="utf-8"))
    metrics = {"pydocs_dev": "ndcg@10", "stsb": "spearman_cosine"}
    return {
        when: {chosen: 100 * results[when][chosen][metric] for chosen, metric in metrics.items()}
        for when in ("before", "after")
    }


def draw(points: list[dict], file: Path) -> None:
    figure, plots = pyplot.subplots(1, 2, figsize=(8, 3))
    for axes, chosen, title in zip(
        plots, ("pydocs_dev", "stsb"), ("pydocs dev, nDCG@10 × 100", "STS-B dev, Spearman × 100"), strict=True
    ):
        for when, style in (("before", "o--"), ("after", "o-")):
            axes.plot(
                [point["tokens"] / 1e6 for point in points], [point[when][chosen] for point in points], style,
                label=f"{when} bias-only training"
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("million tokens through the blocks")
        axes.spines[["top", "right"]].set_visible(False)
    plots[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    print(file)


if __name__ == "__main__":
    main()
