"""Ctrl-C, SIGTERM and SIGUSR1, sent to scripts as users start them: saved, one line that says how to resume, the
shell's exit code, the same run.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sgpt.runtime.interrupt import SAME_PRESS_SECONDS
from sgpt.training.checkpoint import latest
from tests.starts import REPOSITORY, Ended, Start, beir, free_port, start_all
from tests.training.test_resume import EXAMPLES

STEPS = 20


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inter 'rupt")  # what is printed is quoted for the shell
    rows = [{"query": example.query, "positive": example.positive} for example in EXAMPLES]
    (folder / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {f"d{number}": example.positive for number, example in enumerate(EXAMPLES)}
    beir(folder / "toy", texts, {"q0": EXAMPLES[0].query}, {"q0": {"d0": 1}})
    (folder / "base").symlink_to(tiny_base("gpt2"))  # with dropout: the random states matter
    return folder


def training(name: str, *more: str) -> list[str]:
    return [
        f"name={name}", "data.path='my rows.jsonl'", "model.path=base", "trainer.threads=1",
        "trainer.queries_per_process=4", "trainer.epochs=9",
        f"trainer.max_steps={STEPS}", "trainer.log_every_steps=1", "trainer.evaluate_every_steps=1",
        "dev.retrieval=[toy]", "dev.split=train",
        "evaluation.retrieval=[toy]", "evaluation.split=train", "markers.query_max_tokens=24",
        "markers.document_max_tokens=40", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ended(folder) -> dict[str, Ended]:
    def interrupted(
        name: str, signum: int, *, lines: int = 6, port: int | None = None, file: str = "metrics.jsonl"
    ) -> Start:
        return Start(training(name), (f"runs/{name}/{file}", lines), port, signum)

    return start_all("biencoder", folder, {
        "whole": Start(training("whole")),
        "stopped": interrupted("stopped", signal.SIGINT),
        "stopped, resumed": Start(training("stopped", "resume=true")),
        "terminated": interrupted("terminated", signal.SIGTERM),
        "early": interrupted("early", signal.SIGINT, lines=1, file="config.yaml"),
        "early, resumed": Start(training("early", "resume=true")),
        "whole by two": Start(training("two-whole"), port=free_port()),
        "two": interrupted("two", signal.SIGINT, port=free_port()),
        "two, resumed": Start(training("two", "resume=true"), port=free_port()),
        "asked": Start(["run=runs/whole", "corpus=toy"], ("9-0.out", 1), None, signal.SIGINT, "search"),
        "pre-empted": interrupted("pre-empted", signal.SIGUSR1),
        "one killed": Start(training("one-killed"), ("runs/one-killed/metrics.jsonl", 6), free_port()),
        "one killed, resumed": Start(training("one-killed", "resume=true"), port=free_port()),
    })  # fmt: skip


def checkpoint(folder: Path, name: str) -> bytes:
    return (folder / "runs" / name / "checkpoints" / f"step-{STEPS}" / "trained.safetensors").read_bytes()


def log_lines(folder: Path, name: str) -> list[dict]:
    measured = ("queries_per_second", "tokens_per_second", "peak_memory_bytes", "seconds")
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


@pytest.mark.parametrize(("name", "whole"), [("stopped", "whole"), ("two", "two-whole")])
def test_an_interrupted_run_is_saved_and_resumed_it_is_the_uninterrupted_one(name, whole, ended, folder):
    assert ended["whole"].codes == [0], ended["whole"].err
    stopped, resumed = ended[name], ended[f"{name}, resumed"]
    assert set(stopped.codes) == {130}, stopped.err
    assert set(resumed.codes) == {0}, resumed.err
    last = stopped.err.splitlines()[-1]
    step = int(re.match(rf"interrupted: step (\d+) of {STEPS} is saved; resume with: ", last)[1])
    assert 3 <= step < STEPS  # six lines are three steps
    assert f"resumed from runs/{name}/checkpoints/step-{step}" in resumed.err
    assert "Traceback" not in stopped.err
    assert checkpoint(folder, name) == checkpoint(folder, whole)
    # no step is missing or there twice, and no evaluation of the dev set
    assert log_lines(folder, name) == log_lines(folder, whole)


def test_the_line_holds_what_was_typed_quoted_for_the_shell(ended):
    last = ended["stopped"].err.splitlines()[-1]
    command = shlex.split(last.partition("resume with: ")[2])
    assert command == ["python", str(REPOSITORY / "train" / "biencoder.py"), *training("stopped"), "resume=true"]


def test_before_training_there_is_one_line_and_the_command_too(ended, folder):
    assert ended["early"].codes == [130]
    assert "Traceback" not in ended["early"].err
    assert re.search(r"^interrupted: .*; resume with: python .* resume=true$", ended["early"].err, flags=re.MULTILINE)
    assert ended["early, resumed"].codes == [0], ended["early, resumed"].err
    assert checkpoint(folder, "early") == checkpoint(folder, "whole")


def test_at_the_search_prompt_it_ends_quietly(ended):
    assert ended["asked"].codes == [130], ended["asked"].err
    assert "An empty line ends." in ended["asked"].out
    assert "Traceback" not in ended["asked"].err
    assert "interrupted" not in ended["asked"].err


def test_a_terminated_run_is_saved_too(ended, folder):
    assert ended["terminated"].codes == [143], ended["terminated"].err
    step = re.search(
        r"^interrupted: step (\d+) of \d+ is saved; resume with: ", ended["terminated"].err, flags=re.MULTILINE
    )[1]
    assert latest(folder / "runs" / "terminated" / "checkpoints").name == f"step-{step}"


def test_a_pre_empted_run_is_saved_with_an_exit_code_of_its_own(ended, folder):
    assert ended["pre-empted"].codes == [128 + signal.SIGUSR1], ended["pre-empted"].err
    last = ended["pre-empted"].err.splitlines()[-1]
    step = re.match(r"interrupted: step (\d+) of \d+ is saved; resume with: ", last)[1]
    checkpoints = folder / "runs" / "pre-empted" / "checkpoints"
    best = json.loads((checkpoints / f"step-{step}" / "state.json").read_text())["best_step"]
    saved = {path.name for path in checkpoints.iterdir()}
    assert saved >= {f"step-{step}", f"step-{best}"}
    assert len(saved) <= 2  # no step but this one is saved unless it was the best so far


def test_where_one_process_is_killed_the_other_ends_and_names_it(ended, folder):
    """And none of them waits: two have six hours for each other."""
    assert ended["one killed"].codes == [-signal.SIGKILL, 2]
    number = [*ended].index("one killed")
    told = (folder / f"{number}-1.err").read_text().splitlines()[-1]
    assert told == (
        "error: rank 0 of 2 processes has ended; if it gave no reason it was killed, as for want of memory; start it "
        "again with resume=true"
    )
    assert ended["one killed, resumed"].codes == [0, 0], ended["one killed, resumed"].err
    assert checkpoint(folder, "one-killed") == checkpoint(folder, "two-whole")
    assert log_lines(folder, "one-killed") == log_lines(folder, "two-whole")


def test_a_second_press_ends_at_once_and_the_echo_of_the_first_does_not(ctrl_c):
    """torchrun passes Ctrl-C on to its processes, which the terminal has told already."""
    program = (
        "import time; from sgpt.runtime.interrupt import Stop\nwith Stop():\n    print('ready', flush=True)\n    "
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(SAME_PRESS_SECONDS + 0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert told.splitlines()[-1] == "interrupted again: ended at once; what was saved before is kept"
