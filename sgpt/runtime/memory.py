"""Freed memory is kept for the next tensor, compiled kernels are not kept for lengths that hardly come again.

glibc hands large blocks back to the system when they are freed and asks for them anew a moment later; the system clears
every page of them again. A training step on a CPU makes and frees gigabytes of such blocks: a tenth of its time went
there (benchmarks/RESULTS.md).
"""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt(3)
KERNELS = 64  # of the layers of one or two packs, forward and backward


def keep_freed_memory() -> bool:
    """For this process, from now on: what it needed at its peak it keeps until it ends.

    False where the C library is not glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Large blocks come from the heap as well, and its end is never handed back; 1 means that it was accepted.
    return mallopt(MMAP_MAX, 0) == 1 and mallopt(TRIM_THRESHOLD, -1) == 1


def return_freed_memory() -> None:
    """Hands what this process has freed back to the system now; where the C library is not glibc, it does as it does.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def keep_few_kernels() -> None:
    """For this process, before its first product in half precision on a CPU; results stay as they are.

    oneDNN compiles a kernel for each length of a pack, 0.7 MB each, and keeps 1,024 of them unless told otherwise: more
    memory than a small base takes to train, and hardly any length comes again.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and PyTorch's over it
        os.environ.setdefault(variable, str(KERNELS))
