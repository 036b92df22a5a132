"""Training data on disk, opened by memory map: a million pairs start in seconds and take no memory.

    <cache>/<key>/texts.arrow          every text once: text, and 64 bits of its hash
                  examples.arrow       query, positives, hard_negatives: row numbers in texts.arrow
                  tokens-<key>.arrow   token ids of every text, without markers, cut at the longest limit
                  normalised.npy       hashes of the texts without case and blanks (overlap.py)
                  embeddings-<key>/    of the texts, by a guide (embeddings.py)
                  walk-<key>.npy       the order of the examples by data.grouping_model (grouping.py)

The first key is made of the source's bytes (of the hub's revision) and its reader's settings, the others of the
tokenizer and the limit, or of the weights of the guide or grouping model. Whatever changes gives another key, so
nothing stale is ever served. Everything is written under a temporary name and renamed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from sgpt.data.feed.example import Example
from sgpt.runtime.files import make_once, replace_folder
from sgpt.runtime.progress import progress_bar
from sgpt.runtime.provenance import tokenizer_rules
from sgpt.text.tokens import content_ids

FORMAT = 2  # of these files; a change makes every key another
ROWS_AT_A_TIME = 20_000
TEXT_SCHEMA = pa.schema([("text", pa.large_string()), ("hash", pa.int64())])
EXAMPLE_SCHEMA = pa.schema([
    ("query", pa.int64()),
    ("positives", pa.large_list(pa.int64())),
    ("hard_negatives", pa.large_list(pa.int64())),
])  # fmt: skip
TOKEN_SCHEMA = pa.schema([("ids", pa.large_list(pa.int32()))])
COLUMN_TYPES = {field.name: field.type for schema in (TEXT_SCHEMA, EXAMPLE_SCHEMA, TOKEN_SCHEMA) for field in schema}


def text_hash(text: str) -> int:
    """A hash by which equal texts are recognised everywhere: signed 64 bits."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def key_of(*parts: object) -> str:
    """A cache key of anything that JSON takes."""
    return hashlib.blake2b(json.dumps([FORMAT, *parts], sort_keys=True).encode(), digest_size=12).hexdigest()


class Column:
    """One column of an Arrow file, opened by memory map: `column[row]` is a string, a number or a list of numbers."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name
        self.chunks = self._mapped()
        self.starts = np.cumsum([0, *map(len, self.chunks)])

    def _mapped(self) -> list[pa.Array]:
        return pa.ipc.open_file(pa.memory_map(str(self.file))).read_all().column(self.name).chunks  # reads nothing

    def give_back(self) -> None:
        """The memory of the pages that were read, which else counts as this process's as long as the file is open."""
        self.chunks = self._mapped()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int):
        chunk = int(np.searchsorted(self.starts, row, "right")) - 1
        value = self.chunks[chunk][row - int(self.starts[chunk])]
        return value.values.to_numpy().tolist() if isinstance(value, pa.LargeListScalar) else value.as_py()


def column_parts(name: str, column: Sequence) -> list[pa.Array]:
    """Arrow arrays, one after the other: of a column on disk, or the whole of one in memory. name: in the schemas."""
    return column.chunks if isinstance(column, Column) else [pa.array(column, COLUMN_TYPES[name])]


def whole_column(name: str, column: Sequence) -> np.ndarray:
    return np.concatenate([part.to_numpy() for part in column_parts(name, column)])


def texts_named(name: str, column: Sequence) -> np.ndarray:
    """Numbers of the different texts that a column of lists names, ascending."""
    parts = [np.unique(part.flatten().to_numpy()) for part in column_parts(name, column)]
    return np.unique(np.concatenate(parts))


class Examples:
    """A table of texts, and examples that name their texts by row number; on disk or in memory.

    `examples[i]` is an `Example` of strings. texts, hashes: one of each text. queries, positives, hard_negatives: of
    each example, row numbers of texts. key: cache key of the source's bytes and its reader's settings. folder: None in
    memory.
    """

    def __init__(self, tables: Mapping[str, Sequence], key: str, folder: Path | None = None) -> None:
        self.texts, self.hashes = tables["text"], tables["hash"]
        self.queries, self.positives = tables["query"], tables["positives"]
        self.hard_negatives = tables["hard_negatives"]
        self.key, self.folder = key, folder

    @classmethod
    def open(cls, folder: Path) -> "Examples":
        """By memory map, of a folder that `cached_examples` filled."""
        columns = {}
        for file, schema in (("texts.arrow", TEXT_SCHEMA), ("examples.arrow", EXAMPLE_SCHEMA)):
            for name in schema.names:
                columns[name] = Column(folder / file, name)
        return cls(columns, folder.name, folder)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """In memory."""
        texts, rows = _Lists(TEXT_SCHEMA), _Lists(EXAMPLE_SCHEMA)
        writer = Writer(texts, rows)
        for example in examples:
            writer.example(example)
        return cls({**texts.columns, **rows.columns}, key_of(texts.columns["hash"], *rows.columns.values()))

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, number: int) -> Example:
        positive, *others = (self.texts[text] for text in self.positives[number])
        hard_negatives = tuple(self.texts[text] for text in self.hard_negatives[number])
        return Example(self.texts[self.queries[number]], positive, hard_negatives, tuple(others))

    def __iter__(self) -> Iterator[Example]:
        return (self[number] for number in range(len(self)))


class Writer:
    """Writes texts, and examples that name them by number: a text's number is how many were written before it."""

    def __init__(self, texts: "_Table | _Lists", rows: "_Table | _Lists") -> None:
        self.texts, self.rows, self.numbers = texts, rows, {}

    def text(self, text: str) -> int:
        """Writes the text and returns its number, even if an equal one is there: for collections too large to remember.
        """
        self.texts.add(text, text_hash(text))
        return self.texts.count - 1

    def known_text(self, text: str) -> int:
        """Writes the text unless it was written before, and returns its number."""
        hashed = text_hash(text)
        if hashed not in self.numbers:
            self.numbers[hashed] = self.text(text)
        return self.numbers[hashed]

    def row(self, query: int, positives: Sequence[int], hard_negatives: Sequence[int]) -> None:
        self.rows.add(query, positives, hard_negatives)

    def example(self, example: Example) -> None:
        positives = [self.known_text(text) for text in (example.positive, *example.other_positives)]
        self.row(self.known_text(example.query), positives, [self.known_text(text) for text in example.hard_negatives])


def cached_examples(cache: Path, key: str, fill: Callable[[Writer], None]) -> Examples:
    """The examples that `fill` writes, from the cache when they are in it. An error leaves nothing that looks whole."""
    folder = cache / key
    make_once(folder, folder.is_dir, lambda: _fill(folder, fill))
    return Examples.open(folder)


def _fill(folder: Path, fill: Callable[[Writer], None]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(exist_ok=True)
    try:
        with (
            _Table(temporary / "texts.arrow", TEXT_SCHEMA) as texts,
            _Table(temporary / "examples.arrow", EXAMPLE_SCHEMA) as rows,
        ):
            fill(Writer(texts, rows))
    except BaseException:
        shutil.rmtree(temporary)
        raise
    replace_folder(temporary, folder)


class _Table:
    """An Arrow file, written some rows at a time."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self.schema, self.rows, self.count = schema, [], 0
        self.writer = pa.ipc.new_file(str(file), schema)

    def __enter__(self) -> "_Table":
        return self

    def add(self, *values: object) -> None:
        self.rows.append(values)
        self.count += 1
        if len(self.rows) == ROWS_AT_A_TIME:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            values = zip(*self.rows, strict=True)  # by column
            columns = [pa.array(column, field.type) for column, field in zip(values, self.schema, strict=True)]
            self.writer.write_batch(pa.record_batch(columns, schema=self.schema))
            self.rows = []

    def __exit__(self, *error) -> None:
        self._flush()
        self.writer.close()


class _Lists:
    """Lists in memory, with the methods of `_Table`."""

    def __init__(self, schema: pa.Schema) -> None:
        self.columns: dict[str, list] = {name: [] for name in schema.names}
        self.count = 0

    def add(self, *values: object) -> None:
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)
        self.count += 1


class Tokens:
    """Token ids of every text of `examples`, cut at `limit`.

    They are made once for a tokenizer and a limit, and kept next to the texts.
    """

    def __init__(self, examples: Examples, tokenizer, limit: int) -> None:
        if examples.folder is None:
            self.ids: Sequence = []
            for texts in text_batches(examples.texts):
                self.ids += content_ids(texts, tokenizer, limit)
            return
        key = key_of(tokenizer_rules(tokenizer), limit)
        file = examples.folder / f"tokens-{key}.arrow"
        make_once(file, file.is_file, lambda: _tokenise(examples.texts, tokenizer, limit, file))
        self.ids = Column(file, "ids")

    def __getitem__(self, text: int) -> list[int]:
        return self.ids[text]


def _tokenise(texts: Sequence[str], tokenizer, limit: int, file: Path) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    with _Table(temporary, TOKEN_SCHEMA) as table, progress_bar("tokenising", len(texts)) as advance:
        for part in text_batches(texts):
            for ids in content_ids(part, tokenizer, limit):
                table.add(ids)
            advance(len(part))
    temporary.replace(file)


def text_batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """ROWS_AT_A_TIME of them each; those on disk take no memory once they were read."""
    for start in range(0, len(texts), ROWS_AT_A_TIME):
        end = min(start + ROWS_AT_A_TIME, len(texts))
        yield [texts[row] for row in range(start, end)]
        if isinstance(texts, Column):
            texts.give_back()
