"""A study: Optuna draws configurations, and a training run of each is scored on its dev sets, by any number of workers.

    runs/<name>-study/study.db       the trials, in SQLite unless `storage` names another database
    runs/<name>-study/<trial>/       the run of a trial, as every run; <trial>.log is its output
    runs/<name>-study/study.html     table and plots
    runs/<name>-study/experiment/    the best configuration, `--config-dir runs/<name>-study experiment=<name>_best`

A worker is one process of `train/sweep.py` that runs a trial at a time; all with the same name and storage share the
study. One that is killed leaves its trial to the next that looks: it is drawn again with the same values, and its run
resumes. No torch is imported here.
"""

import json
import math
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, SEED, THREADS, check_choice, check_ranges
from sgpt.sweeps.jobs import COMPARED_METRICS, read_dev
from sgpt.sweeps.process import (
    LoggedProcess,
    accelerate_launch,
    failure,
    launch_environment,
    num_cores,
    stop_all,
    threads_of_run,
    wants_cpu,
)
from sgpt.sweeps.space import Dimension, check_space, draw, drawn_overrides
from sgpt.sweeps.table import make_console

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial

SCRIPT = Path(__file__).parents[2] / "train" / "biencoder.py"
POLL_SECONDS = 1.0
HEARTBEAT_SECONDS = 10  # a worker says so often that it is alive
GRACE_SECONDS = 40  # without a sign of it for so long it is taken for dead
MOST_FAILURES = 3  # of a worker, where no trial of the study has a score: what all share is at fault
PASSWORD = re.compile(r"(?<=:)[^:/@]*(?=@)")  # in the URL of a database
_MEAN = "mean"  # of the dev sets, as trainer.keep_best has it


def default_space() -> list[Dimension]:
    """What `experiment=pydocs` is tuned by first."""
    return [
        Dimension("optim.learning_rate", low=1e-3, high=2e-1, log=True),
        Dimension("loss.scale", low=10, high=60, log=True),
    ]


@dataclass
class StudyConfig:
    """A search of the best configuration of `train/biencoder.py`."""

    name: str = "pydocs"
    """Name of the study; the experiment that it ends with is <name>_best."""
    runs: str = "runs"
    """Folder of all runs; the study's is <runs>/<name>-study."""
    storage: str | None = None
    """Database of the trials, as SQLAlchemy names it: postgresql://user:password@host/database, with the extra
    `postgresql` for its driver. Null: SQLite in the folder.
    """
    trials: int = 20
    """Trials of the study, those of all its workers and earlier starts together."""
    overrides: list[str] = field(
        default_factory=lambda: ["experiment=pydocs", "evaluation.retrieval=[]", "trainer.evaluate_every_steps=22"]
    )
    """What all trials share, as typed behind train/biencoder.py; dev sets and trainer.evaluate_every_steps among it."""
    space: list[Dimension] = field(default_factory=default_space)
    """What differs: of each key {key, low, high, log, step} or {key, choices}."""
    metric: str = _MEAN
    """What is maximised, at its best: <dev set>/<metric>, or the mean nDCG@10 or Spearman of all dev sets."""
    pruner: str = "median"
    """Which trials are stopped early: median, those below the median of the others at the same step; or none."""
    startup_trials: int = 5
    """Trials that are drawn at random, and not stopped early, before the sampler (TPE) knows enough."""
    seed: int = 0
    """Decides what is drawn, by the number of the trial."""
    num_processes: int = 1
    """Processes of each trial: one per GPU, or gloo processes on a machine without."""
    threads: int | None = None
    """Threads of each process; null shares the cores among the processes of one trial, and knows of no other worker."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise InputError(f"name={self.name!r} cannot be a folder below {self.runs}/; use letters, digits and -_")
        check_choice("pruner", self.pruner, ("median", "none"))
        check_ranges(
            self,
            trials=COUNT,
            startup_trials=COUNT,
            seed=SEED,
            num_processes=COUNT,
            threads=THREADS.or_null("to share the cores"),
        )
        if self.metric != _MEAN and not all(self.metric.partition("/")):
            raise InputError(f"metric={self.metric!r} must be {_MEAN} or <dev set>/<metric>, as in pydocs_dev/ndcg@10")
        check_space(self.space)
        decided = {"name", "runs", "resume", "trainer.threads", *(dimension.key for dimension in self.space)}
        if taken := {item.partition("=")[0] for item in self.overrides} & decided:
            raise InputError(f"overrides sets {min(taken)}, which the study decides for each trial; leave it out")

    @property
    def folder(self) -> Path:
        return Path(self.runs) / f"{self.name}-study"


def check_training(composed: Mapping) -> None:
    """InputError when runs of this configuration would leave nothing to compare. composed: of one trial."""
    if not any(composed["dev"][kind] for kind in ("retrieval", "sts", "pairs")):
        raise InputError(
            "no dev set decides between the trials; add dev.retrieval=[…], dev.sts=[…] or dev.pairs=[…] to overrides"
        )
    if not composed["trainer"]["evaluate_every_steps"]:
        raise InputError("trainer.evaluate_every_steps is 0, so no trial is scored; set it in overrides")


def run_study(config: StudyConfig, script: Path = SCRIPT) -> "Study":
    """Works on the study until it has its trials, and returns it.

    InputError where only failures come, and for a study of this name that searches something else.
    """
    console = make_console()
    study = open_study(config)
    console.print(
        f"{config.folder}/, {len(latest_trials(study))} of {config.trials} trials so far; output of each: "
        f"{config.folder}/<trial>.log",
        soft_wrap=True,
    )
    failures: list[str] = []

    def report(study: "Study", trial: "FrozenTrial") -> None:
        console.print(outcome_line(trial, study), soft_wrap=True)
        if trial.state.name == "FAIL":
            failures.append(trial.user_attrs["error"])
            for line in trial.user_attrs["last_lines"]:
                console.print(f"    | {line}", soft_wrap=True)

    turn = FileLock(config.folder / ".trial.lock")  # nobody else counts the trials until the next one is among them

    def objective(trial: "Trial") -> float:
        turn.release()
        return score_of_trial(trial, config, script)

    while has_work(study, config.trials):
        turn.acquire()
        if lacks_trials(study, config.trials):
            study.optimize(objective, n_trials=1, catch=(TrialFailed,), callbacks=[report])
        else:  # another worker has taken the last
            turn.release()
        if len(failures) >= MOST_FAILURES and not scored_trials(study):
            raise InputError(
                f"{len(failures)} trials failed and none has a score: what they share is at fault; put it right, with "
                f"another name=… where that changes a key. The last: {failures[-1]}"
            )
    return study


def open_storage(config: StudyConfig) -> "RDBStorage":
    """The database of the trials. InputError, without the password, for a server's that cannot be opened."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    shown = PASSWORD.sub("…", config.storage or "")
    try:
        return optuna.storages.RDBStorage(
            config.storage or f"sqlite:///{config.folder / 'study.db'}",
            heartbeat_interval=HEARTBEAT_SECONDS,
            grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=run_again,
        )
    except ImportError:
        raise InputError(
            f"storage={shown}: the driver of this database is not installed; PostgreSQL's comes with "
            "pip install 'sgpt-framework[postgresql]'"
        ) from None
    except SQLAlchemyError as error:
        if config.storage is None:
            raise
        raise InputError(
            f"storage={shown}: {str(error).splitlines()[0]}; give "
            "postgresql://<user>:<password>@<host>/<database> of a server that can be reached"
        ) from error


def open_study(config: StudyConfig) -> "Study":
    """Makes the study in its database, or joins it."""
    try:
        import optuna
    except ImportError:
        raise InputError("a study needs Optuna; install it with pip install 'sgpt-framework[sweep]'") from None

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    config.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(config.folder / ".study.lock"):  # two that make the tables at a time end with an error
        storage = open_storage(config)
        median = optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials)
        study = optuna.create_study(
            study_name=config.name,
            storage=storage,
            direction="maximize",
            load_if_exists=True,
            sampler=seeded_sampler(config),
            pruner=median if config.pruner == "median" else optuna.pruners.NopPruner(),
        )
    searched = json.dumps({key: asdict(config)[key] for key in ("overrides", "space", "metric")})
    before = study.user_attrs.get("searched", searched)
    if before != searched:
        raise InputError(
            f"{config.folder} is a study with other overrides, space or metric: {before}; take those, or give this one "
            "another name=…"
        )
    study.set_user_attr("searched", searched)
    return study


def seeded_sampler(config: StudyConfig) -> "BaseSampler":
    """TPE whose draws belong to the number of the trial.

    So no two workers draw the same, and a worker that starts again does not repeat itself.
    """
    from optuna.samplers import BaseSampler, TPESampler

    class SeededTPE(BaseSampler):
        def infer_relative_search_space(self, study, trial):
            seed = (config.seed * 1_000_003 + trial.number) % 2**32
            self.tpe = TPESampler(n_startup_trials=config.startup_trials, seed=seed)
            return self.tpe.infer_relative_search_space(study, trial)

        def sample_relative(self, study, trial, search_space):
            return self.tpe.sample_relative(study, trial, search_space)

        def sample_independent(self, study, trial, param_name, param_distribution):
            return self.tpe.sample_independent(study, trial, param_name, param_distribution)

    return SeededTPE()


def has_work(study: "Study", trials: int) -> bool:
    """Whether a trial is left to run. Waits as long as one of another worker may turn out to be left behind."""
    import optuna

    deadline = time.monotonic() + GRACE_SECONDS + HEARTBEAT_SECONDS
    while True:
        optuna.storages.fail_stale_trials(study)  # which calls `run_again` for each
        if lacks_trials(study, trials):
            return True
        if "RUNNING" not in states_of(study) or time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def lacks_trials(study: "Study", trials: int) -> bool:
    return "WAITING" in states_of(study) or len(latest_trials(study)) < trials


def states_of(study: "Study") -> set[str]:
    return {trial.state.name for trial in study.get_trials(deepcopy=False)}


def run_again(study: "Study", trial: "FrozenTrial") -> None:
    """Puts a trial that was interrupted up for the next worker, with the same values and in the same run folder."""
    import optuna

    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={"run": run_number(trial)},
        )
    )


def run_number(trial: "Trial | FrozenTrial") -> int:
    """The number of the trial's run folder: its own, or that of the trial which it continues."""
    return trial.user_attrs.get("run", trial.number)


def latest_trials(study: "Study") -> "list[FrozenTrial]":
    """Of each run the trial that worked on it last, by number of the run."""
    latest = {run_number(trial): trial for trial in study.get_trials(deepcopy=False)}
    return [latest[number] for number in sorted(latest)]


def scored_trials(study: "Study") -> "list[FrozenTrial]":
    """Best first."""
    complete = [trial for trial in latest_trials(study) if trial.state.name == "COMPLETE"]
    return sorted(complete, key=lambda trial: trial.value, reverse=True)


class TrialFailed(Exception):
    """The run of a trial ended with an error, which its user attributes name; others are tried."""


def score_of_trial(trial: "Trial", config: StudyConfig, script: Path) -> float:
    """Trains the configuration that the trial draws, and returns its score.

    Raises TrialPruned and TrialFailed. When it is interrupted, the run saves its step and waits for the next worker.
    """
    trial.set_user_attr("run", run_number(trial))
    processes: list[LoggedProcess] = []
    try:
        draw(trial, config.space)
        processes.append(start_run_of_trial(config, run_number(trial), drawn_overrides(trial.params), script))
        return watched_score(trial, processes[0], config)
    except BaseException as error:
        stop_all(processes)
        if isinstance(error, KeyboardInterrupt):
            run_again(trial.study, trial.study.get_trials(deepcopy=False)[trial.number])
        raise


def start_run_of_trial(config: StudyConfig, number: int, overrides: Sequence[str], script: Path) -> LoggedProcess:
    """Starts or resumes the run, once nobody else trains it: the run of a worker that was killed trains to its end."""
    cpu = wants_cpu(config.num_processes)
    command = [sys.executable]  # one process needs no launcher, whose imports take seconds
    if config.num_processes > 1:
        command = accelerate_launch(config.num_processes, max(1, num_cores() // config.num_processes), [], cpu=cpu)
    command += [str(script), *config.overrides, *overrides, f"runs={config.folder}", f"name={number}", "resume=true"]
    if threads := threads_of_run(config.folder / str(number), config.threads):
        command.append(f"trainer.threads={threads}")
    while True:
        try:
            return LoggedProcess(command, launch_environment(cpu=cpu), config.folder / f"{number}.log")
        except RuntimeError:
            time.sleep(POLL_SECONDS)


def watched_score(trial: "Trial", process: LoggedProcess, config: StudyConfig) -> float:
    """Reports each evaluation to the study as it is written; TrialPruned when that says to stop."""
    import optuna

    folder = config.folder / str(run_number(trial))
    reported: dict[int, float] = {}
    exit_code = None
    while exit_code is None:
        exit_code = process.exit_code()  # asked before the log is read, which is whole then
        scores = dev_scores(folder / "metrics.jsonl", config.metric)
        for step in sorted(scores.keys() - reported.keys()):
            reported[step] = scores[step]
            trial.report(scores[step], step)
            if exit_code is None and trial.should_prune():
                raise optuna.TrialPruned
        if exit_code is None:
            time.sleep(POLL_SECONDS)
    if exit_code or not reported:
        message = "ended well and was never scored on a dev set"
        if exit_code:
            message = failure(f"trial {run_number(trial)}", str(process.log_path), exit_code, process.last_lines())
        trial.set_user_attr("error", message)
        trial.set_user_attr("last_lines", process.last_lines())
        raise TrialFailed(message)
    return max(reported.values())


def dev_scores(file: Path, metric: str) -> dict[int, float]:
    """Step -> what is maximised, of the lines of a run's metrics.jsonl that hold dev results; never nan.

    InputError when it has dev results and not this metric.
    """
    scores = {step: dev_score(results, metric) for step, results in read_dev(file).items()}
    return {step: score for step, score in scores.items() if not math.isnan(score)}


def dev_score(results: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """The mean of the sets' headline metrics, or the one metric of one set."""
    if metric == _MEAN:
        headline = [next(row[name] for name in COMPARED_METRICS if name in row) for row in results.values()]
        return sum(headline) / len(headline)
    of, _, name = metric.rpartition("/")
    if name not in results.get(of, {}):
        known = ", ".join(f"{of}/{name}" for of, row in results.items() for name in row)
        raise InputError(f"metric={metric} is none of the dev results; choose {_MEAN} or one of {known}")
    return results[of][name]


def described_values(trial: "FrozenTrial") -> str:
    """As in `optim.learning_rate=0.01234 loss.scale=20`, rounded to read."""
    return " ".join(drawn_overrides({key: rounded(value) for key, value in trial.params.items()}))


def rounded(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def outcome_line(trial: "FrozenTrial", study: "Study") -> str:
    """A line about a trial that has ended."""
    minutes = trial.duration.total_seconds() / 60
    outcome = {"PRUNED": "stopped early", "FAIL": "FAILED: " + trial.user_attrs.get("error", "")}.get(trial.state.name)
    if outcome is None:
        best = scored_trials(study)[0]
        outcome = f"{trial.value:.4f}" + (", the best" if best.number == trial.number else f" (best {best.value:.4f})")
    if trial.state.name == "PRUNED":
        outcome += f" at step {trial.last_step}"
    return f"trial {run_number(trial)}  {described_values(trial)}  {minutes:.1f} min  {outcome}"
