"""The picture of the README, from what the benchmarks wrote: `python benchmarks/picture.py runs/bench/*.json --output
docs/speed.png`.

A bar is the median over rounds of a competitor's CPU seconds over ours, the line its spread; what has no verdict is
left out.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ENDING = " / ours, CPU seconds"
SHAPES = {
    "125m": "GPT-Neo 125M", "small": "GPT-Neo, 4 × 256", "gpt2_125m": "GPT-2 125M", "llama_small": "Llama, 4 × 256",
    "neox_small": "NeoX, 4 × 256",
    "neox_125m": "NeoX 125M", "smollm2": "SmolLM2 135M",
}
DOING = {
    "train_step": "training step", "encode": "encoding", "rerank": "re-ranking", "memory": "training step",
    "scaling": "training step"
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("files", type=Path, nargs="+", help="JSON files of the benchmarks")
    arguments.add_argument("--output", type=Path, default=Path("docs/speed.png"))
    options = arguments.parse_args()
    bars = [bar for file in options.files for bar in read(json.loads(file.read_text(encoding="utf-8")))]
    bars.sort(key=lambda bar: bar["median"])
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.42 * len(bars)))
    medians = [bar["median"] for bar in bars]
    spread = [[bar["median"] - bar["low"] for bar in bars], [bar["high"] - bar["median"] for bar in bars]]
    axes.barh([bar["label"] for bar in bars], medians, xerr=spread, color="#3b6ea5", ecolor="#1d3c5c", height=0.6)
    for place, bar in enumerate(bars):
        axes.text(bar["high"] + 0.1, place, f"{bar['median']:.1f} ×", va="center", fontsize=9)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set_xlim(0, max(bar["high"] for bar in bars) * 1.12)
    axes.set_xlabel("CPU time of the competitor over ours, equal results")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(options.output, dpi=110)
    print(options.output)


def read(found: dict) -> list[dict]:
    """The verdicts of one file that compare a competitor with us; none of benchmarks that time no such thing."""
    options, script = found["options"], found["command"].split(".py")[0]
    if script not in DOING:
        return []
    where = f"{DOING[script]}, {options.get('data', 'nli')}, {SHAPES[options['shape']]}"
    if options.get("queries", 1) > 1:
        where += f", {options['queries']} queries"
    return [
        verdict | {"label": f"{where}\nbeside {verdict['what'].removesuffix(ENDING)}"}
        for verdict in found["verdicts"]
        if verdict.get("decided") and verdict["what"].endswith(ENDING)
        and not verdict["what"].startswith(("bare", "ours"))
    ]


if __name__ == "__main__":
    main()
