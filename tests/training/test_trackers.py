"""What each tracker keeps is read by its own means, and compared with metrics.jsonl and results.json."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from sgpt.runtime.errors import InputError
from sgpt.training.trackers import check_tracker

Steps = dict[int, dict[str, float]]  # step -> name -> value


@pytest.fixture(scope="module")
def tracked(start, training, tmp_path_factory):
    """tracked(tracker): the folder of a run that was logged to it as well."""
    ran: dict[str, Path] = {}

    def run(tracker: str) -> Path:
        pytest.importorskip(tracker, reason=f"the extra {tracker} is not installed")
        if tracker not in ran:
            place = tmp_path_factory.mktemp(tracker)
            overrides = training(place)
            dev = [f"dev.{item.removeprefix('evaluation.')}" for item in overrides if item.startswith("evaluation.sts")]
            evaluating = [*dev, "trainer.evaluate_every_steps=2"]
            named = ["name=rün/1", "logging.project=tests"]  # no artifact can have this name
            ended = start("biencoder", *overrides, *evaluating, *named, f"logging.tracker={tracker}")
            assert ended.code == 0, ended.said
            ran[tracker] = place / "runs" / "rün" / "1"
        return ran[tracker]

    return run


def logged(run: Path) -> Steps:
    """What metrics.jsonl and results.json say, under the names that trackers show: dev, norms of groups and results as
    set/metric or key/group, and no texts.
    """
    steps: Steps = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        values = steps.setdefault(line.pop("step"), {})
        for of, metrics in (line.pop("dev", {}) | {"grad_norms": line.pop("grad_norms", {})}).items():
            values |= {f"{of}/{metric}": value for metric, value in metrics.items()}
        values |= {name: value for name, value in line.items() if not isinstance(value, str)}
    for stage, sets in json.loads((run / "results.json").read_text()).items():
        for of, metrics in sets.items():
            steps[4] |= {f"{stage}/{of}/{metric}": value for metric, value in metrics.items()}
    return steps


def test_tensorboard_shows_the_same_numbers_under_the_same_names(tracked):
    run = tracked("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown: Steps = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            shown.setdefault(event.step, {})[name] = event.value
    expected = logged(run)
    assert {step: values.keys() for step, values in shown.items()} == {
        step: values.keys() for step, values in expected.items()
    }
    for step, values in expected.items():
        assert shown[step] == pytest.approx(values, rel=1e-6)  # it keeps float32
    texts = [name.removesuffix("/text_summary") for name in events.Tags()["tensors"]]
    assert texts == ["config.yaml", "manifest.json", "results.json"]


def test_trackio_shows_the_same_numbers_under_the_same_names(tracked):
    run = tracked("trackio")
    with sqlite3.connect(run.parent / "trackio" / "tests.db") as database:
        rows = database.execute("select step, metrics from metrics where run_name = 'rün/1' order by id").fetchall()
        [config] = database.execute("select config from configs").fetchone()
        artifacts = database.execute("select * from artifact_versions").fetchall()
    database.close()
    shown: Steps = {}
    for step, metrics in rows:
        shown.setdefault(step, {}).update(json.loads(metrics))
    assert shown == logged(run)
    assert json.loads(config)["optim.learning_rate"] == 0.00032
    assert len(artifacts) == 1


def records(file: Path) -> list:
    """Of W&B's log: LevelDB's frames (blocks of 32 KiB, 7 bytes before each piece) around its own protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole, found = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if 32768 - position % 32768 < 7 or kind == 0:  # the rest of a block is empty
            position += 32768 - position % 32768
            continue
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # the whole record, or its last piece
            found.append(Record.FromString(whole))
            whole = b""
    return found


def test_wandb_offline_keeps_the_same_numbers_and_the_files_for_its_sync(tracked):
    run = tracked("wandb")
    [folder] = (run / "wandb").glob("offline-run-*")
    [log] = folder.glob("run-*.wandb")
    kept = records(log)
    shown: Steps = {}
    for record in kept:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            values = {name: value for name, value in items.items() if not name.startswith("_")}
            shown.setdefault(items["_step"], {}).update(values)
    assert shown == logged(run)
    [started] = [record.run for record in kept if record.WhichOneof("record_type") == "run"]
    assert (started.project, started.display_name) == ("tests", "rün/1")
    assert started.run_id == json.loads((run / "manifest.json").read_text())["tracker_id"]

    [artifact] = [
        record.request.log_artifact.artifact if record.HasField("request") else record.artifact
        for record in kept
        if record.WhichOneof("record_type") == "artifact" or record.request.HasField("log_artifact")
    ]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    named = {"config.yaml", "manifest.json", "results.json", "metrics.jsonl", "report.html"}
    assert named | {"adapter/adapter_model.safetensors", "adapter/sgpt.json"} <= files.keys()
    for name, copy in files.items():
        assert copy.is_relative_to(run)  # it stays with the run until it is uploaded
        if name != "manifest.json":  # which says a moment later that the run is finished
            assert copy.read_bytes() == (run / name).read_bytes()

    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(folder)],
        capture_output=True, text=True, env={**os.environ, "HOME": str(run)},
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    assert folder.name in listed.stdout + listed.stderr


def test_runs_of_different_trackers_are_compared(tracked, start):
    runs = [tracked("tensorboard"), tracked("wandb")]
    compared = start("compare", f"runs=[{runs[0]},{runs[1]}]", f"output={runs[0]}/compare.html")
    assert compared.code == 0, compared.said
    assert compared.err.splitlines()[0] == f"2 runs are compared: {runs[0]}, {runs[1]}"
    lines = compared.out.splitlines()
    assert lines[-1] == f"page  {runs[0]}/compare.html"
    assert [line.split() for line in lines if "logging.tracker" in line] == [
        ["│", "logging.tracker", "│", "tensorboard", "│", "wandb", "│"]
    ]


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_read(monkeypatch):
    check_tracker(None)
    check_tracker("wandb")
    monkeypatch.setattr(sys, "path", [])  # where nothing is installed
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    with pytest.raises(InputError, match=r"logging.tracker=tensorboard is not installed; pip install"):
        check_tracker("tensorboard")
