"""A trial pack: what one forward and backward pass takes in memory and time, measured on texts of the run itself.

Nothing of it stays: gradients are dropped, random states put back, and freed memory handed back to the system.
"""

import time
from dataclasses import dataclass, replace

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from sgpt.data.feed.collate import Batch
from sgpt.decoder.packing import Pack, distinct
from sgpt.decoder.trunk import takes_packs
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from sgpt.runtime.memory import return_freed_memory
from sgpt.training.checkpoint import random_states, restore_random_states
from sgpt.training.log import peak_memory_bytes
from sgpt.training.negatives import unit
from sgpt.training.step import SavedBytes
from sgpt.training.tuning import trainable_parameters

SMALLER = 8  # the first trial is so many times smaller than a pack
MOST_SECONDS = 2.0  # of a whole pack, as the first trial lets expect


@dataclass(frozen=True)
class Trial:
    """What one pack took, in seconds and bytes.

    positions: tokens, with the padding of trunks that need it. saved_bytes: what autograd kept for the backward pass.
    kept_bytes: the same as the process had it: resident memory has holes, of half as much again on a CPU. peak_bytes:
    the most, all of this included. gradient_bytes: of what learns, which do not grow with a pack. bytes_before: what
    was there before, and is in none of the others.
    """

    positions: float
    forward_seconds: float
    backward_seconds: float
    saved_bytes: float
    kept_bytes: float
    peak_bytes: float
    gradient_bytes: float
    bytes_before: int

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds

    def of(self, positions: float) -> "Trial":
        """As a pack of so many positions would take."""
        times = positions / self.positions
        return replace(
            self,
            positions=positions,
            forward_seconds=times * self.forward_seconds,
            backward_seconds=times * self.backward_seconds,
            saved_bytes=times * self.saved_bytes,
            kept_bytes=times * self.kept_bytes,
            peak_bytes=times * max(0.0, self.peak_bytes - self.gradient_bytes) + self.gradient_bytes,
        )


def positions_of(encoder: Encoder, pack: Pack) -> int:
    """Tokens, and the padding where the trunk needs it."""
    return len(pack) if takes_packs(encoder.trunk) else pack.padded_tokens


def try_pack(encoder: Encoder, batch: Batch, accelerator: Accelerator, run_positions: float) -> Trial:
    """The first pack of a batch, which holds its longest texts, forward and backward.

    A part of it is computed first, which shows how long the whole will take. Where that is more than MOST_SECONDS and
    2 % of the run, the part stands for it. run_positions: of the whole run on this process. InputError where an
    embedding or a gradient is not finite.
    """
    rows, _ = distinct([*batch.queries, *batch.documents])
    pack = next(encoder.packs(rows))
    part = next(encoder.packs([rows[row] for row in pack.rows[::SMALLER]]))
    size = positions_of(encoder, pack)
    was_training, states = encoder.training, random_states()
    encoder.train()
    try:
        trial = _try(encoder, part, accelerator)
        if trial.seconds < MOST_SECONDS:  # again: the first one warmed up
            trial = _try(encoder, part, accelerator)
        whole_seconds, run_seconds = trial.of(size).seconds, trial.of(run_positions).seconds
        if whole_seconds <= max(MOST_SECONDS, 0.02 * run_seconds):
            trial = _try(encoder, pack, accelerator)
        return trial.of(size)
    finally:
        restore_random_states(states)
        encoder.train(was_training)
        _free(encoder.device)  # what the run may keep is measured by what is free


def _try(encoder: Encoder, pack: Pack, accelerator: Accelerator) -> Trial:
    memory = _Memory(encoder.device)
    try:
        trial = _compute(encoder, pack, accelerator, memory)
        if trial.seconds < MOST_SECONDS / 2:  # again, in memory that the process has by now, next to the gradients
            again = _compute(encoder, pack, accelerator, memory)
            trial = replace(again, kept_bytes=trial.kept_bytes)
        return trial
    finally:
        for parameter in trainable_parameters(encoder.trunk).values():
            parameter.grad = None


def _compute(encoder: Encoder, pack: Pack, accelerator: Accelerator, memory: "_Memory") -> Trial:
    """Forward and backward, from a gradient as large as that of a loss: each text is to be less like the next one."""
    started = _now(encoder.device)
    with accelerator.autocast(), SavedBytes(encoder.trunk) as saved:
        embeddings = encoder.embed_pack(pack)
    embedded = _now(encoder.device)
    kept_bytes = memory.now() - memory.bytes_before
    unit_length = unit(embeddings)
    (20 * (unit_length * unit_length.roll(1, 0)).sum(1).mean()).backward()
    ended = _now(encoder.device)
    peak_bytes = memory.peak() - memory.bytes_before
    parameters = trainable_parameters(encoder.trunk).values()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    _refuse_not_finite(encoder, embeddings, gradients)
    return Trial(
        positions=positions_of(encoder, pack),
        forward_seconds=embedded - started,
        backward_seconds=ended - embedded,
        saved_bytes=saved.bytes,
        kept_bytes=kept_bytes,
        peak_bytes=peak_bytes,
        gradient_bytes=sum(gradient.numel() * gradient.itemsize for gradient in gradients),
        bytes_before=memory.bytes_before,
    )


class _Memory:
    """Bytes of this process: allocated on its GPU, else resident."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        _free(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.bytes_before, self.peak_before = self.now(), peak_memory_bytes(device)

    def now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The most since this was made.

        On a CPU the system knows the most since the process began. Where that was earlier, what is resident now stands
        for it, as a script keeps what it freed (sgpt/runtime/memory.py).
        """
        peak = peak_memory_bytes(self.device)
        is_new = self.device.type == "cuda" or peak > self.peak_before
        return peak if is_new else self.now()


def _free(device: torch.device) -> None:
    return_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _refuse_not_finite(encoder: Encoder, embeddings: Tensor, gradients: list[Tensor]) -> None:
    broken = not embeddings.isfinite().all(), not all(gradient.isfinite().all() for gradient in gradients)
    if not any(broken):
        return
    what = "embedding" if broken[0] else "gradient"
    dtype = str(encoder.trunk.dtype).removeprefix("torch.")
    remedy = "its weights are damaged; take another base"
    if dtype != "float32":
        remedy = f"it overflows in {dtype}; set model.dtype={'bfloat16' if dtype == 'float16' else 'float32'}"
    raise InputError(
        f"a trial on the longest texts gives a {what} that is NaN or infinite in {type(encoder.trunk).__name__}: "
        f"{remedy}"
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
