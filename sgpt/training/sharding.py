"""A trunk that does not fit one GPU: FSDP2 shares out its frozen weights, and what learns stays whole in every process.

Each process keeps 1/W of the frozen weights, and all of a block's only while it computes that block. The biases stay
as they are, in float32, and `average_gradients` averages them as ever, so training is the same. As every pass through
a block is an exchange now, all processes make as many, in one order: `in_step` and `agreed`.
"""

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from sgpt.decoder.families import block_of
from sgpt.decoder.packing import Pack
from sgpt.decoder.quantised import quantised_dtype
from sgpt.runtime.distributed import gather, world
from sgpt.runtime.errors import InputError
from sgpt.training.tuning import trainable_parameters


def check_shardable(trunk: nn.Module) -> None:
    """InputError where there is nothing that FSDP could share out. After `tune`."""
    if world()[1] == 1:
        raise InputError("trainer.shard_trunk=true with one process shares out nothing; start several, or set it false")
    if dtype := quantised_dtype(trunk):
        raise InputError(f"trainer.shard_trunk=true: FSDP takes no {dtype} weights; set model.dtype=bfloat16")
    if all(parameter.requires_grad for parameter in trunk.parameters()):
        raise InputError("trainer.shard_trunk=true shares out what is frozen, and all weights learn; set tuning=bitfit")


def shard_frozen(trunk: nn.Module, device: torch.device) -> None:
    """Shares out the frozen weights block by block, each moved to the device when its turn comes. In place."""
    # the trunk's result is a view, which nobody writes to
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (world()[1],))
    learning = {parameter for parameter in trunk.parameters() if parameter.requires_grad}
    for name, module in list(trunk.named_modules()):
        if name.rpartition(".")[2].isdecimal() and block_of(name) is None:  # a block, not an expert inside of one
            fully_shard(module, mesh=mesh, ignored_params=learning)
    fully_shard(trunk, mesh=mesh, ignored_params=learning)
    trunk.to(device)


@torch.no_grad()
def copy_learned(sharded: nn.Module, whole: nn.Module) -> nn.Module:
    """`whole`, the same base tuned alike, with what `sharded` has learned, on the CPU."""
    learned = trainable_parameters(sharded)
    for name, parameter in trainable_parameters(whole).items():
        parameter.copy_(learned[name])
    return whole


def is_sharded(trunk: nn.Module) -> bool:
    return isinstance(trunk, FSDPModule)


def in_step(trunk: nn.Module, packs: list[Pack]) -> list[Pack]:
    """The packs, and where the trunk is sharded the last one again until every process has as many."""
    if not is_sharded(trunk):
        return packs
    most = int(gather(torch.tensor([len(packs)], device=packs[0].input_ids.device)).max())
    return packs + [packs[-1]] * (most - len(packs))


def agreed(trunk: nn.Module, answer: bool, device: torch.device) -> bool:
    """Whether every process says yes, where the trunk is sharded; this process's own answer otherwise."""
    return bool(gather(torch.tensor([answer], device=device)).all()) if is_sharded(trunk) else answer
