"""Two starts at once: what both need is made once, and one run folder has one writer."""

import subprocess
import sys
from pathlib import Path

import pytest

from sgpt.data.feed.store import Examples
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import lock, make_once, refuse_unwritable
from sgpt.training.run_folder import RunFolder, start_run

STORING = """
import sys, time
from pathlib import Path
from sgpt.data.feed.example import Example
from sgpt.data.feed.store import cached_examples
folder = Path(sys.argv[1])

def fill(writer):
    with (folder / "filled").open("a") as log:
        log.write("once\\n")
    for number in range(100):
        writer.example(Example(f"query {number}", f"answer {number}"))
        time.sleep(0.01)

(folder / f"ready-{sys.argv[2]}").touch()
while len(list(folder.glob("ready-*"))) < 3:
    time.sleep(0.001)
print(len(cached_examples(folder / "cache", "key", fill)))
"""
HOLDING = """
import sys, time
from pathlib import Path
from sgpt.training.run_folder import RunFolder, start_run
run = RunFolder(Path(sys.argv[1]))
start_run(run, {})
print("begun", flush=True)
time.sleep(600)
"""


def test_three_starts_fill_one_cache_once(tmp_path: Path):
    starts = [
        subprocess.Popen([sys.executable, "-c", STORING, str(tmp_path), str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    assert [start.communicate(timeout=120)[0].strip() for start in starts] == ["100"] * 3
    assert (tmp_path / "filled").read_text() == "once\n"
    examples = Examples.open(tmp_path / "cache" / "key")
    assert [
        (example.query, example.positive) for example in examples
    ] == [(f"query {n}", f"answer {n}") for n in range(100)]


def test_a_run_has_one_writer_and_is_free_when_that_is_killed(tmp_path: Path):
    folder = tmp_path / "runs" / "mine"
    writer = subprocess.Popen([sys.executable, "-c", HOLDING, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "begun\n"
        with pytest.raises(
            InputError, match=r"runs/mine: another process is writing to it; wait until that ends, or set runs=<"
        ):
            start_run(RunFolder(folder), {"seed": 1})
        assert (folder / "config.yaml").read_text() == "{}\n"
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    start_run(RunFolder(folder), {})


def test_no_lock_is_left_behind(tmp_path: Path):
    locked: list[bool] = []
    make_once(tmp_path / "made", (tmp_path / "made").is_dir, lambda: locked.append((tmp_path / ".made.lock").is_file()))
    assert locked == [True]
    run = RunFolder(tmp_path / "run")
    start_run(run, {})
    run.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_cannot_be_written_is_seen_without_writing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    refuse_unwritable(tmp_path / "new" / "run", "")
    with pytest.raises(InputError, match=r"file/new/run cannot be written \(.*/file is no folder\); set runs=$"):
        refuse_unwritable(tmp_path / "file" / "new" / "run", "set runs=")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("path", ["file/made", "/proc/made"])
def test_where_nothing_can_be_written_that_is_said(tmp_path: Path, path: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"made cannot be written \(.*\); choose another folder$"):
        lock(tmp_path / path)
