"""hydra/launcher=accelerate: every job of a sweep is one `accelerate launch` subprocess, one after another.

    python train/biencoder.py -m hydra/launcher=accelerate experiment=pydocs optim.learning_rate=1e-3,3.2e-3

Never in this process, and never `accelerate launch script -m`: Accelerate's state is a process singleton, so precision
could not change between jobs, and each rank would run a sweeper of its own and draw its own values.

Job i of a sweep of the config named N is an ordinary run with two more overrides, `name=N-sweep/i` and `resume=true`:

    runs/N-sweep/i/results.json    written by the script; the numbers in its "after" are what we show
    runs/N-sweep/i.log             stdout and stderr of all its processes, appended to by every start
    runs/N-sweep/sweep.json        all jobs: overrides, status, metrics

so a killed sweep, started again with the same command, resumes: the script finds a finished job finished.

Every Hydra start imports this file, also for a run without a sweep, so torch, accelerate and rich stay out of the top.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from sgpt.runtime.errors import InputError
from sgpt.sweeps.jobs import SweepJob, best_job, compared_metric, read_after, read_jobs, split_overrides
from sgpt.sweeps.process import failure, num_cores, run_logged, stop_signals_raise, wants_cpu
from sgpt.sweeps.table import make_console, spinner, sweep_table

if TYPE_CHECKING:
    from rich.console import Console


# What concerns the sweep and not the job; the rest of the hydra overrides (verbose, job_logging, …) a job gets too.
SWEEP_ONLY = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweep", "hydra.mode")
# Arguments that choose how processes are started; accelerate refuses, or ignores, --multi_gpu next to them.
STRATEGIES = {"--config_file", "--use_deepspeed", "--use_fsdp", "--use_megatron_lm", "--tpu", "--cpu", "--multi_gpu"}


@dataclass
class AccelerateLauncherConfig:
    _target_: str = "hydra_plugins.sgpt_launcher.accelerate_launcher.AccelerateLauncher"
    num_processes: int = 1
    """Processes of each job: one per GPU, or gloo processes on a machine without."""
    num_cpu_threads_per_process: int | None = None
    """None: the cores of this machine divided by num_processes. Accelerate alone would take 1."""
    arguments: list[str] = field(default_factory=list)
    """Further arguments of `accelerate launch`; they come last and so win, e.g. [--config_file,fsdp.yaml]."""


ConfigStore.instance().store(
    group="hydra/launcher", name="accelerate", node=AccelerateLauncherConfig, provider="sgpt_launcher"
)


class AccelerateLauncher(Launcher):
    def __init__(self, num_processes: int, num_cpu_threads_per_process: int | None, arguments: Sequence[str]) -> None:
        if num_processes < 1:
            raise InputError(f"hydra.launcher.num_processes is {num_processes}; it must be at least 1.")
        self.num_processes = num_processes
        self.num_threads = num_cpu_threads_per_process or max(1, num_cores() // num_processes)
        self.arguments = list(arguments)

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

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Sweepers that choose by results call this once per batch; table and sweep.json then grow with every batch."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        console = make_console()
        batch = [self.enter(initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        processes = f"{self.num_processes} process" + ("es" if self.num_processes > 1 else "")
        console.print(f"{self.folder}/, jobs: {len(batch)}, each {processes} of {self.num_threads} threads")
        returns = []
        try:
            with stop_signals_raise():
                for place, job in enumerate(batch, start=1):
                    returns.append(self.run(job, f"[{place}/{len(batch)}]", console))
        finally:  # also after Ctrl-C: what is finished is worth seeing
            self.save()
            console.print(sweep_table(self.name, list(self.jobs.values())))
        return returns

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

    def run(self, job: SweepJob, place: str, console: "Console") -> JobReturn:
        """Does not raise for a job that fails: the others run all the same; at the end Hydra raises what the JobReturn
        carries.
        """
        arguments = [*job.overrides, f"name={quoted(f'{self.name}-sweep/{job.job}')}", "resume=true"]
        result = self.job_return(job, arguments)  # composes: a config without `resume` is refused here
        command, environment = self.accelerate_command(arguments)
        differing = " ".join(split_overrides(list(self.jobs.values()))[1][job.job])
        job.status, job.after, job.main_metric, job.error = "running", {}, None, None
        self.save()
        start = time.monotonic()
        last_lines: list[str] = []
        try:
            with spinner(console, f"{place} job {job.job}  {differing}  {job.log}"):
                exit_code, last_lines = run_logged(command, environment, Path(job.log))
            if exit_code != 0:
                raise RuntimeError(failure(job, exit_code, last_lines))
            job.after = read_after(Path(job.folder) / "results.json")
            metric, job.main_metric = compared_metric(job.after)
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            job.status, job.error = "failed", str(error)
            result.status, result.return_value = JobStatus.FAILED, error
            outcome = f"FAILED: {error}"
        except BaseException:
            job.status = "stopped"
            raise
        else:
            job.status = "finished"
            result.status, result.return_value = JobStatus.COMPLETED, job.main_metric
            last_lines, outcome = [], f"{metric} {job.main_metric:.4f}"
        finally:
            job.minutes = round((time.monotonic() - start) / 60, 2)
            self.save()
        console.print(f"{place} job {job.job}  {differing}  {job.minutes:.1f} min  {outcome}", soft_wrap=True)
        for line in last_lines:
            console.print(f"    | {line}", soft_wrap=True)
        return result

    def job_return(self, job: SweepJob, arguments: list[str]) -> JobReturn:
        config = self.config_loader.load_sweep_config(self.config, arguments)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(job.job), job.job
            hydra_config = OmegaConf.masked_copy(config, ["hydra"])
            del config["hydra"]
        return JobReturn(
            overrides=job.overrides,
            cfg=config,
            hydra_cfg=hydra_config,
            working_dir=job.folder,
            task_name=JobRuntime.instance().get("name"),
        )

    def accelerate_command(self, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
        """The command of one job and its environment; `arguments` are the job's overrides."""
        several = self.num_processes > 1
        cpu = wants_cpu(self.num_processes)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
        launch += ["--num_processes", str(self.num_processes)]
        launch += ["--num_cpu_threads_per_process", str(self.num_threads)]
        # Stated, so that no `accelerate config` of this user's decides them: the trainer's own config does.
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        if several:
            launch += ["--main_process_port", "0"]  # a free one: two sweeps on one machine would meet on 29500
        if not STRATEGIES.intersection(self.arguments):
            # `--cpu --num_processes 2` starts one process and says nothing; --multi_gpu with the variable below starts
            # two gloo processes. For one process accelerate overwrites the variable, so there it takes the flag.
            launch += ["--multi_gpu"] if several else ["--cpu"] if cpu else []
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"} | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
        hydra = self.config.hydra
        flags = ["--config-name", hydra.job.config_name] if hydra.job.config_name else []
        for source in hydra.runtime.config_sources:  # what -cp and -cd said, if anything
            if source.schema == "file" and source.provider in ("main", "command-line"):
                flags += ["--config-path" if source.provider == "main" else "--config-dir", source.path]
        kept = [item for item in hydra.overrides.hydra if not item.lstrip("+~").startswith(SWEEP_ONLY)]
        # Last, and always: an experiment that sets hydra.mode: MULTIRUN would otherwise start sweeps without end.
        script = [str(Path(sys.argv[0]).resolve()), *flags, *kept, *arguments, "hydra.mode=RUN"]
        return [*launch, *self.arguments, *script], environment

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


def quoted(value: str) -> str:
    """`value` as one string of Hydra's override grammar; plain letters, digits and -_./ need no quotes."""
    if all(letter.isascii() and (letter.isalnum() or letter in "-_./") for letter in value):
        return value
    return "'" + value.replace("'", "\\'") + "'"
