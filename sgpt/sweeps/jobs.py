"""The jobs of a sweep: what each one is, what it left behind, which is the best."""

import json
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

COMPARED_METRICS = ("ndcg@10", "spearman_cosine")


@dataclass
class SweepJob:
    """One row of the table and of sweep.json."""

    job: int
    overrides: list[str]
    folder: str
    log: str
    status: str = "waiting"  # then running, then finished, failed or stopped
    minutes: float = 0.0  # of the latest start; next to nothing when the script found the job finished
    main_metric: float | None = None
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    error: str | None = None


def read_jobs(path: Path) -> dict[int, SweepJob]:
    """The jobs of earlier starts. What they left as running was killed with them, unless its log is still locked."""
    if not path.is_file():
        return {}
    jobs = [SweepJob(**row) for row in json.loads(path.read_text(encoding="utf-8"))["jobs"]]
    for job in jobs:
        job.status = "stopped" if job.status == "running" else job.status
    return {job.job: job for job in jobs}


def read_after(path: Path) -> dict[str, dict[str, float]]:
    """`{set: {metric: value}}` after training. FileNotFoundError or ValueError when the script did not write it."""
    if not path.is_file():
        raise FileNotFoundError(f"the job ended well but did not write {path}")
    after = json.loads(path.read_text(encoding="utf-8")).get("after")
    if not after:
        raise ValueError(f'{path} has no "after": {{set: {{metric: value}}}}')
    return after


def compared_metric(after: dict[str, dict[str, float]]) -> tuple[str, float]:
    """Name and value of what jobs are compared by: the first set's nDCG@10 or Spearman correlation."""
    for set_name, metrics in after.items():
        for metric in COMPARED_METRICS:
            if metric in metrics:
                return f"{set_name} {metric}", metrics[metric]
    raise ValueError(f"none of {', '.join(COMPARED_METRICS)} in the results of {', '.join(after)}")


def best_job(jobs: list[SweepJob]) -> SweepJob | None:
    """NaN, from a run that diverged, is not comparable and never the best."""
    comparable = [job for job in jobs if job.main_metric is not None and not isnan(job.main_metric)]
    return max(comparable, key=lambda job: job.main_metric or 0.0, default=None)  # `or`: for the type checker


def split_overrides(jobs: list[SweepJob]) -> tuple[list[str], dict[int, list[str]]]:
    """What all jobs share, and of each job the rest. A single job shares with nobody: all its overrides are shown."""
    several = len(jobs) > 1
    shared = [item for item in jobs[0].overrides if several and all(item in job.overrides for job in jobs)]
    return shared, {job.job: [item for item in job.overrides if item not in shared] for job in jobs}
