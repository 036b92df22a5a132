"""The GPU that computes, where there is one, and what it is told before its first use."""

import os
import warnings

import torch


def default_device() -> str:
    """`cuda` where there is a GPU, which is prepared, else `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    prepare_gpu()
    return "cuda"


def prepare_gpu(*, deterministic: bool = False) -> None:
    """For this process, before the first computation on a GPU.

    deterministic: the same bits each time, as resuming promises. FlashAttention's and the memory-efficient backward
    pass add up in any order otherwise.
    """
    # a backward pass runs in a thread of its own, which has no context before its first product
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS wants it for the same bits
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it
