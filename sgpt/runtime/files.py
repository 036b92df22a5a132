"""Files that are whole or not there, also when two processes make the same one."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import xxhash
from filelock import FileLock, Timeout

from sgpt.runtime.errors import InputError

MOST_FILES = 20_000  # below a folder of one data set: more are a whole disk, or a folder that was meant for something else


def files_below(folder: Path) -> list[Path]:
    """By name, in linked folders too. InputError where there are so many that it cannot be the folder of a data set."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        found += [Path(place, name) for name in names]
        if len(found) + len(folders) > MOST_FILES or place.count(os.sep) > 100:
            raise InputError(f"{folder}: more than {MOST_FILES:,} files are below it, so it is no folder of one data set; give the data's own folder")
    return sorted(found)


def may_be_hub_id(path: str) -> bool:
    """`name` or `owner/name`, as the model hub has them; anything else is a path of this machine and need not be asked for."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None


def make_once(path: Path, is_there: Callable[[], bool], make: Callable[[], None]) -> None:
    """`make()` of `path` unless `is_there()`. Of several processes of this machine one makes it; the others wait and find it there.

    The lock is a file beside it, `.<name>.lock`; the system lets go of it when its process dies, however that happens.
    """
    if is_there():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_of(path)):
        try:
            if not is_there():
                make()
        finally:
            _lock_of(path).unlink(missing_ok=True)  # still held: who waits for it sees that it is gone, and takes a new one


def held(path: Path, key: str = "another place") -> FileLock:
    """`path` for this process alone for as long as the lock that is returned lives. InputError when another one has it, or nobody can.

    key: by which another place is chosen.
    """
    check_place(path, key)
    lock = FileLock(_lock_of(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{path}: another process is writing it now; wait for it, or choose another name") from None
    return lock


def check_place(path: Path, key: str = "another place") -> None:
    """Makes the folder that `path` is to be in. InputError where nothing can be written. key: by which another place is chosen."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: nothing can be written there ({error.strerror}); choose {key}") from None


def let_go(lock: FileLock) -> None:
    """Of `held`, with its file."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _lock_of(path: Path) -> Path:
    if not path.name:
        raise InputError(f"{path}: has no name, so nothing can be made in its place; name a file or a folder in it")
    return path.with_name(f".{path.name}.lock")


def reserve(file: BinaryIO, size: int, place: str) -> None:
    """Disk for the first `size` bytes: who writes into the map of a sparse file dies without a word when the disk is full. InputError now."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise InputError(f"{place}: no room for {size / 1e9:.2f} GB of embeddings ({error.strerror})") from None


def write_whole(file: Path, text: str) -> None:
    """Writes beside and renames, so a killed run leaves no half file."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def ordinary_permissions(folder: Path) -> None:
    """Files below a folder that `mkdir` made may be read by whom the folder is open to: safetensors writes for the owner alone (0600)."""
    may_read = folder.stat().st_mode & 0o666  # what umask, or the folder around it, left of 0777
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(may_read)


def hash_of(file: Path) -> str:
    """Of every byte (XXH3, 128 bits): any damage is seen, no forgery. 14 GB/s, where weights are read at 1 to 3."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def replace_folder(temporary: Path, folder: Path) -> None:
    """Gives a whole folder its name. The one that had it goes only afterwards: a kill leaves it as `.<name>.old`."""
    ordinary_permissions(temporary)
    old = _put_aside(folder)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Under another name, so that a killed removal leaves no half folder of this name."""
    shutil.rmtree(_put_aside(folder), ignore_errors=True)


def _put_aside(folder: Path) -> Path:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    return old
