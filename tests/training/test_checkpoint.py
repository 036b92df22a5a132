"""Checkpoints: whole or not there, complete, and of the run that resumes them."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sgpt.runtime.errors import InputError
from sgpt.training.checkpoint import HASHES, TrainState, best, latest, load, newest_undamaged, save, steps_done
from sgpt.training.optim import OptimConfig, build_optimizer, build_schedule
from tests.starts import PRELOADED

# Forks of a server that has never computed: a fork of the tests' own process may wait for ever for OpenMP threads that
# it does not have.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(PRELOADED)

FILES = {"trained.safetensors", "optimizer.pt", "random-0.pt", "state.json", "hashes.json"}


def parts(numbers: int = 5, seed: int = 0):
    """Parameters, optimizer and schedule of one weight and one bias."""
    torch.manual_seed(seed)
    parameters = {"weight": nn.Parameter(torch.randn(numbers, 3)), "bias": nn.Parameter(torch.randn(numbers))}
    optimizer = build_optimizer(parameters, OptimConfig())
    return parameters, optimizer, build_schedule(optimizer, OptimConfig(), steps=100)


def step(parameters: dict[str, nn.Parameter], optimizer, schedule) -> None:
    noise = torch.randn(3) * random.random() * np.random.rand()  # all three random states matter
    (parameters["weight"] * noise).sum(1).add(parameters["bias"]).square().sum().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


@pytest.mark.bitwise
def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path):
    one = parts()
    for _ in range(3):
        step(*one)
    save(tmp_path, *one, TrainState(step=3, batches=6, seconds=1.5), keep=2)
    for _ in range(3):
        step(*one)
    other = parts(seed=99)
    random.seed(99), np.random.seed(99)
    state = load(latest(tmp_path), *other)
    assert state == TrainState(step=3, batches=6, seconds=1.5, processes=1)
    for _ in range(3):
        step(*other)
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[2].get_last_lr() == other[2].get_last_lr()


def test_a_checkpoint_holds_its_files_and_the_newest_are_kept(tmp_path):
    for number in (1, 2, 9, 10):
        save(tmp_path, *parts(), TrainState(step=number), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]
    assert latest(tmp_path).name == "step-10"  # by number, not by letters
    assert {path.name for path in (tmp_path / "step-10").iterdir()} == FILES


def test_a_checkpoint_of_biases_is_kilobytes(tmp_path):
    bias = {"bias": nn.Parameter(torch.randn(1000))}
    optimizer = build_optimizer(bias, OptimConfig())
    bias["bias"].sum().backward()
    optimizer.step()
    save(tmp_path, bias, optimizer, build_schedule(optimizer, OptimConfig(), steps=10), TrainState(step=1), keep=1)
    # three numbers of four bytes a parameter, and 5 kB + 5 kB of random states and some pickling
    assert sum(file.stat().st_size for file in (tmp_path / "step-1").iterdir()) < 3 * 4 * 1000 + 40_000


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, *parts(seed=1), TrainState(step=4), keep=2)
    again = parts(seed=2)
    save(tmp_path, *again, TrainState(step=4), keep=2)
    assert torch.equal(load_file(tmp_path / "step-4" / "trained.safetensors")["weight"], again[0]["weight"])


@pytest.mark.parametrize("moment", ["before the new one has its name", "after"])
def test_a_checkpoint_that_was_being_replaced_is_not_lost(moment, tmp_path):
    """It is saved again after an evaluation, and a kill between the two renames leaves none of its name."""
    saved = parts(seed=1)
    save(tmp_path, *saved, TrainState(step=4), keep=1)
    shutil.copytree(tmp_path / "step-4", tmp_path / ".step-4.replaced")
    if moment != "after":
        (tmp_path / "step-4").rename(tmp_path / ".step-4.tmp")
    assert steps_done(tmp_path) == 4  # for who only looks, too
    assert load(best(tmp_path), *parts(seed=3)).step == 4
    newest = newest_undamaged(tmp_path)
    assert newest == tmp_path / "step-4"
    resumed = parts(seed=2)
    assert load(newest, *resumed).step == 4
    assert torch.equal(resumed[0]["weight"], saved[0]["weight"])
    assert not (tmp_path / ".step-4.replaced").exists()


def save_for_ever(folder: Path) -> None:
    one = parts(numbers=100_000)
    step(*one)
    for number in range(1, 10_000):
        save(folder, *one, TrainState(step=number), keep=2)


@pytest.mark.parametrize("moment", range(8))
def test_a_killed_save_never_looks_whole(moment, tmp_path):
    """A real process, killed while it saves some megabytes again and again; what is there can be loaded."""
    process = PROCESSES.Process(target=save_for_ever, args=(tmp_path,))
    process.start()
    while latest(tmp_path) is None:
        time.sleep(0.001)
    time.sleep(0.005 * moment)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    whole = list(tmp_path.glob("step-*"))
    assert latest(tmp_path) in whole
    for checkpoint in whole:
        assert {path.name for path in checkpoint.iterdir()} == FILES
        assert load(checkpoint, *parts(numbers=100_000)).step == int(checkpoint.name.removeprefix("step-"))
    # what the kill left behind is in nobody's way
    save(tmp_path, *parts(numbers=100_000), TrainState(step=20_000), keep=1)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-20000"]


def test_nothing_there_is_none(tmp_path):
    assert latest(tmp_path / "checkpoints") is None


def test_another_number_of_processes_is_refused(tmp_path):
    save(tmp_path, *parts(), TrainState(step=1, processes=1), keep=1)
    file = tmp_path / "step-1" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": 2}))
    (tmp_path / "step-1" / HASHES).unlink()
    with pytest.raises(InputError, match=r"step-1: saved by 2 processes, resumed with 1; start as many"):
        load(tmp_path / "step-1", *parts())


def test_other_parameters_are_refused(tmp_path):
    save(tmp_path, *parts(), TrainState(step=1), keep=1)
    parameters, optimizer, schedule = parts()
    del parameters["bias"]
    with pytest.raises(
        InputError,
        match=r"holds other parameters than this run trains, bias for one; resume with the run's own tuning and model",
    ):
        load(tmp_path / "step-1", parameters, optimizer, schedule)


def flip(file: Path) -> None:
    """One bit of the last number, as a disk may: no reader complains of that."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "optimizer.pt cut": ("optimizer.pt", lambda file: file.write_bytes(file.read_bytes()[:-300])),
    "optimizer.pt empty": ("optimizer.pt", lambda file: file.write_bytes(b"")),
    "optimizer.pt of something else": ("optimizer.pt", lambda file: torch.save([1, 2], file)),
    "optimizer.pt with one byte changed": ("optimizer.pt", lambda file: file.write_bytes(b"x" + file.read_bytes()[1:])),
    "trained.safetensors with one bit flipped": ("trained.safetensors", lambda file: flip(file)),
    "random-0.pt missing": ("random-0.pt", lambda file: file.unlink()),
    "random-0.pt cut": ("random-0.pt", lambda file: file.write_bytes(file.read_bytes()[:100])),
    "trained.safetensors cut": ("trained.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-4])),
    "trained.safetensors missing": ("trained.safetensors", lambda file: file.unlink()),
    "state.json cut": ("state.json", lambda file: file.write_text('{"step": ')),
    "state.json with another key": ("state.json", lambda file: file.write_text('{"steps": 4}')),
    "state.json a list": ("state.json", lambda file: file.write_text("[]")),
    "state.json with a text": (
        "state.json",
        lambda file: file.write_text('{"step": "four", "batches": 4, "seconds": 1.0, "processes": 1}'),
    ),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_its_file_and_the_one_before_takes_its_place(name, damage, tmp_path):
    for number in (4, 8):
        save(tmp_path, *parts(), TrainState(step=number), keep=2)
    damage(tmp_path / "step-8" / name)
    with pytest.raises(
        InputError,
        match=rf"step-8/{name} is (damaged|missing).*; remove the folder .*step-8 and resume: step-4 is used instead",
    ):
        load(latest(tmp_path), *parts())
    shutil.rmtree(tmp_path / "step-8")
    assert load(latest(tmp_path), *parts()).step == 4


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_is_told_put_aside_and_the_one_before_is_used(name, damage, tmp_path, caplog):
    for number in (4, 8):
        save(tmp_path, *parts(), TrainState(step=number), keep=2)
    damage(tmp_path / "step-8" / name)
    assert newest_undamaged(tmp_path) == tmp_path / "step-4"
    assert re.search(
        rf"step-8/{name} is (damaged \(its hash has changed\)|missing); it is put aside as step-8\.damaged, and step-4 "
        "is used instead", caplog.text
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"step-4", "step-8.damaged"}
    save(tmp_path, *parts(), TrainState(step=8), keep=1)
    assert newest_undamaged(tmp_path) == tmp_path / "step-8"


def test_where_no_checkpoint_is_whole_training_does_not_begin_again_by_itself(tmp_path):
    for number in (4, 8):
        save(tmp_path, *parts(), TrainState(step=number), keep=2)
        flip(tmp_path / f"step-{number}" / "optimizer.pt")
    refusal = r"step-4/optimizer\.pt is damaged .*; remove the folder .*step-4 and resume: training starts from"
    with pytest.raises(InputError, match=refusal):
        newest_undamaged(tmp_path)
    assert (tmp_path / "step-4").is_dir()


@pytest.mark.parametrize("content", ["", "[]", '{"optimizer.pt": 4}'])
def test_hashes_that_are_damaged_themselves_are_damage(content, tmp_path, caplog):
    for number in (4, 8):
        save(tmp_path, *parts(), TrainState(step=number), keep=2)
    (tmp_path / "step-8" / HASHES).write_text(content)
    assert newest_undamaged(tmp_path) == tmp_path / "step-4"
    assert "is damaged" in caplog.text


def test_a_checkpoint_of_a_version_without_hashes_is_resumed(tmp_path):
    save(tmp_path, *parts(), TrainState(step=4), keep=2)
    (tmp_path / "step-4" / HASHES).unlink()
    assert load(newest_undamaged(tmp_path), *parts()).step == 4


def test_nothing_is_saved_where_the_run_folder_has_gone(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "gone" / "checkpoints", *parts(), TrainState(step=4), keep=2)
    assert not list(tmp_path.iterdir())


def test_a_shape_of_another_model_is_refused(tmp_path):
    save(tmp_path, *parts(5), TrainState(step=1), keep=1)
    with pytest.raises(InputError, match=r"weight has shape \[5, 3\], this model's has \[6, 3\]"):
        load(tmp_path / "step-1", *parts(6))


def test_a_copy_of_a_checkpoint_is_none(tmp_path):
    save(tmp_path, *parts(), TrainState(step=4), keep=2)
    shutil.copytree(tmp_path / "step-4", tmp_path / "step-4.bak")
    assert latest(tmp_path).name == "step-4"
