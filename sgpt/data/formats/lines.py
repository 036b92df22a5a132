"""Lines of text files, plain or gzipped, and the JSON objects in them."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgpt.data.formats.row import Rows, attempt, repeated, shown, sound
from sgpt.runtime.errors import InputError

MAX_LINE_BYTES = 64 << 20  # a longer line is no example but a file without line ends, and would be held in memory whole
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


def byte_lines(file: Path) -> Iterator[tuple[int, bytes | InputError]]:
    """(number from 1, line with its end). Of a line that is too long only the beginning is ever held.

    A file whose lines all end in CR alone, as spreadsheets on a Mac write them, is one line to `readline` and is cut here.
    """
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if number == 1 and line.startswith(UTF16_MARKS):
                    raise InputError(f"{file}, line 1: begins with the mark of UTF-16; save the file as UTF-8")
                if number == 1 and b"\r" in line and not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES:
                    yield from enumerate(line.removeprefix(UTF8_MARK).splitlines(keepends=True), 1)
                elif len(line) > MAX_LINE_BYTES:
                    yield number, InputError(f"{file}, line {number}: longer than {MAX_LINE_BYTES} bytes: {shown(line[:80])}; split or remove the line")
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(1 << 16)
                else:
                    yield number, line.removeprefix(UTF8_MARK) if number == 1 else line
    except (zlib.error, EOFError, OSError) as error:  # a BadGzipFile is an OSError
        raise InputError(
            f"{file}, line {number + 1}: cannot be read from here on ({error}); copy the file again, and let its name end in .gz only if it is gzipped"
        ) from error


def text_lines(file: Path) -> Iterator[tuple[int, str | InputError]]:
    """(number from 1, line without its end)"""
    for number, line in byte_lines(file):
        yield number, line if isinstance(line, InputError) else attempt(decoded, line, f"{file}, line {number}")


def decoded(line: bytes, where: str) -> str:
    """Decoded, without the line's end."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        around = shown(line[max(0, error.start - 30) :])
        raise InputError(f"{where}: not UTF-8 at column {error.start + 1} in {around}; save the file as UTF-8, or fix or remove the line") from None
    if "\0" in text:
        place = text.index("\0")
        raise InputError(f"{where}: a NUL character at column {place + 1} in {shown(text[max(0, place - 30) :][:80])}; remove it")
    return text.removesuffix("\n").removesuffix("\r")


def json_rows(file: Path) -> Rows:
    for number, line in byte_lines(file):
        if isinstance(line, InputError) or line.strip():
            where = f"{file}, line {number}"
            yield where, line if isinstance(line, InputError) else attempt(_json_row, line, where)


def _json_row(line: bytes, where: str) -> dict:
    text = decoded(line, where)
    try:
        row = parsed_json(text)
    except (ValueError, RecursionError) as error:  # beside JSON's own: numbers of 5000 digits, and a thousand brackets
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        remedy = "write one object a line, without brackets around them" if text.strip() in ("[", "[{") else "fix or remove the line"
        raise InputError(f"{where}: not JSON ({reason}): {text.strip()[:80]!r}; {remedy}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(row).__name__} {shown(row)}; write one object a line")
    return sound(row, where) if "\\u" in text else row  # nothing else in a line that is text can spell what is not


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
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"the key {shown(repeated(key for key, _ in pairs))} is there twice")
    return made
