"""Checkpoints: everything needed to resume bit for bit, in kilobytes when only biases learn.

    checkpoints/step-<n>/  trained.safetensors   the learning parameters
                           optimizer.pt          AdamW's moments, the schedule
                           random-<rank>.pt      each process' random states
                           state.json            steps taken, micro-batches drawn, seconds, processes
                           hashes.json           of the other files, which older versions do not have

A checkpoint is written under a temporary name and renamed, and removed under one too: what is half there never looks
whole. What the disk has damaged is seen by its hash. The frozen weights are not in it: they are the base's.
"""

import json
import logging
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sgpt.encoder.adapter import TRAINED
from sgpt.runtime.distributed import barrier, from_main, on_all, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import REPLACED, hash_of, put_back, remove_folder, replace_folder
from sgpt.runtime.provenance import EXACT_PROCESSES

log = logging.getLogger(__name__)
HASHES = "hashes.json"


@dataclass
class TrainState:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps taken."""
    batches: int = 0
    """Micro-batches drawn by each process."""
    seconds: float = 0.0
    """Seconds spent training."""
    processes: int = 1
    """Processes of the run, W."""
    evaluated_step: int = 0
    """Step after which the dev sets were last scored."""
    best_step: int = 0
    """Step whose weights were the best on the dev sets; 0 where none is kept."""
    best_value: float | None = None
    """What decided (trainer.keep_best), after that step."""
    evaluations_without_better: int = 0
    """Evaluations since that step."""


def save(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer, schedule, state: TrainState, keep: int
) -> None:
    """Writes a checkpoint, and keeps the newest `keep` of them and the best. All processes call it."""
    rank = world()[0]
    target = folder / f"step-{state.step}"
    temporary = folder / f".step-{state.step}.tmp"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
        folder.mkdir(exist_ok=True)  # not the folders around it: where they have gone, the disk has
        temporary.mkdir()
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        save_file(tensors, temporary / TRAINED)
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(asdict(state)) + "\n")
    barrier()  # the folder is there
    torch.save(random_states(), temporary / f"random-{rank}.pt")
    barrier()  # it is whole
    if rank == 0:
        hashes = {file.name: hash_of(file) for file in temporary.iterdir()}
        (temporary / HASHES).write_text(json.dumps(hashes) + "\n")
        replace_folder(temporary, target)
        for old in whole_checkpoints(folder)[:-keep]:
            if _step(old) != state.best_step:
                remove_folder(old)
    barrier()


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    whole = whole_checkpoints(folder)
    return whole[-1] if whole else None


def steps_done(folder: Path) -> int:
    """Of the newest whole checkpoint, 0 before the first."""
    newest = latest(folder)
    return _step(newest) if newest else 0


def best(folder: Path) -> Path | None:
    """The checkpoint that an adapter is made from: the best on the dev sets, or the newest where none is kept."""
    newest = latest(folder)
    if newest is None:
        return None
    with _undamaged(newest / "state.json") as file:
        step = json.loads(file.read_text()).get("best_step", 0)
    return next((checkpoint for checkpoint in whole_checkpoints(folder) if _step(checkpoint) == step), newest)


def newest_undamaged(folder: Path) -> Path | None:
    """The newest checkpoint whose files have their hashes, or None before the first. All processes call it.

    A damaged one is told and put aside, as step-<n>.damaged; InputError where there is none before it.
    """
    return from_main(lambda: _newest_undamaged(folder))


def _newest_undamaged(folder: Path) -> Path | None:
    put_back(folder)
    whole = whole_checkpoints(folder)
    while whole:
        newest = whole.pop()
        problem = damage(newest)
        if problem is None:
            return newest
        if not whole:
            raise InputError(f"{problem}; {_remedy(newest)}")
        aside = newest.with_name(f"{newest.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        newest.rename(aside)
        log.warning("%s; it is put aside as %s, and %s is used instead", problem, aside.name, whole[-1].name)
    return None


def damage(checkpoint: Path, *names: str) -> str | None:
    """What is wrong with these files of a checkpoint, or all of them, by their hashes.

    None where nothing is, and where an older version kept no hashes.
    """
    file = checkpoint / HASHES
    try:
        hashes = {**json.loads(file.read_text())}
        for name in names or hashes:
            if hash_of(checkpoint / name) != hashes[name]:
                return f"{checkpoint / name} is damaged (its hash has changed)"
    except FileNotFoundError as error:
        return None if error.filename == str(file) else f"{error.filename} is missing"
    except (ValueError, TypeError, KeyError):
        return f"{file} is damaged"
    return None


def whole_checkpoints(folder: Path) -> list[Path]:
    """By step, the newest last. Folders that only look like one (a copy called step-4.bak) are none.

    One that was being replaced when its process was killed is there under its other name (`put_back`).
    """
    checkpoints = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    for path in folder.glob(f".step-*{REPLACED}"):
        if not (folder / f"step-{_step(path)}").exists():
            checkpoints.append(path)
    return sorted(checkpoints, key=_step)


def load(checkpoint: Path, parameters: Mapping[str, nn.Parameter], optimizer, schedule) -> TrainState:
    """Restores everything in place.

    InputError, on all processes, when it is damaged or of another run: other parameters or processes.
    """
    return on_all(lambda: _load(checkpoint, parameters, optimizer, schedule))


def _load(checkpoint: Path, parameters: Mapping[str, nn.Parameter], optimizer, schedule) -> TrainState:
    rank, processes = world()
    with _undamaged(checkpoint / "state.json") as file:
        stored = json.loads(file.read_text())
        state = TrainState(
            step=int(stored["step"]),
            batches=int(stored["batches"]),
            seconds=float(stored["seconds"]),
            processes=int(stored["processes"]),
            # older versions have none of these; whoever evaluated had done so before saving
            evaluated_step=int(stored.get("evaluated_step", stored["step"])),
            best_step=int(stored.get("best_step", 0)),
            best_value=stored.get("best_value"),
            evaluations_without_better=int(stored.get("evaluations_without_better", 0)),
        )
    if state.processes != processes:
        raise InputError(
            f"{checkpoint}: saved by {state.processes} processes, resumed with {processes}; "
            f"start as many: {EXACT_PROCESSES}"
        )
    load_parameters(checkpoint / TRAINED, parameters)
    with _undamaged(checkpoint / "optimizer.pt") as file:
        # onto the CPU, else every process would take memory on the GPU of the first
        stored = torch.load(file, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(stored["optimizer"])
        schedule.load_state_dict(stored["schedule"])
    with _undamaged(checkpoint / f"random-{rank}.pt") as file:
        restore_random_states(torch.load(file, weights_only=True))
    return state


DAMAGE = (  # what the readers raise, whatever a file was cut or changed to
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, EOFError,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


@contextmanager
def _undamaged(file: Path) -> Iterator[Path]:
    """InputError for a file of a checkpoint whose hash has changed, and for what reading it raises."""
    if problem := damage(file.parent, file.name):
        raise InputError(f"{problem}; {_remedy(file.parent)}")
    try:
        yield file
    except InputError:
        raise
    except DAMAGE as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({type(error).__name__})"
        raise InputError(f"{file} {problem}; {_remedy(file.parent)}") from None


def _remedy(checkpoint: Path) -> str:
    others = [folder for folder in whole_checkpoints(checkpoint.parent) if folder != checkpoint]
    instead = f"{others[-1].name} is used instead" if others else "training starts from the base again"
    return f"remove the folder {checkpoint} and resume: {instead}"


@torch.no_grad()
def load_parameters(file: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copies the tensors of a `trained.safetensors` into the parameters. InputError when it holds others."""
    with _undamaged(file):
        stored = load_file(file)
    if stored.keys() != parameters.keys():
        odd = sorted(stored.keys() ^ parameters.keys())
        raise InputError(
            f"{file}: holds other parameters than this run trains, {odd[0]} for one; "
            "resume with the run's own tuning and model"
        )
    for name, parameter in parameters.items():
        if stored[name].shape != parameter.shape:
            raise InputError(
                f"{file}: {name} has shape {list(stored[name].shape)}, this model's has {list(parameter.shape)}; "
                "resume with the run's own tuning and model"
            )
        parameter.copy_(stored[name])


def random_states() -> dict[str, object]:
    """Of Python, numpy and torch; lists and tensors only, so that it loads with weights_only=True."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    states: dict[str, object] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict) -> None:
    """Sets what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _step(folder: Path) -> int:
    """Also of one that is being replaced."""
    return int(folder.name.removeprefix(".").removeprefix("step-").removesuffix(REPLACED))
