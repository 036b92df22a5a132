"""JSON lines, the format of everything this project reads and writes; `.gz` is recognised by its name."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from sgpt.data.example import Example, checked_example
from sgpt.errors import InputError


def read_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", row) of every line that is not blank; InputError for anything that is not a JSON object."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; check the path")
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield (where := f"{file}, line {number}"), _parsed(line, where)
    except (zlib.error, EOFError, UnicodeDecodeError, OSError) as error:  # a BadGzipFile is an OSError
        raise InputError(f"{file}: cannot be read ({error}); it should be UTF-8 JSON lines, gzipped when it ends in .gz") from error


def write_rows(file: Path, rows: Iterable[dict]) -> int:
    """Writes to a temporary name and renames, so a killed run leaves no half file. Returns the number of rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    count = 0
    with gzip.open(temporary, "wt", encoding="utf-8") if file.suffix == ".gz" else temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    temporary.replace(file)
    return count


def read_examples(file: Path, columns: dict[str, str], num_hard_negatives: int) -> Iterator[Example]:
    """One example a line. `columns` maps query, positive and negative to the file's own names.

    Hard negatives are the column `negative` (text or list of texts) and, when there are more, `negative_2`, `negative_3` ….
    """
    for where, row in read_rows(file):
        yield example_from_row(row, columns, num_hard_negatives, where)


def example_from_row(row: dict, columns: dict[str, str], num_hard_negatives: int, where: str) -> Example:
    for role in ("query", "positive"):
        if columns[role] not in row:
            raise InputError(f"{where}: no column {columns[role]!r}; it has {', '.join(row)}. Name it by data.columns.{role}=<column>")
    negatives = _negatives(row, columns["negative"])
    if len(negatives) < num_hard_negatives:
        raise InputError(
            f"{where}: {len(negatives)} hard negatives in column {columns['negative']!r}, data.num_hard_negatives asks for "
            f"{num_hard_negatives}; lower it, or name the column by data.columns.negative=<column>"
        )
    return checked_example(row[columns["query"]], row[columns["positive"]], negatives if num_hard_negatives else (), where)


def _negatives(row: dict, column: str) -> list[object]:
    first = row.get(column)
    found = list(first) if isinstance(first, list) else [] if first is None else [first]
    number = 2
    while (value := row.get(f"{column}_{number}")) is not None:
        found.append(value)
        number += 1
    return found


def _parsed(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno}): {line.strip()[:80]!r}; mend or remove the line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}; write one object a line")
    return row
