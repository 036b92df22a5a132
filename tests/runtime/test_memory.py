"""Freed memory is used again: counted by the kernel, as page faults."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from sgpt.runtime.memory import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("not this C library")
for turn in range(40):
    if turn == 20:  # by now the heap has found its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB, 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_not_asked_for_again():
    returned, kept = (faults(how) for how in ("returned", "kept"))
    assert returned > 20 * 16_000
    assert kept < 100


def faults(how: str) -> int:
    ended = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    if "not this C library" in ended.stderr:
        pytest.skip("the C library is not glibc")
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)
