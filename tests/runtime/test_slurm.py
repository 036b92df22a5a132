"""The example for Slurm, run by bash: before the time limit it saves, has itself queued again, and resumes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.starts import REPOSITORY, small_training

SCRIPT = REPOSITORY / "docs" / "slurm_requeue.sh"


@pytest.mark.slow
def test_near_its_time_limit_a_job_is_saved_queued_again_and_resumed(tiny_base, tmp_path):
    """`scontrol` is Slurm's and is not here: one that notes what it is asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    overrides = [
        "trainer.max_steps=40000" if argument.startswith("trainer.max_steps") else argument
        for argument in small_training(tmp_path, tiny_base("gpt2"))(tmp_path)
    ]
    run = tmp_path / "runs" / "run"
    metrics = run / "metrics.jsonl"

    def until_near_its_limit(lines: int) -> tuple[int, str]:
        """Exit code and log of a job that hears of its limit when its run has logged so many lines."""
        command = ["bash", str(SCRIPT), *overrides, "trainer.epochs=10000"]
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as job:
            while job.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= lines):
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
            told = job.stderr.read()
        return job.returncode, told

    code, told = until_near_its_limit(3)
    assert code == 128 + signal.SIGTERM, told
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert f"interrupted: step {steps[-1]} of 40000 is saved" in told
    code, told = until_near_its_limit(len(steps) + 3)
    assert f"resumed from {run}/checkpoints/step-{steps[-1]}" in told
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
