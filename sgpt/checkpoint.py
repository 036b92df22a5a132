"""Checkpoints: everything needed to go on bit for bit, in kilobytes when only biases learn.

    checkpoints/step-<n>/  trained.safetensors   the learning parameters
                           optimizer.pt          AdamW's moments, the schedule
                           random-<rank>.pt      each process' random states
                           state.json            steps taken, micro-batches drawn, seconds, processes
    checkpoints/latest     the name of the newest whole one

A checkpoint is written under a temporary name and renamed, and removed under one too: what is half there never looks whole.
The frozen weights are not in it: they are the base's.
"""

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sgpt.distributed import barrier, world
from sgpt.errors import InputError
from sgpt.files import remove_folder, replace_folder, write_whole


@dataclass
class TrainState:
    """step: optimizer steps taken. batches: micro-batches drawn by each process. seconds: spent training. processes: W."""

    step: int = 0
    batches: int = 0
    seconds: float = 0.0
    processes: int = 1


def save(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer, schedule, state: TrainState, keep: int) -> None:
    """All processes call it. Keeps the newest `keep` checkpoints."""
    rank = world()[0]
    target, temporary = folder / f"step-{state.step}", folder / f".step-{state.step}.tmp"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, temporary / "trained.safetensors")
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(asdict(state)) + "\n")
    barrier()
    torch.save(random_states(), temporary / f"random-{rank}.pt")
    barrier()
    if rank == 0:
        replace_folder(temporary, target)
        write_whole(folder / "latest", target.name + "\n")
        for old in sorted(folder.glob("step-*"), key=_step)[:-keep]:
            remove_folder(old)
    barrier()


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    whole = sorted(folder.glob("step-*"), key=_step)
    return whole[-1] if whole else None


def load(checkpoint: Path, parameters: Mapping[str, nn.Parameter], optimizer, schedule) -> TrainState:
    """Restores everything in place. InputError when the checkpoint is of another run: other parameters or processes."""
    rank, processes = world()
    state = TrainState(**json.loads((checkpoint / "state.json").read_text()))
    if state.processes != processes:
        raise InputError(
            f"{checkpoint}: saved by {state.processes} processes, resumed with {processes}; start as many, since batches and random states belong to them"
        )
    load_parameters(checkpoint / "trained.safetensors", parameters)
    stored = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")  # else every process would take memory on the GPU of the first
    optimizer.load_state_dict(stored["optimizer"])
    schedule.load_state_dict(stored["schedule"])
    restore_random_states(torch.load(checkpoint / f"random-{rank}.pt", weights_only=True))
    return state


@torch.no_grad()
def load_parameters(file: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    stored = load_file(file)
    if stored.keys() != parameters.keys():
        odd = sorted(stored.keys() ^ parameters.keys())
        raise InputError(f"{file}: holds other parameters than this run trains, {odd[0]} for one; resume with the run's own tuning and model")
    for name, parameter in parameters.items():
        parameter.copy_(stored[name])


def random_states() -> dict[str, object]:
    """Python, numpy and torch; lists and tensors only, so that it loads with weights_only=True."""
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
    torch.set_rng_state(states["torch"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
