"""The jobs of a sweep: what each one is, what it left behind, which is the best."""

import json
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

COMPARED_METRICS = ("ndcg@10", "spearman_cosine")
ScoresOfSets = dict[str, dict[str, float]]  # set -> metric -> value


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
    after: ScoresOfSets = field(default_factory=dict)  # empty for a run without test and dev sets, too
    error: str | None = None


def read_jobs(path: Path) -> dict[int, SweepJob]:
    """The jobs of earlier starts. What they left as running was killed with them, unless its log is still locked."""
    if not path.is_file():
        return {}
    jobs = [SweepJob(**row) for row in json.loads(path.read_text(encoding="utf-8"))["jobs"]]
    for job in jobs:
        job.status = "stopped" if job.status == "running" else job.status
    return {job.job: job for job in jobs}


def read_after(folder: Path) -> ScoresOfSets:
    """What the finished run of this folder is compared by: its test sets after training.

    Without test sets its dev sets, as `<set> (dev)`, at the step that its adapter is made of. Empty without either.
    FileNotFoundError or ValueError when the script did not write its results.
    """
    results = folder / "results.json"
    if not results.is_file():
        raise FileNotFoundError(f"the job ended well but did not write {results}")
    after = json.loads(results.read_text(encoding="utf-8")).get("after")
    if after is None:
        raise ValueError(f'{results} has no "after": {{set: {{metric: value}}}}')
    return after or {f"{name} (dev)": metrics for name, metrics in _dev_scores_of_adapter(folder).items()}


def _dev_scores_of_adapter(folder: Path) -> ScoresOfSets:
    """At the best step that the manifest names; where it names none, as with trainer.keep_best=null, at the last one
    scored. Empty for a run that was not scored while it trained.
    """
    of_steps = read_dev(folder / "metrics.jsonl")
    manifest = folder / "manifest.json"
    best = json.loads(manifest.read_text(encoding="utf-8")).get("best") if manifest.is_file() else None
    step = best["step"] if best else max(of_steps, default=0)
    return of_steps.get(step, {})


def read_dev(metrics: Path) -> dict[int, ScoresOfSets]:
    """Step -> results on the dev sets, of a metrics.jsonl, which may still be written."""
    of_steps = {}
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else []
    for line in lines:
        if line.endswith("\n") and '"dev"' in line:  # the end of the last one may not be written yet
            content = json.loads(line)
            of_steps[content["step"]] = content["dev"]
    return of_steps


def compared_metric(after: ScoresOfSets) -> tuple[str, float]:
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
