"""Fresh processes, one at a time, and what a process can say of its own time and memory."""

import ctypes
import gc
import hashlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from measure.given import REPOSITORY, Setting

MB = 2**20


def fresh(function: Callable[..., dict], setting: Setting, *arguments) -> dict:
    """`function` of one of the benchmarks, with its arguments as JSON, in a process that ran nothing before.

    A row {"failed": …} when it needs more than nine tenths of the memory that is free.
    """
    room = psutil.virtual_memory().available * 9 // 10
    with tempfile.NamedTemporaryFile(dir=setting.folder) as answer:
        module = Path(sys.argv[0]).stem if function.__module__ == "__main__" else function.__module__
        call = [module, function.__name__, str(room), answer.name, json.dumps([asdict(setting), *arguments])]
        ended = subprocess.run(
            [sys.executable, "-m", __name__, *call], env=_environment(setting.threads), capture_output=True, text=True
        )
        if ended.returncode == 0:
            return json.load(answer) | {"source": source_hash(), "load": os.getloadavg()[0]}
    if ended.returncode == -9 or "allocate memory" in ended.stderr or "MemoryError" in ended.stderr:
        return {"failed": f"does not fit into {room / 1e9:.1f} GB", "source": source_hash()}
    raise RuntimeError(f"{function.__name__}{tuple(arguments)} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")


def _environment(threads: int) -> dict[str, str]:
    """The same on both sides."""
    number, here = str(threads), str(Path(__file__).parents[1])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "RAYON_NUM_THREADS": number, "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


def _answer(module: str, name: str, room: str, answer: str, arguments: str) -> None:
    """What `fresh` runs."""
    if sys.platform == "linux":
        # an error of ours instead of a killed machine
        resource.setrlimit(resource.RLIMIT_DATA, (int(room), resource.RLIM_INFINITY))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    Path(answer).write_text(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))


def source_hash() -> str:
    """Of the framework as it lies there: rows of different sources are not compared."""
    digest = hashlib.sha256()
    for file in sorted((REPOSITORY / "sgpt").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def settle() -> int:
    """Resident bytes now, once freed memory is handed back; the peak is counted anew from here."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """Largest resident size since `settle`; elsewhere than on Linux, since the process began."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Filled on leaving: seconds of the clock, `wall`, and of all threads of this process, `cpu`."""
    spent: dict[str, float] = {}
    cpu, wall = time.process_time(), time.perf_counter()
    yield spent
    spent.update(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
