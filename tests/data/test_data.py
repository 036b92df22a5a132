"""Readers: what they give for good input, and the one sentence they give for bad input: file, line or key, value,
remedy.
"""

import gzip
import json
import logging
import math
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from sgpt.data.feed.collate import collate
from sgpt.data.feed.example import Example
from sgpt.data.formats import beir
from sgpt.data.formats.jsonl import read_rows, write_rows
from sgpt.data.formats.scored_pairs import read_pairs
from sgpt.data.readers import DataConfig, SourceConfig, build_feed, read_examples
from sgpt.runtime.errors import InputError
from sgpt.runtime.provenance import tokenizer_hash
from sgpt.text.markers import MarkersConfig

GOOD = [
    {"query": "q1", "positive": "p1", "negative": "n1"}, {"query": "q2", "positive": "p2", "negative": ["n2", "m2"]}
]


def lines(file: Path, *rows: object) -> Path:
    """Objects as JSON, strings as they are."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text, encoding="utf-8")
    return file


def read(file: Path, **options) -> list[Example]:
    with tempfile.TemporaryDirectory() as cache:
        return list(read_examples(DataConfig(**{"name": "file", "path": str(file), **options}), Path(cache)))


def test_rows_of_another_split_are_no_training_data(tmp_path, caplog):
    splits = ("train", "TRAIN", "test", "trial", None)
    file = lines(
        tmp_path / "pairs.jsonl",
        *({"query": f"q{number}", "positive": "p", "split": split} for number, split in enumerate(splits))
    )
    assert [example.query for example in read(file)] == ["q0", "q1", "q4"]
    assert "by the column split, 1 of 'test', 1 of 'trial' left out; 'train' is the split to read" in caplog.text
    assert [example.query for example in read(file, split="test")] == ["q2", "q4"]
    with pytest.raises(
        InputError, match=r"no row of the split 'train'; its column split has 2 of 'test'\. Set data\.split"
    ):
        read(
            lines(
                tmp_path / "test.jsonl",
                *({"query": "q", "positive": str(number), "split": "test"} for number in range(2))
            )
        )


def test_questions_that_are_no_duplicates_are_no_positives(tmp_path):
    rows = [{"question1": "a", "question2": "b", "duplicate": 1}, {"question1": "a", "question2": "c", "duplicate": 0}]
    (example,) = read(lines(tmp_path / "pairs.jsonl", *rows), num_hard_negatives=1)
    assert (example.query, example.positive, example.hard_negatives) == ("a", "b", ("c",))


# --- JSON lines ---


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_json_lines_become_examples_plain_or_gzipped(name, tmp_path):
    file = lines(tmp_path / name, GOOD[0], "", {**GOOD[1], "other": 3})
    assert read(file) == [Example("q1", "p1"), Example("q2", "p2")]
    assert read(file, num_hard_negatives=1) == [Example("q1", "p1", ("n1",)), Example("q2", "p2", ("n2", "m2"))]
    assert read(file, limit=1) == [Example("q1", "p1")]


def test_several_hard_negatives_come_from_a_list_or_from_numbered_columns(tmp_path):
    file = lines(
        tmp_path / "train.jsonl", GOOD[1],
        {"query": "q", "positive": "p", "negative": "a", "negative_2": "b", "negative_3": "c"}
    )
    assert [example.hard_negatives for example in read(file, num_hard_negatives=2)] == [("n2", "m2"), ("a", "b", "c")]


def test_columns_take_the_files_own_names(tmp_path):
    file = lines(tmp_path / "train.jsonl", {"anchor": "q", "good": "p", "bad": "n"})
    columns = {"query": "anchor", "positive": "good", "negative": "bad"}
    assert read(file, columns=columns, num_hard_negatives=1) == [Example("q", "p", ("n",))]
    assert read(
        lines(tmp_path / "nli.jsonl", {"anchor": "q", "positive": "p"}), columns={"query": "anchor"}
    ) == [Example("q", "p")]


def test_texts_are_kept_to_the_last_blank(tmp_path):
    text = "  naïve\n東京 🙂\u2028\t"
    assert read(lines(tmp_path / "train.jsonl", {"query": text, "positive": " p "})) == [Example(text, " p ")]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ("{not json}", {}, r"line 2: not JSON \(.*\): '\{not json\}'; fix or remove the line"),
        ('{"query": "q", "positive": "p"', {}, r"line 2: not JSON .*; fix or remove the line"),
        ('["q", "p"]', {}, r"line 2: expected a JSON object, got list .*; write one object a line"),
        (
            {"question": "q", "positive": "p"}, {},
            r"line 2: no column 'query'; it has question, positive\. Name it by data\.columns\.query=<column>"
        ),
        (
            {"query": "q"}, {},
            r"line 2: no column 'positive'; it has query\. Name it by data\.columns\.positive=<column>"
        ),
        ({"query": 7, "positive": "p"}, {}, r"line 2, query: expected text, got int 7; give a string"),
        ({"query": "q", "positive": None}, {}, r"line 2, positive: expected text, got NoneType None; give a string"),
        ({"query": "q", "positive": ["p", 7]}, {}, r"line 2, positive 2: expected text, got int 7; give a string"),
        (
            {"query": "q", "positive": []}, {},
            r"line 2, column 'positive': the list of positives is empty; remove the row or give it a text"
        ),
        (
            {"query": "q", "positive": "q"}, {},
            r"line 2: the positive equals the query 'q'; such a pair teaches nothing, remove it"
        ),
        ({"query": " \t", "positive": "p"}, {}, r"line 2, query: the text is blank; remove the row or give it text"),
        ({"query": "q", "positive": ""}, {}, r"line 2, positive: the text is blank; remove the row or give it text"),
        (
            {"query": "q", "positive": "p", "negative": "\n"}, {"num_hard_negatives": 1},
            r"line 2, hard negative 1: the text is blank; remove the row"
        ),
        (
            {"query": "q", "positive": "p", "negative": ["n", 5]}, {"num_hard_negatives": 2},
            r"line 2, hard negative 2: expected text, got int 5; give a string"
        ),
        (
            {"query": "q", "positive": "p", "negative": "p"}, {"num_hard_negatives": 1},
            r"line 2: a hard negative equals the positive 'p'; remove one of them"
        ),
        (
            {"query": "q", "positive": "p"}, {"num_hard_negatives": 1},
            r"line 2: 0 hard negatives in column 'negative', .* asks for 1; lower it, name the column"
        ),
        (
            {"query": "q", "positive": "p", "negative": ["n"]}, {"num_hard_negatives": 2},
            r"line 2: 1 hard negatives in column 'negative', .* asks for 2; lower"
        ),
    ],
)
def test_a_bad_line_is_named_with_its_value_and_the_remedy(row, options, message, tmp_path):
    file = lines(tmp_path / "train.jsonl", {"query": "good", "positive": "good too", "negative": ["a", "b"]}, row)
    with pytest.raises(InputError, match=message) as caught:
        read(file, **options)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.jsonl: no such file; check the path"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match=r"no data files of the split 'train'; it holds nothing"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(text, tmp_path):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"train\.jsonl: no rows in it; give a file with at least one"):
        read(tmp_path / "train.jsonl")


def test_a_path_must_be_given(tmp_path):
    with pytest.raises(InputError, match=r"data\.path is empty; set data\.path=<file or folder> for data=file"):
        read_examples(DataConfig(), tmp_path)


def damaged(content: bytes, how: str) -> bytes:
    """A gzip stream cut off, with a byte of its data turned, or not gzip at all."""
    if how == "truncated":
        return content[: len(content) // 2]
    if how == "turned":
        return content[:40] + bytes(255 - byte for byte in content[40:60]) + content[60:]
    return b'{"query": "q", "positive": "p"}\n'


@pytest.mark.parametrize("how", ["truncated", "turned", "plain"])
def test_a_damaged_gzip_file_is_refused(how, tmp_path):
    file = lines(
        tmp_path / "train.jsonl.gz",
        *({"query": f"query {i * i}", "positive": f"positive {i * 77}"} for i in range(500))
    )
    file.write_bytes(damaged(file.read_bytes(), how))
    for reader in (lambda: list(read_rows(file)), lambda: read(file)):
        with pytest.raises(
            InputError, match=r"train\.jsonl\.gz, line \d+: cannot be read from here on \(.*\); copy the file again"
        ):
            reader()


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_bytes('{"query": "naïve", "positive": "p"}\n'.encode("latin-1"))
    for reader in (lambda: list(read_rows(tmp_path / "train.jsonl")), lambda: read(tmp_path / "train.jsonl")):
        with pytest.raises(
            InputError,
            match=r"train\.jsonl, line 1: not UTF-8 at column 14 in .*; save the file as UTF-8, or fix or remove the "
            r"line"
        ):
            reader()


def test_bad_settings_are_refused():
    with pytest.raises(
        InputError, match=r"data\.name='csv' is unknown; choose file, documents, beir, nli, msmarco or pydocs"
    ):
        DataConfig("csv")
    with pytest.raises(
        InputError, match=r"data\.columns has the unknown key 'anchor'; it maps query, positive, negative, label, score"
    ):
        DataConfig(columns={"anchor": "query"})
    with pytest.raises(InputError, match=r"data\.num_hard_negatives=-1 must be 0 or more"):
        DataConfig(num_hard_negatives=-1)


def test_written_rows_are_read_again_and_a_failed_write_leaves_nothing(tmp_path):
    for name in ("a.jsonl", "deeper/b.jsonl.gz"):
        assert write_rows(tmp_path / name, GOOD) == 2
        assert [row for _, row in read_rows(tmp_path / name)] == GOOD

    def breaks():
        yield GOOD[0]
        raise KeyError("later")

    with pytest.raises(KeyError):
        write_rows(tmp_path / "c.jsonl", breaks())
    assert not (tmp_path / "c.jsonl").exists()


# --- BEIR folders ---


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "toy"
    (made / "qrels").mkdir(parents=True)
    lines(
        made / "corpus.jsonl", {"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "text": "two"},
        {"_id": "d3", "title": "", "text": ""}
    )
    lines(
        made / "queries.jsonl", {"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"},
        {"_id": "q3", "text": "not judged"}
    )
    (made / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t2\nq2\td1\t0\n")
    (made / "triples.tsv").write_text("query\tpositive\tnegative\nq1\td1\td2\nq2\td2\td1\n")
    return made


@pytest.mark.parametrize("gzipped", [False, True])
def test_a_beir_folder_gives_corpus_judged_queries_and_qrels(gzipped, folder):
    if gzipped:
        for name in ("corpus.jsonl", "queries.jsonl"):
            (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
            (folder / name).unlink()
    found = beir.read_retrieval(folder, "test")
    assert found.name == "toy"
    assert found.corpus == {"d1": "T one", "d2": "two", "d3": ""}  # old collections have empty documents
    assert found.queries == {"q1": "first", "q2": "second"}
    assert found.qrels == {"q1": {"d1": 1}, "q2": {"d2": 2, "d1": 0}}


def test_training_examples_of_a_beir_folder_are_its_relevant_pairs_or_its_triples(folder):
    assert read(folder, name="beir", split="test") == [Example("first", "T one"), Example("second", "two")]
    triples = read(folder, name="beir", triples="triples.tsv", num_hard_negatives=1)
    assert triples == [Example("first", "T one", ("two",)), Example("second", "two", ("T one",))]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "qrels/test.tsv", "h\th\th\nq9\td1\t1\n",
            r"test\.tsv: query id 'q9' is not in .*queries\.jsonl; the files do not belong together"
        ),
        (
            "qrels/test.tsv", "h\th\th\nq1\td9\t1\n",
            r"test\.tsv: document id 'd9' is not in .*corpus\.jsonl; the files do not belong together"
        ),
        ("qrels/test.tsv", "h\th\th\nq1\td1\tmuch\n", r"test\.tsv, line 2: relevance 'much' is no whole number"),
        (
            "qrels/test.tsv", "h\th\th\nq1 d1 1\n",
            r"test\.tsv, line 2: 1 tab-separated fields, 3 are needed \(query-id, corpus-id, score\): 'q1 d1 1'"
        ),
        ("qrels/test.tsv", "q1\t0\td1\t1\n", r"test\.tsv, line 1: 4 tab-separated fields, 3 are needed"),
        ("qrels/test.tsv", "q1\td1\t1.0\n", r"test\.tsv, line 1: relevance '1\.0' is no whole number"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", r"test\.tsv: no judgements; the file is empty"),
        (
            "qrels/test.tsv", "h\th\th\nq1\td1\t1\nq1\td1\t0\n",
            r"test\.tsv, line 3: document 'd1' of query 'q1' was judged 1 before and is 0 here"
        ),
        (
            "queries.jsonl", '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}\n',
            r"queries\.jsonl, line 2: id 'q1' was used before; ids must be unique"
        ),
        (
            "corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "a"}\n',
            r"corpus\.jsonl, line 2: id 'd1' was used before; ids must be unique"
        ),
        (
            "corpus.jsonl", '{"_id": 1, "text": "a"}\n',
            r"corpus\.jsonl, line 1: _id is 1, which is no text; write it in quotes"
        ),
        (
            "corpus.jsonl", '{"_id": "d1", "body": "a"}\n',
            r"corpus\.jsonl, line 1: needs the columns _id and text; it has _id, body"
        ),
        ("queries.jsonl", '{"_id": "q1", "text": null}\n', r"queries\.jsonl, line 1: text is None, which is no text"),
        ("corpus.jsonl", "", r"corpus\.jsonl: no rows in it; give a file with at least one"),
        ("queries.jsonl", "{]\n", r"queries\.jsonl, line 1: not JSON"),
    ],
)
def test_a_broken_beir_folder_is_refused(file, content, message, folder):
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        beir.read_retrieval(folder, "test")


def test_missing_parts_of_a_beir_folder_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"qrels/dev\.tsv: no such file; .*toy has the splits: test"):
        beir.read_retrieval(folder, "dev")
    with pytest.raises(
        InputError,
        match=r"nowhere.*(a BEIR folder with corpus\.jsonl, queries\.jsonl and qrels/ is needed|has the splits: none)"
    ):
        beir.read_retrieval(tmp_path / "nowhere", "test")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"corpus\.jsonl: no such file"):
        beir.read_retrieval(folder, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_hard_negatives": 1},
            r"toy: qrels name no hard negatives; set data\.num_hard_negatives=0 or data\.triples=<file>"
        ),
        ({"triples": "other.tsv", "num_hard_negatives": 1}, r"other\.tsv: no such file; check the path"),
        (
            {"triples": "triples.tsv", "num_hard_negatives": 2},
            r"triples\.tsv, line 2: 3 tab-separated fields, 4 are needed"
        ),
    ],
)
def test_a_beir_folder_that_does_not_hold_what_is_asked_is_refused(options, message, folder):
    with pytest.raises(InputError, match=message):
        read(folder, name="beir", split="test", **options)


def test_triples_that_name_unknown_documents_are_refused(folder):
    cases = {
        "q1\td1\td9": "document id 'd9' is not", "q9\td1\td2": "query id 'q9' is not",
        "q1\td3\td2": "positive: the text is blank"
    }
    for line, message in cases.items():
        (folder / "triples.tsv").write_text(f"h\th\th\n{line}\n")
        with pytest.raises(InputError, match=r"triples\.tsv, line 2.*" + message):
            read(folder, name="beir", triples="triples.tsv", num_hard_negatives=1)


def test_a_qrels_file_in_another_encoding_is_refused(folder):
    (folder / "qrels" / "test.tsv").write_bytes("h\th\th\nqé\td1\t1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"test\.tsv, line 2: not UTF-8 at column 2 in .*; save the file as UTF-8"):
        beir.read_retrieval(folder, "test")


# --- scored pairs ---


def test_pairs_of_the_split_are_read_and_a_label_or_the_quora_names_serve_too(tmp_path):
    rows = [
        {"sentence1": "a", "sentence2": "b", "score": 0.5, "split": "test"},
        {"sentence1": "c", "sentence2": "d", "score": 3, "split": "dev"},
        {"sentence1": "e", "sentence2": "f", "label": 1},
        {"question1": "g", "question2": "h", "duplicate": 0},
    ]
    [pairs] = read_pairs(lines(tmp_path / "stsb.jsonl", *rows), "test")
    assert (pairs.name, pairs.first, pairs.second, pairs.scores) == (
        "stsb", ["a", "e", "g"], ["b", "f", "h"], [0.5, 1.0, 0.0]
    )


def test_sets_are_called_after_their_folder_also_when_it_is_the_working_directory(folder, monkeypatch):
    lines(
        folder / "pairs.jsonl.gz", {"sentence1": "a", "sentence2": "b", "score": 1},
        {"sentence1": "c", "sentence2": "d", "score": 2}
    )
    assert read_pairs(folder / "pairs.jsonl.gz", "test")[0].name == "toy"
    monkeypatch.chdir(folder)
    assert read_pairs(Path("pairs.jsonl.gz"), "test")[0].name == "toy"
    assert beir.read_retrieval(Path("."), "test").name == "toy"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"sentence1": "a", "sentence2": "b"}],
            r"line 1: needs sentence1, sentence2 and a numeric score; it has sentence1, sentence2"
        ),
        ([{"sentence1": "a", "sentence2": 5, "score": 1}], r"line 1: needs sentence1, sentence2 and a numeric score"),
        (
            [{"sentence1": "a", "sentence2": "b", "score": math.nan}],
            r"line 1: needs sentence1, sentence2 and a numeric score"
        ),
        (
            [{"sentence1": "a", "sentence2": "b", "score": "high"}],
            r"line 1: needs sentence1, sentence2 and a numeric score"
        ),
        (
            [{"sentence1": "a", "sentence2": "b", "score": 1}] * 2,
            r"2 pairs in split 'test' with fewer than two different scores; nothing to correlate"
        ),
        ([{"sentence1": "a", "sentence2": "b", "score": 1, "split": "dev"}], r"0 pairs in split 'test'"),
    ],
)
def test_bad_pairs_are_refused(rows, message, tmp_path):
    with pytest.raises(InputError, match=r"pairs\.jsonl.*" + message):
        read_pairs(lines(tmp_path / "pairs.jsonl", *rows), "test")


# --- folders of the library `datasets` ---


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_saved_by_datasets_is_read(splits, tmp_path):
    rows = datasets.Dataset.from_list(
        [{"anchor": "q1", "positive": "p1", "negative": "n1"}, {"anchor": "q2", "positive": "p2", "negative": "n2"}]
    )
    (datasets.DatasetDict({"train": rows}) if splits else rows).save_to_disk(str(tmp_path / "saved"))
    found = read(tmp_path / "saved", name="file", columns={"query": "anchor"}, num_hard_negatives=1)
    assert found == [Example("q1", "p1", ("n1",)), Example("q2", "p2", ("n2",))]


def test_bad_dataset_folders_are_refused(tmp_path):
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list([{"query": "q", "positive": " "}])}
    ).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match=r"saved, row 1, positive: the text is blank"):
        read(tmp_path / "saved", name="file")
    with pytest.raises(InputError, match=r"saved: no split 'dev'; it has train"):
        read(tmp_path / "saved", name="file", split="dev")
    with pytest.raises(InputError, match=r"nowhere: no such file; check the path"):
        read(tmp_path / "nowhere", name="file")
    shutil.rmtree(tmp_path / "saved" / "train")
    with pytest.raises(InputError, match=r"saved: cannot be loaded as a data set"):
        read(tmp_path / "saved", name="file")


# --- batches ---


def test_a_batch_is_query_major_and_knows_equal_texts(tiny_encoder):
    encoder = tiny_encoder("gpt_neo")
    batch = collate([Example("a", "p", ("n", "m")), Example("b", "a", ("p", "x"))], encoder.tokenizer, encoder.frames)
    assert batch.documents == encoder.token_ids(["p", "n", "m", "a", "p", "x"], "document")
    assert batch.queries == encoder.token_ids(["a", "b"], "query")
    assert batch.documents_per_query == 3
    assert batch.document_hashes[0] == batch.document_hashes[4]
    assert batch.document_hashes[3] == batch.query_hashes[0]
    assert len({*batch.document_hashes.tolist(), *batch.query_hashes.tolist()}) == 6


def test_qrels_and_triples_without_a_header_lose_no_row(folder):
    with_header = beir.read_qrels(folder, "test"), len(list(beir.beir_examples(folder, "test", "triples.tsv", 1)))
    for file in (folder / "qrels" / "test.tsv", folder / "triples.tsv"):
        file.write_text(file.read_text().split("\n", 1)[1])
    assert (
        beir.read_qrels(folder, "test"), len(list(beir.beir_examples(folder, "test", "triples.tsv", 1)))
    ) == with_header


# --- from a configuration to batches ---


def feed(tmp_path: Path, tokenizer, **options):
    config = DataConfig(**{"cache": str(tmp_path / "cache"), **options})
    return build_feed(
        config, tokenizer, MarkersConfig(query_max_tokens=12, document_max_tokens=16), queries_per_process=2
    )


def test_what_was_read_and_tokenised_is_served_again_and_never_stale(tmp_path, tiny_encoder):
    tokenizer = tiny_encoder("gpt2").tokenizer
    file = lines(tmp_path / "train.jsonl", *GOOD)
    first = feed(tmp_path, tokenizer, path=str(file)).sources[0]
    times = {part: part.stat().st_mtime_ns for part in (tmp_path / "cache").rglob("*.arrow")}
    assert len(times) == 3  # texts, examples, tokens
    again = feed(tmp_path, tokenizer, path=str(file)).sources[0]
    assert list(again.examples) == list(first.examples)
    assert times == {part: part.stat().st_mtime_ns for part in (tmp_path / "cache").rglob("*.arrow")}
    lines(file, GOOD[0], {**GOOD[1], "query": "changed"})
    assert [
        example.query for example in feed(tmp_path, tokenizer, path=str(file)).sources[0].examples
    ] == ["q1", "changed"]
    assert feed(
        tmp_path, tokenizer, path=str(file), num_hard_negatives=1
    ).sources[0].examples[0].hard_negatives == ("n1",)


def test_a_tokenizer_in_python_has_a_hash_and_stored_tokens(tmp_path):
    """CANINE's ids are the characters of a text."""
    from transformers import CanineTokenizer

    file = lines(tmp_path / "train.jsonl", *GOOD)
    tokenizer, other = CanineTokenizer(), CanineTokenizer(pad_token="0")
    assert tokenizer_hash(tokenizer) == tokenizer_hash(CanineTokenizer()) != tokenizer_hash(other)
    [source] = feed(tmp_path, tokenizer, path=str(file)).sources
    assert source.tokens[list(source.examples.texts).index("q1")] == [ord("q"), ord("1")]


def test_stored_token_ids_are_those_of_the_tokenizer_cut_and_framed(tmp_path, tiny_encoder):
    encoder = tiny_encoder("gpt2", query_max_tokens=12, document_max_tokens=16)
    texts = ["parse a date from a string of many, many, many words", "x", "東京 🙂 [why?]"]
    file = lines(tmp_path / "train.jsonl", *({"query": text, "positive": f"about {text}"} for text in texts))
    made = feed(tmp_path, encoder.tokenizer, path=str(file))
    for place, (_, row, _) in enumerate(made.drawn_examples(0, 0)):
        batch = made.batch(0, 0)
        assert batch.queries[place] == encoder.token_ids([texts[row]], "query")[0]
        assert batch.documents[place] == encoder.token_ids([f"about {texts[row]}"], "document")[0]


def test_several_sources_keep_their_own_markers_and_limits(tmp_path, tiny_encoder):
    tokenizer = tiny_encoder("gpt2").tokenizer
    one, other = (
        lines(
            tmp_path / f"{name}.jsonl",
            *({"query": f"{name} {n}", "positive": f"{name} text {n} " * 9} for n in range(4))
        )
        for name in "ab"
    )
    made = feed(tmp_path, tokenizer, sources=[
        SourceConfig(path=str(one), weight=4.0),
        SourceConfig(path=str(other), markers="none", symmetric=True, weight=8.0),
    ])  # fmt: skip
    with pytest.raises(InputError, match=r"data\.document_max_tokens=6 has no effect with data\.symmetric=true"):
        SourceConfig(path=str(other), document_max_tokens=6, symmetric=True)
    by_source = {made.drawn_examples(number, 0)[0][0]: made.batch(number, 0) for number in range(6)}
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in "[]{}"]
    assert all(row[0] == marks[0] and row[-1] == marks[1] for row in by_source[0].queries)
    assert all(row[0] == marks[2] and row[-1] == marks[3] and len(row) == 16 for row in by_source[0].documents)
    assert not {*marks} & {token for row in (*by_source[1].queries, *by_source[1].documents) for token in row}
    assert {len(row) for row in by_source[1].documents} == {12}  # symmetric: documents have the queries' limit


def test_two_sources_of_one_path_are_two(tmp_path, tiny_encoder):
    """What a run records of its data goes by their names."""
    file = lines(tmp_path / "a.jsonl", *({"query": f"q{n}", "positive": f"p{n}"} for n in range(8)))
    one, other = SourceConfig(path=str(file)), SourceConfig(path=str(file), limit=5)
    made = feed(tmp_path, tiny_encoder("gpt2").tokenizer, sources=[one, other])
    assert [(source.name, len(source.examples)) for source in made.sources] == [(str(file), 8), (f"{file} (2)", 5)]


def test_a_limit_next_to_sources_is_of_each(tmp_path, tiny_encoder):
    file = lines(tmp_path / "a.jsonl", *({"query": f"q{n}", "positive": f"p{n}"} for n in range(8)))
    one, other = SourceConfig(path=str(file)), SourceConfig(path=str(file), limit=5)
    made = feed(tmp_path, tiny_encoder("gpt2").tokenizer, sources=[one, other], limit=6)
    assert [len(source.examples) for source in made.sources] == [6, 5]


@pytest.mark.parametrize("keys", [{"temperature": 5.0}, {"mixed": True}, {"weight": 3.0}])
def test_nothing_is_mixed_of_one_source(keys):
    with pytest.raises(InputError, match=r"data\.mixed, .* and data\.temperature have no effect on one source"):
        DataConfig(path="a.jsonl", **keys)


def test_a_temperature_next_to_weights_is_refused():
    sources = [SourceConfig(path="a", weight=1.0), SourceConfig(path="b", weight=1.0)]
    with pytest.raises(InputError, match=r"data\.temperature=5\.0 has no effect where the sources have weights"):
        DataConfig(sources=sources, temperature=5.0)


def test_skipped_rows_are_listed_and_too_many_stop(tmp_path, tiny_encoder, caplog):
    tokenizer = tiny_encoder("gpt2").tokenizer
    file = lines(tmp_path / "train.jsonl", GOOD[0], "{torn", {"query": " ", "positive": "p"}, GOOD[1])
    made = feed(tmp_path, tokenizer, path=str(file), on_error="skip", max_error_share=0.5)
    assert [example.query for example in made.sources[0].examples] == ["q1", "q2"]
    (rejected,) = (tmp_path / "cache").glob("*.rejected.jsonl")
    assert [
        json.loads(line)["where"] for line in rejected.read_text().splitlines()
    ] == [f"{file}, line 2", f"{file}, line 3"]
    assert f"rows were skipped; {rejected} lists them" in caplog.text
    with pytest.raises(
        InputError,
        match=r"2 of 4 rows rejected, listed in .*rejected\.jsonl; .*data\.max_error_share=0\.1 are not skipped"
    ):
        feed(tmp_path, tokenizer, path=str(file), on_error="skip", max_error_share=0.1)


def test_queries_of_a_beir_folder_keep_all_their_positives(folder, tmp_path):
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t1\nq2\td2\t0\n")
    assert read(folder, name="beir") == [Example("first", "T one", (), ("two",))]


# --- several sources ---


def two_sources(tmp_path: Path, **weights: float) -> list[SourceConfig]:
    files = {}
    for name, size in {"a": 4, "b": 12}.items():
        files[name] = lines(
            tmp_path / f"{name}.jsonl", *({"query": f"{name} {n}", "positive": f"{name} text {n}"} for n in range(size))
        )
    return [SourceConfig(path=str(file), weight=weights.get(name)) for name, file in files.items()]


@pytest.mark.parametrize(("weights", "told", "batches"), [({}, "25.0%", 25), ({"a": 3.0, "b": 1.0}, "75.0%", 75)])
def test_the_share_of_a_source_is_told_and_kept(weights, told, batches, tmp_path, tiny_encoder, caplog):
    caplog.set_level(logging.INFO)
    made = feed(tmp_path, tiny_encoder("gpt2").tokenizer, sources=two_sources(tmp_path, **weights))
    assert f"batches by source: {tmp_path}/a.jsonl {told}" in caplog.text
    assert sum(made.drawn_examples(number, 0)[0][0] == 0 for number in range(100)) == batches


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"a": 2.0}, {}, r"^data\.sources: .*b\.jsonl has no weight and others have; give each one a weight, or none$"),
        (
            {}, {"num_hard_negatives": 1, "on_error": "skip"},
            r"^data\.num_hard_negatives, data\.on_error: set next to data\.sources, where nothing reads it"
        ),
        (
            {}, {"path": "else.jsonl"},
            r"^data\.path: set next to data\.sources, where nothing reads it; set it in each of the sources"
        ),
    ],
)
def test_what_stands_beside_sources_and_weights_of_some_are_refused(weights, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        DataConfig(sources=two_sources(tmp_path, **weights), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": -1}, r"^data\.limit=-1 must be 1 or more; null takes every example$"),
        (
            {"name": "nli", "num_hard_negatives": 3},
            r"^data\.num_hard_negatives=3: data=nli has one hard negative for each example; set it to 1 or 0$"
        ),
        (
            {"name": "msmarco", "on_error": "skip"},
            r"^data\.on_error=skip is read by data=file or data=documents or data=beir or data=pydocs only, "
                r"not by data=msmarco, .*out$",
        ),
    ],
)
def test_settings_that_a_reader_cannot_keep_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SourceConfig(**options)


# --- what a key is made of ---


def test_triples_beside_the_folder_and_linked_folders_are_never_stale(folder, tmp_path):
    outside = tmp_path / "outside.tsv"
    outside.write_text("q1\td1\td2\n")
    config = DataConfig("beir", str(folder), triples=str(outside), num_hard_negatives=1)
    assert list(read_examples(config, tmp_path / "cache")) == [Example("first", "T one", ("two",))]
    outside.write_text("q2\td2\td1\n")
    assert list(read_examples(config, tmp_path / "cache")) == [Example("second", "two", ("T one",))]
    (folder / "qrels").rename(tmp_path / "qrels")
    (folder / "qrels").symlink_to(tmp_path / "qrels")
    config = DataConfig("beir", str(folder), split="test")
    assert len(read_examples(config, tmp_path / "cache")) == 2
    (tmp_path / "qrels" / "test.tsv").write_text("q1\td1\t1\n")
    assert list(read_examples(config, tmp_path / "cache")) == [Example("first", "T one")]


def test_a_data_set_of_the_hub_is_known_by_its_revision(tmp_path, monkeypatch, caplog):
    """The hub's answers are stand-ins: there is no network here."""
    there = {"sha": "one", "rows": 2}

    def info(self, repo_id, **options):
        if not there["sha"]:
            raise OSError("no network")
        return SimpleNamespace(sha=there["sha"])

    def load(path, subset, split, streaming):
        return datasets.Dataset.from_list([{"query": f"q{n}", "positive": "p"} for n in range(there["rows"])])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(path="owner/name")
    assert len(read_examples(config, tmp_path)) == 2
    there["rows"] = 3
    assert len(read_examples(config, tmp_path)) == 2  # of the same revision
    there["sha"] = "two"
    assert len(read_examples(config, tmp_path)) == 3
    there["sha"] = None
    assert len(read_examples(config, tmp_path)) == 3
    assert "owner/name: the hub cannot be asked whether it has changed (OSError)" in caplog.text


# --- BEIR folders as they are found ---


def test_all_negatives_of_a_triple_are_kept_and_a_first_line_with_one_wrong_id_is_no_header(folder):
    (folder / "triples.tsv").write_text("\ufeffq1\td1\td2\td2\n", encoding="utf-8")
    assert read(
        folder, name="beir", triples="triples.tsv", num_hard_negatives=1
    ) == [Example("first", "T one", ("two", "two"))]
    (folder / "triples.tsv").write_text("Q1\td1\td2\nq2\td2\td1\n")
    with pytest.raises(InputError, match=r"triples\.tsv, line 1: query id 'Q1' is not in"):
        read(folder, name="beir", triples="triples.tsv", num_hard_negatives=1)
    (folder / "triples.tsv").write_text("q1\td1\td2\t\n")
    with pytest.raises(InputError, match=r"triples\.tsv, line 1: document id '' is not in"):
        read(folder, name="beir", triples="triples.tsv", num_hard_negatives=1)


def test_bad_rows_of_a_beir_folder_are_skipped_and_listed(folder, tmp_path):
    lines(
        folder / "corpus.jsonl", {"_id": "d1", "text": "one"}, {"_id": "d2", "text": "half \ud83d"},
        {"_id": 3, "text": "x"}, {"_id": "d1", "text": "again"}
    )
    (folder / "qrels" / "test.tsv").write_text("q\td\ts\nq1\td1\t1\nq2\td2\t1\nq9\td1\t1\nq1\td1\n")
    with pytest.raises(InputError, match=r"corpus\.jsonl, line 2, column 'text': half of a surrogate pair"):
        read(folder, name="beir", split="test")
    with pytest.raises(InputError, match=r"6 of 11 rows rejected"):  # good ones: 1 document, 3 queries, 1 example
        read(folder, name="beir", split="test", on_error="skip", max_error_share=0.5)
    config = DataConfig("beir", str(folder), split="test", on_error="skip", max_error_share=0.9)
    assert list(read_examples(config, tmp_path / "cache")) == [Example("first", "one")]
    (rejected,) = (tmp_path / "cache").glob("*.rejected.jsonl")
    places = [json.loads(line)["where"].removeprefix(f"{folder}/") for line in rejected.read_text().splitlines()]
    assert places == [
        *(f"corpus.jsonl, line {number}" for number in (2, 3, 4)),
        *(f"qrels/test.tsv, {place}" for place in ("line 5", "query q2", "query q9"))
    ]


# --- queries with too few hard negatives ---


def test_positives_of_others_stand_in_where_a_labelled_query_has_too_few_hard_negatives(tmp_path, tiny_encoder):
    rows = [
        {"query": f"q{n}", "document": f"p{n}", "label": 1} for n in range(6)
    ] + [{"query": "q0", "document": "n0", "label": 0}]
    made = feed(
        tmp_path, tiny_encoder("gpt2").tokenizer, path=str(lines(tmp_path / "pairs.jsonl", *rows)), num_hard_negatives=2
    )
    source = made.sources[0]
    names = source.examples.texts
    for row in range(6):
        _, *hard = (names[text] for text in source.draw(row, 0, 0).documents)
        assert len(hard) == 2
        assert f"p{row}" not in hard
        assert [text for text in hard if text[0] == "n"] == (["n0"] if row == 0 else [])
        assert set(hard) - {"n0"} <= {f"p{n}" for n in range(6)}


@pytest.mark.parametrize(
    ("spelt", "problem"), [("\\ud83d", "half of a surrogate pair"), ("a\\u0000b", "a NUL character")]
)
def test_escapes_that_spell_no_text_are_named_in_json_lines(spelt, problem, tmp_path):
    file = lines(
        tmp_path / "snli_1.0_train.jsonl", f'{{"sentence1": "{spelt}", "sentence2": "b", "gold_label": "neutral"}}'
    )
    for data in ({"name": "nli", "num_hard_negatives": 1}, {"name": "file"}):
        with pytest.raises(InputError, match=rf"line 1, column 'sentence1': {problem}"):
            read(file, **data)
