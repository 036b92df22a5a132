"""Exact gradients over several processes.

Each process scores its own Q queries against the documents of all; its loss is the mean over its queries. The gradient
of the one-process batch is then the mean over processes, provided that documents carry gradient back to their owner:
`gather_with_gradient` sums what every process owes a document, `average_gradients` divides by W once per step.
`gather` carries no gradient and is for hashes and metrics only; the ways of getting this wrong differ by factors of W
or, worse, in direction.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgpt.runtime.errors import InputError

Result = TypeVar("Result")


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when not distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.shape = rows.shape
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # what each process owes the others' rows goes straight to their owners: half of the bytes of an all-reduce, and
        # on a slow link half of its delay
        owed = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(owed, gradient.contiguous())
        return owed.view(-1, *ctx.shape).sum(0)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """[rows, D] -> [W·rows, D], rank-major. Every process must hold the same number of rows."""
    return rows if world()[1] == 1 else _Gather.apply(rows)


def gather(rows: Tensor) -> Tensor:
    """As `gather_with_gradient`, but without gradient: for hashes and numbers of any dtype."""
    if world()[1] == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world()[1])]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def from_main(compute: Callable[[], Result]) -> Result:
    """The result of the main process, on all of them; or the InputError that it raises, so that none waits for it."""
    if world()[1] == 1:
        return compute()
    result_and_error: list = [None, None]
    if world()[0] == 0:
        try:
            result_and_error[0] = compute()
        except InputError as error:
            result_and_error[1] = error
    dist.broadcast_object_list(result_and_error)
    result, error = result_and_error
    if error:
        raise error
    return result


def on_all(compute: Callable[[], Result]) -> Result:
    """Each process's own result; where one raises an InputError, all do, so that none waits for it."""
    result, problem = None, None
    try:
        result = compute()
    except InputError as error:
        problem = str(error)
    if world()[1] > 1:
        problems: list[str | None] = [None] * world()[1]
        dist.all_gather_object(problems, problem)
        problem = next((other for other in problems if other), None)
    if problem:
        raise InputError(problem)
    return result


def barrier() -> None:
    """Waits until all processes have come here."""
    if world()[1] > 1:
        dist.barrier()


@dataclass(frozen=True)
class Peer:
    """A process of the run, and by what it is known on its machine."""

    rank: int
    host: str
    pid: int
    started: float


_peers: list[Peer] = []


def introduce_processes() -> None:
    """All processes tell each other what they are, so that `lost_processes` can name those that have ended."""
    if world()[1] > 1:
        own = Peer(world()[0], socket.gethostname(), os.getpid(), psutil.Process().create_time())
        everyone: list = [None] * world()[1]
        dist.all_gather_object(everyone, own)
        _peers[:] = everyone


def lost_processes(patience: float = 0.0) -> list[int]:
    """Ranks of the processes that have ended on this machine; those of others cannot be asked.

    patience: seconds until one is there, since its connections are closed before it has ended.
    """
    end = time.monotonic() + patience
    here = [peer for peer in _peers if peer.host == socket.gethostname()]
    while not (lost := [peer.rank for peer in here if _has_ended(peer)]) and time.monotonic() < end:
        time.sleep(0.05)
    return lost


def _has_ended(peer: Peer) -> bool:
    try:
        process = psutil.Process(peer.pid)
        return process.create_time() != peer.started or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces `.grad` by its mean over processes, with one reduction.

    Of biases that is kilobytes, so no DDP wrapper is needed. A parameter without gradient on this process counts as
    zero. The sum is at least in float32.
    """
    processes = world()[1]
    if processes == 1:
        return
    parameters = list(parameters)
    wide = torch.promote_types(parameters[0].dtype, torch.float32)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten().to(wide) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
