"""What goes wrong around a script and not in it, as one sentence.

That is files, disks, memory, the network, and output that nobody reads. Libraries say these in exceptions of their own,
some in words alone. What is none of these is a fault of ours: it keeps its traceback. Imports nothing heavy.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT}
OF_A_PATH = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENODEV, errno.ESTALE, errno.EIO,
    errno.ENOTEMPTY,
}  # fmt: skip
# gloo's and NCCL's, when a process at the other end is gone
CONNECTION = re.compile(r"gloo|NCCL|TCPStore|Connection (closed|reset|refused) by|Broken pipe", re.IGNORECASE)
UNNAMED = -1  # a write that failed, of which the library does not say why
# Rust's and Arrow's; Python's own have it as a number
STATED_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)|Os \{ code: (\d+)", re.IGNORECASE)
# torch's and numpy's
WRITING = re.compile(
    r"PytorchStreamWriter|inline_container.*unexpected pos|iostream error|\d+ requested and \d+ written"
)
UNFINISHED = re.compile(r"\.(.+)\.(?:lock|tmp|old|building)")  # next to what it is to become
LOST_SECONDS = 2  # from the end of its connections to the end of a process
ON_THE_SAME_GPU = re.compile(r"Process \d+ has ([\d.]+ [KMG]iB) memory in use\. ?")
NETWORK = {"requests", "httpx", "httpcore", "urllib3", "urllib", "aiohttp", "socket"}
OURS = str(Path(__file__).parents[2])
PRINTING = (
    str(Path(__file__).with_name("command.py")),
    *(str(Path(find_spec(name).origin).parent) for name in ("rich", "hydra")),
)


def describe_failure(error: BaseException, config: Mapping[str, Any]) -> str | None:
    """One sentence for what a user can cause or end; None for a fault of ours.

    config: as composed, to name the keys of paths.
    """
    for cause in _causes(error):
        if type(cause).__module__.startswith("submitit") or _raised_in(cause) == "submitit":
            return (
                f"submitit could not run the jobs ({_last_line(cause)}); what they printed, if they began, lies in "
                ".submitit/ of the sweep's folder; without a cluster take hydra/launcher=accelerate"
            )
        if isinstance(cause, BrokenPipeError):
            return "the output was closed before everything was written, as `| head` does"
        if isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.partition(".")[0] in NETWORK:
            return f"the network failed ({_first_line(cause)}); try again, or name files that are on this machine"
        if number := _errno(cause):
            return _of_the_system(cause, number, config)
        if _is_memory(cause):
            return f"not enough memory ({_of_memory(cause)}); {_smaller(config)}"
        if "does not have a deterministic implementation" in str(cause):
            return f"{_first_line(cause).partition(',')[0]}; set trainer.deterministic=false: last bits then differ"
        if isinstance(cause, ValueError) and "integer string conversion" in str(cause):
            return "a number has more digits than can be read; write a smaller one"
        if isinstance(cause, UnicodeDecodeError):
            return f"{_place(cause) or 'a file'}: not in UTF-8 ({cause.reason} at byte {cause.start}); save it as UTF-8"
        if type(cause).__module__.startswith("yaml."):
            return (
                f"{' '.join(str(getattr(cause, 'problem_mark', '')).replace('in ', '').split()) or 'a YAML file'}: "
                f"{_first_line(cause)}; correct the YAML"
            )
    return None


def lost_ranks(error: BaseException) -> list[int] | None:
    """Ranks of the processes whose end is the reason for the error, [] of one on another machine.

    None for any other error.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    causes = [cause for cause in _causes(error) if isinstance(cause, RuntimeError)]
    if processes < 2 or not any(CONNECTION.search(str(cause)) for cause in causes):
        return None
    from sgpt.runtime.distributed import lost_processes

    return lost_processes(patience=LOST_SECONDS)


def describe_lost(ranks: Sequence[int]) -> str:
    """The first half of a sentence."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if not ranks:
        return f"one of {processes} processes, on another machine, has ended or cannot be reached"
    named = " and ".join(map(str, ranks))
    return f"rank {named} of {processes} processes has ended; if it gave no reason it was killed, as for want of memory"


def speaks_for(ranks: Sequence[int]) -> bool:
    """Whether this process, the first of those that are left, says that these have ended."""
    own = int(os.environ.get("RANK", "0"))
    return own == min(rank for rank in range(own + 1) if rank not in ranks)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _raised_in(error: BaseException) -> str:
    """The package whose code raised it, as its modules name it."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").partition(".")[0] if frames else ""


def _errno(error: BaseException) -> int | None:
    """The system's number of what failed, or UNNAMED."""
    if isinstance(error, OSError) and error.errno:
        return error.errno if error.errno in errno.errorcode else None
    if isinstance(error, OSError | RuntimeError) or type(error).__name__ in ("SafetensorError", "Exception"):
        if stated := STATED_NUMBER.search(str(error)):
            return int(stated[1] or stated[2])
        if WRITING.search(str(error)):
            return UNNAMED
    return None


def _of_the_system(error: BaseException, number: int, config: Mapping[str, Any]) -> str:
    path = _place(error)
    where = path or "a file"
    if number in FULL:
        return (
            f"{where} could not be written: the disk is full{_free(path) if path != Path('the output') else ''}; "
            f"make room, {_again(config)}"
        )
    if number == UNNAMED:
        return (
            f"{where} could not be written{_free(path)}; if that is too little make room, "
            f"or let files grow larger (ulimit -f), {_again(config)}"
        )
    if number == errno.EFBIG:
        return (
            f"{where} could not be written: files may not grow so large here (ulimit -f, or the file system); "
            f"raise the limit, {_again(config)}"
        )
    key = _key_of(path, config)
    other = f"set {key}=<another path>" if key else f"choose another place with {_places(config)}"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        keys = dict.fromkeys([*([f"{key}="] if key else []), *_places(config).split(" and ")])
        return f"{where}: {os.strerror(number)}; choose places that can be read and written, by {' and '.join(keys)}"
    if number == errno.ENAMETOOLONG:
        return (
            f"{where}: a name is too long for this file system, which takes 255 bytes and whole paths of 4,095; "
            f"{other}"
        )
    if number in OF_A_PATH:
        return f"{where}: {os.strerror(number)}; put it right, or {other}"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{where}: {os.strerror(number)}; raise the limit of open files (ulimit -n)"
    return f"{path}: {os.strerror(number)}" if path else os.strerror(number)


def _place(error: BaseException) -> Path | None:
    """The file that it names, or the innermost path that our code held when it happened.

    A failed write does not say to which file, and a folder that could not be made may be only the first one on the way.
    """
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    named = Path(os.fsdecode(named)) if isinstance(named, str | bytes | os.PathLike) else None
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    held: list[Path] = []  # by our own code, the innermost and latest first
    read: list[str] = []  # by Hydra, which has the file of a YAML in this variable
    for frame in reversed(frames):
        file = frame.f_code.co_filename
        if file.startswith(OURS) and file != __file__:
            held += [value for value in reversed(list(frame.f_locals.values())) if isinstance(value, Path)]
        if isinstance(full_path := frame.f_locals.get("full_path"), str):
            read.append(full_path)
    if named is None and frames and frames[-1].f_code.co_filename.startswith(PRINTING):
        return Path("the output")
    if named is not None:
        return next((path for path in held if named in path.parents), named)
    return Path(read[0]) if read else held[0] if held else None


def _free(place: Path | None) -> str:
    path = (place or Path()).absolute()
    folder = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    return f", with {shutil.disk_usage(folder).free / 1e6:,.1f} MB free" if folder else ""


def _key_of(path: Path | None, config: Mapping[str, Any]) -> str | None:
    """The key whose value is, or begins, or is in the path."""
    if path is None:
        return None
    if unfinished := UNFINISHED.fullmatch(path.name):
        path = path.with_name(unfinished[1])
    keys: dict[str, int] = {}  # key -> length of its value: of several, the longest says most
    for key, value in _texts(config):
        is_or_begins = f"{path}/".startswith(f"{value.rstrip('/')}/")
        if value and (is_or_begins or (key == "name" and f"/{value}/" in f"/{path}/")):
            keys[key] = max(len(value), keys.get(key, 0))
    return max(keys, key=keys.__getitem__) if keys else None


def _texts(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items() if isinstance(tree, Mapping) else []:
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                yield prefix + key, text


def _places(config: Mapping[str, Any]) -> str:
    """The keys by which files are put elsewhere."""
    keys = [key for key in ("runs", "output", "folder") if key in config]
    if isinstance(config.get("data"), Mapping):
        keys.append("data.cache")
    if "index" in config:  # search: the index lies in the run's folder, and what is searched may have to be made
        keys = ["run", "corpus"]
    return " and ".join(f"{key}=" for key in keys) or "its key"


def _again(config: Mapping[str, Any]) -> str:
    return "then start it again with resume=true" if "resume" in config else "then start it again"


def _is_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _of_memory(error: BaseException) -> str:
    """Of a GPU also what this process has and what others have, of which torch tells one after the other."""
    text = str(error).partition(" Of the allocated memory")[0]
    others = ON_THE_SAME_GPU.findall(text)
    own = _first_line(MemoryError(ON_THE_SAME_GPU.sub("", text)))
    return own + (f", other processes {', '.join(others)}" if others else "")


def _smaller(config: Mapping[str, Any]) -> str:
    keys = [key for key in ("tokens_per_pack", "queries_per_process") if key in (config.get("trainer") or {})]
    names = [f"trainer.{key}" for key in keys]
    names += [key for key in ("tokens_per_pack", "documents_per_block") if key in config]
    if not names:
        return "take a smaller model, or a machine with more"
    return f"lower {' or '.join(names)}, or take a smaller model"


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    first = next(filter(None, lines), type(error).__name__)
    return first[:200].rstrip(".")


def _last_line(error: BaseException) -> str:
    """Of an error that holds what another process printed: its reason comes last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return (lines[-1] if lines else type(error).__name__)[-300:].rstrip(".")
