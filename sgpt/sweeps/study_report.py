"""What a study ends with: a table, a page of plots, and the best configuration as an experiment."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from sgpt.runtime.files import write_whole
from sgpt.sweeps.study import StudyConfig, described_values, latest_trials, rounded, run_number, scored_trials

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial
    from rich.table import Table

STATES = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "running", "WAITING": "waits"}
NOT_OF_THE_RECIPE = ("name", "runs", "resume", "logging")  # keys that an experiment leaves to whoever starts it


def score_text(trial: "FrozenTrial") -> str:
    """Of a trial that was stopped early, the last one before that."""
    if trial.state.name == "COMPLETE":
        return f"{trial.value:.4f}"
    return f"{trial.intermediate_values[trial.last_step]:.4f} at step {trial.last_step}" if trial.last_step else "-"


def study_table(study: "Study", config: StudyConfig) -> "Table":
    """All trials; `*` marks the best."""
    from rich.table import Table

    best = scored_trials(study)[:1]
    table = Table(title=f"{config.name}-study", title_justify="left", caption_justify="left")
    table.caption = f"* best {config.metric} of the dev sets, each trial at its best evaluation" if best else None
    keys = [dimension.key for dimension in config.space]
    for heading in ("trial", *keys, "state", config.metric):
        table.add_column(heading, justify="right", overflow="fold")
    for trial in latest_trials(study):
        values = [rounded(trial.params.get(key, "")) for key in keys]
        is_best = trial in best
        cells = [f"*{run_number(trial)}" if is_best else str(run_number(trial)), *values]
        table.add_row(*cells, STATES[trial.state.name], score_text(trial), style="bold" if is_best else None)
    return table


def write_study_page(study: "Study", config: StudyConfig) -> Path:
    """Writes `study.html`, which holds its plots whole: it needs no network."""
    from optuna import visualization

    plots = [visualization.plot_optimization_history, visualization.plot_intermediate_values]
    if len(scored_trials(study)) > 1:
        plots[:0] = [visualization.plot_parallel_coordinate, visualization.plot_param_importances]
    figures = []
    for plot in plots:
        figure = plot(study)
        figures.append(figure.to_html(full_html=False, include_plotlyjs=not figures, config={"displaylogo": False}))
    rows = []
    for trial in latest_trials(study):
        cells = (str(run_number(trial)), described_values(trial), STATES[trial.state.name], score_text(trial))
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    file = config.folder / "study.html"
    title = f"{config.name}: {config.metric} of the dev sets"
    _write(file, STUDY_PAGE.format(title=escape(title), rows="".join(rows), figures="".join(figures)))
    return file


def write_experiment(study: "Study", config: StudyConfig, best: Mapping[str, Any]) -> Path:
    """Writes the best configuration as an option of the group `experiment`.

    best: the whole configuration of the best trial, so that later defaults do not change what it says.
    """
    import yaml

    trial = scored_trials(study)[0]
    recipe = {key: value for key, value in best.items() if key not in NOT_OF_THE_RECIPE}
    name = f"{config.name}_best"  # another than of the experiments in configs/, which Hydra would find first
    file = config.folder / "experiment" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    seconds = trial.duration.total_seconds()
    head = (
        "# @package _global_\n"
        f"# The best of {len(latest_trials(study))} trials: {config.metric} {trial.value:.4f} on the dev sets, "
        f"{seconds / 60:.1f} minutes.\n"
        f"# {described_values(trial)}, next to {' '.join(config.overrides)}\n"
        f"#   accelerate launch train/biencoder.py --config-dir {config.folder} experiment={name}\n"
    )
    _write(file, head + yaml.safe_dump({"name": name, **recipe}, sort_keys=False, allow_unicode=True))
    return file


def _write(file: Path, text: str) -> None:
    """One worker at a time: those that end together write the same files."""
    with FileLock(file.with_name(f".{file.name}.lock")):
        write_whole(file, text)


STUDY_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ max-width: 1120px; margin: 40px auto; padding: 0 20px; font: 16px/1.5 system-ui, sans-serif; color: #1b2430 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: 4px 16px 4px 0; text-align: left; border-bottom: 1px solid #e4e8ee }}
</style>
</head>
<body>
<h1>{title}</h1>
{figures}
<table><thead><tr><th>trial</th><th>values</th><th>state</th><th>score</th></tr></thead><tbody>{rows}</tbody></table>
</body>
</html>
"""
