"""Lines of text files, plain or gzipped, and the JSON in them.

The one place where bytes of anyone's text file become text: gzip by the name, a byte order mark, line ends of any
system, NUL and what is not UTF-8 are handled here, and every error names the file and the line. JSON lines, CSV, TSV,
TREC, NLI, USEB and BEIR are read through it. (MS MARCO's gigabytes have a byte reader of their own,
sgpt/data/sources/msmarco.py.)

    byte_lines, text_lines   a line that cannot be used is given as an InputError: the caller may count it and continue
    checked_lines            the first such line is raised, as everything behind it would be read wrongly
    read_json_file           a whole file as one JSON value
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sgpt.data.formats.row import PlacedRows, attempt, checked_row, repeated, shown
from sgpt.runtime.errors import InputError

MAX_LINE_BYTES = 64 << 20  # a longer line is no example but a file without line ends, and would be held in memory whole
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
UNREADABLE = (zlib.error, EOFError, OSError)  # what a damaged file raises; a BadGzipFile is an OSError


def open_bytes(file: Path) -> BinaryIO:
    """The file's content, unpacked when its name ends in .gz."""
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")


def byte_lines(file: Path) -> Iterator[tuple[int, bytes | InputError]]:
    """(number from 1, line with its end). Of a line that is too long only the beginning is ever held.

    A file whose lines all end in CR alone, as spreadsheets on a Mac write them, is one line to `readline` and is cut
    here. InputError for a file that cannot be read on: a gzip stream that is cut off, a disk that fails.
    """
    number = 0
    try:
        with open_bytes(file) as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                too_long = len(line) > MAX_LINE_BYTES
                if number == 1:
                    _check_mark(line, f"{file}, line 1")
                    line = line.removeprefix(UTF8_MARK)
                if too_long:
                    yield number, InputError(
                        f"{file}, line {number}: longer than {MAX_LINE_BYTES} bytes: {shown(line[:80])}; "
                        "split or remove the line"
                    )
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(1 << 16)
                elif number == 1 and b"\r" in line and not line.endswith(b"\n"):
                    yield from enumerate(line.splitlines(keepends=True), 1)
                else:
                    yield number, line
    except UNREADABLE as error:
        raise _cannot_be_read_on(f"{file}, line {number + 1}", error) from error


def _check_mark(beginning: bytes, where: str) -> None:
    if beginning.startswith(UTF16_MARKS):
        raise InputError(f"{where}: begins with the mark of UTF-16; save the file as UTF-8")


def _cannot_be_read_on(where: str, error: Exception) -> InputError:
    return InputError(
        f"{where}: cannot be read from here on ({error}); "
        "copy the file again, and let its name end in .gz only if it is gzipped"
    )


def text_lines(file: Path) -> Iterator[tuple[int, str | InputError]]:
    """Pairs of a line's number, from 1, and the line without its end."""
    for number, line in byte_lines(file):
        yield number, line if isinstance(line, InputError) else attempt(decoded, line, f"{file}, line {number}")


def checked_lines(file: Path, remedy: str = "check the path") -> Iterator[tuple[str, str]]:
    """("file, line n", line without its end); InputError for the first line that is no text, and without the file.

    remedy: what to do when the file is not there.
    """
    check_is_there(file, remedy)
    for number, line in text_lines(file):
        if isinstance(line, InputError):
            raise line
        yield f"{file}, line {number}", line


def check_is_there(file: Path, remedy: str = "check the path") -> None:
    if not file.is_file():
        raise InputError(f"{file}: no such file; {remedy}")


def begins_with(file: Path, character: bytes) -> bool:
    """Whether the first thing that is not blank is this character: `{` tells JSON from columns."""
    try:
        with open_bytes(file) as stream:
            return stream.read(100).removeprefix(UTF8_MARK).lstrip().startswith(character)
    except UNREADABLE as error:
        raise _cannot_be_read_on(f"{file}, line 1", error) from error


def read_json_file(file: Path, remedy: str = "write the file again") -> Any:
    """The value that the whole file holds, however long its lines are: a run of a million documents is often one line.

    As strict as `parsed_json`. InputError with the file and, where it is known, the line. remedy: for what is not JSON.
    """
    try:
        with open_bytes(file) as stream:
            content = stream.read()
    except UNREADABLE as error:
        raise _cannot_be_read_on(f"{file}", error) from error
    _check_mark(content, f"{file}, line 1")
    content = content.removeprefix(UTF8_MARK)
    try:
        return parsed_json(content.decode())
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        line = content.split(b"\n", number)[number - 1]
        decoded(line, f"{file}, line {number}")  # raises, with the column
        raise
    except json.JSONDecodeError as error:
        where, reason = f"{file}, line {error.lineno}", f"{error.msg} at column {error.colno}"
    except ValueError as error:  # a key that is there twice, a number of 5000 digits
        where, reason = f"{file}", str(error)[:200]
    except RecursionError:
        where, reason = f"{file}", "brackets too deep"
    raise InputError(f"{where}: not JSON ({reason}); {remedy}")


def decoded(line: bytes, where: str) -> str:
    """The line as text, without its end. InputError for what is not UTF-8 and for NUL, which no tokenizer knows."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        around = shown(line[max(0, error.start - 30) :])
        raise InputError(
            f"{where}: not UTF-8 at column {error.start + 1} in {around}; "
            "save the file as UTF-8, or fix or remove the line"
        ) from None
    if "\0" in text:
        position = text.index("\0")
        around = shown(text[max(0, position - 30) :][:80])
        raise InputError(f"{where}: a NUL character at column {position + 1} in {around}; remove it")
    return text.removesuffix("\n").removesuffix("\r")


def json_rows(file: Path) -> PlacedRows:
    for number, line in byte_lines(file):
        if isinstance(line, InputError) or line.strip():
            where = f"{file}, line {number}"
            yield where, line if isinstance(line, InputError) else attempt(_json_row, line, where)


def _json_row(line: bytes, where: str) -> dict:
    text = decoded(line, where)
    try:
        row = parsed_json(text)
    except (ValueError, RecursionError) as error:  # next to JSON's own: numbers of 5000 digits, and a thousand brackets
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        remedy = (
            "write one object a line, without brackets around them"
            if text.strip() in ("[", "[{")
            else "fix or remove the line"
        )
        raise InputError(f"{where}: not JSON ({reason}): {text.strip()[:80]!r}; {remedy}") from None
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: expected a JSON object, got {type(row).__name__} {shown(row)}; write one object a line"
        )
    # nothing but an escape can spell what is not text, in a line that is
    return checked_row(row, where) if "\\u" in text else row


def parsed_json(text: str) -> Any:
    """Stricter than json.loads, ValueError or RecursionError: what it would lose or change in silence is refused.

    NaN, which is no JSON, is what pandas and numpy write where there is no value, and is read as null.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    """json.loads keeps the last of two, and the other text would be lost without a word."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError(f"the key {shown(repeated(key for key, _ in pairs))} is there twice")
    return unique
