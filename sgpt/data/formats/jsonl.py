"""JSON lines, the format of everything this project reads and writes; `.gz` is recognised by its name."""

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from sgpt.data.formats.lines import check_is_there, json_rows
from sgpt.runtime.errors import InputError


def read_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", row) of every line that is not blank; InputError for anything that is not a JSON object."""
    check_is_there(file)
    for where, row in json_rows(file):
        if isinstance(row, InputError):
            raise row
        yield where, row


def write_rows(file: Path, rows: Iterable[dict]) -> int:
    """Writes to a temporary name and renames, so a killed run leaves no half file. Returns the number of rows.

    Equal rows give equal bytes, compressed ones too: no name and no clock goes into the head.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    count = 0
    with (
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if file.suffix == ".gz" else nullcontext(raw) as out,
    ):
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    temporary.replace(file)
    return count
