"""Freed memory is kept for the next tensor.

glibc hands large blocks back to the system when they are freed and asks for them anew a moment later; the system clears
every page of them again. A training step on a CPU makes and frees gigabytes of such blocks: a tenth of its time went
there (benchmarks/RESULTS.md).
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt(3)


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
