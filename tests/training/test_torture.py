"""`make torture` in small: killed at any instant and resumed, a run is the one that nobody killed; and a torture that
finds nothing would say so.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.torture import differences
from tests.starts import REPOSITORY


def torture(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/torture.py", "--quick", "--folder", str(folder), *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)


@pytest.mark.bitwise
def test_three_kills_lose_nothing_and_change_nothing(tmp_path):
    ended = torture(tmp_path / "torture", "--kills", "3")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"^[3-5] kills of [1-3] runs by 1 process\(es\): 0 lost, 0 different", ended.stdout, re.MULTILINE)
    trials = [json.loads(line) for line in (tmp_path / "torture" / "trials.jsonl").read_text().splitlines()]
    assert sum(len(trial["kills"]) for trial in trials) >= 3
    assert (tmp_path / "torture" / "whole" / "runs" / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_one_process_of_two_is_killed_and_the_other_names_it(tmp_path):
    ended = torture(tmp_path / "torture", "--processes", "2", "--kills", "6")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"by 2 process\(es\): 0 lost, 0 different; 0 processes left behind, 0 starts", ended.stdout)


WHOLE = {
    "runs/run/adapter/trained.safetensors": "weights",
    "runs/run/metrics.jsonl": '{"step": 1, "loss": 0.5, "seconds": 1.0}\n{"step": 2, "loss": 0.25, "seconds": 2.0}\n',
    "runs/run/manifest.json": '{"inputs": {"data": "a"}, "seconds": 1.0, "finished": "today"}',
    "runs/run/export/README.md": "# card\n| time | 1 minute |\n",
    "data/cache/key/texts.arrow": "texts",
}
CHANGES = {
    "another byte": ("runs/run/adapter/trained.safetensors", "Weights", True),
    "no file": ("runs/run/adapter/trained.safetensors", None, True),
    "one file more": ("runs/run/export/more", "", True),
    "a step that is missing": ("runs/run/metrics.jsonl", '{"step": 1, "loss": 0.5, "seconds": 1.0}\n', True),
    "another loss": ("runs/run/metrics.jsonl", WHOLE["runs/run/metrics.jsonl"].replace("0.25", "0.26"), True),
    "another hash": ("runs/run/manifest.json", '{"inputs": {"data": "b"}, "seconds": 1.0}', True),
    "other seconds": ("runs/run/metrics.jsonl", WHOLE["runs/run/metrics.jsonl"].replace("1.0", "1.5"), False),
    "another time in the card": ("runs/run/export/README.md", "# card\n| time | 2 minutes |\n", False),
    "another word in the card": ("runs/run/export/README.md", "# Card\n| time | 1 minute |\n", True),
    "another day": ("runs/run/manifest.json", '{"inputs": {"data": "a"}, "seconds": 3.0, "finished": "then"}', False),
}


@pytest.mark.parametrize(("file", "text", "is_different"), CHANGES.values(), ids=CHANGES)
def test_what_is_different_is_named_but_for_what_is_measured(file, text, is_different, tmp_path):
    for folder, changed in (("whole", {}), ("other", {file: text})):
        for name, content in (WHOLE | changed).items():
            if content is not None:
                path = tmp_path / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
    assert differences(tmp_path / "whole", tmp_path / "other") == ([file] if is_different else [])
