"""JSON lines, the format of everything this project reads and writes; `.gz` is recognised by its name."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from sgpt.data.rows import sound
from sgpt.errors import InputError


def read_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", row) of every line that is not blank; InputError for anything that is not a JSON object."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; check the path")
    try:
        with gzip.open(file, "rt", encoding="utf-8-sig") if file.suffix == ".gz" else file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield (where := f"{file}, line {number}"), _parsed(line, where)
    except (zlib.error, EOFError, UnicodeDecodeError, OSError) as error:  # a BadGzipFile is an OSError
        raise InputError(f"{file}: cannot be read ({error}); it should be UTF-8 JSON lines, gzipped when it ends in .gz") from error


def write_rows(file: Path, rows: Iterable[dict]) -> int:
    """Writes to a temporary name and renames, so a killed run leaves no half file. Returns the number of rows.

    Equal rows give equal bytes, compressed ones too: no name and no clock goes into the head.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    count = 0
    with temporary.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if file.suffix == ".gz" else nullcontext(raw) as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    temporary.replace(file)
    return count


def _parsed(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno}): {line.strip()[:80]!r}; mend or remove the line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}; write one object a line")
    return sound(row, where) if "\\u" in line else row  # nothing else can spell what is no text
