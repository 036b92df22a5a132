"""What a part of a tuned model's change is worth: quality on its task and in general, from the base to the model.

Tuning for a task costs some of the base's general quality, and a strength below 1 gives it back. The curve shows the
trade, so that a strength can be chosen by what both are worth.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import numpy as np

from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import EvaluationConfig, Results, Sets, evaluate, read_sets
from sgpt.report.merging import draw_strength_curve
from sgpt.retrieval.metrics import main_metric
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole
from sgpt.runtime.progress import log_progress
from sgpt.runtime.values import FINITE, Range, check_ranges

TABLE, PICTURE = "curve.csv", "curve.png"  # in the merged model's folder


@dataclass
class MergeConfig:
    """Keys of train/merge.py."""

    models: list[str] = field(default_factory=list)
    """Runs or adapter folders whose biases were tuned over one base; one is enough."""
    weights: list[float] | None = None
    """Of each model, how much of its change is added to the base; of any sign. Null averages the models."""
    output: str = ""
    """Folder of the new adapter, which opens like any other; an earlier merge there is replaced."""
    curve: bool = False
    """Score the merged model in strengths from 0, the base, to 1: a table, curve.csv and curve.png."""
    steps: int = 11
    """Of curve: how many strengths, 0 and 1 among them."""
    retrieval: list[str] = field(default_factory=list)
    """Of curve: BEIR folders, or names of BEIR's sets."""
    sts: list[str] = field(default_factory=list)
    """Of curve: files of scored sentence pairs."""
    general: list[str] = field(default_factory=list)
    """Of curve: names of the sets that measure general quality, the others are the task's; empty takes those of sts."""
    split: str | None = None
    """Of curve: null is each set's own, which is test but for BEIR's msmarco."""

    def __post_init__(self) -> None:
        check_ranges(self, steps=Range("from 2 to 101", 2, 101))
        for weight in self.weights or []:
            if weight not in FINITE:
                raise InputError(f"weights={weight} must be {FINITE.describe(weight)}")
        if self.weights is not None and len(self.weights) != len(self.models):
            raise InputError(f"weights has {len(self.weights)} numbers for {len(self.models)} models; give each one")
        for key in ("retrieval", "sts", "general", "split"):
            if getattr(self, key) and not self.curve:
                raise InputError(f"{key}={getattr(self, key)} has no effect without curve=true; leave it out")
        if self.steps != MergeConfig.steps and not self.curve:
            raise InputError(f"steps={self.steps} has no effect without curve=true; leave it out")


def check_merge(config: MergeConfig) -> None:
    """InputError where something to merge, or to score, is missing."""
    if not config.models or not config.output:
        raise InputError(
            "set models=[<run or adapter>,…] and output=<folder>, for example models=[runs/a,runs/b] output=runs/both"
        )
    if config.curve and not (config.retrieval or config.sts):
        raise InputError("curve=true scores nothing; set retrieval=[<BEIR folder or name>,…] or sts=[<pairs file>,…]")


def read_curve_sets(config: MergeConfig) -> Sets:
    """What the curve is scored on; InputError for what cannot be read, and for a name in `general` that no set has."""
    sets = read_sets(EvaluationConfig(retrieval=config.retrieval, sts=config.sts, split=config.split))
    names = [dataset.name for dataset in (*sets.retrieval, *sets.sts)]
    unknown = next((name for name in config.general if name not in names), None)
    if unknown is not None:
        raise InputError(f"general={unknown}: no set has that name; they are {', '.join(names)}")
    return sets


def strength_curve(encoder: Encoder, delta: str, sets: Sets, steps: int) -> dict[float, Results]:
    """Strength -> set -> metrics, from 0 to 1. delta: of the encoder's, by name."""
    curve: dict[float, Results] = {}
    for strength in np.linspace(0, 1, steps).round(4).tolist():
        with log_progress(f"strength {strength:g}"):
            curve[strength] = evaluate(encoder.with_delta(delta, strength), sets)
    return curve


def general_sets(config: MergeConfig, sets: Sets) -> list[str]:
    """Names of the sets that measure general quality."""
    return config.general or [dataset.name for dataset in sets.sts]


def write_curve(curve: Mapping[float, Results], general: Sequence[str], folder: Path) -> None:
    """TABLE, a row for each strength with all metrics of all sets, and PICTURE, of the main ones × 100."""
    first = next(iter(curve.values()))
    columns = [(name, metric) for name, metrics in first.items() for metric in metrics]
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["strength", *(f"{name} {metric}" for name, metric in columns)])
    for strength, results in curve.items():
        rows.writerow([strength, *(results[name][metric] for name, metric in columns)])
    write_whole(folder / TABLE, text.getvalue())
    scores = {name: [100 * main_metric(results[name])[1] for results in curve.values()] for name in first}
    draw_strength_curve(list(curve), scores, [name for name in first if name in general], folder / PICTURE)


def curve_table(curve: Mapping[float, Results], general: Sequence[str]):
    """A rich table: a row for each strength, a column for each set, × 100."""
    from rich.table import Table

    first = next(iter(curve.values()))
    heads = []
    for name, metrics in first.items():
        heads.append(f"{name}{' (general)' if name in general else ''}\n{main_metric(metrics)[0]}")
    table = Table("strength", *heads, title="from the base to the tuned model, × 100")
    for strength, results in curve.items():
        cells = (f"{100 * main_metric(results[name])[1]:.2f}" for name in first)
        table.add_row(f"{strength:g}", *cells)
    return table
