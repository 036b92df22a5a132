"""Anyone's files: what good rows become, the sentence that each bad one gets, and that no bad one takes a good one with
it.

Files are written by csv, json and pyarrow, and by hand, never by the code that reads them.
"""

import csv
import gzip
import io
import json
import logging
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from sgpt.data.feed.example import Example
from sgpt.data.formats import lines as lines_module
from sgpt.data.formats import tables as tables_module
from sgpt.data.formats.rows import rows
from sgpt.data.sources.bad_rows import accepted
from sgpt.data.sources.columns import Columns, describe, guess_columns, peek_column_names, refuse_late_columns
from sgpt.data.sources.pairs import GroupedExample, examples
from sgpt.runtime.errors import InputError

TABLE = [
    {"query": "q1", "positive": "naïve 東京 🙂"}, {"query": "q2", "positive": 'said "yes", twice'},
    {"query": "q3", "positive": "p3"}
]
PAIR = Columns("query", "positive")


def values(path: Path, **options) -> list[dict]:
    """Rows of a file that has only good ones."""
    return [row for _, row in rows(path, **options)]


def errors(path: Path, **options) -> list[str]:
    """What is wrong with the rows, all others being equal to TABLE's."""
    found = values(path, **options)
    assert [row for row in found if isinstance(row, dict)] == TABLE
    return [str(row) for row in found if isinstance(row, InputError)]


def raised(path: Path, match: str, **options) -> list[dict]:
    """The rows before the InputError that ends them."""
    before = []
    with pytest.raises(InputError, match=match) as caught:
        before.extend(row for _, row in rows(path, **options))
    assert "\n" not in str(caught.value)
    return before


def until_error(found: Iterator) -> tuple[list, InputError | None]:
    """What comes, and the InputError that ends it, if one does. Anything else fails the test."""
    before = []
    try:
        before.extend(found)
    except InputError as error:
        return before, error
    return before, None


def as_json(table: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table).encode()


def as_csv(table: list[dict]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue().encode()


def as_tsv(table: list[dict]) -> bytes:
    names = list(table[0])
    return "".join(
        "\t".join(fields) + "\n" for fields in [names, *([row[name] for name in names] for row in table)]
    ).encode()


WRITERS = {".jsonl": as_json, ".csv": as_csv, ".tsv": as_tsv}


def write(file: Path, table: list[dict], *, chunk: int = 2) -> Path:
    """As the name says; Parquet and Arrow in several pieces."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if content := next((content for kind, content in WRITERS.items() if kind in file.name.lower()), None):
        file.write_bytes(gzip.compress(content(table)) if file.suffix == ".gz" else content(table))
    elif file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(table), file, row_group_size=chunk)
    else:
        made = pa.Table.from_pylist(table)
        with (pa.ipc.new_stream if "stream" in file.name else pa.ipc.new_file)(str(file), made.schema) as out:
            out.write_table(made, max_chunksize=chunk)
    return file


# --- every kind of file gives the same rows ---

KINDS = [
    "a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz", "a.parquet", "a.arrow", "stream.arrow", "A.CSV"
]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_rows_and_their_places(name, tmp_path):
    file = write(tmp_path / name, TABLE)
    word, first = ("row", 1) if name.endswith((".parquet", ".arrow")) else ("line", 1 if "json" in name else 2)
    assert list(rows(file)) == [(f"{file}, {word} {first + i}", row) for i, row in enumerate(TABLE)]


def test_json_lines_may_be_called_json(tmp_path):
    write(tmp_path / "a.jsonl", TABLE).rename(tmp_path / "a.json")
    assert values(tmp_path / "a.json") == TABLE


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv"])
def test_a_byte_order_mark_windows_line_ends_and_blank_lines_change_nothing(kind, tmp_path):
    content = WRITERS[kind](TABLE).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    lines = content.split(b"\r\n")
    (tmp_path / f"a{kind}").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([lines[0], b"", *lines[1:], b""]))
    assert values(tmp_path / f"a{kind}") == TABLE


def test_the_last_line_needs_no_end(tmp_path):
    for kind, content in WRITERS.items():
        (tmp_path / f"a{kind}").write_bytes(content(TABLE).rstrip(b"\r\n"))
        assert values(tmp_path / f"a{kind}") == TABLE


def test_quoted_line_ends_belong_to_the_text_and_places_are_the_rows_first_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'query,positive\n"one\ntwo\r\nthree",p\n"a ""b"" c","d,e"\n')
    file = tmp_path / "a.csv"
    assert list(rows(file)) == [
        (f"{file}, line 2", {"query": "one\ntwo\r\nthree", "positive": "p"}),
        (f"{file}, line 5", {"query": 'a "b" c', "positive": "d,e"}),
    ]


def test_a_tsv_has_no_quoting(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b'query\tpositive\n"q\tp "p"\na,b\t"\n')
    assert values(tmp_path / "a.tsv") == [{"query": '"q', "positive": 'p "p"'}, {"query": "a,b", "positive": '"'}]


def test_parquet_and_arrow_give_pythons_numbers_lists_and_none(tmp_path):
    table = [{"q": "a", "n": ["b", "c"], "score": 0.5, "label": 1}, {"q": None, "n": [], "score": None, "label": 0}]
    for name in ("a.parquet", "a.arrow"):
        assert values(write(tmp_path / name, table)) == table


def test_memory_is_bounded_by_batches_not_by_the_file(tmp_path):
    table = pa.table({"text": [f"{i} " * 200 for i in range(3_000)]})  # 3 MB
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3_000)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    (tmp_path / "a.jsonl").write_bytes(as_json(table.to_pylist()))
    for file in tmp_path.iterdir():
        tracemalloc.start()
        assert sum(1 for _ in rows(file)) == 3_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000, file
        tracemalloc.stop()


# --- folders ---


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path):
    for place, row in enumerate(TABLE):
        write(tmp_path / f"part-{place}.jsonl{'.gz' if place == 1 else ''}", [row])
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".hidden.csv").write_text("a\n1\n")
    (tmp_path / "config.json").write_text("{}")
    assert [where.removeprefix(f"{tmp_path}/") for where, _ in rows(tmp_path)] == [
        "part-0.jsonl, line 1", "part-1.jsonl.gz, line 1", "part-2.jsonl, line 1"
    ]
    assert values(tmp_path) == TABLE


def test_files_of_another_split_are_left_out_with_a_warning(tmp_path, caplog):
    for name, row in zip(
        ("train-00000.parquet", "train-00001.parquet", "more.parquet", "test-00000.parquet"), [*TABLE, {"query": "x"}],
        strict=True
    ):
        write(tmp_path / name, [row])
    assert sorted(row["query"] for row in values(tmp_path)) == ["q1", "q2", "q3"]
    assert "test-00000.parquet left out; 'train' is the split to read" in caplog.text
    assert {"query": "x"} in values(tmp_path, split="test")


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    raised(
        tmp_path,
        r"no data files of the split 'train'; it holds nothing\. Give one of its files or folders, or set data\.split"
    )
    write(tmp_path / "data" / "test.csv", TABLE)
    raised(tmp_path, r"it holds data/\. Give")
    raised(tmp_path / "data", r"no data files of the split 'dev'; it holds test\.csv", split="dev")
    write(tmp_path / "a.csv", TABLE)
    write(tmp_path / "b.tsv", TABLE)
    raised(tmp_path, r"holds files of several kinds \(1 \.csv, 1 \.tsv\); give one file, or a folder of one kind")


def test_an_empty_file_among_others_is_no_error_but_alone_it_is(tmp_path):
    (tmp_path / "a.jsonl").touch()
    raised(tmp_path, r"no rows in it; give a file with at least one")
    write(tmp_path / "b.jsonl", TABLE)
    assert values(tmp_path) == TABLE


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_written_by_save_to_disk_is_read(splits, tmp_path):
    table = datasets.Dataset.from_list(TABLE)
    (
        datasets.DatasetDict({"train": table, "dev": table.select([0])}) if splits else table
    ).save_to_disk(str(tmp_path / "saved"))
    assert list(rows(tmp_path / "saved")) == [(f"{tmp_path}/saved, row {i + 1}", row) for i, row in enumerate(TABLE)]
    if splits:
        assert values(tmp_path / "saved", split="dev") == TABLE[:1]
        raised(tmp_path / "saved", r"no split 'test'; it has train, dev\. Set data\.split=<split>", split="test")


def test_class_labels_of_a_saved_set_are_read_by_name(tmp_path):
    names = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    table = datasets.Dataset.from_dict(
        {"premise": ["a"] * 4, "label": [0, 1, 2, -1]},
        datasets.Features({"premise": datasets.Value("string"), "label": names})
    )
    table.save_to_disk(str(tmp_path / "saved"))
    assert [row["label"] for row in values(tmp_path / "saved")] == ["entailment", "neutral", "contradiction", None]


def test_a_damaged_saved_set_is_refused(tmp_path):
    datasets.Dataset.from_list(TABLE).save_to_disk(str(tmp_path / "saved"))
    (data,) = (tmp_path / "saved").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:100])
    raised(
        tmp_path / "saved",
        r"saved: cannot be loaded as a data set \(.*\); give a hub id or a folder written by save_to_disk"
    )


def test_a_hub_id_without_a_network_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    sentence = (
        r"no-name: no such file, and it cannot be loaded as a data set of the hub \(.*\); check the path or the id, "
        r"the split 'train' and the subset"
    )
    raised(Path("nobody/no-name"), sentence, streaming=True)


# --- malformed rows: a value each, and the next row goes on ---


def spoiled(kind: str, line: bytes, place: int = 1) -> bytes:
    """TABLE with a line in it, behind so many of its rows."""
    lines = WRITERS[kind](TABLE).splitlines(keepends=True)
    place += kind != ".jsonl"
    return b"".join([*lines[:place], line + b"\n", *lines[place:]])


BAD_LINES = [
    (
        ".jsonl", b"{not json}",
        r"line 2: not JSON (Expecting property name enclosed in double quotes at column 2): '{not json}'; fix or "
        r"remove the line"
    ),
    (
        ".jsonl", b'{"query": "q"',
        r"line 2: not JSON (Expecting ',' delimiter at column 14): '{" + '"query": "q"' + "'; fix or remove the line"
    ),
    (".jsonl", b'["q", "p"]', "line 2: expected a JSON object, got list ['q', 'p']; write one object a line"),
    (".jsonl", b"7", "line 2: expected a JSON object, got int 7; write one object a line"),
    (
        ".jsonl", b'{"a": 1, "a": 2}',
        "line 2: not JSON (the key 'a' is there twice): '{\"a\": 1, \"a\": 2}'; fix or remove the line"
    ),
    (".jsonl", b"[" * 100_000, "line 2: not JSON (maximum recursion depth exceeded"),
    (".jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 2: not JSON (Exceeds the limit"),
    (
        ".jsonl", b'{"a": "caf\xe9"}',
        "line 2: not UTF-8 at column 11 in '{\"a\": \"caf\\\\xe9\"}\\n'; save the file as UTF-8, or fix or remove the "
        "line"
    ),
    (".jsonl", b'{"a": "b\0c"}', "line 2: a NUL character at column 9 in '{\"a\": \"b\\x00c\"}\\n'; remove it"),
    (".jsonl", b'{"a": "b\\u0000c"}', "line 2, column 'a': a NUL character in 'b\\x00c'; remove it"),
    (
        ".jsonl", b'{"a": ["b", "\\ud83d"]}',
        "line 2, column 'a': half of a surrogate pair in '\\ud83d', which is no character; remove it"
    ),
    (
        ".csv", b"q",
        "line 3: 1 fields where the header names 2 columns: 'q'; quote texts that hold a comma or a line end"
    ),
    (
        ".csv", b"q,p,n",
        "line 3: 3 fields where the header names 2 columns: 'q,p,n'; quote texts that hold a comma or a line end"
    ),
    (
        ".csv", b'"q"x,p',
        "line 3: not CSV up to line 3 (',' expected after '\"'): '\"q\"x,p'; double quotes within a text, or remove "
        "the row"
    ),
    (
        ".csv", b'"q\n"x,p',
        "line 3: not CSV up to line 4 (',' expected after '\"'): '\"q'; double quotes within a text, or remove the row"
    ),
    (
        ".csv", b"caf\xe9,p",
        "line 3: not UTF-8 at column 4 in 'caf\\\\xe9,p\\n'; save the file as UTF-8, or fix or remove the line"
    ),
    (".csv", b'"a\nb\0\nc",p', "line 4: a NUL character at column 2 in 'b\\x00\\n'; remove it"),
    (".csv", b"a\rb,p", "line 3: not CSV up to line 3 (new-line character seen in unquoted field"),
    (
        ".tsv", b"q\tp\tn",
        "line 3: 3 fields where the header names 2 columns: 'q\\tp\\tn'; take tabs and line ends out of the texts"
    ),
    (".tsv", b"q p", "line 3: 1 fields where the header names 2 columns: 'q p'; take tabs"),
    (".tsv", b"\xff\tp", "line 3: not UTF-8 at column 1 in '\\\\xff\\tp\\n'; save the file as UTF-8"),
    (".tsv", b"q\t\0", "line 3: a NUL character at column 3 in 'q\\t\\x00\\n'; remove it"),
]


@pytest.mark.parametrize(("kind", "line", "sentence"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_malformed_row_is_named_and_no_other_is_lost(kind, line, sentence, tmp_path):
    for name in (f"a{kind}", f"a{kind}.gz"):
        content = spoiled(kind, line)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        (error,) = errors(tmp_path / name)
        assert error.startswith(f"{tmp_path / name}, {sentence}")
        assert "\n" not in error


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("length", [101, 102, 4_000_000])
def test_a_line_that_is_too_long_is_refused_without_being_held(kind, place, length, tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 100)
    (tmp_path / f"a{kind}").write_bytes(spoiled(kind, b"x" * (length - 1), place))
    tracemalloc.start()
    (error,) = errors(tmp_path / f"a{kind}")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    line = place + 1 + (kind != ".jsonl")
    assert error == f"{tmp_path}/a{kind}, line {line}: longer than 100 bytes: '{'x' * 80}'; split or remove the line"


def test_a_line_of_just_the_limit_is_read(tmp_path, monkeypatch):
    line = json.dumps({"query": "q" * 80})
    (tmp_path / "a.jsonl").write_text(line + "\n")
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", len(line) + 1)
    assert values(tmp_path / "a.jsonl") == [{"query": "q" * 80}]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_text_that_is_not_utf_8_in_a_binary_table_is_a_row_of_its_own(name, kind, tmp_path):
    raw = pa.array([b"fine", b"caf\xe9", b"also \0", b"fine too"])
    column = pa.Array.from_buffers(
        kind, 4, raw.cast(pa.large_binary() if kind == pa.large_string() else pa.binary()).buffers()
    )
    table = pa.table({"query": column})
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name)
    else:
        with (pa.ipc.new_stream if "stream" in name else pa.ipc.new_file)(str(tmp_path / name), table.schema) as out:
            out.write_table(table)
    first, second, third, last = values(tmp_path / name)
    assert (first, last) == ({"query": "fine"}, {"query": "fine too"})
    assert str(second) == f"{tmp_path / name}, row 2, column 'query': not UTF-8 in 'caf\\\\xe9'; fix or remove the row"
    assert str(third) == f"{tmp_path / name}, row 3, column 'query': a NUL character in 'also \\x00'; remove it"


def test_a_value_that_python_has_not_is_a_malformed_row(tmp_path):
    parquet.write_table(pa.table({"when": pa.array([0, 1 << 60], pa.timestamp("us"))}), tmp_path / "a.parquet")
    good, bad = values(tmp_path / "a.parquet")
    assert good["when"].year == 1970
    assert "row 2, column 'when': cannot be read (" in str(bad)


# --- files that cannot be read on ---


@pytest.mark.parametrize("kind", WRITERS)
def test_a_truncated_gzip_stream_gives_what_is_whole_and_names_the_line_it_got_to(kind, tmp_path):
    table = [{"query": os.urandom(30).hex(), "positive": f"p{i}"} for i in range(400)]
    whole = gzip.compress(WRITERS[kind](table))
    header = kind != ".jsonl"
    for size in (5, 15, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 8, len(whole) - 1):
        (tmp_path / f"a{kind}.gz").write_bytes(whole[:size])
        before = raised(
            tmp_path / f"a{kind}.gz",
            r"\.gz, line \d+: cannot be read from here on \(Compressed file ended before .*\); copy the file again"
        )
        assert before == table[: len(before)]
        assert len(before) >= (size / len(whole) - 0.3) * len(table)
        with pytest.raises(InputError, match=rf", line {len(before) + header + 1}:" if before else ", line [12]:"):
            list(rows(tmp_path / f"a{kind}.gz"))


def test_damaged_and_pretended_gzip_is_refused(tmp_path):
    content = gzip.compress(as_json([{"query": os.urandom(30).hex()} for _ in range(400)]))
    (tmp_path / "a.jsonl.gz").write_bytes(
        content[:5000] + bytes(255 - byte for byte in content[5000:5100]) + content[5100:]
    )
    with pytest.raises(InputError, match=r", line \d+: cannot be read from here on \((Error -3|CRC check failed)"):
        [row for _, row in rows(tmp_path / "a.jsonl.gz") if not isinstance(row, InputError)]
    (tmp_path / "a.jsonl.gz").write_bytes(as_json(TABLE))
    raised(
        tmp_path / "a.jsonl.gz",
        r"line 1: cannot be read from here on \(Not a gzipped file .*\); .* let its name end in \.gz only if it is "
        r"gzipped"
    )


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_broken_binary_tables_are_refused(name, tmp_path):
    whole = write(tmp_path / name, [{"query": os.urandom(500).hex()} for _ in range(100)], chunk=10).read_bytes()
    sentence = r", row \d+: cannot be read from here on \(.*\); write or copy the file again"
    for content in (
        b"not a table", whole[: len(whole) // 2], whole[: len(whole) - 400], b"PAR1" + whole[4:-4] + b"PAR0"
    ):
        (tmp_path / name).write_bytes(content)
        if content.startswith(b"PAR1") and name != "a.parquet":
            continue
        before = raised(tmp_path / name, sentence)
        assert len(before) % 10 == 0
        assert len(before) > 30 or not name.startswith("stream") or content[:3] == b"not"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_turned_bytes_in_a_binary_table_end_in_rows_or_in_an_input_error(name, tmp_path):
    whole = write(
        tmp_path / name, [{"query": f"query {i}", "positive": ["a", "b"], "score": i / 3} for i in range(50)], chunk=10
    ).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        _, error = until_error(rows(tmp_path / name))
        assert error is None or str(tmp_path / name) in str(error)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.csv", b'query,positive\nq1,p1\n"never,p\nq3,p3\n',
            r"line 3: a quote that opens in the row '\"never,p' is not closed up to line 4, and the rows"
        ),
        ("a.csv", b"query,positive,query\n", r"line 1: two columns are called 'query'; rename or remove one"),
        (
            "a.csv", b",query,positive\n",
            r"line 1: column 1 of ', query, positive' has no name; name or remove it \(pandas: to_csv\(index=False\)\)"
        ),
        (
            "a.csv", b"query|positive\n",
            r"line 1: the header is one column with '\|' in its name, 'query\|positive'; separate the fields by ','"
        ),
        ("a.csv", b"caf\xe9,positive\n", r"line 1: not UTF-8 at column 4"),
        ("a.csv", b'"query"x,positive\n', r"line 1: not CSV up to line 1"),
        (
            "a.tsv", b"query,positive\n",
            r"line 1: the header is one column with ',' in its name, 'query,positive'; separate the fields by '\\t', "
            r"or end"
        ),
        ("a.tsv", b"query\t \n", r"line 1: column 2 of 'query,  ' has no name"),
        ("a.tsv", b"a\ta\n", r"line 1: two columns are called 'a'"),
        (
            "a.jsonl", '{"query": "q"}\n'.encode("utf-16"),
            r"line 1: begins with the mark of UTF-16; save the file as UTF-8"
        ),
        ("a.csv", "query,positive\nq,p\n".encode("utf-16"), r"line 1: begins with the mark of UTF-16"),
        ("a.jsonl", b"", r"a\.jsonl: no rows in it; give a file with at least one"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: no rows in it"),
        ("a.csv", b"", r"a\.csv: no rows in it"),
        ("a.csv", b"query,positive\n\n", r"a\.csv: no rows in it"),
        ("a.tsv", b"query\tpositive\n", r"a\.tsv: no rows in it"),
        ("a.jsonl.gz", b"", r"a\.jsonl\.gz: no rows in it"),
        ("a.parquet", b"", r"a\.parquet, row 1: cannot be read from here on \(.*\); write or copy the file again"),
        ("a.arrow", b"", r"a\.arrow: no rows in it"),
        (
            "a.txt", b"text",
            r"a\.txt: the ending is unknown; the ones that are read are \.jsonl, \.json, .* and \.gz behind \.jsonl, "
            r"\.json, \.csv, \.tsv"
        ),
        ("a.parquet.gz", b"text", r"a\.parquet\.gz: the ending is unknown"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    before = raised(tmp_path / name, sentence)
    assert before == ([{"query": "q1", "positive": "p1"}] if b"never" in content else [])


def test_tables_without_rows_or_with_two_columns_of_a_name_are_refused(tmp_path):
    two = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    for name in ("a.parquet", "a.arrow"):
        write(tmp_path / name, TABLE)
        parquet.write_table(
            pa.table({"a": pa.array([], pa.string())}), tmp_path / name
        ) if name == "a.parquet" else None
    raised(tmp_path / "a.parquet", r"a\.parquet: no rows in it")
    parquet.write_table(two, tmp_path / "a.parquet")
    raised(tmp_path / "a.parquet", r"a\.parquet: two columns are called 'text'; rename or remove one")


def test_a_runaway_quote_ends_at_the_limit_and_not_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "MAX_LINE_BYTES", 1000)
    before = csv.field_size_limit(2000)
    (tmp_path / "a.csv").write_text('query,positive\n"open,p\n' + "q,p\n" * 100_000)
    raised(tmp_path / "a.csv", r"line 2: a quote that opens in the row '\"open,p' is not closed up to line \d{3},")
    csv.field_size_limit(before)


@pytest.mark.parametrize("path", ["nothing.jsonl", "deep/er/nothing", "./nothing", "/nothing/at/all", "nothing.csv.gz"])
def test_a_missing_file_is_no_hub_id(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raised(Path(path) if not path.startswith("./") else tmp_path / path, r"no such file; check the path")


# --- columns ---


@pytest.mark.parametrize(
    ("names", "stated", "expected"),
    [
        (["query", "positive"], {}, PAIR),
        (["id", "Question", "Answer"], {}, Columns("Question", "Answer")),
        (["anchor", "positive", "negative"], {}, Columns("anchor", "positive", ("negative",))),
        (["query", "pos", "neg"], {}, Columns("query", "pos", ("neg",))),
        (
            ["query", "positive", "negative_10", "negative_2", "negative_1"], {},
            Columns("query", "positive", ("negative_1", "negative_2", "negative_10"))
        ),
        (
            ["query", "passage", "hard_negatives", "negative_2"], {},
            Columns("query", "passage", ("hard_negatives", "negative_2"))
        ),
        (["query", "response", "negatives", "score", "label"], {}, Columns("query", "response", ("negatives",))),
        (["sentence1", "sentence2", "label"], {}, Columns("sentence1", "sentence2", label="label")),
        (["sentence1", "sentence2", "similarity"], {}, Columns("sentence1", "sentence2", score="similarity")),
        (["text1", "text2", "label", "score"], {}, Columns("text1", "text2", label="label")),
        (["text1", "text2", "label", "score"], {"label": ""}, Columns("text1", "text2", score="score")),
        (["text1", "text2", "label", "score"], {"label": "", "score": ""}, Columns("text1", "text2")),
        (["sentence1", "sentence2", "label"], {"score": "label"}, Columns("sentence1", "sentence2", score="label")),
        (["premise", "hypothesis", "gold"], {"label": "gold"}, Columns("premise", "hypothesis", label="gold")),
        (
            ["a", "b", "bad", "bad_3", "bad_2", "bad_x"], {"query": "a", "positive": "b", "negative": "bad"},
            Columns("a", "b", ("bad", "bad_2", "bad_3"))
        ),
        (["query", "positive", "negative"], {"negative": ""}, PAIR),
        (
            ["query", "positive", "negative"], {"query": "positive", "positive": "query", "negative": None},
            Columns("positive", "query", ("negative",))
        ),
        (["question", "answer", "title"], {"query": "answer", "positive": "title"}, Columns("answer", "title")),
    ],
)
def test_columns_go_by_their_usual_names_and_what_is_stated_wins(names, stated, expected):
    assert guess_columns(names, stated) == expected


@pytest.mark.parametrize(
    ("names", "stated", "sentence"),
    [
        (
            ["id", "title", "body"], {},
            r"a\.csv: which columns hold the texts is not clear from their names: id, title, body; "
                                      r"set data\.columns\.query=<column> and data\.columns\.positive=<column>"),
        (["query", "body"], {}, r"not clear from their names: query, body; set data\.columns\.positive=<column>$"),
        (
            ["anchor", "body"], {"query": "anchr"},
            r"a\.csv: data\.columns\.query='anchr' names no column; it has anchor, body\. Did you mean 'anchor'\?"
        ),
        (
            ["anchor", "body"], {"negative": "zzz"},
            r"data\.columns\.negative='zzz' names no column; it has anchor, body$"
        ),
        (
            ["a", "b"], {"query": "a", "positive": "a"},
            r"data\.columns\.query and data\.columns\.positive both name the column 'a'; give each its own"
        ),
        (
            ["a"], {"anchor": "a"},
            r"data\.columns has the unknown key 'anchor'; it maps query, positive, negative, label, score"
        ),
        (
            ["query", "positive", "n", "l"], {"negative": "n", "label": "l"},
            r"data\.columns\.negative and data\.columns\.label are both set, .*; keep one"
        ),
        ([f"c{i}" for i in range(99)], {}, r"c10, c11 and 87 more; set"),
        (["a\nb", "x" * 99], {}, r"names: 'a\\nb', x{40}; set"),
    ],
)  # fmt: skip
def test_columns_that_fit_nothing_are_refused_with_the_files_own(names, stated, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        guess_columns(names, stated, "a.csv")
    assert "\n" not in str(caught.value)


def test_the_log_line_says_what_is_read_from_where():
    named = Columns("anchor", "pos", ("neg", "neg_2"))
    assert describe(named, 1) == "query from 'anchor', positive from 'pos'; hard negatives from 'neg', 'neg_2'"
    assert describe(named, 0).endswith(
        "'neg_2'; data.num_hard_negatives=0 uses no hard negatives, 1 one for each query"
    )
    assert describe(PAIR, 0) == "query from 'query', positive from 'positive'; no hard negatives"
    assert "pairs judged by 'gold': 1, 1.0, true, entailment" in describe(Columns("a", "b", label="gold"), 1)
    assert "pairs judged by 'sim': data.positive_score and more make a positive" in describe(
        Columns("a", "b", score="sim"), 1
    )


def test_names_are_those_of_the_first_rows_together_and_no_row_is_lost():
    table = [("1", {"query": "q"}), ("2", InputError("bad")), ("3", {"query": "r", "neg": "n"}), ("4", {"late": "x"})]
    names, found = peek_column_names(iter(table), first=3)
    assert names == ["query", "neg"]
    assert list(found) == table
    with pytest.raises(InputError, match="bad"):
        peek_column_names(iter(table[1:2]))


# --- examples ---

FULL = Columns("query", "positive", ("negative", "negative_2"))
LABELLED = Columns("a", "b", label="judged")
SCORED = Columns("a", "b", score="judged")


def made(row: object, columns: Columns = FULL, num_hard_negatives: int = 0, **options) -> Example | InputError:
    ((where, found),) = examples(
        iter([("a.jsonl, line 1", row)]), columns, num_hard_negatives=num_hard_negatives, **options
    )
    assert where == "a.jsonl, line 1"
    return found


def test_texts_and_lists_of_texts_become_positives_and_hard_negatives():
    row = {"query": "q", "positive": ["p", "p2"], "negative": ["n", "m"], "negative_2": "k"}
    assert made(row, num_hard_negatives=1) == Example("q", "p", ("n", "m", "k"), ("p2",))
    assert made(row) == Example("q", "p", (), ("p2",))
    assert made({**row, "negative": None, "positive": " p "}, num_hard_negatives=1) == Example("q", " p ", ("k",))
    # an empty cell of a CSV
    assert made({**row, "negative": "n", "negative_2": ""}, num_hard_negatives=1) == Example("q", "p", ("n",), ("p2",))


@pytest.mark.parametrize(
    ("row", "num_hard_negatives", "sentence"),
    [
        ({"question": "q"}, 0, "line 1: no column 'query'; it has question. Name it by data.columns.query=<column>"),
        ({"query": "q"}, 0, "line 1: no column 'positive'; it has query. Name it by data.columns.positive=<column>"),
        ({"query": 7, "positive": "p"}, 0, "line 1, query: expected text, got int 7; give a string"),
        ({"query": ["q"], "positive": "p"}, 0, "line 1, query: expected text, got list ['q']; give a string"),
        ({"query": "q", "positive": None}, 0, "line 1, positive: expected text, got NoneType None; give a string"),
        (
            {"query": "q", "positive": {"text": "p"}}, 0,
            "line 1, positive: expected text, got dict {'text': 'p'}; give a string"
        ),
        (
            {"query": "q", "positive": []}, 0,
            "line 1, column 'positive': the list of positives is empty; remove the row or give it a text"
        ),
        ({"query": "q", "positive": ["p", 5]}, 0, "line 1, positive 2: expected text, got int 5; give a string"),
        ({"query": " \t", "positive": "p"}, 0, "line 1, query: the text is blank; remove the row or give it text"),
        ({"query": "q", "positive": "\n"}, 0, "line 1, positive: the text is blank; remove the row or give it text"),
        (
            {"query": "q", "positive": "q"}, 0,
            "line 1: the positive equals the query 'q'; such a pair teaches nothing, remove it"
        ),
        (
            {"query": "q", "positive": ["p", "q"]}, 0,
            "line 1: the positive equals the query 'q'; such a pair teaches nothing, remove it"
        ),
        (
            {"query": "q", "positive": "p", "negative": ["n", "p"]}, 1,
            "line 1: a hard negative equals the positive 'p'; remove one of them"
        ),
        (
            {"query": "q", "positive": ["o", "p"], "negative": "p"}, 1,
            "line 1: a hard negative equals the positive 'p'; remove one of them"
        ),
        (
            {"query": "q", "positive": "p", "negative": " "}, 1,
            "line 1, hard negative 1: the text is blank; remove the row or give it text"
        ),
        (
            {"query": "q", "positive": "p", "negative": ["n", 3]}, 1,
            "line 1, hard negative 2: expected text, got int 3; give a string"
        ),
        (
            {"query": "q", "positive": "p", "negative": []}, 1,
            "line 1: 0 hard negatives in column 'negative' or 'negative_2', data.num_hard_negatives asks "
            "for 1; lower it, name the column by data.columns.negative=<column>, or skip such rows with "
            "data.on_error=skip"),
        (
            {"query": "q", "positive": "p", "negative": "n", "negative_2": ""}, 2,
            "line 1: 1 hard negatives in column 'negative' or 'negative_2', data.num"
        ),
    ],
)  # fmt: skip
def test_a_bad_row_is_a_value_with_its_sentence(row, num_hard_negatives, sentence):
    error = made(row, num_hard_negatives=num_hard_negatives)
    assert isinstance(error, InputError)
    assert str(error).startswith(f"a.jsonl, {sentence}")


def test_malformed_rows_pass_through_in_their_place():
    bad = InputError("bad")
    found = examples(
        iter([("1", {"query": "q", "positive": "p"}), ("2", bad), ("3", {"query": "r", "positive": "p"})]), PAIR,
        num_hard_negatives=0
    )
    assert list(found) == [("1", Example("q", "p")), ("2", bad), ("3", Example("r", "p"))]


@pytest.mark.parametrize(
    ("columns", "options", "sentence"),
    [
        (
            PAIR, {"num_hard_negatives": 2},
            r"_negatives=2, but no column of hard negatives is known; set data\.columns\.negative=<column>, or "
            r"data\.num"
        ),
        (
            PAIR, {"positive_score": 1},
            r"data\.positive_score is set, but no column of scores is used; set "
            r"data\.columns\.score"
        ),
        (
            SCORED, {},
            r"column 'judged' scores the pairs, .* is not said; set data\.positive_score=<score>, or "
            r"data\.columns\.score='' to take every pair"
        ),
        (
            SCORED, {"num_hard_negatives": 1, "positive_score": 4},
            r"below which score in column 'judged' .* set data\.negative_score=<score>, or data\.num"
        ),
        (
            SCORED, {"positive_score": 4, "negative_score": 5},
            r"data\.negative_score=5 is above data\.positive_score=4; a pair cannot be both"
        ),
    ],
)
def test_settings_that_fit_no_row_are_refused_before_any_is_read(columns, options, sentence):
    with pytest.raises(InputError, match=sentence):
        examples(iter(()), columns, **{"num_hard_negatives": 0, **options})


def judged(
    table: list[tuple], columns: Columns, num_hard_negatives: int = 0, **options
) -> tuple[list[Example], list[str]]:
    found = (
        (f"row {i + 1}", {"a": query, "b": document, "judged": value}) for i,
        (query, document, value) in enumerate(table)
    )
    parsed_rows = list(examples(found, columns, num_hard_negatives=num_hard_negatives, **options))
    # each row counts once for the share of errors
    assert sum(not isinstance(each, GroupedExample) for _, each in parsed_rows) == len(table)
    return [each.example for _, each in parsed_rows if isinstance(each, GroupedExample)], [
        str(each) for _, each in parsed_rows if isinstance(each, InputError)
    ]


@pytest.mark.parametrize(
    ("yes", "no", "neither"),
    [(1, 0, "neutral"), ("1", "0", "-"), (True, False, "neutral"), (1.0, 0.0, "not_entailment"),
                                                    ("Entailment", "contradiction", "neutral"),
                                                    ("true", "FALSE ", "-")])
def test_labelled_pairs_are_grouped_by_query_in_the_order_of_the_file(yes, no, neither, caplog):
    table = [
        ("q", "n1", no), ("r", "x", neither), ("q", "p1", yes), ("s", "p3", yes), ("q", "p2", yes), ("q", "n2", no),
        ("q", "p1", yes), ("t", "n", no)
    ]
    caplog.set_level(logging.INFO)
    found, wrong = judged(table, LABELLED)
    assert not wrong
    assert found == [Example("q", "p1", (), ("p2",)), Example("s", "p3")]
    summary = (
        "8 pairs judged by 'judged': 1 left out as neither positive nor hard negative; 2 of 4 queries left out for "
        "want of a positive"
    )
    assert caplog.messages == [summary]
    found, wrong = judged(table, LABELLED, 2)
    assert found == [Example("q", "p1", ("n1", "n2"), ("p2",)), Example("s", "p3")]
    assert not wrong
    expected = (
        f"{summary}; 1 have fewer than 2 hard negatives, and positives "
        f"of other queries are used instead"
    )
    assert caplog.messages[-1] == expected


def test_scored_pairs_are_judged_by_two_thresholds():
    table = [("q", "p", 4.0), ("q", "n", 1.9), ("q", "between", 2.0), ("q", "p2", "5"), ("r", "low", 0)]
    assert judged(table, SCORED, 1, positive_score=4, negative_score=2) == ([Example("q", "p", ("n",), ("p2",))], [])
    assert judged(table, SCORED, positive_score=0) == (
        [Example("q", "p", (), ("n", "between", "p2")), Example("r", "low")], []
    )


@pytest.mark.parametrize(
    ("columns", "row", "sentence"),
    [
        (LABELLED, ("q", "p", 2), "row 1, column 'judged': the label 2 is none of 1, 1.0, true, entailment"),
        (LABELLED, ("q", "p", 0.5), "row 1, column 'judged': the label 0.5 is none of"),
        (LABELLED, ("q", "p", None), "row 1, column 'judged': the label None is none of"),
        (LABELLED, ("q", 3, 1), "row 1, positive (column 'b'): expected text, got int 3"),
        (LABELLED, (" ", "p", 0), "row 1, query (column 'a'): the text is blank"),
        (LABELLED, ("q", "", 0), "row 1, document (column 'b'): the text is blank"),
        (LABELLED, ("q", "q", 1), "row 1: the positive equals the query 'q'"),
        (
            SCORED, ("q", "p", "high"),
            "row 1, column 'judged': expected a number, got str 'high'; fix or remove the row"
        ),
        (SCORED, ("q", "p", float("nan")), "row 1, column 'judged': expected a number, got float nan"),
        (SCORED, ("q", "p", True), "row 1, column 'judged': expected a number, got bool True"),
        (SCORED, ("q", "p", [1]), "row 1, column 'judged': expected a number, got list [1]"),
    ],
)
def test_a_bad_judged_row_is_named_and_the_others_are_grouped(columns, row, sentence):
    good = [("r", "p", 1), ("r", "n", 0)]
    found, (error,) = judged(
        [row, *good], columns, 1, **({"positive_score": 1, "negative_score": 1} if columns.score else {})
    )
    assert found == [Example("r", "p", ("n",))]
    assert error.startswith(sentence)


def test_a_pair_that_is_judged_both_ways_is_named_at_its_second_row():
    found, wrong = judged([("q", "p", 1), ("q", "p", 0), ("q", "n", 0)], LABELLED, 1)
    assert found == [Example("q", "p", ("n",))]
    assert wrong == ["row 2: the same pair was a positive before: 'p'; remove one of them"]


def test_numbers_as_labels_of_inference_pairs_are_refused_as_their_order_differs():
    columns = Columns("premise", "hypothesis", label="label")
    error = made({"premise": "a", "hypothesis": "b", "label": 0}, columns)
    assert "the label 0 of two sentences is ambiguous" in str(error)


# --- stop or skip ---


def candidates(*wrong: int, count: int = 1000):
    return (
        (f"row {i}", InputError(f"row {i}: bad") if i in wrong else Example(f"q{i}", f"p{i}"))
        for i in range(1, count + 1)
    )


def test_stop_raises_the_first_error_and_gives_what_is_before():
    found = accepted(candidates(3, 5))
    assert [next(found), next(found)] == [Example("q1", "p1"), Example("q2", "p2")]
    with pytest.raises(InputError, match=r"^row 3: bad$"):
        next(found)


def test_skip_goes_on_writes_the_rejected_while_going_and_says_how_many(tmp_path, caplog):
    rejected = tmp_path / "run" / "rejected.jsonl"
    found = accepted(candidates(3, 700), on_error="skip", rejected=rejected)
    assert [next(found).query for _ in range(5)] == ["q1", "q2", "q4", "q5", "q6"]
    # before the end
    assert [
        json.loads(line) for line in rejected.read_text().splitlines()
    ] == [{"where": "row 3", "reason": "row 3: bad"}]
    assert len(list(found)) == 993
    assert [json.loads(line)["where"] for line in rejected.read_text().splitlines()] == ["row 3", "row 700"]
    assert caplog.messages == [f"2 of 1000 rows rejected, listed in {rejected}; the first: row 3: bad"]
    assert len(list(accepted(candidates(), on_error="skip", rejected=rejected))) == 1000
    assert rejected.read_text() == ""  # an earlier run's are gone


def test_skip_counts_bad_rows_over_the_whole_file_and_stops_early_where_half_are_bad(tmp_path):
    # all of them at the beginning
    assert len(list(accepted(candidates(*range(1, 11)), on_error="skip", max_error_share=0.01))) == 990
    with pytest.raises(
        InputError, match=r"^11 of 1000 rows rejected, listed in .*rejected\.jsonl; the first: row 1: bad\. More than "
                                         r"data\.max_error_share=0\.01 are not skipped; fix the rows or raise it$"):
        list(accepted(candidates(*range(1, 12)), on_error="skip", rejected=tmp_path / "rejected.jsonl"))
    before = []
    with pytest.raises(
        InputError, match=r"^58 of 115 rows rejected; .* More than data\.max_error_share=0\.01 are not skipped"
    ):
        before.extend(accepted(candidates(*range(58, 1000)), on_error="skip"))
    assert len(before) == 57  # the rest was not read
    assert len(list(accepted(candidates(*range(1, 1001)), on_error="skip", max_error_share=1))) == 0


def test_a_limit_ends_the_reading_and_the_rows_until_then_are_judged():
    found = accepted(candidates(*range(1, 3)), on_error="skip", limit=150)
    with pytest.raises(InputError, match=r"^2 of 152 rows rejected; .* More than data\.max_error_share=0\.01"):
        list(found)
    assert len(list(accepted(candidates(1), on_error="skip", limit=150))) == 150
    # of fewer rows a share says little
    assert len(list(accepted(candidates(1, 2), on_error="skip", limit=50))) == 50
    assert [example.query for example in accepted(candidates(3), limit=2)] == ["q1", "q2"]


def test_a_short_file_is_judged_at_its_end():
    with pytest.raises(
        InputError, match=r"^1 of 10 rows rejected; the first: row 10: bad\. More than data\.max_error_share=0\.05"
    ):
        list(accepted(candidates(10, count=10), on_error="skip", max_error_share=0.05))
    assert len(list(accepted(candidates(10, count=10), on_error="skip", max_error_share=0.1))) == 9


def test_other_answers_to_errors_are_refused_at_once():
    with pytest.raises(InputError, match=r"data\.on_error='ignore' is unknown; choose stop or skip"):
        accepted(iter(()), on_error="ignore")
    with pytest.raises(InputError, match=r"data\.max_error_share=5 must be between 0 and 1"):
        accepted(iter(()), on_error="skip", max_error_share=5)


def test_rows_of_judged_pairs_count_for_the_share_while_they_are_read():
    """Errors come at once and the groups behind the last row, so only rows in order can hold the share down."""
    table = (("row", {"a": f"q{i}", "b": "p", "judged": 7 if i % 200 == 0 else 1}) for i in range(1, 1001))
    found = accepted(examples(table, LABELLED, num_hard_negatives=0), on_error="skip", max_error_share=0.01)
    assert len(list(found)) == 995


def test_a_file_goes_through_as_the_module_says(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"anchor,pos,neg\nq1,p1,n1\nq2,p2\nq3,p3,n3\n")
    names, found = peek_column_names(rows(tmp_path / "a.csv"))
    made = accepted(
        examples(found, guess_columns(names, {}), num_hard_negatives=1), on_error="skip", max_error_share=0.5
    )
    assert list(made) == [Example("q1", "p1", ("n1",)), Example("q3", "p3", ("n3",))]


# --- anything at all ---

# whatever some reader takes for a line's end, a quote, a separator or the end of a file; marks, wide characters, the
# last one
TEXTS = st.text(
    st.sampled_from(
        "\"'`,;|\t\n\r\\ aZ0#{}[]:\x01\x0b\x0c\x1a\x1c\x85\u2028\u2029\xa0éß\u0301ع東🙂\ufeff\ufffe\uffff\U0010ffff"
    ),
    max_size=12
)
TSV_TEXTS = TEXTS.map(lambda text: "".join(character for character in text if character not in "\t\n\r"))
FEW = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tables(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict]]:
    return st.lists(st.fixed_dictionaries({"query": texts, "positive": texts}), min_size=1, max_size=8)


@FEW
@given(table=tables(TEXTS), gzipped=st.booleans(), escaped=st.booleans())
def test_written_json_lines_come_back(table, gzipped, escaped, tmp_path):
    file = tmp_path / ("a.jsonl.gz" if gzipped else "a.jsonl")
    content = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in table).encode()
    file.write_bytes(gzip.compress(content) if gzipped else content)
    assert values(file) == table


@FEW
@given(table=tables(TEXTS), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@example(table=[{"query": " ", "positive": '\t"'}], quoting=csv.QUOTE_MINIMAL)  # a blank and a quote within quotes
def test_written_csv_comes_back(table, quoting, tmp_path):
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, ["query", "positive"], quoting=quoting)
        writer.writeheader()
        writer.writerows(table)
    assert values(tmp_path / "a.csv") == table


@FEW
@given(table=tables(TSV_TEXTS))
def test_written_tsv_comes_back(table, tmp_path):
    (tmp_path / "a.tsv").write_bytes(as_tsv(table))
    assert values(tmp_path / "a.tsv") == table


@settings(FEW, max_examples=30)
@given(table=tables(TEXTS), name=st.sampled_from(["a.parquet", "a.arrow", "stream.arrow"]), chunk=st.integers(1, 5))
def test_written_binary_tables_come_back(table, name, chunk, tmp_path):
    assert values(write(tmp_path / name, table, chunk=chunk)) == table


GOOD = [
    {"query": f"query {i} naïve", "positive": f"positive {i} 東京", "negative": [f"negative {i}"]} for i in range(12)
]
LINES = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in GOOD]
PIECES = [b"\n", b"\0", b"\xff", b'"', b"{", b"}", b"[", b"\r", b"\\u0000", b"\xef\xbb\xbf", b'{"query": "x"}']
JUNK = st.binary(max_size=30) | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)
SPLICES = st.lists(st.tuples(st.integers(0, sum(map(len, LINES))), st.integers(0, 40), JUNK), min_size=1, max_size=4)


def spliced(splices: list[tuple[int, int, bytes]]) -> tuple[bytes, list[int]]:
    """The file with bytes put in place of others, from the end on, and the numbers of the lines that keep all of
    theirs.
    """
    content, untouched = b"".join(LINES), set(range(len(LINES)))
    starts = [sum(map(len, LINES[:i])) for i in range(len(LINES))]
    end = len(content)
    for place, length, junk in sorted(splices, reverse=True):
        last = min(place + length, end)
        if place <= last:
            content, end = content[:place] + junk + content[last:], place
            untouched -= {
                i for i, start in enumerate(starts) if start < max(last, place + 1) and place < start + len(LINES[i])
            }
            if last > place:  # a line's end may be gone, and the next line then hangs on what is before
                untouched -= {i for i, start in enumerate(starts) if start == last}
            untouched -= {i for i, start in enumerate(starts) if start == place}
    return content, sorted(untouched)


@settings(FEW, max_examples=120)
@given(splices=SPLICES)
def test_bytes_spliced_into_a_file_cost_the_lines_they_touch_and_no_other(splices, tmp_path):
    content, untouched = spliced(splices)
    (tmp_path / "a.jsonl").write_bytes(content)
    columns = Columns("query", "positive", ("negative",))
    found = accepted(
        examples(rows(tmp_path / "a.jsonl"), columns, num_hard_negatives=1), on_error="skip", max_error_share=1
    )
    kept, error = until_error(found)
    if error:
        assert not untouched or "UTF-16" in str(error)
        return
    expected = [Example(GOOD[i]["query"], GOOD[i]["positive"], tuple(GOOD[i]["negative"])) for i in untouched]
    rest = iter(kept)
    assert all(example in rest for example in expected)  # in order: `in` reads on from where it stands


@settings(FEW, max_examples=80)
@given(
    kind=st.sampled_from([".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".parquet", ".arrow"]),
    content=st.binary(max_size=200)
)
def test_any_bytes_give_rows_or_an_input_error(kind, content, tmp_path):
    (tmp_path / f"a{kind}").write_bytes(content)
    _, error = until_error(rows(tmp_path / f"a{kind}"))
    assert error is None or str(tmp_path / f"a{kind}") in str(error)


# --- as people have them ---


def test_files_named_after_another_split_anywhere_in_the_name_are_left_out(tmp_path, caplog):
    for name in ("my_train.jsonl", "squad-dev.jsonl", "nq_test.v2.jsonl", "contest.jsonl"):
        write(tmp_path / name, [{"query": name, "positive": "p"}])
    assert [row["query"] for row in values(tmp_path)] == ["contest.jsonl", "my_train.jsonl"]
    assert "nq_test.v2.jsonl, squad-dev.jsonl left out; 'train' is the split to read" in caplog.text


def test_a_file_and_its_gzipped_twin_are_refused(tmp_path):
    for name in ("train.jsonl", "train.jsonl.gz"):
        write(tmp_path / name, TABLE)
    with pytest.raises(
        InputError, match=r"holds both train\.jsonl and train\.jsonl\.gz, which would be read as two; remove one"
    ):
        values(tmp_path)


def test_csv_may_be_separated_by_semicolons(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfquery;positive\r\n1,5 km;"a; ""b"""\r\nx;y;z\r\n')
    (_, first), (_, second) = rows(tmp_path / "a.csv")
    assert first == {"query": "1,5 km", "positive": 'a; "b"'}
    expected = (
        "3 fields where the header names 2 columns: 'x;y;z'; quote texts "
        "that hold a semicolon or a line end"
    )
    assert expected in str(second)


def test_quoted_fields_of_a_tsv_are_text_and_told_once(tmp_path, caplog):
    (tmp_path / "a.tsv").write_bytes(b'query\tpositive\nq\t"He said ""hi"" twice"\nr\t"and ""again"""\ns\t"quoted"\n')
    assert [row["positive"] for row in values(tmp_path / "a.tsv")] == [
        '"He said ""hi"" twice"', '"and ""again"""', '"quoted"'
    ]
    (message,) = caplog.messages
    expected = (
        "line 2: '\"He said \"\"hi\"\" twice\"' looks quoted, and TSV has "
        "no quoting: the quotes are read as text"
    )
    assert expected in message


def test_a_json_array_is_told_what_json_lines_are(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(TABLE, indent=1))
    with pytest.raises(InputError, match=r"line 1: not JSON .*write one object a line, without brackets around them"):
        accepted_all(tmp_path / "a.jsonl")


def accepted_all(file: Path, num_hard_negatives: int = 0, **stated: str) -> list[Example]:
    names, found = peek_column_names(rows(file))
    columns = guess_columns(names, stated)
    found = refuse_late_columns(found, names, columns, stated, num_hard_negatives)
    return list(accepted(examples(found, columns, num_hard_negatives=num_hard_negatives)))


@pytest.mark.parametrize("name", ["label", "labels", "gold_label", "relevance", "is_relevant"])
def test_judgements_are_known_by_their_usual_names(name, tmp_path):
    file = write(tmp_path / "a.csv", [{"query": f"q{n}", "document": f"d{n}", name: str(n % 2)} for n in range(6)])
    assert [example.query for example in accepted_all(file)] == ["q1", "q3", "q5"]


def test_columns_that_are_not_used_are_told():
    names = ["query", "document", "judgement", "url"]
    assert describe(guess_columns(names, {}), 0, names).endswith("no hard negatives; not used: judgement, url")


@pytest.mark.parametrize(
    ("late", "num_hard_negatives", "role"),
    [({"label": 0}, 0, "label"), ({"score": 0.1}, 0, "score"), ({"negative": "n"}, 1, "negative"),
                                                                   ({"negative": "n"}, 0, None),
                                                                   ({"url": "u"}, 0, None)])
def test_a_column_that_comes_late_and_says_something_is_an_error(late, num_hard_negatives, role, tmp_path):
    table = [
        {"query": f"q{n}", "positive": f"p{n}"} | ({"negative_2": "m"} if num_hard_negatives else {})
        for n in range(150)
    ]
    file = write(tmp_path / "a.jsonl", [*table, {**table[0], "query": "late", **late}])
    if role is None:
        assert len(accepted_all(file, num_hard_negatives)) == 151
        return
    (column,) = late
    with pytest.raises(
        InputError,
        match=rf"line 151: the column '{column}', which is in none of the first rows, would be taken for a {role}; "
        rf"write it"
    ):
        accepted_all(file, num_hard_negatives)
    if not num_hard_negatives:
        assert len(accepted_all(file, **{role: ""})) == 151
