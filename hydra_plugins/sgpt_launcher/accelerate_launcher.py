"""hydra/launcher=accelerate: every job of a sweep is one `accelerate launch` subprocess, one after another.

    python train/biencoder.py -m hydra/launcher=accelerate experiment=pydocs optim.learning_rate=1e-3,3.2e-3

Never in this process, and never `accelerate launch script -m`: Accelerate's state is a process singleton, so precision
could not change between jobs, and each rank would run a sweeper of its own and draw its own values.

Job i of a sweep of the config named N is an ordinary run with two more overrides, `name=N-sweep/i` and `resume=true`:

    runs/N-sweep/i/results.json    written by the script; the numbers in its "after" are what we show
    runs/N-sweep/i.log             stdout and stderr of all its processes, appended to by every start
    runs/N-sweep/sweep.json        all jobs: overrides, status, metrics

so a killed sweep, started again with the same command, goes on: the script finds a finished job finished.

Every Hydra start imports this file, also for a run without a sweep, so torch, accelerate and rich stay out of the top.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from sgpt.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAIN_METRICS = ("ndcg@10", "spearman_cosine")
SHOWN_LOG_LINES = 25
STOP_SECONDS = 45  # torchrun, asked to stop, gives its workers 30 s before it kills them
# What concerns the sweep and not the job; the rest of the hydra overrides (verbose, job_logging, …) a job gets too.
SWEEP_ONLY = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweep", "hydra.mode")
# Arguments that choose how processes are started; accelerate refuses, or ignores, --multi_gpu beside them.
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


@dataclass
class Job:
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

    def enter(self, number: int, overrides: list[str]) -> Job:
        """Resuming into the folder of other overrides would show their results under these, so that is refused."""
        folder = self.folder / str(number)
        earlier = self.jobs.get(number)
        if earlier is not None and sorted(earlier.overrides) != sorted(overrides):
            raise InputError(
                f"{folder} belongs to a sweep with other values: job {number} was '{' '.join(earlier.overrides)}' "
                f"and is now '{' '.join(overrides)}'; give this sweep another name (name=…) or remove {self.folder}."
            )
        # An earlier row stays as it is until its job's turn comes: a start that is stopped before then forgets nothing.
        return self.jobs.setdefault(number, Job(number, overrides, folder=str(folder), log=f"{folder}.log"))

    def run(self, job: Job, place: str, console: "Console") -> JobReturn:
        """Does not raise for a job that fails: the others go on; at the end Hydra raises what the JobReturn carries."""
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
            metric, job.main_metric = main_metric(job.after)
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

    def job_return(self, job: Job, arguments: list[str]) -> JobReturn:
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
            "main_metric": main_metric(best.after)[0] if best else None,
            "best": best.job if best else None,
            "jobs": [asdict(job) for job in jobs],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / "sweep.json.tmp"
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / "sweep.json")


def num_cores() -> int:
    """Those this process may use: under taskset or Slurm fewer than the machine has. macOS cannot say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wants_cpu(num_processes: int) -> bool:
    """ACCELERATE_USE_CPU decides where it is set. Else one process is left to Accelerate, which finds the device as in
    a run without a sweep, and several use the CPU where no GPU driver's tool is on the PATH: those come with the
    drivers, and importing torch here to ask would cost seconds and hold memory on a GPU that the jobs want.
    """
    if "ACCELERATE_USE_CPU" in os.environ:
        return os.environ["ACCELERATE_USE_CPU"].lower() in ("1", "true", "yes", "on")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return num_processes > 1 and (hidden or not (shutil.which("nvidia-smi") or shutil.which("rocm-smi")))


def quoted(value: str) -> str:
    """`value` as one string of Hydra's override grammar; plain letters, digits and -_./ need no quotes."""
    if all(letter.isascii() and (letter.isalnum() or letter in "-_./") for letter in value):
        return value
    return "'" + value.replace("'", "\\'") + "'"


def run_logged(command: list[str], environment: dict[str, str], log_path: Path) -> tuple[int, list[str]]:
    """Run to the end, output streamed to the end of the log; returns exit code and the last lines of this start.

    Raises RuntimeError when a process of an earlier start still runs: a launcher ended by kill -9 leaves its job behind
    and two of them training in one folder spoil each other. The job inherits the lock with its stdout.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"a process of an earlier start still writes to {log_path}; stop it or wait for it"
            raise RuntimeError(message) from None
        log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        # A session of its own: Ctrl-C reaches only this launcher, which then stops exactly this job.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            exit_code = process.wait()
        except BaseException:
            stop_group(process)
            raise
    with log_path.open("rb") as log:
        log.seek(max(start, log.seek(0, os.SEEK_END) - 16_384))  # the end of a log that may be large
        lines = log.read().decode("utf-8", errors="replace").splitlines()
    for i, line in enumerate(lines):  # torchrun closes with a screen about itself, after a line with the exit code
        if "torch/distributed/elastic" in line and "failed (exitcode" in line:
            lines = lines[: i + 1]
            break
    return exit_code, [line for line in lines if line.strip()][-SHOWN_LOG_LINES:]


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End the job's process group and return when it is empty. torchrun's workers have groups of their own; torchrun,
    asked politely, ends them itself, hence SIGTERM and patience first."""
    with suppress(ProcessLookupError):
        try:
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline:
                process.poll()  # reaps the leader, which would count as alive
                os.killpg(process.pid, 0)  # the group's last process has gone: ProcessLookupError
                time.sleep(0.1)
        finally:  # also at a second, impatient Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """`kill`, Slurm and a closed terminal would end this process and leave the job behind, which Ctrl-C does not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def failure(job: Job, exit_code: int, last_lines: list[str]) -> str:
    message = f"job {job.job} ({' '.join(job.overrides)}) ended with exit code {exit_code}; log: {job.log}"
    if not any("Error" in line for line in last_lines):
        # accelerate says 1 for every failure and, being quiet, not that a signal ended the script
        message += " (which shows no error: was the job killed, for instance for lack of memory?)"
    return message


def read_jobs(path: Path) -> dict[int, Job]:
    """The jobs of earlier starts. What they left as running was killed with them, unless its log is still locked."""
    if not path.is_file():
        return {}
    jobs = [Job(**row) for row in json.loads(path.read_text(encoding="utf-8"))["jobs"]]
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


def main_metric(after: dict[str, dict[str, float]]) -> tuple[str, float]:
    """Name and value of what jobs are compared by: the first set's nDCG@10 or Spearman correlation."""
    for set_name, metrics in after.items():
        for metric in MAIN_METRICS:
            if metric in metrics:
                return f"{set_name} {metric}", metrics[metric]
    raise ValueError(f"none of {', '.join(MAIN_METRICS)} in the results of {', '.join(after)}")


def best_job(jobs: list[Job]) -> Job | None:
    """NaN, from a run that diverged, is not comparable and never the best."""
    comparable = [job for job in jobs if job.main_metric is not None and not isnan(job.main_metric)]
    return max(comparable, key=lambda job: job.main_metric or 0.0, default=None)  # `or`: for the type checker


def split_overrides(jobs: list[Job]) -> tuple[list[str], dict[int, list[str]]]:
    """What all jobs share, and of each job the rest. A single job shares with nobody: all its overrides are shown."""
    several = len(jobs) > 1
    shared = [item for item in jobs[0].overrides if several and all(item in job.overrides for job in jobs)]
    return shared, {job.job: [item for item in job.overrides if item not in shared] for job in jobs}


def make_console() -> "Console":
    from rich.console import Console

    # Into a file or pipe rich would assume 80 columns and fold the table; no markup: overrides may hold [1,2].
    return Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False, emoji=False)


def spinner(console: "Console", text: str) -> AbstractContextManager[object]:
    """What runs now and where its output is; on a terminal only, and gone when the job's line replaces it."""
    from rich.text import Text

    return console.status(Text(text)) if console.is_terminal else nullcontext()  # Text: a plain str is read as markup


def sweep_table(name: str, jobs: list[Job]) -> "Table":
    """Every metric of "after", a column each; `*` marks the job with the best main metric."""
    from rich.table import Table

    shared, differing = split_overrides(jobs)
    best = best_job(jobs)
    scores = [(of, metric) for job in jobs for of, metrics in job.after.items() for metric in metrics]
    columns = list(dict.fromkeys(scores))  # each once, in the order met
    table = Table(title=" ".join([f"{name}-sweep", *shared]), title_justify="left", caption_justify="left")
    table.caption = f"* best {main_metric(best.after)[0]}: job {best.job}" if best else None
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
