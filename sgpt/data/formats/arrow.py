"""Rows of Parquet and Arrow files, and of data sets of the library `datasets`, on disk or from the hub."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from sgpt.data.formats.row import (
    PlacedRows,
    attempt,
    checked_names,
    checked_row,
    listed,
    same_split,
    short_reason,
    shown,
)
from sgpt.runtime.errors import InputError

Labels = dict[str, list[str]]  # column of class labels -> their names, by number
BATCH_ROWS = 1024


def parquet_rows(file: Path) -> PlacedRows:
    def batches() -> Iterator[pa.RecordBatch]:
        with parquet.ParquetFile(file, buffer_size=1 << 20, page_checksum_verification=True) as source:
            yield from _named_batches(source.schema_arrow, source.iter_batches(BATCH_ROWS), file)

    return _batch_rows(file, batches())


def arrow_rows(file: Path) -> PlacedRows:
    """The file format, which begins with its name, or the stream format, which datasets writes under the same
    ending.
    """

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
    checked_names(schema.names, str(file))
    for batch in batches:
        for start in range(0, len(batch), BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _batch_rows(file: Path, batches: Iterator[pa.RecordBatch]) -> PlacedRows:
    """Class labels by name, as `datasets` writes the names into the schema."""
    number = 0
    try:
        for batch in batches:
            labels = _class_labels(batch.schema)
            for row in _python_rows(batch):
                number += 1
                where = f"{file}, row {number}"
                if isinstance(row, str):  # what is wrong with it
                    yield where, InputError(f"{where}{row}; fix or remove the row")
                else:
                    yield where, attempt(checked_row, _with_labels(row, labels), where)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}, row {number + 1}: cannot be read from here on ({short_reason(error)}); "
            "write or copy the file again"
        ) from error


def _class_labels(schema: pa.Schema) -> Labels:
    """What the library `datasets` says of the columns, which it leaves in the file as JSON; nothing where that cannot
    be understood.
    """
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: kind["names"]
            for column, kind in features.items()
            if kind.get("_type") == "ClassLabel" and isinstance(kind["names"], list)
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _with_labels(row: dict, labels: Labels) -> dict:
    """The names of the numbers: sets number them in different orders, and 0 is entailment in one and no duplicate in
    another.
    """
    return row | {
        column: names[row[column]] if row[column] in range(len(names)) else None
        for column, names in labels.items()
        if column in row
    }


def _python_rows(batch: pa.RecordBatch) -> Iterable[dict | str]:
    """Dicts, and what is wrong with the row where there is none.

    Validated first: offsets that lead out of the file would end the process.
    """
    try:
        batch.validate(full=True)
        return batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [_flaw(batch) or f": cannot be read ({short_reason(error)})"]
        return (row for index in range(len(batch)) for row in _python_rows(batch.slice(index, 1)))


def _flaw(row: pa.RecordBatch) -> str | None:
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.validate(full=True)
            column.to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            if "utf" in str(error).lower() and column.type in (pa.string(), pa.large_string()):
                return f", column {name!r}: not UTF-8 in {shown(column.cast(pa.large_binary())[0].as_py())}"
            return f", column {name!r}: cannot be read ({short_reason(error)})"
    return None


def saved_rows(folder: Path, split: str) -> PlacedRows:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever its parts raise: OSError, KeyError, ArrowInvalid
        raise InputError(
            f"{folder}: cannot be loaded as a data set ({short_reason(error)}); "
            "give a hub id or a folder written by save_to_disk"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        alike = (name for name in dataset if same_split(name, split))  # validation for dev
        name = split if split in dataset else next(alike, None)
        if name is None:
            raise InputError(f"{folder}: no split {split!r}; it has {listed(dataset)}. Set data.split=<split>")
        dataset = dataset[name]
    return _dataset_rows(dataset, str(folder))


def hub_rows(path: Path, split: str, subset: str | None, streaming: bool) -> PlacedRows:
    import datasets

    try:
        dataset = datasets.load_dataset(str(path), subset, split=split, streaming=streaming)
    except Exception as error:  # whatever its parts raise: of the network, of the hub, of the files' formats, its own
        raise InputError(
            f"{path}: no such file, and it cannot be loaded as a data set of the hub ({short_reason(error)}); "
            f"check the path or the id, the split {split!r} and the subset {subset!r}"
        ) from error
    return _dataset_rows(dataset, str(path))


def _dataset_rows(dataset, name: str) -> PlacedRows:
    """Class labels by name."""
    import datasets

    labels = {
        column: kind.names for column, kind in (dataset.features or {}).items() if isinstance(kind, datasets.ClassLabel)
    }
    number = 0
    try:
        for row in dataset:
            number += 1
            yield f"{name}, row {number}", attempt(checked_row, _with_labels(row, labels), f"{name}, row {number}")
    except Exception as error:  # as above
        raise InputError(
            f"{name}, row {number + 1}: cannot be read from here on ({short_reason(error)}); "
            "load or save the data set again"
        ) from error
