"""Long work that survives a kill, by any number of processes: mining, re-ranking and encoding.

Work is cut into blocks; process r of W takes the blocks r, r + W, … of those that remain. A finished block is a line in
`<output>.part-<rank>`, so a killed job loses only the blocks that were under way, and may be resumed by more or fewer
processes. `<output>.manifest.json` says what the blocks belong to, and at the end what came out.

    with Job(config, "results") as job:          one writer; the threads of the first start
        …                                        read and check everything; nothing is written yet
        if not job.start(inputs):                the manifest; refuses other inputs than at the first start
            return job.results                   it was finished before
        for block, items in job.blocks.remaining("block", n, size, title):
            job.blocks.append({"block": block, …})
        return job.finish(write)                 the main process writes the output, last of all that it is finished
"""

import glob
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from sgpt.runtime.distributed import barrier, from_main, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import lock, unlock, write_whole
from sgpt.runtime.progress import progress_bar
from sgpt.runtime.provenance import Inputs, check_same, differences, environment, recorded_threads, threads

BLOCK_KINDS = {  # the first key of a line in the part files -> what its number counts
    "block": "blocks of the output: of queries in mining, of documents in re-ranking, of texts in encoding",
    "documents": "blocks of documents that mining encodes before it ranks",
}
# Keys that may differ on resuming; how many threads really compute is compared by check_same.
_MAY_CHANGE = {"resume", "threads"}
_AS_STARTED = "tokens_per_pack"  # null takes what the job was started with, whatever suits this device


class Resumable(Protocol):
    """A dataclass of configuration. output: the file to write. threads: per process. resume: continue a killed job."""

    output: str
    threads: int | None
    resume: bool


class Job:
    """The protocol of one job, from its lock to its last file.

    All processes enter it, and call `start` and `finish` together. result: manifest key of what `write` gives to
    `finish`. scratch: endings of files next to the output that are removed with the blocks.
    Raises InputError, on all processes, while another start writes the same output.
    """

    def __init__(self, config: Resumable, result: str, scratch: Sequence[str] = ()) -> None:
        self.config, self.output, self.result, self.scratch = config, Path(config.output), result, scratch
        self.manifest: dict[str, Any] = {}
        self.resumed = False
        self._context = ExitStack()

    def __enter__(self) -> "Job":
        with ExitStack() as context:  # which ends what was entered when something below raises
            context.enter_context(sole_writer(self.output))
            self.manifest = _read_manifest(self.config)
            self.resumed = bool(self.manifest)
            context.enter_context(threads(self.config.threads or recorded_threads(self.manifest)))
            self._context = context.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    @property
    def results(self) -> dict[str, Any]:
        """Of a finished job: what `write` returned to `finish`; {} on all but the main process."""
        return self.manifest[self.result] if world()[0] == 0 else {}

    def start(self, inputs: Inputs, keep: Mapping[str, str] | None = None) -> bool:
        """Whether there is work to do; False where the job was finished before.

        inputs: everything that decides the result, but for the configuration; InputError where the job was started with
        other inputs, versions or threads. keep: ending -> text of files next to the output that a resumed job reads.
        """
        if self.resumed:
            check_same(self.output, self.manifest, inputs, otherwise="set output=<another path>")
        else:
            self.manifest = {"config": asdict(self.config), "inputs": dict(inputs), "environment": environment()}
        barrier()  # everybody has read the manifest, now the main process may write it
        if "finished" in self.manifest:
            self._remove_work()  # of a job that was killed while it removed them
            return False
        if world()[0] == 0 and not self.resumed:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._remove_work()  # of a job whose manifest somebody removed
            for ending, text in (keep or {}).items():
                write_whole(sibling(self.output, ending), text)
            self._write_manifest()
        barrier()  # the blocks of somebody else's job are gone: what is there now belongs to this one
        self.blocks = Blocks(self.output)
        barrier()  # everybody has read the blocks and shares out the same ones, now they may grow
        return True

    def finish(self, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Calls `write`, which writes the output, on the main process; what it returns there, and {} on the others."""
        barrier()  # everybody has written its blocks, and has read those that it needs: now they may be removed
        results: dict[str, Any] = {}
        if world()[0] == 0:
            results = write()
            finished = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self.manifest = {**self.manifest, self.result: results, "finished": finished}
            self._write_manifest()
            self._remove_work()
        barrier()  # the output is there when any process returns
        return results

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n"
        write_whole(sibling(self.output, ".manifest.json"), text)

    def _remove_work(self) -> None:
        """The blocks and the scratch files."""
        for file in (*_part_files(self.output), *(sibling(self.output, ending) for ending in self.scratch)):
            file.unlink(missing_ok=True)


class Blocks:
    """The finished blocks of a job, one JSON line each in the part files.

    A line's first key is a row of BLOCK_KINDS, its value the number of the block.
    done: kind -> block -> file and first byte of its line, as they were when this object was made: all processes then
    share out the same blocks.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.own = output, sibling(output, f".part-{world()[0]}")
        self.done: dict[str, dict[int, tuple[Path, int]]] = {kind: {} for kind in BLOCK_KINDS}
        for file in _part_files(output):
            whole = 0  # bytes of whole lines
            with file.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    kind, block = next(iter(_parsed(line, file, whole).items()))
                    self.done[kind][block] = file, whole
                    whole += len(line)
            # A kill tore the last line. Its owner cuts it off; the others have only read up to it.
            if file == self.own and whole < file.stat().st_size:
                os.truncate(file, whole)

    def missing(self, kind: str, items: int, size: int) -> list[int]:
        """The blocks of `size` items that are not done, the same on all processes."""
        return [block for block in range(math.ceil(items / size)) if block not in self.done[kind]]

    def remaining(self, kind: str, items: int, size: int, title: str) -> Iterator[tuple[int, slice]]:
        """This process's share of the blocks that are not done, each with its items; under a progress bar."""
        yield from own_share(self.missing(kind, items, size), size, title)

    def append(self, row: dict) -> None:
        """A block is done when its line is on the disk."""
        with self.own.open("ab") as out:
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())

    def read(self, block: int) -> dict:
        """The line of a block of kind `block`."""
        file, first_byte = self.done["block"][block]
        with file.open("rb") as lines:
            lines.seek(first_byte)
            return _parsed(lines.readline(), file, first_byte)

    def of_all_processes(self) -> "Blocks":
        """Those that all processes have written by now; all call it."""
        barrier()  # everybody has written its blocks
        return Blocks(self.output)

    def shared_file(self, kind: str, ending: str, create: Callable[[Path], None]) -> Path:
        """`<output><ending>`, which blocks of `kind` fill. Where it is missing it is created, and no block is done."""
        file = sibling(self.output, ending)
        if not file.is_file():
            self.done[kind].clear()
        barrier()  # everybody has looked for the file, now it may appear
        if world()[0] == 0 and not file.is_file():
            create(file)
        barrier()  # it is there for everybody
        return file


def own_share(missing: Sequence[int], size: int, title: str, *, alone: bool = False) -> Iterator[tuple[int, slice]]:
    """This process's share of blocks of `size` items, each with its items, under a progress bar. alone: all of them."""
    own = own_blocks(missing, alone=alone)
    with progress_bar(title, len(own)) as advance:
        for block in own:
            yield block, slice(block * size, (block + 1) * size)
            advance(1)


def own_blocks(missing: Sequence[int], *, alone: bool = False) -> Sequence[int]:
    """This process's share of them. alone: all."""
    rank, processes = (0, 1) if alone else world()
    return missing[rank::processes]


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """InputError, on all processes of this start, while another start writes `output`."""
    locks: list[FileLock] = []
    from_main(lambda: locks.append(lock(output, "set output=<another path>")))
    try:
        yield
    finally:
        for taken in locks:
            unlock(taken)


def sibling(output: Path, ending: str) -> Path:
    """The file next to `output` whose name is that of `output` with the ending."""
    return output.with_name(output.name + ending)


def _part_files(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*"))


def _parsed(line: bytes, file: Path, first_byte: int) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        raise InputError(
            f"{file}: the line that starts at byte {first_byte} is no JSON; "
            "delete this file and start again with resume=true, which computes its blocks again"
        ) from None


def _read_manifest(config: Resumable) -> dict:
    """Of `<output>.manifest.json`; {} where there is nothing to resume.

    InputError where something would be overwritten, or resumed without resume=true.
    """
    output = Path(config.output)
    file = sibling(output, ".manifest.json")
    manifest: dict = {}
    try:
        if file.is_file():
            manifest = json.loads(file.read_text(encoding="utf-8"))
            manifest["config"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{file} is damaged, so {output} cannot be resumed; put that file back, or set output=<another path>"
        ) from None
    if output.exists() and not config.resume:
        raise InputError(f"{output} exists; resume with resume=true, or set output=<another path>")
    if output.exists() and not manifest:
        raise InputError(f"{output} exists without {file}, so it cannot be resumed; set output=<another path>")
    if "finished" in manifest and not output.exists():
        return {}  # somebody removed the output
    if manifest and not config.resume:
        raise InputError(f"{output} is unfinished, see {file}; resume with resume=true, or set output=<another path>")
    if manifest and getattr(config, _AS_STARTED, 0) is None:
        setattr(config, _AS_STARTED, manifest["config"].get(_AS_STARTED))
    changed = differences(manifest["config"], asdict(config), _MAY_CHANGE) if manifest else []
    if changed:
        raise InputError(
            f"{output} was started with another configuration: {'; '.join(changed[:5])}. "
            "Resume it with that one, or set output=<another path>"
        )
    return manifest
