"""The files of configs/accelerate/, read by accelerate itself; those for a CPU are run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import config_args
from safetensors.torch import load_file

from tests.starts import REPOSITORY

FILES = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml"))
PROCESSES = {"one_process": 1, "one_gpu": 1, "two_cpu_processes": 2, "multi_gpu": 8, "multi_node": 16, "fsdp2": 8}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file_and_the_header_names_it(file):
    config = config_args.load_config_from_file(str(file))  # refuses keys that it does not know
    assert config.num_processes == PROCESSES[file.stem]
    assert f"--config_file configs/accelerate/{file.name}" in file.read_text()


@pytest.mark.slow
def test_training_runs_by_the_files_and_is_the_same_by_all_of_two_processes(training, tmp_path):
    """Those for GPUs, too, by two CPU processes in place of theirs."""
    biases = {
        name: trained_by(name, [*training(tmp_path / name), *keys], tmp_path / name / "runs" / "run")
        for name, keys in (
            ("one_process", []), ("two_cpu_processes", []), ("multi_gpu", []), ("fsdp2", ["trainer.shard_trunk=true"]),
        )
    }  # fmt: skip
    for name in ("multi_gpu", "fsdp2"):
        for parameter, values in biases["two_cpu_processes"].items():
            torch.testing.assert_close(biases[name][parameter], values, rtol=0, atol=1e-6)


def trained_by(name: str, arguments: list[str], run: Path) -> dict[str, torch.Tensor]:
    processes = min(2, PROCESSES[name])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{name}.yaml"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*launch, "--num_processes", str(processes), "train/biencoder.py", *arguments],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert json.loads((run / "manifest.json").read_text())["processes"] == processes
    return load_file(run / "adapter" / "trained.safetensors")
