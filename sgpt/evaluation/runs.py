"""Training runs next to each other: `train/compare.py` and its page.

Differences are to the first run. Of a retrieval set they have a 95 % interval, by a paired bootstrap over the queries,
whose scores each run keeps in analysis.json; of other sets there is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml
from matplotlib.axes import Axes

from sgpt.report.page import LIGHT, Plot, figures, page, section
from sgpt.report.run import CURVES, METRIC_LABELS, Points, read_log, read_part, scores_of
from sgpt.retrieval.metrics import Difference, difference
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole
from sgpt.runtime.provenance import SHOWN, flat

if TYPE_CHECKING:
    from rich.table import Table

COLOURS_OF_RUNS = ("blue", "amber", "teal", "rise", "fall", "grey")
LINES_OF_RUNS = [(colour, style) for style in ("solid", "dashed") for colour in COLOURS_OF_RUNS]
SCORED_QUERIES_METRIC = "ndcg@10"  # what analysis.json has of each query
NOT_COMPARED = ("name", "runs", "resume")  # keys of a configuration that differ by nature
NOTE = (
    "Differences are to the first run. In brackets their 95 % interval, a paired bootstrap over the queries that both "
    "runs scored; where there is none, no scores of single queries are kept. A set of one name that is not the same in "
    "both runs has no difference: its hashes are below. One run of each recipe: how much another seed would change is "
    "not in the interval."
)


@dataclass
class CompareConfig:
    """Which runs are compared, and where the page goes."""

    runs: list[str] = field(default_factory=list)
    """Folders of training runs, the one that the others are compared with first."""
    output: str = "compare.html"
    """Page that is written."""

    def __post_init__(self) -> None:
        if len({Path(folder).absolute() for folder in self.runs}) < len(self.runs):
            raise InputError(f"runs={self.runs} names a run twice; leave one out")
        if len(self.runs) > len(LINES_OF_RUNS):
            raise InputError(f"runs names {len(self.runs)} runs; a page shows at most {len(LINES_OF_RUNS)}")


class ComparedRun(NamedTuple):
    """What the folder of a run holds. log: lines of `read_log`; queries: set -> query -> score after training."""

    name: str
    config: dict[str, Any]
    log: list[dict[str, Any]]
    after: dict[str, dict[str, float]]
    queries: dict[str, dict[str, float]]
    manifest: dict[str, Any]


def read_runs(config: CompareConfig) -> list[ComparedRun]:
    """InputError for a folder that is no run; one that has not finished has no results yet, and is compared all the
    same.
    """
    if len(config.runs) < 2:
        raise InputError("runs names fewer than two runs; for example runs=[runs/a,runs/b]")
    return [_read_run(Path(folder), folder) for folder in config.runs]


def _read_run(folder: Path, name: str) -> ComparedRun:
    if not (folder / "config.yaml").is_file():
        raise InputError(f"runs: {folder} is no training run, there is no {folder / 'config.yaml'}")

    def read(file: str) -> dict[str, Any]:
        return read_part(folder / file) if (folder / file).is_file() else {}

    analysis = read("analysis.json")
    return ComparedRun(
        name=name,
        config=read_part(folder / "config.yaml", yaml.safe_load),
        log=read_log(folder / "metrics.jsonl", unfinished=True),
        after=scores_of(read("results.json"), "after", folder / "results.json"),
        queries=scores_of(analysis.get("queries") or {}, "after", folder / "analysis.json"),
        manifest=read("manifest.json"),
    )


def compared_metrics(runs: list[ComparedRun]) -> dict[tuple[str, str], list[tuple[float | None, Difference | None]]]:
    """(set, metric) -> of each run its value, and its difference to the first run, None where one of them has none."""
    rows: dict[tuple[str, str], list[tuple[float | None, Difference | None]]] = {}
    names = dict.fromkeys((of, metric) for run in runs for of in run.after for metric in run.after[of])
    for of, metric in names:
        rows[of, metric] = [(run.after.get(of, {}).get(metric), _gain(runs[0], run, of, metric)) for run in runs]
    return rows


def _gain(first: ComparedRun, run: ComparedRun, of: str, metric: str) -> Difference | None:
    values = [other.after.get(of, {}).get(metric) for other in (run, first)]
    if run is first or None in values or not _is_same_set(first, run, of):
        return None
    scored = run.queries.get(of, {}), first.queries.get(of, {})
    both = sorted(scored[0].keys() & scored[1].keys())
    if metric == SCORED_QUERIES_METRIC and both:
        return difference(*([scores[query] for query in both] for scores in scored))
    return Difference(values[0] - values[1], None, None)


def _is_same_set(first: ComparedRun, run: ComparedRun, of: str) -> bool:
    """Whether both were scored on the same texts and judgements, by their hashes."""
    hashes = [other.manifest.get("inputs", {}).get(f"test set {of}") for other in (first, run)]
    return hashes[0] == hashes[1]


def config_differences(runs: list[ComparedRun]) -> dict[str, list[str]]:
    """Key -> its value in each run, of the keys that are not the same in all; versions, processor and hashes of the
    inputs too.
    """
    flats = []
    for run in runs:
        config = flat({key: value for key, value in run.config.items() if key not in NOT_COMPARED})
        made_on = flat({"environment": run.manifest.get("environment", {})})
        inputs = {f"inputs.{name}": str(value)[:SHOWN] for name, value in run.manifest.get("inputs", {}).items()}
        flats.append({key: str(value) for key, value in (config | made_on | inputs).items()})
    keys = dict.fromkeys(key for values in flats for key in values)
    return {
        key: [values.get(key, "–") for values in flats]
        for key in keys
        if len({values.get(key) for values in flats}) > 1
    }


def write_comparison(runs: list[ComparedRun], file: Path) -> None:
    """Writes the page; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = [escape(run.name) for run in runs]
    keys = "".join(
        f"<span class='key' style='--c:var(--{colour})'>{escape(label)}</span> "
        for label, colour in line_labels(runs).items()
    )
    body = [
        f"<header><p class='quiet'>SGPT training runs</p><h1>{' · '.join(names)}</h1><p>{keys}</p></header>",
        section("Results", _html_table(names, result_rows(runs) | cost_rows(runs)), f"<p class='quiet'>{NOTE}</p>"),
        section("Training", figures(_overlaid_plots(runs))),
        section("What differs in their configuration", _html_table(names, config_differences(runs))),
    ]
    write_whole(file, page(" · ".join(run.name for run in runs), *body))


def result_rows(runs: list[ComparedRun]) -> dict[str, list[str]]:
    """"<set> · <metric>" -> a text for each run."""
    return {
        f"{of} · {METRIC_LABELS.get(metric, metric)}": [described_value(*cell) for cell in row]
        for (of, metric), row in compared_metrics(runs).items()
    }


def cost_rows(runs: list[ComparedRun]) -> dict[str, list[str]]:
    """What training took; seconds are known of finished runs alone."""
    seconds = [run.manifest.get("seconds") for run in runs]
    return {
        "parameters trained": [f"{run.manifest.get('parameters', {}).get('trained', 0):,}" for run in runs],
        "optimizer steps": [f"{run.log[-1]['step']:,}" if run.log else "0" for run in runs],
        "minutes of training": ["–" if value is None else f"{value / 60:.1f}" for value in seconds],
    }


def comparison_table(runs: list[ComparedRun]) -> "Table":
    """Results, costs and different keys, for the terminal."""
    from rich.table import Table

    table = Table()
    table.add_column("", overflow="fold")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for rows in (result_rows(runs), cost_rows(runs), config_differences(runs)):
        for label, cells in rows.items():
            table.add_row(label, *cells)
        table.add_section()
    return table


def described_value(value: float | None, gain: Difference | None) -> str:
    """As in `0.4321 (+0.0123 [0.0045, 0.0201])`."""
    if value is None:
        return "–"
    if gain is None:
        return f"{value:.4f}"
    interval = "" if gain.low is None else f" [{gain.low:+.4f}, {gain.high:+.4f}]"
    return f"{value:.4f} ({gain.mean:+.4f}{interval})".replace("-", "−")


def _html_table(names: list[str], rows: Mapping[str, list[str]]) -> str:
    head = "".join(f"<th style='text-align:right'>{name}</th>" for name in names)
    body = ""
    for label, cells in rows.items():
        body += f"<tr><td>{escape(label)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    return f"<div class='scroll card'><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _overlaid_plots(runs: list[ComparedRun]) -> list[Plot]:
    """One plot for each number of the log and each metric of a dev set that a run has a point of."""
    curves: dict[str, list[Points]] = {}
    for title, keys in CURVES.items():
        for key in keys:
            label = title if len(keys) == 1 else f"{title}: {METRIC_LABELS.get(key, key)}"
            curves[label] = [[(line["step"], line[key]) for line in run.log if line[key] is not None] for run in runs]
    dev_names = dict.fromkeys(
        (of, metric) for run in runs for line in run.log for of, row in line["dev"].items() for metric in row
    )
    for of, metric in dev_names:
        curves[f"{METRIC_LABELS.get(metric, metric)} on {of}"] = [
            [(line["step"], line["dev"][of][metric]) for line in run.log if metric in line["dev"].get(of, {})]
            for run in runs
        ]
    labels = line_labels(runs)
    return [Plot(title, partial(_draw_overlaid, lines=lines), labels) for title, lines in curves.items() if any(lines)]


def line_labels(runs: list[ComparedRun]) -> dict[str, str]:
    """What the legends say of each run -> its colour."""
    labels = {}
    for run, (colour, style) in zip(runs, LINES_OF_RUNS, strict=False):
        labels[run.name + (" (dashed)" if style == "dashed" else "")] = colour
    return labels


def _draw_overlaid(axes: Axes, lines: list[Points]) -> None:
    for points, (colour, style) in zip(lines, LINES_OF_RUNS, strict=False):
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        marker = "o" if len(points) <= 25 else ""
        axes.plot(steps, values, color=LIGHT[colour], linestyle=style, marker=marker, markersize=3)
    axes.set_xlabel("optimizer step")
