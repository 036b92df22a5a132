"""hydra/launcher=accelerate: every job of a sweep is one `accelerate launch` subprocess, one or several at a time.

    python train/biencoder.py -m hydra/launcher=accelerate experiment=pydocs optim.learning_rate=1e-3,3.2e-3

Never in this process, and never `accelerate launch script -m`: Accelerate's state is a process singleton, so precision
could not change between jobs, and each rank would run a sweeper of its own and draw its own values.

Job i of a sweep of the config named N is an ordinary run with two more overrides, `name=N-sweep/i` and `resume=true`:

    runs/N-sweep/i/results.json    written by the script; the numbers in its "after" are what we show, or without
                                   test sets those of the dev sets in metrics.jsonl
    runs/N-sweep/i.log             stdout and stderr of all its processes, appended to by every start
    runs/N-sweep/sweep.json        all jobs: overrides, status, metrics

so a killed sweep, started again with the same command, resumes: the script finds a finished job finished.

Every Hydra start imports this file, also for a run without a sweep, so torch, accelerate and rich stay out of the top.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from sgpt.runtime.errors import InputError
from sgpt.sweeps.jobs import SweepJob, best_job, compared_metric, read_after, read_jobs, split_overrides
from sgpt.sweeps.process import (
    LoggedProcess,
    accelerate_launch,
    cores_of_slots,
    failure,
    gpus_of_machine,
    gpus_of_slots,
    launch_environment,
    num_cores,
    stop_all,
    stop_signals_raise,
    threads_of_run,
    wants_cpu,
)
from sgpt.sweeps.table import make_console, spinner, sweep_table

if TYPE_CHECKING:
    from rich.console import Console

POLL_SECONDS = 0.2
# What concerns the sweep and not the job; the rest of the hydra overrides (verbose, job_logging, …) a job gets too.
SWEEP_ONLY = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweep", "hydra.mode")


@dataclass
class AccelerateLauncherConfig:
    """The keys `hydra.launcher.…` of a sweep with `hydra/launcher=accelerate`."""

    _target_: str = "hydra_plugins.sgpt_launcher.accelerate_launcher.AccelerateLauncher"
    """What Hydra makes of this."""
    num_processes: int = 1
    """Processes of each job: one per GPU, or gloo processes on a machine without."""
    jobs_at_a_time: int = 1
    """Jobs that run at the same time, each with cores of its own and, on a machine with GPUs, its own of those."""
    num_cpu_threads_per_process: int | None = None
    """Threads of each process, in training unless the job sets trainer.threads; a run that is resumed keeps its own.

    None: the cores of this machine divided by all processes that run at a time. Accelerate alone would take 1.
    """
    prefix: list[str] = field(default_factory=list)
    """A command that starts each job elsewhere and ends as the job does, e.g. [srun,--gpus,1,--cpus-per-task,8].

    Neither the cores nor the GPUs of this machine decide anything then, so num_cpu_threads_per_process is needed.
    """
    arguments: list[str] = field(default_factory=list)
    """Further arguments of `accelerate launch`; they come last and so win, e.g. [--config_file,fsdp.yaml]."""


ConfigStore.instance().store(
    group="hydra/launcher", name="accelerate", node=AccelerateLauncherConfig, provider="sgpt_launcher"
)


class Running(NamedTuple):
    """A job whose process runs. slot: from 0, of the jobs at a time; it decides the job's cores and GPUs."""

    job: SweepJob
    process: LoggedProcess
    slot: int


class AccelerateLauncher(Launcher):
    def __init__(
        self,
        num_processes: int,
        jobs_at_a_time: int,
        num_cpu_threads_per_process: int | None,
        prefix: Sequence[str],
        arguments: Sequence[str],
    ) -> None:
        counts = {
            "num_processes": num_processes,
            "jobs_at_a_time": jobs_at_a_time,
            "num_cpu_threads_per_process": num_cpu_threads_per_process,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"hydra.launcher.{name} is {value}; it must be at least 1.")
        if prefix and not shutil.which(prefix[0]):
            raise InputError(f"hydra.launcher.prefix={' '.join(prefix)}: there is no command {prefix[0]} on the PATH")
        if prefix and not num_cpu_threads_per_process:
            raise InputError(
                f"hydra.launcher.prefix={' '.join(prefix)} starts jobs elsewhere, so the cores of this machine do not "
                "say how many threads they have; set hydra.launcher.num_cpu_threads_per_process"
            )
        self.num_processes = num_processes
        self.jobs_at_a_time = jobs_at_a_time
        self.stated_threads = num_cpu_threads_per_process
        at_a_time = num_processes * jobs_at_a_time
        self.num_threads = num_cpu_threads_per_process or max(1, num_cores() // at_a_time)
        self.prefix = list(prefix)
        self.arguments = list(arguments)
        self.cpu = wants_cpu(num_processes) if not prefix else "ACCELERATE_USE_CPU" in os.environ and wants_cpu(1)
        self.cores_of_slots = None if prefix else cores_of_slots(jobs_at_a_time)
        gpus = [] if prefix or self.cpu else gpus_of_machine()
        self.gpus_of_slots = gpus_of_slots(gpus, jobs_at_a_time, num_processes)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """`config` is what all jobs share: swept overrides are not in it, and neither is a name that is swept."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "This sweep was itself started by `accelerate launch` or torchrun, so every process would run all of "
                "it; start it with plain `python`, the launcher starts accelerate for each job."
            )
        self.config = config
        self.config_loader = hydra_context.config_loader
        self.name = OmegaConf.select(config, "name")
        if self.name is None:
            raise InputError("A sweep needs the key `name`, which names its folder; set it in the config or name=….")
        self.folder = Path(OmegaConf.select(config, "runs") or "runs") / f"{self.name}-sweep"
        self.jobs = read_jobs(self.folder / "sweep.json")
        self.threads_overrides: dict[int, list[str]] = {}  # job -> trainer.threads=…, where it is for us to set

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Sweepers that choose by results call this once per batch; table and sweep.json then grow with every batch."""
        self.batch_size, self.ended = len(job_overrides), 0
        self.keeping_threads: list[str] = []  # jobs that were started with other threads than stated now
        self.started: dict[int, float] = {}  # job -> seconds by the monotonic clock
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        console = make_console()
        batch = [self.enter(initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        processes = f"{self.num_processes} process" + ("es" if self.num_processes > 1 else "")
        at_a_time = f", {self.jobs_at_a_time} at a time" if self.jobs_at_a_time > 1 else ""
        console.print(f"{self.folder}/, jobs: {len(batch)}{at_a_time}, each {processes} of {self.num_threads} threads")
        returns = {job.job: self.job_return(job) for job in batch}
        if self.keeping_threads:
            console.print(
                f"started with other threads, which are kept: job {', '.join(self.keeping_threads)}; "
                f"hydra.launcher.num_cpu_threads_per_process={self.stated_threads} has no effect there",
                soft_wrap=True,
            )
        waiting, running = list(batch), list[Running]()
        try:
            with stop_signals_raise(), spinner(console, f"output of the jobs: {self.folder}/<job>.log"):
                while waiting or running:
                    if waiting and len(running) < self.jobs_at_a_time:
                        job = waiting.pop(0)
                        try:
                            running.append(self.start(job, running))
                        except RuntimeError as error:
                            self.conclude(job, returns[job.job], error, [], console)
                        continue
                    time.sleep(POLL_SECONDS)
                    for item in [item for item in running if item.process.exit_code() is not None]:
                        running.remove(item)
                        error = result_of(item)
                        last_lines = item.process.last_lines() if error else []
                        self.conclude(item.job, returns[item.job.job], error, last_lines, console)
        finally:  # also after Ctrl-C: what is finished is worth seeing
            try:
                stop_all([item.process for item in running])
            finally:
                for item in running:
                    item.job.status, item.job.minutes = "stopped", self.minutes(item.job)
                self.save()
                console.print(sweep_table(self.name, list(self.jobs.values())))
        failed = [str(job.job) for job in batch if job.status == "failed"]
        for job in batch:
            if job.status == "failed":
                returns[job.job].return_value = InputError(
                    f"{len(failed)} of {len(batch)} jobs failed: {', '.join(failed)}; their output: "
                    f"{self.folder}/<job>.log; typed again, the command runs these alone"
                )
        return [returns[job.job] for job in batch]

    def enter(self, number: int, overrides: list[str]) -> SweepJob:
        """Resuming into the folder of other overrides would show their results under these, so that is refused."""
        folder = self.folder / str(number)
        earlier = self.jobs.get(number)
        if earlier is not None and sorted(earlier.overrides) != sorted(overrides):
            raise InputError(
                f"{folder} belongs to a sweep with other values: job {number} was '{' '.join(earlier.overrides)}' "
                f"and is now '{' '.join(overrides)}'; give this sweep another name (name=…) or remove {self.folder}."
            )
        # An earlier row stays as it is until its job's turn comes: a start that is stopped before then forgets nothing.
        return self.jobs.setdefault(number, SweepJob(number, overrides, folder=str(folder), log=f"{folder}.log"))

    def start(self, job: SweepJob, running: Sequence[Running]) -> Running:
        """RuntimeError when a process of an earlier start still has the job."""
        slot = min(set(range(self.jobs_at_a_time)) - {item.slot for item in running})
        job.status, job.after, job.main_metric, job.error = "running", {}, None, None
        self.started[job.job] = time.monotonic()
        self.save()
        gpus = self.gpus_of_slots[slot] if self.gpus_of_slots else None
        cores = self.cores_of_slots[slot] if self.cores_of_slots else None
        environment = launch_environment(cpu=self.cpu, gpus=gpus)
        return Running(job, LoggedProcess(self.command(job), environment, Path(job.log), cores), slot)

    def conclude(
        self, job: SweepJob, returned: JobReturn, error: Exception | None, last_lines: list[str], console: "Console"
    ) -> None:
        """Does not raise for a job that failed: the others run all the same; at the end Hydra raises what the JobReturn
        carries.
        """
        job.minutes = self.minutes(job)
        if error is None:
            job.status = "finished"
            returned.status, returned.return_value = JobStatus.COMPLETED, job.main_metric
            outcome = "finished, with no score"
            if job.main_metric is not None:
                outcome = f"{compared_metric(job.after)[0]} {job.main_metric:.4f}"
        else:
            job.status, job.error = "failed", str(error)
            returned.status = JobStatus.FAILED
            outcome = f"FAILED: {error}"
        self.save()
        self.ended += 1
        differing = " ".join(split_overrides(list(self.jobs.values()))[1][job.job])
        place = f"[{self.ended}/{self.batch_size}]"
        console.print(f"{place} job {job.job}  {differing}  {job.minutes:.1f} min  {outcome}", soft_wrap=True)
        for line in last_lines:
            console.print(f"    | {line}", soft_wrap=True)

    def minutes(self, job: SweepJob) -> float:
        return round((time.monotonic() - self.started[job.job]) / 60, 2)

    def job_arguments(self, job: SweepJob) -> list[str]:
        name = quoted(f"{self.name}-sweep/{job.job}")
        return [*job.overrides, *self.threads_overrides.get(job.job, []), f"name={name}", "resume=true"]

    def job_return(self, job: SweepJob) -> JobReturn:
        """Composes the job's configuration: one without `resume` is refused here, and what training would refuse."""
        config = self.config_loader.load_sweep_config(self.config, self.job_arguments(job))
        if lets_set_threads(config):
            threads = threads_of_run(Path(job.folder), self.stated_threads)
            if self.stated_threads not in (None, threads) and job.status != "finished":
                self.keeping_threads.append(str(job.job))
            if threads is not None:
                self.threads_overrides[job.job] = [f"trainer.threads={threads}"]
                config = self.config_loader.load_sweep_config(self.config, self.job_arguments(job))
        if self.config.hydra.job.config_name == "train":
            refuse_untrainable(config, job)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(job.job), job.job
            hydra_config = OmegaConf.masked_copy(config, ["hydra"])
            del config["hydra"]
        return Returned(
            overrides=job.overrides,
            cfg=config,
            hydra_cfg=hydra_config,
            working_dir=job.folder,
            task_name=JobRuntime.instance().get("name"),
        )

    def command(self, job: SweepJob) -> list[str]:
        launch = accelerate_launch(self.num_processes, self.num_threads, self.arguments, cpu=self.cpu)
        hydra = self.config.hydra
        flags = ["--config-name", hydra.job.config_name] if hydra.job.config_name else []
        for source in hydra.runtime.config_sources:  # what -cp and -cd said, if anything
            if source.schema == "file" and source.provider in ("main", "command-line"):
                flags += ["--config-path" if source.provider == "main" else "--config-dir", source.path]
        kept = [item for item in hydra.overrides.hydra if not item.lstrip("+~").startswith(SWEEP_ONLY)]
        # Last, and always: an experiment that sets hydra.mode: MULTIRUN would otherwise start sweeps without end.
        script = [str(Path(sys.argv[0]).resolve()), *flags, *kept, *self.job_arguments(job), "hydra.mode=RUN"]
        return [*self.prefix, *launch, *script]

    def save(self) -> None:
        jobs = list(self.jobs.values())
        best = best_job(jobs)
        content = {
            "name": self.name,
            "shared_overrides": split_overrides(jobs)[0],
            "main_metric": compared_metric(best.after)[0] if best else None,
            "best": best.job if best else None,
            "jobs": [asdict(job) for job in jobs],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / "sweep.json.tmp"
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / "sweep.json")


class Returned(JobReturn):
    """Hydra's, which of a failed job raises the error that it carries, but prints a line of its own before."""

    @property
    def return_value(self) -> object:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return super().return_value

    @return_value.setter
    def return_value(self, value: object) -> None:
        self._return_value = value


def lets_set_threads(config: DictConfig) -> bool:
    """Whether it is the configuration of a script with the key trainer.threads, and leaves that null."""
    trainer = OmegaConf.select(config, "trainer")
    return isinstance(trainer, DictConfig) and "threads" in trainer and trainer.threads is None


def refuse_untrainable(config: DictConfig, job: SweepJob) -> None:
    """InputError for a value that train/biencoder.py refuses: now, and not when the jobs before have ended."""
    from sgpt.cli.compose import typed
    from sgpt.training.config import TrainConfig

    try:
        typed(TrainConfig, config)
    except InputError as error:
        raise InputError(f"job {job.job} ({' '.join(job.overrides)}): {error}") from None


def result_of(item: Running) -> Exception | None:
    """Reads into the job what its process left, or returns why there is nothing."""
    exit_code = item.process.exit_code()
    if exit_code:
        return RuntimeError(failure(f"job {item.job.job}", item.job.log, exit_code, item.process.last_lines()))
    try:
        item.job.after = read_after(Path(item.job.folder))
        item.job.main_metric = compared_metric(item.job.after)[1] if item.job.after else None
    except (ValueError, FileNotFoundError) as error:
        return error
    return None


def quoted(value: str) -> str:
    """`value` as one string of Hydra's override grammar; plain letters, digits and -_./ need no quotes."""
    if all(letter.isascii() and (letter.isalnum() or letter in "-_./") for letter in value):
        return value
    return "'" + value.replace("'", "\\'") + "'"
