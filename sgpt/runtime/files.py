"""Files that are whole or not there, also when two processes make the same one."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from sgpt.runtime.errors import InputError

REPLACED = ".replaced"  # ending of the old folder while a new one gets its name
MOST_FILES = 20_000  # below a folder of one data set: more are a whole disk, or a folder for something else


def files_below(folder: Path) -> list[Path]:
    """All files by name, in linked folders too. InputError where they are too many for the folder of one data set."""
    files: list[Path] = []
    for current, folders, names in os.walk(folder, followlinks=True):
        files += [Path(current, name) for name in names]
        # A link to a folder above makes the tree endless: it shows by its depth.
        if len(files) + len(folders) > MOST_FILES or current.count(os.sep) > 100:
            raise InputError(
                f"{folder}: more than {MOST_FILES:,} files are below it, so it is no folder of one data set; "
                "give the data's own folder"
            )
    return sorted(files)


def may_be_hub_id(path: str) -> bool:
    """Whether it is `name` or `owner/name`, as the model hub has them; anything else is a path of this machine."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None


def make_once(path: Path, is_there: Callable[[], bool], make: Callable[[], None]) -> None:
    """`make()` of `path` unless `is_there()`. Of several processes of this machine one makes it, while the others wait.

    The lock is a file next to it, `.<name>.lock`; the system releases it when its process dies, however that happens.
    """
    if is_there():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_of(path)):
        try:
            if not is_there():
                make()
        finally:
            # Still locked: whoever waits for it sees that the file is gone, and takes a new one.
            _lock_of(path).unlink(missing_ok=True)


def lock(path: Path, remedy: str = "choose another folder") -> FileLock:
    """Reserves `path` for this process until `unlock`, or until the process ends.

    Raises InputError when another process has it, or nothing can be written. remedy: ends the message with what to do,
    "set output=<another file>".
    """
    check_writable(path, remedy)
    taken = FileLock(_lock_of(path))
    try:
        taken.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{path}: another process is writing to it; wait until that ends, or {remedy}") from None
    return taken


def refuse_unwritable(path: Path, remedy: str) -> None:
    """InputError where it is seen without writing that `path` cannot be made or written; remedy: as for `lock`."""
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"{path} cannot be written ({nearest} is no folder); {remedy}")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{path} cannot be written (nothing can be in {nearest}); {remedy}")


def check_writable(path: Path, remedy: str = "choose another folder") -> None:
    """Makes the folder of `path`; InputError where nothing can be written in it. remedy: as for `lock`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); {remedy}") from None


def unlock(taken: FileLock) -> None:
    """Gives back what `lock` returned, and removes its file."""
    Path(taken.lock_file).unlink(missing_ok=True)  # before the release: afterwards it may be somebody else's
    taken.release()


def _lock_of(path: Path) -> Path:
    if not path.name:
        raise InputError(f"{path} has no name, so nothing can be written in its place; name a file or a folder in it")
    return path.with_name(f".{path.name}.lock")


def reserve(file: BinaryIO, size: int, owner: str) -> None:
    """Takes the disk for the first `size` bytes; InputError, about `owner`, where there is no room.

    A process that writes into the map of a sparse file is killed without a word (SIGBUS) when the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise InputError(f"{owner}: no room for {size / 1e9:.2f} GB of embeddings ({error.strerror})") from None


def write_whole(file: Path, text: str) -> None:
    """Writes under a temporary name and renames, so a killed run leaves no half file."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def ordinary_permissions(folder: Path) -> None:
    """Files below `folder` may be read by whom the folder is open to: safetensors writes for the owner alone (0600)."""
    may_read = folder.stat().st_mode & 0o666  # what umask, or the folder around it, left of 0777
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(may_read)


def hash_of(file: Path) -> str:
    """A hash of every byte (XXH3, 128 bits): it shows damage, not forgery; 14 GB/s, weights are read at 1 to 3."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hash_of_numbers(numbers: np.ndarray) -> str:
    """As `hash_of`, of an array's bytes."""
    return xxhash.xxh3_128(np.ascontiguousarray(numbers)).hexdigest()


def replace_folder(temporary: Path, folder: Path) -> None:
    """Gives a whole folder its name. The one that had it is removed after that, and its name until then is
    `.<name>.replaced`: `put_back` undoes what a kill between the two has left.
    """
    ordinary_permissions(temporary)
    old = _put_aside(folder, REPLACED)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def put_back(parent: Path) -> None:
    """Folders of `parent` that a killed `replace_folder` was about to replace get their names again.

    Nobody else may be writing there.
    """
    for old in parent.glob(f".*{REPLACED}"):
        folder = parent / old.name.removeprefix(".").removesuffix(REPLACED)
        if folder.exists():  # the kill came later
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)


def remove_folder(folder: Path) -> None:
    """Removes it under another name, so that a kill leaves no half folder of this name."""
    shutil.rmtree(_put_aside(folder, ".removed"), ignore_errors=True)


def _put_aside(folder: Path, ending: str) -> Path:
    old = folder.with_name(f".{folder.name}{ending}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    return old
