"""What bias-only training costs in quality, and saves in all else: next to norm gains, LoRA and full fine-tuning.

    python benchmarks/tunings.py [--base nano] [--steps 110] [--tunings bitfit lora_1 last_10 …] [--seeds 0]

The task is pydocs: nDCG@10 on packages never trained on; for SmolLM2 with fewer and shorter texts. Each tuning first
tries its learning rates for a quarter of the steps and keeps the best on the dev packages; variants of bias-only
training, as last_10, take its rate. Then all train on equally many pairs, and once more for as long as bias-only
training took. Every run is `train/biencoder.py`; a finished run is not run again, so a stopped benchmark resumes.
Prints a table; seconds are of training alone, ± is the half width of the 95 % interval over seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from ablation import estimate

BASES = {
    "nano": ["experiment=pydocs"],
    "smollm2": [  # small enough for hours on one core
        "experiment=pydocs_smollm2", "trainer.queries_per_process=32", "data.document_max_tokens=48",
        "markers.document_max_tokens=96", "evaluation.limit=300", "dev.limit=200",
    ],
    "smollm2_whole": ["experiment=pydocs_smollm2"],  # minutes on a GPU
}
TUNINGS = {
    "bitfit": ("biases", ["tuning=bitfit"]),
    "bitfit_norm": ("biases and norm gains", ["tuning=bitfit_norm"]),
    "lora_1": ("LoRA, rank 1", ["tuning=lora", "tuning.lora_rank=1", "tuning.lora_alpha=2"]),
    "lora_8": ("LoRA, rank 8", ["tuning=lora", "tuning.lora_rank=8", "tuning.lora_alpha=16"]),
    "full": ("all weights", ["tuning=full"]),
}
OF_BITFIT = {  # variants of the first
    "attention": ("biases of attention", ["tuning=bitfit", "tuning.add_biases=attention"]),
    "mlp": ("biases of the MLP", ["tuning=bitfit", "tuning.add_biases=mlp"]),
    "last_10": ("biases of the last 10 blocks", ["tuning=bitfit", "tuning.layers=last:10"]),
    "first_20": ("biases of a base of its first 20 blocks", ["tuning=bitfit", "model.layers=20"]),
    "whole": ("biases, documents as long as in search", ["tuning=bitfit", "data.document_max_tokens=null"]),
}
ROWS = TUNINGS | OF_BITFIT
RATES = {
    "nano": {"bitfit": [2e-2, 5e-2, 1e-1], "bitfit_norm": [1e-2, 2e-2, 5e-2], "lora_1": [3e-3, 1e-2, 3e-2],
             "lora_8": [1e-3, 3e-3, 1e-2], "full": [1e-4, 3e-4, 1e-3]},
    "smollm2": {"bitfit": [5e-3, 1e-2, 2e-2], "bitfit_norm": [5e-3, 1e-2, 2e-2], "lora_1": [1e-3, 3e-3, 1e-2],
                "lora_8": [1e-3, 3e-3, 1e-2], "full": [1e-4, 3e-4, 1e-3]},
    "smollm2_whole": {"bitfit": [5e-3, 1e-2, 2e-2], "bitfit_norm": [2e-3, 5e-3, 1e-2], "lora_1": [3e-3, 1e-2, 3e-2],
                      "lora_8": [1e-3, 3e-3, 1e-2], "full": [1e-4, 3e-4, 1e-3]},
}  # fmt: skip
DEV = "data/raw/pydocs/pydocs_dev"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="nano")
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--tunings", nargs="+", choices=ROWS, default=list(TUNINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    print("| trained | numbers | adapter | learning rate | equal pairs | equal time | s a step | memory |")
    print("|---|---|---|---|---|---|---|---|")
    tunings = dict.fromkeys(["bitfit", *options.tunings])  # its time is what the others are given
    seconds_of_bitfit = 0.0
    for tuning in tunings:
        rate = best_rate(options.base, "bitfit" if tuning in OF_BITFIT else tuning, max(1, options.steps // 4))
        equal_pairs = [scored(options.base, tuning, rate, options.steps, seed) for seed in options.seeds]
        seconds = statistics.mean(run["seconds"] for run in equal_pairs)
        seconds_of_bitfit = seconds_of_bitfit or seconds
        steps = round(options.steps * seconds_of_bitfit / seconds)
        equal_time = [scored(options.base, tuning, rate, steps, seed) for seed in options.seeds]
        manifest = equal_pairs[0]["manifest"]
        cells = [
            ROWS[tuning][0],
            f"{manifest['parameters']['trained']:,}",
            f"{manifest['bytes']['adapter'] / 1e6:.3f} MB",
            f"{rate:g}",
            _mean(equal_pairs),
            f"{_mean(equal_time)} ({steps} steps)",
            f"{seconds / options.steps:.2f}",
            f"{equal_pairs[0]['memory'] / 1e9:.1f} GB",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def best_rate(base: str, tuning: str, steps: int) -> float:
    """The learning rate that is best on the dev packages."""
    results: dict[float, float] = {}
    for rate in RATES[base][tuning]:
        on_dev = ["evaluation.retrieval=[]", f"dev.retrieval=[{DEV}]", f"trainer.evaluate_every_steps={steps}"]
        try:
            run = trained(base, tuning, rate, steps, 0, on_dev, "rate")
        except subprocess.CalledProcessError:  # which has said why; too high a rate ends in a loss that is no number
            continue
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        results[rate] = next(line["dev"] for line in lines if "dev" in line)["pydocs_dev"]["ndcg@10"]
        print(f"{tuning}, learning rate {rate:g}: {100 * results[rate]:.2f} on dev", file=sys.stderr, flush=True)
    return max(results, key=results.get)


def scored(base: str, tuning: str, rate: float, steps: int, seed: int) -> dict:
    """Its test score, seconds of training, peak memory and manifest."""
    run = trained(base, tuning, rate, steps, seed, [], "test")
    manifest = json.loads((run / "manifest.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    after = json.loads((run / "results.json").read_text())["after"]
    return {
        "score": 100 * after["pydocs_test"]["ndcg@10"],
        "seconds": manifest["seconds"],
        "memory": max(row.get("peak_memory_bytes", 0) for row in metrics),
        "manifest": manifest,
    }


def trained(base: str, tuning: str, rate: float, steps: int, seed: int, more: list[str], kind: str) -> Path:
    """The folder of a finished run."""
    name = f"tunings/{base}-{tuning}-{kind}-{rate:g}-{steps}-{seed}"
    command = [
        sys.executable, "train/biencoder.py", *BASES[base], *ROWS[tuning][1], *more, f"name={name}",
        f"optim.learning_rate={rate}", f"trainer.max_steps={steps}", f"trainer.seed={seed}", "resume=true",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Path("runs") / name


def _mean(runs: list[dict]) -> str:
    return str(estimate([run["score"] for run in runs]))


if __name__ == "__main__":
    main()
