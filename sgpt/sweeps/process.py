"""A job of a sweep as a process group: started, logged, stopped whole."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sgpt.runtime.errors import InputError

SHOWN_LOG_LINES = 25
# Arguments that choose how processes are started; accelerate refuses, or ignores, --multi_gpu next to them.
STRATEGIES = {"--config_file", "--use_deepspeed", "--use_fsdp", "--use_megatron_lm", "--tpu", "--cpu", "--multi_gpu"}
STOP_SECONDS = 45  # torchrun, asked to stop, gives its workers 30 s before it kills them


def num_cores() -> int:
    """Those this process may use: under taskset or Slurm fewer than the machine has. macOS cannot say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wants_cpu(num_processes: int) -> bool:
    """ACCELERATE_USE_CPU decides where it is set.

    Else one process is left to Accelerate, which finds the device as in a run without a sweep, and several use the CPU
    where no GPU driver's tool is on the PATH: those come with the drivers, and importing torch here to ask would cost
    seconds and hold memory on a GPU that the jobs want.
    """
    if "ACCELERATE_USE_CPU" in os.environ:
        return os.environ["ACCELERATE_USE_CPU"].lower() in ("1", "true", "yes", "on")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return num_processes > 1 and (hidden or not (shutil.which("nvidia-smi") or shutil.which("rocm-smi")))


def threads_of_run(folder: Path, stated: int | None) -> int | None:
    """trainer.threads of the run of this folder: as it was started, where it was, since training refuses another one.

    stated: for a new run. None leaves them to training, which shares the cores that it may use.
    """
    import yaml

    file = folder / "config.yaml"
    if not file.is_file():
        return stated
    return yaml.safe_load(file.read_text(encoding="utf-8")).get("trainer", {}).get("threads")


def accelerate_launch(num_processes: int, num_threads: int, arguments: Sequence[str], *, cpu: bool) -> list[str]:
    """The command that starts a script in so many processes of so many threads, up to the script.

    arguments: further ones of `accelerate launch`, which win. cpu: as of `wants_cpu`, see `launch_environment` too.
    """
    several = num_processes > 1
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
    launch += ["--num_processes", str(num_processes)]
    launch += ["--num_cpu_threads_per_process", str(num_threads)]
    # Stated, so that no `accelerate config` of this user's decides them: the trainer's own config does.
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if several:
        launch += ["--main_process_port", "0"]  # a free one: two sweeps on one machine would meet on 29500
    if not STRATEGIES.intersection(arguments):
        # `--cpu --num_processes 2` starts one process and says nothing; --multi_gpu with the variable below starts
        # two gloo processes. For one process accelerate overwrites the variable, so there it takes the flag.
        launch += ["--multi_gpu"] if several else ["--cpu"] if cpu else []
    return [*launch, *arguments]


def launch_environment(*, cpu: bool, gpus: Sequence[str] | None = None) -> dict[str, str]:
    """This process's environment for `accelerate_launch`. gpus: those the job may use, None for all."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return environment


def gpus_of_machine() -> list[str]:
    """Those this process may use, as CUDA_VISIBLE_DEVICES names them. No torch: it would hold memory on one."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(number) for number, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def cores_of_slots(slots: int) -> list[list[int]] | None:
    """Which cores each of the jobs that run at a time is bound to, equally many; None where all may use all.

    Training counts the cores that it may use to choose its threads, so jobs that share them would have too many.
    """
    if slots == 1 or not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    size = max(1, len(cores) // slots)
    return [[cores[(slot * size + i) % len(cores)] for i in range(size)] for slot in range(slots)]


def gpus_of_slots(gpus: Sequence[str], slots: int, num_processes: int) -> list[list[str]] | None:
    """Which GPUs each of the jobs that run at a time may use; None where all may use all.

    Each job gets some of its own. With too few for that InputError: jobs that share a GPU slow each other down and can
    run out of its memory.
    """
    if slots == 1 or not gpus:
        return None
    if len(gpus) < slots * num_processes:
        raise InputError(
            f"{slots} jobs at a time of {num_processes} process(es) each need {slots * num_processes} GPUs, and "
            f"{len(gpus)} can be used (CUDA_VISIBLE_DEVICES); lower jobs_at_a_time or num_processes"
        )
    return [list(gpus[slot * num_processes : (slot + 1) * num_processes]) for slot in range(slots)]


class LoggedProcess:
    """A command as a process group of its own, with its output at the end of a log.

    cores: those it may use, None for all of this process.
    Raises RuntimeError when a process of an earlier start still runs: a launcher ended by kill -9 leaves its job behind
    and two of them training in one folder spoil each other. The job inherits the lock with its stdout.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], log_path: Path, cores: Sequence[int] | None = None
    ) -> None:
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"a process of an earlier start still writes to {log_path}; stop it or wait for it"
                raise RuntimeError(message) from None
            log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            log.flush()
            self.log_start = log.tell()
            with running_on(cores):
                # A session of its own: Ctrl-C reaches only the sweep, which then stops exactly its jobs.
                self.process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def last_lines(self) -> list[str]:
        """Of what this start wrote."""
        with self.log_path.open("rb") as log:
            log.seek(max(self.log_start, log.seek(0, os.SEEK_END) - 16_384))  # the end of a log that may be large
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        for i, line in enumerate(lines):  # torchrun closes with a screen about itself, after a line with the exit code
            if "torch/distributed/elastic" in line and "failed (exitcode" in line:
                lines = lines[: i + 1]
                break
        return [line for line in lines if line.strip()][-SHOWN_LOG_LINES:]


def check_in_fork(check: Callable[[], object]) -> None:
    """Calls it in a fork of this process, with which the memory of its imports goes; raises its InputError here."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def send_refusal() -> None:
        try:
            check()
            sender.send(None)
        except InputError as error:
            sender.send(str(error))

    process = context.Process(target=send_refusal)
    process.start()
    sender.close()
    try:
        refusal = receiver.recv()
    except EOFError:
        process.join()
        refusal = f"the check of what is drawn ended with code {process.exitcode}; -9 is for want of memory"
    process.join()
    if refusal is not None:
        raise InputError(refusal)


@contextmanager
def running_on(cores: Sequence[int] | None) -> Iterator[None]:
    """This thread, and so what it starts, is bound to the cores; not through preexec_fn, which other threads forbid."""
    before = os.sched_getaffinity(0) if cores is not None else set()
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if cores is not None:
            os.sched_setaffinity(0, before)


def stop_all(processes: Sequence[LoggedProcess]) -> None:
    """End the process groups and return when they are empty.

    torchrun's workers have groups of their own; torchrun, asked politely, ends them itself, and a training run saves
    its step, hence SIGTERM and patience first.
    """
    try:
        remaining = [item for item in processes if _signalled(item, signal.SIGTERM)]
        deadline = time.monotonic() + STOP_SECONDS
        while remaining and time.monotonic() < deadline:
            time.sleep(0.1)
            remaining = [item for item in remaining if _signalled(item, 0)]
    finally:  # also at a second, impatient Ctrl-C
        for item in processes:
            _signalled(item, signal.SIGKILL)


def _signalled(item: LoggedProcess, number: int) -> bool:
    """Whether there was anybody left in the group. Signal 0 only asks."""
    item.process.poll()  # reaps the leader, which would count as alive
    try:
        os.killpg(item.process.pid, number)
    except ProcessLookupError:
        return False
    return True


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


def failure(what: str, log: str, exit_code: int, last_lines: list[str]) -> str:
    """A sentence. what: the job or trial."""
    message = f"{what} ended with exit code {exit_code}; log: {log}"
    if not any("error" in line.lower() for line in last_lines):
        # accelerate says 1 for every failure and, being quiet, not that a signal ended the script
        message += " (which shows no error: was the job killed, for instance for lack of memory?)"
    return message
