"""Disks that fill up, files that may not grow, places where nothing can be written: one sentence, exit code 2, and the
run can be resumed.
"""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.starts import Forks


def slow(*values: int) -> list:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, start: Forks, training) -> dict[str, bytes]:
    """What a run on a disk with room leaves."""
    place = tmp_path_factory.mktemp("reference")
    assert start("biencoder", *training(place)).code == 0
    return weights(place)


def weights(place: Path) -> dict[str, bytes]:
    return {
        file: (place / "runs" / "run" / file).read_bytes()
        for file in ("export/model.safetensors", "adapter/adapter_model.safetensors")
    }


@pytest.mark.parametrize("limit", [1_000, *slow(200, 3_000, 9_000, 60_000)])
def test_a_file_that_may_not_grow_is_one_sentence_and_the_run_resumes(tmp_path, start, training, reference, limit):
    stopped = start("biencoder", *training(tmp_path), limit=limit)
    assert re.match(
        rf"{re.escape(str(tmp_path))}/\S+ could not be written(: files may not grow so large|, with [\d.,]+ MB free;)",
        stopped.sentence
    )
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
        ended = subprocess.run(
            ["mount", *([] if mounted else options), *size, *([] if mounted else ["tmpfs"]), str(place)],
            capture_output=True, text=True
        )
        if ended.returncode:
            pytest.skip(f"no file system of a chosen size can be mounted here: {ended.stderr.strip()}")
        mounted = True
        return place

    try:
        yield sized
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kilobytes", [80, *slow(12, 40, 130, 190, 260, 350)])
def test_a_full_disk_is_one_sentence_and_the_run_resumes(small_disk, start, training, reference, kilobytes):
    place = small_disk(kilobytes)
    sentence = start("biencoder", *training(place)).sentence
    assert re.fullmatch(
        rf"{re.escape(str(place))}\S* could not be written(: the disk is full, with \d+\.\d MB free; make room, |, "
        rf"with \d+\.\d MB free; if that is too little "
        r"make room, or let files grow larger \(ulimit -f\), )then start it again with resume=true", sentence
    ), sentence
    small_disk(20_000)
    assert start("biencoder", *training(place), "resume=true").code == 0
    assert weights(place) == reference


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """read_only(folder): nothing can be written below it. Root may write where it is not allowed to, but not into what
    is mounted so.
    """
    made: list[Path] = []

    def make(folder: Path) -> None:
        if os.geteuid():
            folder.chmod(0o555)
        elif (
            told := subprocess.run(
                ["mount", "--bind", "-o", "ro", str(folder), str(folder)], capture_output=True, text=True
            )
        ).returncode:
            pytest.skip(f"nothing can be mounted here: {told.stderr.strip()}")
        made.append(folder)

    try:
        yield make
    finally:
        for folder in made:
            folder.chmod(0o755) if os.geteuid() else subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_where_nothing_can_be_written_the_keys_that_choose_another_place_are_named(
    tmp_path, start, training, read_only
):
    corpus, beir = tmp_path / "corpus.jsonl", tmp_path / "toy"
    corpus.write_text('{"_id": "a", "text": "seven"}\n')
    (beir / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        (beir / f"{name}.jsonl").write_text('{"_id": "a", "text": "seven"}\n')
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\ta\t1\n")
    other = tmp_path / "other"
    assert start("biencoder", *training(tmp_path)).code == 0
    place, run = tmp_path / "place", tmp_path / "runs" / "run"
    place.mkdir()
    read_only(place)
    read_only(run)
    for script, overrides, keys in (
        ("biencoder", training(place), ["runs=", "data.cache="]),
        ("biencoder", [*training(place), f"data.cache={other}"], ["runs="]),
        ("biencoder", [*training(other), f"data.cache={place}/below/it"], ["runs=", "data.cache="]),
        ("biencoder", [*training(other), "data=pydocs", f"data.path={place}/pydocs"], ["data.path=", "data.cache="]),
        ("inspect_data", [*training(other), f"output={place}/page.html"], ["output="]),
        ("search", [f"run={run}", "query=seven", f"corpus={corpus}"], ["run="]),
        ("export", [f"run={run}"], ["run=", "output="]),
        ("export", [f"run={run}", f"output={place}/export"], ["output="]),
        ("evaluate", [f"model={run}", f"retrieval=[{beir}]", f"output={place}/scores.json"], ["output="]),
        ("evaluate", [f"model={run}", f"retrieval=[{beir}]", f"runs={place}/trec"], ["runs="]),
        ("mine", [f"data={beir}", "split=test", f"output={place}/rows.jsonl"], ["output="]),
        ("rerank", [f"data={beir}", f"output={place}/run.trec"], ["output="]),
        ("pretrain", [f"text={other}", f"pydocs={place}/pydocs", f"folder={place}/nano"], ["folder="]),
    ):
        sentence = start(script, *overrides).sentence
        assert all(key in sentence for key in keys), (script, overrides, sentence)
        assert str(
            run if script in ("search", "export") and "output" not in str(overrides) else place
        ) in sentence, sentence
