"""What a result depends on besides its configuration, and how whoever resumes it knows that it is still the same.

A training run, mining, re-ranking and encoding record three things in their manifest when they start:

    inputs        by name, a hash of the content: training data, test sets, base model, tokenizer, first stage …
    environment   versions of the libraries that compute, the commit, the machine, the threads of each process
    config        compared by its owner

Resumed, they take as many threads as before and refuse other inputs or versions by name. Sums of floating-point numbers
differ in their last bits with the number of threads, the version and the processor, so "bit for bit" is a promise at
equal numbers of these. Another processor is logged and not refused: a run may have to move to another machine.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from sgpt.runtime.errors import InputError

log = logging.getLogger(__name__)
Inputs = Mapping[str, str | int]  # name -> hash of the content, or a number
VERSIONS = ("torch", "transformers", "tokenizers", "peft", "numpy", "accelerate", "datasets", "safetensors")
COMPUTING = ("torch", "transformers", "tokenizers", "peft", "numpy")  # another version can give another result
SHOWN = 12  # characters of a hash in messages
EXACT_PROCESSES = "dropout and last bits belong to their number; several may share a machine"
DISPATCH = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")  # choose other kernels


def environment() -> dict[str, Any]:
    """Versions, commit, machine and threads, for a manifest."""
    import torch

    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONS},
        },
        "commit": _commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": _processor(),
        "instruction set": _instruction_set(),
        "threads": torch.get_num_threads(),
    }


def computing_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in COMPUTING}


def check_same(where: Path, manifest: Mapping[str, Any], inputs: Inputs, *, otherwise: str) -> None:
    """Raises InputError, naming them, where inputs, versions or threads of what is to be resumed are others now.

    manifest: of the first start; of what is finished the inputs alone count. otherwise: what to do where they cannot be
    restored, the end of the sentence. Another processor or commit is logged, as last bits may differ from here on.
    """
    if "inputs" not in manifest or "processor" not in manifest.get("environment", {}):
        raise InputError(
            f"{where} has no record of its inputs (manifest.json was deleted, or is of an older version), so it cannot "
            f"be resumed; {otherwise}"
        )
    then, now = manifest["environment"], environment()
    changed = _changed_inputs(manifest["inputs"], inputs)
    if "finished" not in manifest:
        changed += changed_environment(then, now)
    if changed:
        raise InputError(
            f"{where} was started with other inputs or in another environment: {'; '.join(changed[:8])}. "
            f"Restore that and resume, or {otherwise}"
        )
    for what in ("processor", "instruction set", "device", "commit"):
        if "finished" not in manifest and then[what] != now[what]:
            message = "%s: its %s was %s and is %s now; last bits may differ from here on"
            log.warning(message, where, what, then[what], now[what])


def _changed_inputs(before: Inputs, now: Inputs) -> list[str]:
    changed = []
    for name in {**before, **now}:
        if name not in now:
            changed.append(f"{name} was an input and is none now")
        elif name not in before:
            changed.append(f"{name} was no input and is one now")
        elif before[name] != now[name]:
            then_now = f"{str(before[name])[:SHOWN]} -> {str(now[name])[:SHOWN]}"
            is_number = isinstance(now[name], int)
            reason = f" ({EXACT_PROCESSES})" if name == "processes" else ""
            changed.append(f"{name} {then_now}{reason}" if is_number else f"{name} has changed (hash {then_now})")
    return changed


def changed_environment(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two environments that give other numbers, in words."""
    changed = []
    for name in COMPUTING:
        before, after = then["versions"].get(name), now["versions"][name]
        if before != after:
            changed.append(f"{name} {before} -> {after} (pip install {name}=={before})")
    if (then["device"] == "cpu") != (now["device"] == "cpu"):
        changed.append(f"device {then['device']} -> {now['device']}")
    elif now["device"] == "cpu" and then["threads"] != now["threads"]:
        changed.append(f"threads {then['threads']} -> {now['threads']}")
    return changed


def differences(before: Mapping, now: Mapping, may_change: Iterable[str] = (), prefix: str = "") -> list[str]:
    """One `key: then -> now` for every key of two configurations that differs, but for those that may."""
    changed: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        name, then, value = prefix + key, before.get(key), now.get(key)
        if name in may_change:
            continue
        if isinstance(then, dict) and isinstance(value, dict):
            changed += differences(then, value, may_change, f"{name}.")
        elif then != value:
            changed.append(f"{name}: {then} -> {value}")
    return changed


def flat(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, str | int | float | bool]:
    """The tree's numbers and texts under joined names, as tables and trackers take them."""
    leaves: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, separator, f"{prefix}{key}{separator}")
        else:
            leaves[prefix + key] = value if isinstance(value, str | int | float | bool) else str(value)
    return leaves


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with so many threads; None leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    set_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_threads(count: int) -> None:
    """For this process, from now on. A warning where the system does not give as many (OMP_THREAD_LIMIT)."""
    import torch

    torch.set_num_threads(count)
    given = torch.get_num_threads()
    if given != count:
        log.warning("%d threads were asked for and %d are given, so last bits may differ", count, given)


def recorded_threads(manifest: Mapping[str, Any]) -> int | None:
    """The threads of each process in a manifest; None in one that is empty."""
    return manifest.get("environment", {}).get("threads")


def content_hash(*tables: Mapping | Iterable) -> str:
    """A hash of mappings and sequences of anything that JSON takes, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for table in tables:
        for entry in table.items() if isinstance(table, Mapping) else table:
            digest.update(json.dumps(entry).encode() + b"\n")
        digest.update(b"\0")
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def weights_hash(parameters: Mapping[str, Any]) -> str:
    """A hash of every bit of tensors by name; 1.5 GB a second, a fraction of the time to read them from disk."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(parameters):
        value = parameters[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_hash(tokenizer) -> str:
    """A hash of a tokenizer's vocabulary, rules and special tokens."""
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return content_hash([tokenizer_rules(tokenizer)], special_tokens)


def tokenizer_rules(tokenizer) -> str:
    """What decides token ids, as text: tokenizer.json, or the vocabulary and settings of a tokenizer in Python."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        return backend.to_str()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=itemgetter(1))
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if not key.endswith(("_file", "_or_path"))}
    return repr((type(tokenizer).__name__, vocabulary, sorted(settings.items())))


def _processor() -> str:
    """The model as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _instruction_set() -> str:
    """The instruction set that torch computes with, and the variables that lower it."""
    import torch

    lowered = [f"{name}={os.environ[name]}" for name in DISPATCH if name in os.environ]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *lowered])


def _commit() -> str | None:
    """Commit of this checkout, with a + when files were changed; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status_command = [*git, "status", "--porcelain", "--untracked-files=no"]
        status = subprocess.run(status_command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout else "")
