"""What a killed run leaves behind, and how the next one goes on with it: mining and re-ranking.

Work is cut into blocks; process r of W takes the blocks r, r + W, … of those that are left. A finished block is a line in
`<output>.part-<rank>`, and a killed run loses the blocks that were under way. Any number of processes goes on.
`<output>.manifest.json` says what the parts belong to, and at the end what was made.
"""

import glob
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from sgpt.runtime.distributed import from_main, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import held, let_go, write_whole
from sgpt.runtime.progress import progress_bar
from sgpt.runtime.provenance import Inputs, check_same, differences, environment

MAY_CHANGE = {"resume", "threads"}  # keys; of threads the number that computes counts, and it is compared apart


class Resumable(Protocol):
    """A dataclass of configuration. output: the file that is made. resume: go on with what is there."""

    output: str
    resume: bool


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """InputError, on all processes of this start, while another start writes `output`."""
    locks: list[FileLock] = []
    from_main(lambda: locks.append(held(output, "another output=")))
    try:
        yield
    finally:
        for lock in locks:
            let_go(lock)


def beside(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)


class Parts:
    """JSON lines, one a block; the first key is its kind: `block`, or `documents` for those that mining encodes beforehand.

    done: kind -> block -> file and byte of its line, as it was when this was made: all processes then share out the same blocks.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.own = output, beside(output, f".part-{world()[0]}")
        self.done: dict[str, dict[int, tuple[Path, int]]] = {"documents": {}, "block": {}}
        for file in _part_files(output):
            whole = 0
            with file.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    kind, block = next(iter(_parsed(line, file, whole).items()))
                    self.done[kind][block] = file, whole
                    whole += len(line)
            if file == self.own and whole < file.stat().st_size:  # a kill tore the last line; the others only read up to it
                os.truncate(file, whole)

    def left(self, kind: str, items: int, size: int, title: str) -> Iterator[tuple[int, slice]]:
        """This process's share of the blocks that are not done, each with its items; under a progress bar."""
        rank, processes = world()
        own = [block for block in range(math.ceil(items / size)) if block not in self.done[kind]][rank::processes]
        with progress_bar(title, len(own)) as advance:
            for block in own:
                yield block, slice(block * size, (block + 1) * size)
                advance(1)

    def append(self, row: dict) -> None:
        with self.own.open("ab") as out:
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())

    def read(self, block: int) -> dict:
        """The line of a block of kind `block`."""
        file, place = self.done["block"][block]
        with file.open("rb") as lines:
            lines.seek(place)
            return _parsed(lines.readline(), file, place)


def _parsed(line: bytes, file: Path, place: int) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        raise InputError(f"{file}: damaged at byte {place}; delete this file and resume, its blocks are done again") from None


def _part_files(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*"))


def remove_parts(output: Path) -> None:
    for file in _part_files(output):
        file.unlink(missing_ok=True)


def read_manifest(config: Resumable) -> dict:
    """Of `<output>.manifest.json`; {} when nothing is there to go on with. Refuses what is there unless told to resume."""
    output = Path(config.output)
    file = beside(output, ".manifest.json")
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if output.exists() and not config.resume:
        raise InputError(f"{output} exists; go on with resume=true, or choose another output=<file>")
    if output.exists() and not manifest:
        raise InputError(f"{output} exists and was not made here: there is no {file}; choose another output=<file>")
    if "finished" in manifest and not output.exists():
        return {}  # somebody removed the rows
    if manifest and not config.resume:
        raise InputError(f"{file} belongs to a killed run; go on with resume=true, or choose another output=<file>")
    if manifest and (changed := differences(manifest["config"], asdict(config), MAY_CHANGE)):
        raise InputError(f"{output} was begun with another configuration: {'; '.join(changed[:5])}. Resume it unchanged, or choose another output=<file>")
    return manifest


def begin(config: Resumable, manifest: dict, inputs: Inputs) -> dict[str, Any]:
    """The manifest of this job: the one that is there, when its inputs are these and it has as many threads; else a new one."""
    if manifest:
        check_same(Path(config.output), manifest, inputs, otherwise="choose another output=<file>")
        return manifest
    return {"config": asdict(config), "inputs": dict(inputs), "environment": environment()}


def write_manifest(output: Path, manifest: dict) -> None:
    write_whole(beside(output, ".manifest.json"), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
