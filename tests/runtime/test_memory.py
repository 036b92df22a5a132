"""Freed memory is used again: counted by the kernel, as page faults. Few compiled kernels are kept: resident memory."""

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


KERNELS = """
import psutil, sys, torch
from sgpt.runtime.memory import keep_few_kernels
if sys.argv[1] == "few":
    keep_few_kernels()
torch.manual_seed(0)
layer, process = torch.nn.Linear(64, 64, dtype=torch.bfloat16), psutil.Process()
with torch.no_grad():
    results = [layer(torch.ones(1, 64, dtype=torch.bfloat16))]
    before = process.memory_info().rss
    results += [layer(torch.ones(length, 64, dtype=torch.bfloat16))[:1] for length in range(2, 302)]
print(process.memory_info().rss - before, float(torch.cat(results).double().sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_not_asked_for_again():
    returned, kept = (int(printed(FAULTS, how)[0]) for how in ("returned", "kept"))
    assert returned > 20 * 16_000
    assert kept < 100


def test_few_compiled_kernels_are_kept_and_results_stay():
    (many_bytes, many_sum), (few_bytes, few_sum) = (printed(KERNELS, how) for how in ("many", "few"))
    if int(many_bytes) < 100e6:
        pytest.skip("this processor's products in bfloat16 compile no kernel for each length")
    assert int(few_bytes) < 0.4 * int(many_bytes)
    assert few_sum == many_sum


def printed(script: str, how: str) -> list[str]:
    ended = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True)
    if "not this C library" in ended.stderr:
        pytest.skip("the C library is not glibc")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()
