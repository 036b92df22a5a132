"""Disks that fill up, files that may not grow, places where nothing can be written: one sentence, exit code 2, and the run can be resumed.

The scripts are started as users start them; each start is a fork of one process that has imported everything.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]

STARTER = """
import json, os, resource, runpy, sys
import rich.console, sentence_transformers, torch
torch.set_num_threads(1)
import sgpt.config, sgpt.launch, sgpt.report, sgpt.search
for line in sys.stdin:
    limit, command = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1), os.dup2(write, 2)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        sys.argv, code = command, 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with open(read) as said:
        text = said.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""


class Ended(NamedTuple):
    code: int
    said: str

    @property
    def sentence(self) -> str:
        """What it was refused with; fails when it was anything but one sentence, behind what was logged before."""
        assert self.code == 2, self.said
        assert "Traceback" not in self.said
        told = [line for line in self.said.splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        assert self.said.endswith(told[0] + "\n")
        return told[0].removeprefix("error: ")


Start = Callable[..., Ended]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(script, *overrides, limit=None): limit: bytes that a file may have."""
    folder = tmp_path_factory.mktemp("starts")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "400", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    starter = subprocess.Popen([sys.executable, "-c", STARTER], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(script: str, *overrides: str, limit: int | None = None) -> Ended:
        starter.stdin.write(json.dumps([limit, [str(REPOSITORY / "train" / f"{script}.py"), *overrides]]) + "\n")
        starter.stdin.flush()
        return Ended(*json.loads(starter.stdout.readline()))

    yield run
    starter.stdin.close()
    starter.wait(timeout=60)
    starter.stdout.close()


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_base) -> Callable[[Path], list[str]]:
    """training(place): overrides of a run of four steps with two checkpoints, which writes below `place` alone."""
    pairs = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"query": f"what is {n}?", "positive": f"{n} is behind {n - 1}"}) + "\n" for n in range(64)))
    scored = pairs.with_name("scored.jsonl")
    scored.write_text("".join(json.dumps({"sentence1": f"{n}", "sentence2": f"{n + n % 3}", "score": n % 3}) + "\n" for n in range(6)))
    return lambda place: [
        f"runs={place}/runs", f"data.cache={place}/cache", f"model.path={tiny_base('gpt2')}", f"data.path={pairs}", f"evaluation.sts=[{scored}]",
        "markers.query_max_tokens=24", "markers.document_max_tokens=24", "trainer.threads=1", "trainer.queries_per_process=8", "trainer.max_steps=4", "trainer.save_every_steps=2", "trainer.log_every_steps=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, start: Start, training) -> dict[str, bytes]:
    """What a run on a disk with room leaves."""
    place = tmp_path_factory.mktemp("reference")
    assert start("biencoder", *training(place)).code == 0
    return weights(place)


def weights(place: Path) -> dict[str, bytes]:
    return {file: (place / "runs" / "run" / file).read_bytes() for file in ("export/model.safetensors", "adapter/adapter_model.safetensors")}


@pytest.mark.parametrize("limit", [200, 1_000, 3_000, 9_000, 60_000])
def test_a_file_that_may_not_grow_is_one_sentence_and_the_run_resumes(tmp_path, start, training, reference, limit):
    stopped = start("biencoder", *training(tmp_path), limit=limit)
    assert re.match(rf"{re.escape(str(tmp_path))}/\S+ could not be written(: files may not grow so large|, with [\d.,]+ MB free;)", stopped.sentence)
    assert "(ulimit -f" in stopped.sentence
    assert stopped.sentence.endswith(", then start it again with resume=true")
    assert start("biencoder", *training(tmp_path), "resume=true").code == 0
    assert weights(tmp_path) == reference


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(kilobytes): a folder with so much room; called again, it has another size and what was in it."""
    place, options = tmp_path / "disk", ["-t", "tmpfs"]
    place.mkdir()
    mounted = False

    def sized(kilobytes: int) -> Path:
        nonlocal mounted
        size = ["-o", f"{'remount,' if mounted else ''}size={kilobytes}k"]
        ended = subprocess.run(["mount", *([] if mounted else options), *size, *([] if mounted else ["tmpfs"]), str(place)], capture_output=True, text=True)
        if ended.returncode:
            pytest.skip(f"no file system of a chosen size can be mounted here: {ended.stderr.strip()}")
        mounted = True
        return place

    try:
        yield sized
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kilobytes", [12, 40, 80, 130, 190, 260, 350])
def test_a_full_disk_is_one_sentence_and_the_run_resumes(small_disk, start, training, reference, kilobytes):
    place = small_disk(kilobytes)
    sentence = start("biencoder", *training(place)).sentence
    assert re.fullmatch(
        rf"{re.escape(str(place))}\S* could not be written(: the disk is full, with \d+\.\d MB free; make room, |, with \d+\.\d MB free; if that is too little "
        r"make room, or let files grow larger \(ulimit -f\), )then start it again with resume=true", sentence
    ), sentence
    small_disk(20_000)
    assert start("biencoder", *training(place), "resume=true").code == 0
    assert weights(place) == reference
