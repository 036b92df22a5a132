"""Exact gradients over several processes.

Each process scores its own Q queries against the documents of all; its loss is the mean over its queries. The gradient of
the one-process batch is then the mean over processes, provided that documents carry gradient back to their owner:
`gather_with_gradient` sums what every process owes a document, `average_gradients` divides by W once per step.
`Accelerator.gather` carries no gradient and is for metrics only; the ways of getting this wrong differ by factors of W or,
worse, in direction.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgpt.runtime.errors import InputError

Made = TypeVar("Made")


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when not distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather_with_gradient(rows: Tensor) -> Tensor:
    """[rows, D] -> [W·rows, D], rank-major. Every process must hold the same number of rows."""
    return rows if world()[1] == 1 else _Gather.apply(rows)


def gather(rows: Tensor) -> Tensor:
    """As above without gradient, for hashes and numbers of any dtype."""
    if world()[1] == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world()[1])]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def from_main(make: Callable[[], Made]) -> Made:
    """What the main process makes, on all of them; or the InputError that it raises, so that none waits for it."""
    if world()[1] == 1:
        return make()
    made: list = [None, None]
    if world()[0] == 0:
        try:
            made[0] = make()
        except InputError as error:
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1]:
        raise made[1]
    return made[0]


def on_all(make: Callable[[], Made]) -> Made:
    """What each process makes for itself; where one raises an InputError, all do."""
    made, problem = None, None
    try:
        made = make()
    except InputError as error:
        problem = str(error)
    if world()[1] > 1:
        problems: list[str | None] = [None] * world()[1]
        dist.all_gather_object(problems, problem)
        problem = next((other for other in problems if other), None)
    if problem:
        raise InputError(problem)
    return made


def barrier() -> None:
    if world()[1] > 1:
        dist.barrier()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of `.grad` over processes, in place, one reduction a step. For biases that is kilobytes; no DDP wrapper is needed."""
    processes = world()[1]
    if processes == 1:
        return
    parameters = list(parameters)
    wide = torch.promote_types(parameters[0].dtype, torch.float32)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().to(wide) for p in parameters])
    dist.all_reduce(flat)
    flat /= processes
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
