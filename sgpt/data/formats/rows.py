"""Rows of anyone's files: ("<file>, line n", row), where a row is a dict of Python values or an InputError that says
what is wrong with it.

A row that cannot be used is given as a value, so that the caller may count it and continue. What makes the rest
unreadable (a gzip stream that is cut off, a Parquet file that is none) is raised, with the place it got to. Nothing is
read whole: lines one by one, tables some rows at a time.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sgpt.data.formats.arrow import arrow_rows, hub_rows, parquet_rows, saved_rows
from sgpt.data.formats.lines import json_rows
from sgpt.data.formats.row import SPLITS, PlacedRows, meaning_of_split, same_split
from sgpt.data.formats.tables import csv_rows, tsv_rows
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import may_be_hub_id

log = logging.getLogger(__name__)
USUAL_SPLITS = ("train", "test")  # of training and of evaluation, where nobody names one


def rows(path: Path, split: str = "train", *, subset: str | None = None, streaming: bool = False) -> PlacedRows:
    """("<file>, line n" or "<file>, row n", row) of a file, of a folder, or of a data set of the hub.

    Files: JSON lines, CSV, TSV (each also .gz), Parquet, Arrow IPC. Folders: files of one kind, read in the order of
    their names and without those called after another split, or what datasets' save_to_disk wrote. Anything else is
    taken for a hub id; `subset` and `streaming` are for that only.
    """
    count = 0
    for where, row in _source(path, split, subset, streaming):
        count += 1
        yield where, row
    if not count:
        raise InputError(f"{path}: no rows in it; give a file with at least one")


def of_split(all_rows: PlacedRows, split: str, source: str) -> PlacedRows:
    """The rows without those whose column `split` names another split; a row without that column is kept.

    Where no row has it, and the file is not called after its split either, the log says that all are taken for it.
    """
    others, kept, named_any = Counter(), 0, False
    for where, row in all_rows:
        named = row.get("split") if isinstance(row, dict) else None
        named_any |= named is not None
        if isinstance(named, str) and not same_split(named, split):
            others[named] += 1
        else:
            kept += 1
            yield where, row
    left_out = ", ".join(f"{count:,} of {name!r}" for name, count in others.items())
    if others and not kept:
        raise InputError(f"{source}: no row of the split {split!r}; its column split has {left_out}. Set data.split")
    if not named_any:
        say_unsplit(Path(source), split)
    if others:
        log.warning(f"{source}: by the column split, {left_out} left out; {split!r} is the split to read")


def say_unsplit(file: Path, split: str) -> None:
    """Of a file without a column `split` that all of it is taken for a split that somebody named.

    Not where the file is called after it, or where it is the split that is read if nobody names one.
    """
    if split not in USUAL_SPLITS and file.is_file() and split not in file.name:
        log.info("%s: has no column split, so all of its rows are taken for %r", file, split)


def _source(path: Path, split: str, subset: str | None, streaming: bool) -> PlacedRows:
    if path.exists() and (subset or streaming):
        key = f"data.subset={subset}" if subset else "data.streaming=true"
        raise InputError(f"{key}: is for a data set of the hub, and {path} is here; leave it out")
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return (
            saved_rows(path, split)
            if is_saved_dataset(path)
            else (row for file in _files(path, split) for row in _read_file(file))
        )
    if not is_hub_dataset(path):
        raise InputError(f"{path}: no such file; check the path")
    return hub_rows(path, split, subset, streaming)


def is_saved_dataset(path: Path) -> bool:
    """Written by the library datasets."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def is_hub_dataset(path: Path) -> bool:
    """Not here, and named as a data set of the hub may be."""
    return not path.exists() and path.suffix not in {*FILE_READERS, ".gz"} and may_be_hub_id(str(path))


def kind_of(file: Path) -> str | None:
    """By its ending: a key of FILE_READERS. Only text is read from .gz: Parquet and Arrow compress by themselves."""
    name = file.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    return kind if kind in FILE_READERS and (not name.endswith(".gz") or kind in TEXT) else None


def _read_file(file: Path) -> PlacedRows:
    kind = kind_of(file)
    if kind is None:
        raise InputError(
            f"{file}: the ending is unknown; the ones that are read are {', '.join(FILE_READERS)}, "
            f"and .gz behind {', '.join(TEXT)}"
        )
    return FILE_READERS[kind](file)


def _files(folder: Path, split: str) -> list[Path]:
    """Those of the one kind that the folder holds. A .json is no data here: folders hold them as descriptions."""
    visible = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
    files = [file for file in visible if kind_of(file) not in (None, ".json")]
    kinds = Counter(kind_of(file) for file in files)
    if len(kinds) > 1:
        several = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise InputError(f"{folder}: holds files of several kinds ({several}); give one file, or a folder of one kind")
    if twice := next((file for file in files if file.with_name(f"{file.name}.gz") in files), None):
        raise InputError(
            f"{folder}: holds both {twice.name} and {twice.name}.gz, which would be read as two; "
            "remove one, or give the file"
        )
    files_of_split = [file for file in files if _of_split(file.name.lower(), split)]
    if not files_of_split:
        entries = (
            ", ".join(sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())[:10])
            or "nothing"
        )
        raise InputError(
            f"{folder}: no data files of the split {split!r}; it holds {entries}. "
            "Give one of its files or folders, or set data.split"
        )
    if left := [file.name for file in files if file not in files_of_split]:
        log.warning(f"{folder}: {', '.join(left)} left out; {split!r} is the split to read")
    return files_of_split


def _of_split(name: str, split: str) -> bool:
    """Not called after another split alone: `test-00000.parquet` and `squad_dev.jsonl` must not be trained on."""
    named = {SPLITS[word] for word in re.split(r"[-_.]", name) if word in SPLITS}
    return (
        not named
        or meaning_of_split(split) in named
        or re.search(rf"(^|[-_.]){re.escape(split.lower())}", name) is not None
    )


TEXT = (".jsonl", ".json", ".csv", ".tsv")
FILE_READERS: dict[str, Callable[[Path], PlacedRows]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
