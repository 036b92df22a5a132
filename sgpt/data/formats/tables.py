"""CSV and TSV: records of text under the names of a header."""

import csv
import logging
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sgpt.data.formats.lines import MAX_LINE_BYTES, byte_lines, decoded, text_lines
from sgpt.data.formats.row import PlacedRows, attempt, checked_names, shown
from sgpt.runtime.errors import InputError

log = logging.getLogger(__name__)
FIRST_RECORDS = 100  # by which a CSV's manner of quoting is recognised
SEPARATOR_LINE = re.compile(rb'"?sep=([ -~\t])"?[\r\n]*')  # how a spreadsheet names the separator, before the header


def csv_rows(file: Path) -> PlacedRows:
    """Separated by commas; by semicolons where the header has no comma; or as a first line `sep=;` says.

    Spreadsheets write the last two, where the comma is in numbers.
    """
    _, first = next(byte_lines(file), (1, b""))
    if named := SEPARATOR_LINE.fullmatch(first) if isinstance(first, bytes) else None:
        separator = named[1].decode()
    else:
        separator = ";" if isinstance(first, bytes) and b";" in first and b"," not in first else ","
    return _table_rows(file, _csv_records(file, separator, skip=int(bool(named))), separator)


def tsv_rows(file: Path) -> PlacedRows:
    return _table_rows(file, _tsv_records(file), "\t")


def _table_rows(file: Path, records: Iterator[tuple[int, list[str] | InputError]], separator: str) -> PlacedRows:
    """The first record names the columns; without them nothing can be read, so what is wrong with it is raised."""
    header: list[str] = []
    for number, fields in records:
        where = f"{file}, line {number}"
        if isinstance(fields, InputError):
            if not header:
                raise fields
            yield where, fields
        elif header:
            yield where, attempt(_table_row, header, fields, separator, where)
        else:
            header = checked_names(fields, where)
            if separator == "\t" and (quoted := next((name for name in header if re.fullmatch('".*"', name)), None)):
                raise InputError(
                    f"{where}: the column {shown(quoted)} is in quotes, and TSV has no quoting; "
                    "write the file as CSV, or without quotes"
                )
            if len(header) == 1 and (other := next((mark for mark in ",;\t|" if mark in header[0]), None)):
                remedy = (
                    f"separate the fields by {separator!r}, or end the file's name in .csv or .tsv as they are "
                    "separated"
                )
                raise InputError(
                    f"{where}: the header is one column with {other!r} in its name, {shown(header[0])}; {remedy}"
                )


def _table_row(header: list[str], fields: list[str], separator: str, where: str) -> dict:
    if len(fields) != len(header):
        mark = {",": "comma", ";": "semicolon"}.get(separator)
        remedy = f"quote texts that hold a {mark} or a line end" if mark else "take tabs and line ends out of the texts"
        raise InputError(
            f"{where}: {len(fields)} fields where the header names {len(header)} columns: "
            f"{shown(separator.join(fields)[:80])}; {remedy}"
        )
    return dict(zip(header, fields, strict=True))


def _tsv_records(file: Path) -> Iterator[tuple[int, list[str] | InputError]]:
    """No quoting, as in MS MARCO: a quote is a character of the text."""
    warned = False
    for number, text in text_lines(file):
        if isinstance(text, InputError):
            yield number, text
        elif text:
            fields = text.split("\t")
            if not warned and (field := next(filter(_looks_quoted, fields), None)):
                hint = "looks quoted, and TSV has no quoting: the quotes are read as text; write CSV if they are none"
                log.warning(f"{file}, line {number}: {shown(field)} {hint}")
                warned = True
            yield number, fields


def _looks_quoted(field: str) -> bool:
    """As csv writers do with a text that has quotes."""
    within = field[1:-1]
    return field[:1] == '"' == field[-1:] and '""' in within and '"' not in within.replace('""', "")


def _csv_records(file: Path, separator: str, skip: int = 0) -> Iterator[tuple[int, list[str] | InputError]]:
    """(line where it begins, fields).

    Strict: a stray quote is an error of the row, where csv would join texts in silence.

    Some write `"a", "b"`: where one of the first records has a quote behind a blank, blanks behind separators are none
    of the texts'; one that comes later is an error of its row.
    """
    # of the process; 128 KB else, and documents are longer
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    blanks = _has_blanks_before_quotes(file, separator, skip)
    for number, fields, written in _csv_parsed(file, separator, skip, blanks):
        if not blanks and (odd := _quoted_behind_blanks(fields, written, separator)):
            yield number, InputError(
                f"{file}, line {number}: a quote behind a blank, {shown(odd)}; "
                "take the blanks between separators and quotes away"
            )
        else:
            yield number, fields


def _has_blanks_before_quotes(file: Path, separator: str, skip: int) -> bool:
    first = islice(_csv_parsed(file, separator, skip, blanks=False), FIRST_RECORDS)
    try:
        return any(_quoted_behind_blanks(fields, written, separator) for _, fields, written in first)
    except InputError:  # raised again, in its place, when the rows are read
        return False


def _quoted_behind_blanks(fields: list[str] | InputError, written: str, separator: str) -> str | None:
    """The field of a record that begins with blanks and a quote, unless it is written within quotes of its own."""
    if isinstance(fields, InputError):
        return None
    odd = next((field for field in fields if field[:1] in (" ", "\t") and field.lstrip(" \t")[:1] == '"'), None)
    is_bare = odd is not None and re.search(rf'(?:^|[\n{separator}])[ \t]+"', written)
    return odd if is_bare else None


def _csv_parsed(
    file: Path, separator: str, skip: int, blanks: bool
) -> Iterator[tuple[int, list[str] | InputError, str]]:  # fmt: skip
    """(line where it begins, fields, the record as it is written). blanks: those behind a separator are left out."""
    feed = _Feed(file)
    for _ in range(skip):
        next(feed)
    reader = csv.reader(feed, delimiter=separator, strict=True, skipinitialspace=blanks)
    while True:
        number = skip + reader.line_num + 1
        feed.new_row()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = _csv_error(error, f"{file}, line {number}", skip + reader.line_num, feed)
        if feed.flaw or fields:
            yield number, feed.flaw or fields, "".join(feed.written)


def _csv_error(error: csv.Error, where: str, last_line: int, feed: "_Feed") -> InputError:
    if str(error).startswith(("unexpected end", "field larger")):
        problem = f"{where}: a quote that opens in the row {shown(feed.first)} is not closed up to line {last_line}"
        raise InputError(
            f"{problem}, and the rows behind it cannot be separated; close it, or double quotes within a text"
        ) from None
    remedy = (
        "take the blanks behind quotes away"
        if re.search(r'"[ \t]+\W', feed.first)
        else "double quotes within a text, or remove the row"
    )
    return InputError(f"{where}: not CSV up to line {last_line} ({error}): {shown(feed.first)}; {remedy}")


class _Feed:
    """Lines for csv.reader.

    A line that is no text goes in with replacement characters, so that the quotes around it still count, and is
    remembered.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.lines = file, byte_lines(file)
        self.new_row()

    def new_row(self) -> None:
        self.first, self.flaw = "", None
        self.written: list[str] = []

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        number, line = next(self.lines)
        text_or_flaw = line if isinstance(line, InputError) else attempt(decoded, line, f"{self.file}, line {number}")
        if isinstance(text_or_flaw, InputError):
            self.flaw = self.flaw or text_or_flaw
        text = "\n" if isinstance(line, InputError) else line.decode(errors="replace")
        self.first = self.first or text.rstrip("\r\n")[:80]
        self.written.append(text)
        return text
