"""A job of a sweep as a process group: started, logged, stopped whole."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sgpt.sweeps.jobs import SweepJob

SHOWN_LOG_LINES = 25
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


def failure(job: SweepJob, exit_code: int, last_lines: list[str]) -> str:
    message = f"job {job.job} ({' '.join(job.overrides)}) ended with exit code {exit_code}; log: {job.log}"
    if not any("Error" in line for line in last_lines):
        # accelerate says 1 for every failure and, being quiet, not that a signal ended the script
        message += " (which shows no error: was the job killed, for instance for lack of memory?)"
    return message
