"""Pictures of tuned biases: where they moved, and what a part of their change is worth."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from sgpt.report.page import DRAWING, LIGHT

LINES = ("blue", "amber", "teal", "rise", "fall", "grey")
DOTS_AN_INCH = 110


def draw_bias_change(change: Mapping[str, Mapping[int | None, float]], file: Path) -> None:
    """A PNG of the size of the change by module (row) and block (column).

    change: module -> block -> root mean square of the change; block None, for what is in no block, is the last column.
    """
    numbers = sorted({block for of_module in change.values() for block in of_module if block is not None})
    outside = any(None in of_module for of_module in change.values())
    columns: list[int | None] = [*numbers, None] if outside else [*numbers]
    cells = np.array([[of_module.get(block, np.nan) for block in columns] for of_module in change.values()])
    with rc_context(DRAWING | {"axes.grid": False}):
        figure = Figure(figsize=(max(4.5, 2.5 + 0.28 * len(columns)), 1.4 + 0.28 * len(change)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(cells, aspect="auto", vmin=0, cmap="viridis")
        axes.set_yticks(range(len(change)), list(change))
        axes.set_xticks(range(len(columns)), ["outside" if block is None else str(block) for block in columns])
        if outside:
            axes.get_xticklabels()[-1].set_rotation(90)
        axes.set_xlabel("block")
        figure.colorbar(image, ax=axes, label="root mean square of the change")
        figure.savefig(file, dpi=DOTS_AN_INCH)


def draw_strength_curve(
    strengths: Sequence[float], sets: Mapping[str, Sequence[float]], general: Sequence[str], file: Path
) -> None:
    """A PNG of the scores by strength, and where both are measured of the tuned task against general quality.

    sets: name and metric -> a score at each strength. general: those of them that measure general quality; the others
    are the task's, and means are drawn against each other.
    """
    task = [name for name in sets if name not in general]
    panels = 2 if task and general else 1
    with rc_context(DRAWING):
        figure = Figure(figsize=(5.2 * panels, 3.4), layout="constrained")
        left, *right = np.atleast_1d(figure.subplots(1, panels))
        for number, (name, scores) in enumerate(sets.items()):
            style = "--" if name in general else "-"
            left.plot(strengths, scores, f"o{style}", markersize=3, color=LIGHT[LINES[number % len(LINES)]], label=name)
        left.set_xlabel("strength: 0 is the base, 1 the tuned model")
        left.set_ylabel("score × 100")
        left.legend(frameon=False, fontsize=7)
        for axes in right:
            across, up = (np.mean([sets[name] for name in names], axis=0) for names in (general, task))
            axes.plot(across, up, "o-", markersize=3, color=LIGHT["blue"])
            for strength, x, y in zip(strengths, across, up, strict=True):
                axes.annotate(f"{strength:.2g}", (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
            axes.set_xlabel(f"general: {', '.join(general)}")
            axes.set_ylabel(f"task: {', '.join(task)}")
        figure.savefig(file, dpi=DOTS_AN_INCH)
