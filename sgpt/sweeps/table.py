"""What a sweep shows on the terminal."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from sgpt.sweeps.jobs import SweepJob, best_job, compared_metric, split_overrides

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOTHING_TO_COMPARE = (
    "nothing to compare the jobs by: they have no test set (evaluation.retrieval, evaluation.sts, evaluation.pairs) "
    "and no dev set that is scored (dev.retrieval, dev.sts, dev.pairs and trainer.evaluate_every_steps)"
)


def make_console() -> "Console":
    from rich.console import Console

    # Into a file or pipe rich would assume 80 columns and fold the table; no markup: overrides may hold [1,2].
    return Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False, emoji=False)


def spinner(console: "Console", text: str) -> AbstractContextManager[object]:
    """What runs now and where its output is; on a terminal only, and gone when the job's line replaces it."""
    from rich.text import Text

    return console.status(Text(text)) if console.is_terminal else nullcontext()  # Text: a plain str is read as markup


def sweep_table(name: str, jobs: list[SweepJob]) -> "Table":
    """Every metric of "after", a column each; `*` marks the job with the best main metric."""
    from rich.table import Table

    shared, differing = split_overrides(jobs)
    best = best_job(jobs)
    scores = [(of, metric) for job in jobs for of, metrics in job.after.items() for metric in metrics]
    columns = list(dict.fromkeys(scores))  # each once, in the order met
    table = Table(title=" ".join([f"{name}-sweep", *shared]), title_justify="left", caption_justify="left")
    table.caption = f"* best {compared_metric(best.after)[0]}: job {best.job}" if best else None
    finished = [job for job in jobs if job.status == "finished"]
    if finished and not any(job.after for job in finished):
        table.caption = NOTHING_TO_COMPARE
    table.add_column("job", justify="right")
    for heading in ("overrides", "status"):
        table.add_column(heading, overflow="fold")
    for of, metric in columns:
        table.add_column(f"{of}\n{metric}", justify="right", overflow="fold")
    for job in jobs:
        values = [job.after.get(of, {}).get(metric) for of, metric in columns]
        table.add_row(
            f"*{job.job}" if job is best else str(job.job),
            " ".join(differing[job.job]),
            job.status,
            *("-" if value is None else f"{value:.4f}" for value in values),
            style="bold" if job is best else None,
        )
    return table
