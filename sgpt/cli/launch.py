"""Starting up: threads, precision, seeds, logging, trackers."""

import logging
import os
import re
from contextlib import nullcontext
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

from sgpt.runtime import interrupt
from sgpt.runtime.device import prepare_gpu
from sgpt.runtime.distributed import introduce_processes
from sgpt.runtime.errors import InputError
from sgpt.runtime.memory import keep_few_kernels
from sgpt.runtime.provenance import set_threads
from sgpt.training.config import TrainConfig
from sgpt.training.trackers import check_tracker

PROCESS_TIMEOUT = timedelta(hours=6)  # the others wait while one process evaluates, harvests or exports


def start(config: TrainConfig, recorded_threads: int | None = None) -> Accelerator:
    """The accelerator of a training run. recorded_threads: of the run that is resumed, which takes as many again."""
    return accelerate(
        precision=config.trainer.precision,
        seed=config.trainer.seed,
        threads=config.trainer.threads or recorded_threads,
        tracker=config.logging.tracker,
        folder=f"{config.runs}/{config.name}",
        deterministic=config.trainer.deterministic,
    )


def accelerate(
    *,
    precision: str,
    seed: int,
    threads: int | None = None,
    tracker: str | None = None,
    folder: str | None = None,
    deterministic: bool = False,
) -> Accelerator:
    """Everything that is global to a process, set once. deterministic: the same bits each time on a GPU, too."""
    check_tracker(tracker)
    _refuse_wrappers()
    keep_few_kernels()
    with interrupt.ending_at_once() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else nullcontext():
        accelerator = Accelerator(  # which waits for the other processes
            mixed_precision="bf16" if precision == "bf16" else "no", log_with=tracker, project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        )
    _check_processes(accelerator.num_processes)
    introduce_processes()
    if accelerator.device.type == "cuda":
        prepare_gpu(deterministic=deterministic)
    # `accelerate launch` gives every process one thread unless told otherwise
    set_threads(threads or max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    set_seed(seed)  # before any weight is made (LoRA's), the same on every process
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("sgpt").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return accelerator


def _refuse_wrappers() -> None:
    """InputError where accelerate was told to share out a model by wrapping it: nothing is wrapped here, so each
    process would hold all of it, and accelerate would say nothing.
    """
    for wrapper in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{wrapper}") == "true":
            raise InputError(
                f"accelerate's distributed_type: {wrapper} has no effect, since only biases learn and nothing is "
                "wrapped; start by configs/accelerate/fsdp2.yaml, with trainer.shard_trunk=true where the trunk does "
                "not fit one GPU"
            )


def _check_processes(running: int) -> None:
    """InputError when fewer run together than were asked for: without a GPU, launchers start one or leave each alone,
    and say nothing.
    """
    command = " ".join(interrupt.typed_command())
    stated = re.search(r" --num_processes[= ](\d+)", command)
    asked = max(int(os.environ.get("WORLD_SIZE", "1")), int(stated[1]) if stated else 1)
    if running < asked:
        raise InputError(
            f"{asked} processes were asked for, and {running} runs by itself. On a CPU start them as "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked} --main_process_port 0 …"
        )
