"""The files of configs/accelerate/, read by accelerate itself; those for a CPU are run."""

import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.config import config_args

from tests.starts import REPOSITORY

FILES = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml"))
PROCESSES = {"one_process": 1, "one_gpu": 1, "two_cpu_processes": 2, "multi_gpu": 8, "multi_node": 16, "fsdp2": 8}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file_and_the_header_names_it(file):
    config = config_args.load_config_from_file(str(file))  # refuses keys that it does not know
    assert config.num_processes == PROCESSES[file.stem]
    assert f"--config_file configs/accelerate/{file.name}" in file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_process", "two_cpu_processes"])
def test_training_runs_by_the_file(name, training, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{name}.yaml"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*launch, "train/biencoder.py", *training(tmp_path)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    manifest = json.loads((tmp_path / "runs" / "run" / "manifest.json").read_text())
    assert manifest["processes"] == PROCESSES[name]
