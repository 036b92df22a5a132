"""Rows as they lie in anyone's files: (place, row), where a row is a dict of Python values or the InputError that it deserves.

A row that cannot be used is given as a value, so that the caller may count it and go on. What makes the rest unreadable (a
gzip stream that is cut off, a Parquet file that is none) is raised, with the place it got to. Nothing is read whole: lines
one by one, tables some rows at a time.
"""

import csv
import gzip
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import parquet

from sgpt.errors import InputError
from sgpt.files import may_be_hub_id

log = logging.getLogger(__name__)
Made = TypeVar("Made")
Rows = Iterator[tuple[str, dict | InputError]]
Labels = dict[str, list[str]]  # column of class labels -> their names, by number
MAX_LINE_BYTES = 64 << 20  # a longer line is no example but a file without line ends, and would be held in memory whole
ROWS_AT_A_TIME = 1024
FIRST_RECORDS = 100  # by which a CSV's manner of quoting is told
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
SEPARATOR_LINE = re.compile(rb'"?sep=([ -~\t])"?[\r\n]*')  # how a spreadsheet names the separator, before the header
NOTHING = ("nan", "none", "null", "n/a", "<na>", "nat")
LISTED = 12  # names that a message shows
SPLITS = {"train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "eval": "dev", "test": "test"}


def rows(path: Path, split: str = "train", *, subset: str | None = None, streaming: bool = False) -> Rows:
    """("<file>, line n" or "<file>, row n", row) of a file, of a folder, or of a data set of the hub.

    Files: JSON lines, CSV, TSV (each also .gz), Parquet, Arrow IPC. Folders: files of one kind, read in the order of their
    names and without those called after another split, or what datasets' save_to_disk wrote. Anything else is taken for a hub
    id; `subset` and `streaming` are for that only.
    """
    count = 0
    for where, row in _source(path, split, subset, streaming):
        count += 1
        yield where, row
    if not count:
        raise InputError(f"{path}: no rows in it; give a file with at least one")


def of_split(found: Rows, split: str, source: str) -> Rows:
    """Without the rows whose column `split` names another one; what has no such column is of every split."""
    others, kept = Counter(), 0
    for where, row in found:
        named = row.get("split") if isinstance(row, dict) else None
        if isinstance(named, str) and not same_split(named, split):
            others[named] += 1
        else:
            kept += 1
            yield where, row
    told = ", ".join(f"{count:,} of {name!r}" for name, count in others.items())
    if others and not kept:
        raise InputError(f"{source}: no row of the split {split!r}; its column split has {told}. Set data.split")
    if others:
        log.warning(f"{source}: by the column split, {told} left out; {split!r} is the split to read")


def same_split(one: str, other: str) -> bool:
    """By their usual names: validation, dev and Val are one."""
    return _meaning(one) == _meaning(other)


def _meaning(split: str) -> str:
    name = split.strip().lower()
    return SPLITS.get(name, name)


def attempt(make: Callable[..., Made], *arguments: object) -> Made | InputError:
    """What `make` gives or the InputError it raises, as a value: raised inside a generator it would end it."""
    try:
        return make(*arguments)
    except InputError as error:
        return error


def _source(path: Path, split: str, subset: str | None, streaming: bool) -> Rows:
    if path.exists() and (subset or streaming):
        key = f"data.subset={subset}" if subset else "data.streaming=true"
        raise InputError(f"{key}: is for a data set of the hub, and {path} is here; leave it out")
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _saved_rows(path, split) if saved_folder(path) else (row for file in _files(path, split) for row in _read_file(file))
    if not of_the_hub(path):
        raise InputError(f"{path}: no such file; check the path")
    return _hub_rows(path, split, subset, streaming)


def saved_folder(path: Path) -> bool:
    """Written by the library datasets."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def of_the_hub(path: Path) -> bool:
    """Not here, and named as a data set of the hub may be."""
    return not path.exists() and path.suffix not in {*READERS, ".gz"} and may_be_hub_id(str(path))


def kind_of(file: Path) -> str | None:
    """By its ending: a key of READERS. Only text is read from .gz: Parquet and Arrow compress by themselves."""
    name = file.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    return kind if kind in READERS and (not name.endswith(".gz") or kind in TEXT) else None


def _read_file(file: Path) -> Rows:
    kind = kind_of(file)
    if kind is None:
        raise InputError(f"{file}: the ending is unknown; the ones that are read are {', '.join(READERS)}, and .gz behind {', '.join(TEXT)}")
    return READERS[kind](file)


def _files(folder: Path, split: str) -> list[Path]:
    """Those of the one kind that the folder holds. A .json is no data here: folders hold them as descriptions."""
    visible = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
    files = [file for file in visible if kind_of(file) not in (None, ".json")]
    kinds = Counter(kind_of(file) for file in files)
    if len(kinds) > 1:
        several = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise InputError(f"{folder}: holds files of several kinds ({several}); give one file, or a folder of one kind")
    if twice := next((file for file in files if file.with_name(f"{file.name}.gz") in files), None):
        raise InputError(f"{folder}: holds both {twice.name} and {twice.name}.gz, which would be read as two; remove one, or give the file")
    chosen = [file for file in files if _of_split(file.name.lower(), split)]
    if not chosen:
        there = ", ".join(sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise InputError(f"{folder}: no data files of the split {split!r}; it holds {there}. Give one of its files or folders, or set data.split")
    if left := [file.name for file in files if file not in chosen]:
        log.warning(f"{folder}: {', '.join(left)} left out; {split!r} is the split to read")
    return chosen


def _of_split(name: str, split: str) -> bool:
    """Not called after another split alone: `test-00000.parquet` and `squad_dev.jsonl` must not be trained on."""
    named = {SPLITS[word] for word in re.split(r"[-_.]", name) if word in SPLITS}
    return not named or _meaning(split) in named or re.search(rf"(^|[-_.]){re.escape(split.lower())}", name) is not None


# --- lines ---


def _lines(file: Path) -> Iterator[tuple[int, bytes | InputError]]:
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
    for number, line in _lines(file):
        yield number, line if isinstance(line, InputError) else attempt(_text, line, f"{file}, line {number}")


def _text(line: bytes, where: str) -> str:
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


def listed(names: Iterable[str]) -> str:
    """For a message: not too many, none too long, and in one line."""
    names = list(names)
    shown = [f"{name if name.isprintable() else repr(name):.40}" for name in names[:LISTED]]
    return ", ".join(shown) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def spells_nothing(text: object) -> bool:
    """What programs write as text where there is no value. It may be meant, as in texts about Python, so it is told and not changed."""
    return isinstance(text, str) and text.strip().lower() in NOTHING


def shown(value: object) -> str:
    """Cut to 80 characters, in quotes; bytes as the text they may be."""
    return repr(value[:320].decode(errors="backslashreplace")[:80] if isinstance(value, bytes) else value)[:82]


# --- JSON lines ---


def json_rows(file: Path) -> Rows:
    for number, line in _lines(file):
        if isinstance(line, InputError) or line.strip():
            where = f"{file}, line {number}"
            yield where, line if isinstance(line, InputError) else attempt(_json_row, line, where)


def _json_row(line: bytes, where: str) -> dict:
    text = _text(line, where)
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
        raise ValueError(f"the key {shown(_twice(key for key, _ in pairs))} is there twice")
    return made


def _twice(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def sound(row: dict, where: str) -> dict:
    """`row`, if its texts can be stored and tokenised: JSON's escapes can spell NUL, and half of a character."""
    for column, value in row.items():
        for text in (column, *_texts(value)):
            if "\0" in text:
                raise InputError(f"{where}, column {shown(column)}: a NUL character in {shown(text)}; remove it")
            if not text.isascii() and not _encodes(text):
                raise InputError(f"{where}, column {shown(column)}: half of a surrogate pair in {shown(text)}, which is no character; remove it")
    return row


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- tables of text ---


def _csv_rows(file: Path) -> Rows:
    """Separated by commas; by semicolons where the header has no comma, as spreadsheets write it where the comma is in numbers;

    or as a first line `sep=;` says, which is a spreadsheet's too.
    """
    _, first = next(_lines(file), (1, b""))
    if named := SEPARATOR_LINE.fullmatch(first) if isinstance(first, bytes) else None:
        separator = named[1].decode()
    else:
        separator = ";" if isinstance(first, bytes) and b";" in first and b"," not in first else ","
    return _table_rows(file, _csv_records(file, separator, skip=int(bool(named))), separator)


def _tsv_rows(file: Path) -> Rows:
    return _table_rows(file, _tsv_records(file), "\t")


def _table_rows(file: Path, records: Iterator[tuple[int, list[str] | InputError]], separator: str) -> Rows:
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
            header = _checked_names(fields, where)
            if separator == "\t" and (quoted := next((name for name in header if re.fullmatch('".*"', name)), None)):
                raise InputError(f"{where}: the column {shown(quoted)} is in quotes, and TSV has no quoting; write the file as CSV, or without quotes")
            if len(header) == 1 and (other := next((mark for mark in ",;\t|" if mark in header[0]), None)):
                remedy = f"separate the fields by {separator!r}, or end the file's name in .csv or .tsv as they are separated"
                raise InputError(f"{where}: the header is one column with {other!r} in its name, {shown(header[0])}; {remedy}")


def _table_row(header: list[str], fields: list[str], separator: str, where: str) -> dict:
    if len(fields) != len(header):
        mark = {",": "comma", ";": "semicolon"}.get(separator)
        remedy = f"quote texts that hold a {mark} or a line end" if mark else "take tabs and line ends out of the texts"
        raise InputError(f"{where}: {len(fields)} fields where the header names {len(header)} columns: {shown(separator.join(fields)[:80])}; {remedy}")
    return dict(zip(header, fields, strict=True))


def _checked_names(given: list[str], where: str) -> list[str]:
    names = [name.strip() for name in given]
    if not all(names):
        place = next(place for place, name in enumerate(names, 1) if not name)
        raise InputError(f"{where}: column {place} of {shown(', '.join(given)[:80])} has no name; name or remove it (pandas: to_csv(index=False))")
    if len({*names}) < len(names):
        raise InputError(f"{where}: two columns are called {shown(_twice(names))}; rename or remove one")
    return names


def _tsv_records(file: Path) -> Iterator[tuple[int, list[str] | InputError]]:
    """No quoting, as in MS MARCO: a quote is a character of the text."""
    told = False
    for number, text in text_lines(file):
        if isinstance(text, InputError):
            yield number, text
        elif text:
            fields = text.split("\t")
            if not told and (field := next(filter(_looks_quoted, fields), None)):
                hint = "looks quoted, and TSV has no quoting: the quotes are read as text; write CSV if they are none"
                log.warning(f"{file}, line {number}: {shown(field)} {hint}")
                told = True
            yield number, fields


def _looks_quoted(field: str) -> bool:
    """As csv writers do with a text that has quotes."""
    within = field[1:-1]
    return field[:1] == '"' == field[-1:] and '""' in within and '"' not in within.replace('""', "")


def _csv_records(file: Path, separator: str, skip: int = 0) -> Iterator[tuple[int, list[str] | InputError]]:
    """(line where it begins, fields). Strict: a stray quote is an error of the row, where csv would join texts in silence.

    Some write `"a", "b"`: where one of the first records has a quote behind a blank, blanks behind separators are none of the
    texts'; one that comes later is an error of its row.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))  # of the process; 128 KB else, and documents are longer
    blanks = _has_blanks_before_quotes(file, separator, skip)
    for number, fields in _csv_parsed(file, separator, skip, blanks):
        if not blanks and (odd := _quoted_behind_blanks(fields)):
            yield number, InputError(f"{file}, line {number}: a quote behind a blank, {shown(odd)}; take the blanks between separators and quotes away")
        else:
            yield number, fields


def _has_blanks_before_quotes(file: Path, separator: str, skip: int) -> bool:
    first = islice(_csv_parsed(file, separator, skip, blanks=False), FIRST_RECORDS)
    try:
        return any(_quoted_behind_blanks(fields) for _, fields in first)
    except InputError:  # raised again, in its place, when the rows are read
        return False


def _quoted_behind_blanks(fields: list[str] | InputError) -> str | None:
    if isinstance(fields, InputError):
        return None
    return next((field for field in fields if field[:1] in (" ", "\t") and field.lstrip(" \t")[:1] == '"'), None)


def _csv_parsed(file: Path, separator: str, skip: int, blanks: bool) -> Iterator[tuple[int, list[str] | InputError]]:
    """blanks: those behind a separator are left out."""
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
            yield number, feed.flaw or fields


def _csv_error(error: csv.Error, where: str, last_line: int, feed: "_Feed") -> InputError:
    if str(error).startswith(("unexpected end", "field larger")):
        found = f"{where}: a quote that opens in the row {shown(feed.first)} is not closed up to line {last_line}"
        raise InputError(f"{found}, and no row behind it can be told; close it, or double quotes within a text") from None
    remedy = "take the blanks behind quotes away" if re.search(r'"[ \t]+\W', feed.first) else "double quotes within a text, or remove the row"
    return InputError(f"{where}: not CSV up to line {last_line} ({error}): {shown(feed.first)}; {remedy}")


class _Feed:
    """Lines for csv.reader. A line that is no text goes in with stand-ins, so that the quotes around it still count, and is remembered."""

    def __init__(self, file: Path) -> None:
        self.file, self.lines = file, _lines(file)
        self.new_row()

    def new_row(self) -> None:
        self.first, self.flaw = "", None

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        number, line = next(self.lines)
        found = line if isinstance(line, InputError) else attempt(_text, line, f"{self.file}, line {number}")
        if isinstance(found, InputError):
            self.flaw = self.flaw or found
        text = "\n" if isinstance(line, InputError) else line.decode(errors="replace")
        self.first = self.first or text.rstrip("\r\n")[:80]
        return text


# --- Parquet and Arrow ---


def _parquet_rows(file: Path) -> Rows:
    def batches() -> Iterator[pa.RecordBatch]:
        with parquet.ParquetFile(file, buffer_size=1 << 20, page_checksum_verification=True) as source:
            yield from _named_batches(source.schema_arrow, source.iter_batches(ROWS_AT_A_TIME), file)

    return _batch_rows(file, batches())


def _arrow_rows(file: Path) -> Rows:
    """The file format, which begins with its name, or the stream format, which datasets writes under the same ending."""

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                opened = pa.ipc.open_file(source)
                yield from _named_batches(opened.schema, map(opened.get_batch, range(opened.num_record_batches)), file)
            else:
                source.seek(0)
                opened = pa.ipc.open_stream(source)
                yield from _named_batches(opened.schema, opened, file)

    if not file.stat().st_size:  # which cannot be mapped
        return iter(())
    return _batch_rows(file, batches())


def _named_batches(schema: pa.Schema, batches: Iterable[pa.RecordBatch], file: Path) -> Iterator[pa.RecordBatch]:
    _checked_names(schema.names, str(file))
    for batch in batches:
        for start in range(0, len(batch), ROWS_AT_A_TIME):
            yield batch.slice(start, ROWS_AT_A_TIME)


def _batch_rows(file: Path, batches: Iterator[pa.RecordBatch]) -> Rows:
    """Class labels by name, as `datasets` writes the names into the schema."""
    number = 0
    try:
        for batch in batches:
            labels = _class_labels(batch.schema)
            for row in _python_rows(batch):
                number += 1
                where = f"{file}, row {number}"
                yield where, InputError(f"{where}{row}; fix or remove the row") if isinstance(row, str) else attempt(sound, _with_labels(row, labels), where)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}, row {number + 1}: cannot be read from here on ({_first_line(error)}); write or copy the file again") from error


def _class_labels(schema: pa.Schema) -> Labels:
    """What the library `datasets` says of the columns, which it leaves in the file as JSON; nothing where that cannot be understood."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {column: kind["names"] for column, kind in features.items() if kind.get("_type") == "ClassLabel" and isinstance(kind["names"], list)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _with_labels(row: dict, labels: Labels) -> dict:
    """The names of the numbers: sets number them in different orders, and 0 is entailment in one and no duplicate in another."""
    return row | {column: names[row[column]] if row[column] in range(len(names)) else None for column, names in labels.items() if column in row}


def _python_rows(batch: pa.RecordBatch) -> Iterable[dict | str]:
    """Dicts, and what is wrong with the row where there is none. Validated first: offsets that lead out of the file would end the process."""
    try:
        batch.validate(full=True)
        return batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [_flaw(batch) or f": cannot be read ({_first_line(error)})"]
        return (row for place in range(len(batch)) for row in _python_rows(batch.slice(place, 1)))


def _flaw(row: pa.RecordBatch) -> str | None:
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.validate(full=True)
            column.to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            if "utf" in str(error).lower() and column.type in (pa.string(), pa.large_string()):
                return f", column {name!r}: not UTF-8 in {shown(column.cast(pa.large_binary())[0].as_py())}"
            return f", column {name!r}: cannot be read ({_first_line(error)})"
    return None


def _first_line(error: BaseException) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.200}"


# --- the library `datasets` ---


def _saved_rows(folder: Path, split: str) -> Rows:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever its parts raise: OSError, KeyError, ArrowInvalid
        raise InputError(f"{folder}: cannot be loaded as a data set ({_first_line(error)}); give a hub id or a folder written by save_to_disk") from error
    if isinstance(found, datasets.DatasetDict):
        name = next((name for name in found if name == split), None) or next((name for name in found if same_split(name, split)), None)
        if name is None:
            raise InputError(f"{folder}: no split {split!r}; it has {listed(found)}. Set data.split=<split>")
        found = found[name]
    return _dataset_rows(found, str(folder))


def _hub_rows(path: Path, split: str, subset: str | None, streaming: bool) -> Rows:
    import datasets

    try:
        found = datasets.load_dataset(str(path), subset, split=split, streaming=streaming)
    except Exception as error:  # whatever its parts raise: of the network, of the hub, of the files' formats, its own
        raise InputError(
            f"{path}: no such file, and it cannot be loaded as a data set of the hub ({_first_line(error)}); check the path or the id, the split {split!r} "
            f"and the subset {subset!r}"
        ) from error
    return _dataset_rows(found, str(path))


def _dataset_rows(found, name: str) -> Rows:
    """Class labels by name."""
    import datasets

    labels = {column: kind.names for column, kind in (found.features or {}).items() if isinstance(kind, datasets.ClassLabel)}
    number = 0
    try:
        for row in found:
            number += 1
            yield f"{name}, row {number}", attempt(sound, _with_labels(row, labels), f"{name}, row {number}")
    except Exception as error:  # as above
        raise InputError(f"{name}, row {number + 1}: cannot be read from here on ({_first_line(error)}); load or save the data set again") from error


TEXT = (".jsonl", ".json", ".csv", ".tsv")
READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": json_rows, ".json": json_rows, ".csv": _csv_rows, ".tsv": _tsv_rows, ".parquet": _parquet_rows, ".arrow": _arrow_rows,
}  # fmt: skip
