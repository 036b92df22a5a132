"""Files as people have them: read as they are meant, or refused by file, line, value and remedy; and no row lost
without a word.

Files are written by csv, json, pyarrow, datasets and by hand, never by the code that reads them.
"""

import gzip
import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from sgpt.data.feed.example import Example
from sgpt.data.formats import beir
from sgpt.data.formats.beir import read_search_corpus
from sgpt.data.formats.scored_pairs import read_pairs
from sgpt.data.formats.trec import read_run
from sgpt.data.readers import DataConfig, SourceConfig, read_examples
from sgpt.data.test_sets.beir_sets import find_beir_folders, read_beir_folder
from sgpt.evaluation.compare import tuning_set
from sgpt.evaluation.evaluate import EvaluationConfig, read_sets
from sgpt.mining.config import MineConfig
from sgpt.mining.mine import mine
from sgpt.pretraining import open_text
from sgpt.retrieval.bm25 import bm25_run
from sgpt.runtime.errors import InputError
from sgpt.training import record as outcome

LONGEST = 400  # letters of a refusal, without the folder's name


def read(file: Path, **options) -> list[Example]:
    cache = file.parent / f".cache-{file.name}"
    return list(read_examples(DataConfig(**{"name": "file", "path": str(file), **options}), cache))


def written(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def json_lines(file: Path, *rows: object) -> Path:
    return written(file, "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def beir_folder(
    folder: Path, corpus: dict[str, str], queries: dict[str, str], judged: str, split: str = "test"
) -> Path:
    json_lines(folder / "corpus.jsonl", *({"_id": name, "text": text} for name, text in corpus.items()))
    json_lines(folder / "queries.jsonl", *({"_id": name, "text": text} for name, text in queries.items()))
    written(folder / "qrels" / f"{split}.tsv", judged)
    return folder


# --- labels ---


RTE = [
    ("it rains", "it is wet", 0), ("it rains", "it is dry", 1), ("she sang", "there was a song", 0),
    ("she sang", "nobody sang", 1)
]
RTE_EXAMPLES = [
    Example("it rains", "it is wet", ("it is dry",)), Example("she sang", "there was a song", ("nobody sang",))
]
RTE_COLUMNS = {
    name: list(column) for name, column in zip(("sentence1", "sentence2", "label"), zip(*RTE, strict=True), strict=True)
}


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "folder of parquet", "saved"])
def test_class_labels_are_read_by_name_whatever_the_form(kind, tmp_path):
    """0 is entailment here: taken for 1 and 0, positives and hard negatives would be swapped."""
    features = datasets.Features({
        "sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["entailment", "contradiction"]),
    })  # fmt: skip
    table = datasets.Dataset.from_dict(RTE_COLUMNS, features)
    place = tmp_path / "rte"
    if kind == "parquet":
        table.to_parquet(str(place := tmp_path / "rte.parquet"))
    elif kind == "folder of parquet":
        table.to_parquet(str(place / "train-00000.parquet"))
    else:
        table.save_to_disk(str(place))
        place = next(place.glob("*.arrow")) if kind == "arrow stream" else place
    assert read(place, num_hard_negatives=1) == RTE_EXAMPLES


@pytest.mark.parametrize("second", ["sentence2", "text2", "hypothesis", "sentence"])
@pytest.mark.parametrize("kind", [int, float, str])
def test_numbers_as_labels_of_two_sentences_are_asked_for_and_taken_as_stated(kind, second, tmp_path):
    file = json_lines(
        tmp_path / "rte.jsonl", *({"sentence1": a, second: b, "label": kind(label)} for a, b, label in RTE)
    )
    columns = {"positive": second}
    with pytest.raises(
        InputError,
        match=r"line 1, column 'label': the label .* is ambiguous.*data\.labels=\[not_duplicate,duplicate\]"
    ):
        read(file, columns=columns)
    assert read(file, columns=columns, labels=["entailment", "contradiction"], num_hard_negatives=1) == RTE_EXAMPLES
    with pytest.raises(
        InputError, match=r"line 2, column 'label': data\.labels names the numbers 0 to 0, and the label is"
    ):
        read(file, columns=columns, labels=["entailment"])
    with pytest.raises(InputError, match=r"data\.labels: 'yes' is none of 1, 1\.0, true, entailment"):
        read(file, columns=columns, labels=["yes", "no"])


@pytest.mark.parametrize(
    "columns",
    [("question1", "question2", "is_duplicate"), ("query", "passage", "is_relevant"), ("query", "document", "label"),
                                     ("sentence1", "sentence2", "duplicate")])  # fmt: skip
def test_numbers_whose_column_says_what_they_mean_are_read(columns, tmp_path):
    file = json_lines(
        tmp_path / "a.jsonl", *(dict(zip(columns, row, strict=True)) for row in (("a", "b", 1), ("a", "c", 0)))
    )
    assert read(file, num_hard_negatives=1) == [Example("a", "b", ("c",))]


# --- documents ---


def test_the_sample_of_similarities_leaves_out_what_is_no_candidate(tiny_encoder, tmp_path):
    """BEIR's rules leave out documents with an empty text, judged ones too: the best of q1 is one, and q2 has none
    other.
    """
    folder = beir_folder(
        tmp_path / "trec-covid", {"d1": "a text", "d2": "other", "d3": ""}, {"q1": "a", "q2": "b"},
        "q1\td3\t2\nq1\td1\t1\nq2\td3\t1\n"
    )
    sets = read_sets(EvaluationConfig(retrieval=[str(folder)]))
    assert list(sets.retrieval[0].corpus) == ["d1", "d2"]
    assert len(outcome._similarity(tiny_encoder("gpt2"), sets)["positive"]) == 1


@pytest.mark.parametrize(
    ("corpus", "judged", "message"),
    [
        ({"d1": "", "d2": " "}, "q1\td1\t1\n", r"corpus\.jsonl: every document's text is empty; give"),
        ({"d1": "a", "d2": "b"}, "q1\td1\t0\nq1\td2\t-1\n", r"test\.tsv: no judgement is above 0.*; judge"),
        ({"d1": "", "d2": "b"}, "q1\td1\t1\n", r"test\.tsv: every relevant document has an empty text.*; give"),
        (
            {"d1": "a"}, f"q1\td1\t{10**20}\n",
            r"test\.tsv, line 1: relevance '1000.*' is no whole number up to 10,000; write"
        ),
        ({"d1": "a"}, "q1\td1\t1_0\nq1\td1\t1\n", r"test\.tsv, line 1: relevance '1_0' is no whole number"),
    ],
)
def test_what_cannot_be_scored_is_refused_when_it_is_read(corpus, judged, message, tmp_path):
    folder = beir_folder(tmp_path / "trec-covid", corpus, {"q1": "a"}, judged)
    with pytest.raises(InputError, match=message):
        read_sets(EvaluationConfig(retrieval=[str(folder)]))


def test_what_a_limit_leaves_nothing_of_is_refused(tmp_path):
    folder = beir_folder(tmp_path / "b", {"d1": "a"}, {"q1": "a", "q2": "b"}, "q1\td1\t0\nq2\td1\t1\n")
    with pytest.raises(
        InputError, match=r"evaluation\.limit=1: the first queries of b have no relevant document; raise it"
    ):
        read_sets(EvaluationConfig(retrieval=[str(folder)], limit=1))
    file = json_lines(
        tmp_path / "sts.jsonl", *({"sentence1": "a", "sentence2": "b", "score": score} for score in (1, 1, 2))
    )
    with pytest.raises(
        InputError, match=r"evaluation\.limit=2: the first pairs of sts have one score, nothing to correlate; raise it"
    ):
        read_sets(EvaluationConfig(sts=[str(file)], limit=2))


@pytest.mark.parametrize("reader", [beir.read_corpus, read_search_corpus])
def test_a_title_that_is_no_value_is_no_title_and_one_that_is_no_text_is_refused(reader, tmp_path):
    folder = tmp_path / "b"
    json_lines(
        folder / "corpus.jsonl", '{"_id": "1", "title": NaN, "text": "Put the egg"}',
        '{"_id": "2", "title": null, "text": "in"}'
    )
    assert reader(folder) == reader(folder / "corpus.jsonl") == {"1": "Put the egg", "2": "in"}
    table = pa.table({"_id": ["1"], "title": pa.array([float("nan")]), "text": ["Put the egg"]})
    parquet.write_table(table, tmp_path / "corpus.parquet")
    assert reader(tmp_path / "corpus.parquet") == {"1": "Put the egg"}
    for value, told in (
        ('["a", "b"]', r"title is \['a', 'b'\], which is no text; write it as one text"),
        ("7", "title is 7, which is no text; write it in"),
                        ('{"a": 1}', "title is {'a': 1}, which is no text"),
                        ("Infinity", "not JSON .Infinity is no JSON number"),
                        ("false", "title is False, which is no text")):  # fmt: skip
        json_lines(folder / "corpus.jsonl", f'{{"_id": "1", "title": {value}, "text": "a"}}')
        with pytest.raises(InputError, match=rf"corpus\.jsonl, line 1: {told}"):
            reader(folder)
    json_lines(folder / "corpus.jsonl", '{"_id": "1", "text": NaN}')
    with pytest.raises(
        InputError, match=r"corpus\.jsonl, line 1: text is None, which is no text; write \"\" for an empty one"
    ):
        reader(folder)


def test_words_for_no_value_and_lists_in_cells_are_told(tmp_path, caplog):
    assert len(read(written(tmp_path / "a.csv", "query,positive\nq1,nan\nq2,None\nq3,\"['p', 'r']\"\nq4,p4\n"))) == 4
    expected = (
        "a.csv, line 2: 'nan' is a word for no value and is read as a "
        "text, in 2 rows; leave such cells empty"
    )
    assert expected in caplog.text
    assert "a.csv, line 4: \"['p', 'r']\" is a list written as text and is read as a text, in 1 rows" in caplog.text
    json_lines(tmp_path / "corpus.jsonl", {"_id": "1", "title": "nan", "text": "a"})
    read_search_corpus(tmp_path / "corpus.jsonl")
    assert "corpus.jsonl, line 1: 'nan' is a word for no value and is read as a text or title, in 1 rows" in caplog.text


@pytest.mark.parametrize("cell", ["['n1', 'n2']", '["n1", "n2"]', "['n1' 'n2']", "['n1']"])
def test_a_list_in_a_cell_of_hard_negatives_is_refused(cell, tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"query": "q", "positive": "p", "negative": cell})
    with pytest.raises(
        InputError, match=r"line 1, column 'negative': .* is a list written as one text; write JSON lines or Parquet"
    ):
        read(file, num_hard_negatives=1)
    assert read(file) == [Example("q", "p")]


def test_nan_among_hard_negatives_is_none(tmp_path):
    file = written(tmp_path / "a.jsonl", '{"query": "q", "positive": "p", "negative_1": "n", "negative_2": NaN}\n')
    assert read(file, num_hard_negatives=1) == [Example("q", "p", ("n",))]


# --- tables of text ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '"query", "positive"\n"q, 1", "p ""1"", here"\n"q2", "p2"\n'),
        ("a.csv", 'query,positive\n"q, 1", "p ""1"", here"\n"q2",   "p2"\n'),
        ("a.csv", ' query , positive \n"q, 1","p ""1"", here"\nq2,p2\n'),
        ("a.csv", 'sep=;\nquery;positive\n"q, 1";"p ""1"", here"\nq2;p2\n'),
        ("a.csv", '"sep=|"\r\nquery|positive\r\n"q, 1"|"p ""1"", here"\r\nq2|p2\r\n'),
        ("a.csv", '\ufeffsep=,\nquery,positive\n"q, 1","p ""1"", here"\nq2,p2\n'),
        ("a.csv", 'query,positive\r"q, 1","p ""1"", here"\rq2,p2\r'),
        ("a.csv", '\ufeffquery,positive\r"q, 1","p ""1"", here"\rq2,p2'),
        ("a.tsv", 'query\tpositive\rq, 1\tp "1", here\rq2\tp2\r'),
        ("a.tsv", '\ufeff query\tpositive \r\nq, 1\tp "1", here\r\n\r\nq2\tp2\r\n'),
        ("a.jsonl", '{"query": "q, 1", "positive": "p \\"1\\", here"}\r{"query": "q2", "positive": "p2"}\r'),
    ],
)
def test_odd_tables_are_read_as_they_are_meant(name, content, tmp_path):
    assert read(written(tmp_path / name, content)) == [Example("q, 1", 'p "1", here'), Example("q2", "p2")]


def test_blanks_behind_separators_are_kept_where_no_quote_stands_behind_one(tmp_path):
    assert read(written(tmp_path / "a.csv", 'query,positive\n"q", p\n')) == [Example("q", " p")]
    late = "".join(f"q{number},p{number}\n" for number in range(150))
    with pytest.raises(
        InputError,
        match=r"line 152: a quote behind a blank, ' \"p\"'; take the blanks between separators and quotes away"
    ):
        read(written(tmp_path / "b.csv", f'query,positive\n{late}"q", "p"\n'))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv", '"query"\t"positive"\n"q"\t"p"\n',
            r"line 1: the column '\"query\"' is in quotes, and TSV has no quoting; write the file as CSV"
        ),
        ("a.csv", 'query,positive\n"q" ,"p"\n', r"line 2: not CSV up to line 2 .*; take the blanks behind quotes away"),
        ("a.csv", "query\tpositive\nq\tp\n", r"line 1: the header is one column with '\\t' in its name"),
        ("a.jsonl", '{"query": "q", "positive": Infinity}\n', r"line 1: not JSON \(Infinity is no JSON number\)"),
        (
            "a.csv", "query,positive\nq,p\n".encode("utf-16"),
            r"line 1: begins with the mark of UTF-16; save the file as UTF-8"
        ),
    ],
)
def test_odd_tables_that_cannot_be_read_are_refused(name, content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(written(tmp_path / name, content))


# --- splits by their usual names ---


@pytest.mark.parametrize("name", ["validation", "Dev", "VAL", "valid"])
@pytest.mark.parametrize("asked", ["dev", "validation"])
def test_splits_go_by_their_usual_names(name, asked, tmp_path):
    folder = beir_folder(tmp_path / "b", {"d": "text"}, {"q": "query"}, "q\td\t1\n", split=name)
    assert read_beir_folder(find_beir_folders([str(folder)], asked, tmp_path)[0]).qrels == {"q": {"d": 1}}
    assert len(read(folder, name="beir", split=asked)) == 1
    rows = [
        {"sentence1": "a", "sentence2": "b", "score": score, "split": split} for score,
        split in ((1, name), (2, f" {name} "), (3, "test"))
    ]
    assert read_pairs(json_lines(tmp_path / "sts.jsonl", *rows), asked)[0].scores == [1, 2]
    table = datasets.Dataset.from_list([{"query": "q", "positive": "p"}])
    datasets.DatasetDict({name: table}).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", split=asked) == [Example("q", "p")]


def test_two_files_of_one_split_are_refused_unless_one_is_named(tmp_path):
    folder = beir_folder(tmp_path / "b", {"d": "text"}, {"q": "query"}, "q\td\t1\n", split="validation")
    written(folder / "qrels" / "val.tsv", "q\td\t2\n")
    with pytest.raises(
        InputError, match=r"val\.tsv, validation\.tsv are names of one split; set split=<one of them>, as it is written"
    ):
        beir.read_retrieval(folder, "dev")
    assert beir.read_qrels(folder, "val") == {"q": {"d": 2}}


def test_pairs_of_other_splits_are_told(tmp_path, caplog):
    rows = [
        {"sentence1": "a", "sentence2": "b", "score": score, "split": split} for score,
        split in ((1, "test"), (2, "TEST"), (3, "tset"), (4, "train"))
    ]
    assert read_pairs(json_lines(tmp_path / "sts.jsonl", *rows), "test")[0].scores == [1, 2]
    assert "sts.jsonl: 1 of 'tset', 1 of 'train' left out; 'test' is the split to read" in caplog.text
    with pytest.raises(
        InputError,
        match=r"0 pairs in split 'dev' .*\. It has 1 of 'test', 1 of 'TEST', 1 of 'tset', 1 of 'train'; set the split"
    ):
        read_pairs(tmp_path / "sts.jsonl", "dev")
    with pytest.raises(InputError, match=r"line 1: split is 5, which is no text"):
        read_pairs(json_lines(tmp_path / "sts.jsonl", {**rows[0], "split": 5}), "test")


def test_scored_pairs_may_be_a_table_and_empty_sentences_are_told(tmp_path, caplog):
    file = written(tmp_path / "sts.csv", 'sentence1,sentence2,score\na,"b, c",4.5\nd,,1\n')
    assert read_pairs(file, "test")[0].scores == [4.5, 1.0]
    assert "sts.csv: 1 sentences are empty; fix or remove their rows" in caplog.text


def test_a_weight_is_not_tuned_on_the_scored_split_under_its_other_name(tmp_path):
    folder = beir_folder(tmp_path / "b", {"d": "text"}, {"q": "query"}, "q\td\t1\n", split="validation")
    place = find_beir_folders([str(folder)], "validation", tmp_path)[0]
    dev, reason = tuning_set(place, read_beir_folder(place), "dev")
    assert dev is None
    assert "is tuned on split 'dev', which is what is scored" in reason
    written(folder / "qrels" / "test.tsv", "q\td\t0\n")
    assert "where no judgement is above 0" in tuning_set(place, read_beir_folder(place), "test")[1]


def test_the_mark_of_utf_8_hides_no_column_of_allnli_and_a_tab_in_a_text_shifts_none(tmp_path):
    rows = [("train", "a", "b", "entailment"), ("train", "a", "c", "contradiction"), ("Dev", "a", "d", "entailment")]
    content = "".join("\t".join(row) + "\r\n" for row in (("split", "sentence1", "sentence2", "label"), *rows))
    file = written(tmp_path / "AllNLI.tsv", "\ufeff" + content)
    assert {text for example in read(file, name="nli") for text in (example.query, example.positive)} == {"a", "b"}
    written(file, content.replace("\tc\t", "\tc\tc\t"))
    with pytest.raises(
        InputError,
        match=r"AllNLI\.tsv, line 3: 5 tab-separated fields where the header names 4 columns: .*; take the tabs out"
    ):
        read(file, name="nli")


def test_open_text_without_a_column_is_refused(tmp_path):
    written(tmp_path / "open_text" / "train-00.jsonl.gz", gzip.compress(b'{"title": null, "text": "t"}\n'))
    with pytest.raises(
        InputError, match=r"train-00\.jsonl\.gz, line 1: needs the text column title; it has title, text"
    ):
        list(open_text.read_texts(tmp_path))


# --- runs ---


@pytest.fixture
def toy(tmp_path) -> Path:
    corpus, queries = {f"d{n}": f"text {n}" for n in range(6)}, {f"q{n}": f"query {n}" for n in range(3)}
    return beir_folder(tmp_path / "toy", corpus, queries, "".join(f"q{n}\td{n}\t1\n" for n in range(3)))


def run_of(toy: Path, content: str | bytes, name: str = "run") -> dict[str, dict[str, float]]:
    return read_run(written(toy.parent / name, content), toy, beir.read_retrieval(toy, "test"), "trec")


def test_a_run_that_orders_by_rank_alone_is_refused_and_one_with_some_such_queries_told(toy, caplog):
    flat = "".join(f"q0 Q0 d{n} {n + 1} 1.0 tag\n" for n in range(3))
    with pytest.raises(
        InputError,
        match=r"all scores of query 'q0' are equal while its ranks differ.*; write scores that fall with the rank: awk"
    ):
        run_of(toy, flat)
    assert list(run_of(toy, flat + "q1 Q0 d0 1 2.0 tag\nq1 Q0 d1 2 1.0 tag\n")) == ["q0", "q1"]
    assert "all scores of query 'q0' are equal while its ranks differ" in caplog.text
    assert "1 of 2 queries are like it" in caplog.text
    # equal ranks: ties, as they are
    assert run_of(toy, "q0 Q0 d0 1 1.0 tag\nq0 Q0 d1 1 1.0 tag\n") == {"q0": {"d0": 1.0, "d1": 1.0}}
    assert "run: all scores of a query are equal, so the run ranks nothing" in caplog.text


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_distances_are_refused_in_any_order_of_lines(order, toy):
    lines = [f"q0 Q0 d{n} {n + 1} 0.{n + 1} tag\n" for n in range(3)]
    with pytest.raises(
        InputError,
        match=r"run, line \d: rank 2 scores 0\.2, more than rank 1 with 0\.1; higher must be better, so negate "
        r"distances"
    ):
        run_of(toy, "".join(lines[n] for n in order))


@pytest.mark.parametrize(
    "content", ["q0 Q0 d0 1 1.5 tag\r\n", '{"q0": {"d0": 1.5}}', "q0\tQ0\td0\t1\t1.5\ttag\r", "\n\nq0 Q0  d0 1 1.5 tag"]
)
def test_a_mark_of_utf_8_and_any_line_ends_change_nothing_in_a_run(content, toy):
    assert run_of(toy, "\ufeff" + content) == run_of(toy, content) == {"q0": {"d0": 1.5}}


@pytest.mark.parametrize("content", [
    '{"q0": {"d0": 1, "d0": 2}}', '{"q0": {"d0": Infinity}}', '{"q0": {"d0": NaN}}',
    '{"q0": {"d0": 1' + "0" * 400 + "}}", '{"q0": ' * 9999,
])  # fmt: skip
def test_a_run_in_json_that_is_none_is_refused(content, toy):
    with pytest.raises(InputError, match=r"run.*(not JSON|no finite number)"):
        run_of(toy, content)


def test_a_run_for_a_folder_without_queries_is_refused(toy):
    chosen = beir.read_retrieval(toy, "test")
    (toy / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"queries\.jsonl: no such file"):
        read_run(written(toy.parent / "run", "q0 Q0 d0 1 1.5 tag\n"), toy, chosen, "trec")


# --- BM25 ---


@pytest.mark.parametrize(
    ("corpus", "query", "best"),
    [
        ({"a": "我喜欢吃鱼", "b": "今天天气很好"}, "鱼怎么吃", "a"),
        ({"a": "我喜欢吃鱼", "b": "今天天气很好"}, "鱼", "a"),
        ({"a": "用Python写程序", "b": "用Java写程序"}, "Python程序", "a"),
        ({"a": "猫は魚を食べる", "b": "天気がとても良い"}, "魚を食べた", "a"),
        ({"a": "แมวกินปลา", "b": "สภาพอากาศดี"}, "กินปลา", "a"),
        ({"a": "हिन्दी भाषा सीखना", "b": "मौसम अच्छा है"}, "हिन्दी में", "a"),
    ],
)
def test_bm25_finds_words_of_scripts_without_blanks(corpus, query, best, tmp_path):
    chosen = beir.RetrievalSet("set", corpus, {"q": query}, {"q": {best: 1}})
    assert next(iter(bm25_run(chosen)["q"])) == best


def test_bm25_tells_when_most_queries_match_nothing(caplog):
    corpus = {"a": "the cat sat", "b": "a dog ran"}
    assert bm25_run(
        beir.RetrievalSet("set", corpus, {"1": "eine Katze", "2": "ein Hund"}, {"1": {"a": 1}, "2": {"b": 1}})
    ) == {"1": {}, "2": {}}
    assert "set: BM25 finds no document for 2 of 2 queries, because none of their words is in the corpus" in caplog.text
    assert bm25_run(beir.RetrievalSet("of the", {"a": "of the", "b": ""}, {"1": "cat"}, {"1": {"a": 1}})) == {"1": {}}


def test_mined_rows_without_negatives_are_told(tmp_path, caplog):
    file = json_lines(tmp_path / "pairs.jsonl", *({"query": f"Wort{n}", "positive": f"word{n}"} for n in range(4)))
    statistics = mine(MineConfig(data=str(file), output=str(tmp_path / "rows.jsonl"), threads=1))
    assert statistics["counts"]["none"] == statistics["counts"]["rows"] == 4
    assert "rows.jsonl: 4 of 4 queries have no hard negative; their rows are written without any" in caplog.text


# --- keys of readers ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"systems": ["bm25"]},
            r"^data\.systems=\['bm25'\] is read by data=msmarco only, not by data=file; leave it out$"
        ),
        ({"seed": 3}, r"^data\.seed=3 is read by data=nli or data=msmarco only, not by data=file"),
        ({"triples": "t.tsv"}, r"^data\.triples=t\.tsv is read by data=beir only"),
        (
            {"name": "beir", "columns": {"query": "q"}},
            r"^data\.columns=.* is read by data=file or data=documents only, not by data=beir",
        ),
        (
            {"name": "nli", "split": "dev"},
            r"^data\.split=dev is read by data=file or data=documents or data=beir only, not by data=nli",
        ),
        (
            {"name": "msmarco", "positive_score": 0.5},
            r"^data\.positive_score=0\.5 is read by data=file only, not by data=msmarco"
        ),
        (
            {"name": "pydocs", "streaming": True},
            r"^data\.streaming=True is read by data=file or data=documents only, not by data=pydocs",
        ),
    ],
)
@pytest.mark.parametrize("kind", [SourceConfig, DataConfig])
def test_another_readers_key_is_refused(options, message, kind):
    with pytest.raises(InputError, match=message):
        kind(**options)


def test_keys_of_the_hub_are_refused_for_what_is_here(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"query": "q", "positive": "p"})
    for options in ({"subset": "pair"}, {"streaming": True}):
        with pytest.raises(
            InputError,
            match=r"data\.(subset=pair|streaming=true): is for a data set of the hub, and .*a\.jsonl is here; leave it "
            r"out"
        ):
            read(file, **options)


def test_what_a_reader_does_not_read_makes_nothing_stale(tmp_path):
    pairs = [
        {"sentence1": "a", "sentence2": b, "gold_label": label} for b,
        label in (("b", "entailment"), ("c", "contradiction"))
    ]
    file, cache = json_lines(tmp_path / "snli_1.0_train.jsonl", *pairs), tmp_path / "cache"
    before = read_examples(SourceConfig("nli", str(file), num_hard_negatives=1), cache)
    there = {entry: entry.stat().st_mtime_ns for entry in cache.rglob("*")}
    again = read_examples(
        SourceConfig("nli", str(file), num_hard_negatives=0, weight=2.0, markers="none", symmetric=True), cache
    )
    assert again.key == before.key
    assert {entry: entry.stat().st_mtime_ns for entry in cache.rglob("*")} == there
    assert read_examples(SourceConfig("nli", str(file), num_hard_negatives=1, seed=1), cache).key != before.key


# --- any change of a file ends in rows or in a sentence, and rows are counted ---


def put(line: bytes, chance: random.Random, *what: bytes) -> bytes:
    """One of them, anywhere in the line."""
    place = chance.randrange(len(line) + 1)
    return line[:place] + chance.choice(what) + line[place:]


LETTERS = [bytes([letter]) for letter in b' \t"\'\\{}[],:;0-x\r']
NUMBERS = [b"nan", b"-1", b"1e400", b"1" * 30, b"x", b"", b"NaN", b"null"]
VALUES = [b"NaN", b"null", b'["a"]', b"7", b'""', b'"' + b"y" * 5000 + b'"']
CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "drop a letter": lambda line, chance: line[: (place := chance.randrange(len(line) + 1))] + line[place + 1 :],
    "add a letter": lambda line, chance: put(line, chance, *LETTERS),
    "other bytes": lambda line, chance: put(line, chance, b"\xff", b"\0", b"\xc3\xa9", b"\xef\xbb\xbf"),
    "a number": lambda line, chance: re.sub(rb"\b\d+(\.\d+)?\b", chance.choice(NUMBERS), line, count=1),
    "a last number": lambda line, chance: re.sub(rb"\d+(\.\d+)?(?=\D*$)", chance.choice(NUMBERS), line),
    "a text": lambda line, chance: re.sub(rb'"[^"]*"', chance.choice(VALUES), line, count=chance.randint(1, 4)),
    "blanks for tabs": lambda line, chance: line.replace(b"\t", b" "),
    "twice": lambda line, chance: line + b"\n" + line,
    "a blank line": lambda line, chance: line + b"\n\n",
    "cut": lambda line, chance: line[: chance.randrange(len(line) + 1)],
    "long": lambda line, chance: line.replace(line[:2], line[:2] + b"z" * 5000, 1),
    "carriage return": lambda line, chance: line + b"\r",
}


def changed(content: bytes, chance: random.Random) -> bytes:
    lines = content.split(b"\n")
    place = chance.randrange(len(lines) - 1)
    lines[place] = CHANGES[chance.choice(list(CHANGES))](lines[place], chance)
    whole = b"\n".join(lines)
    return chance.choice(
        [lambda: whole] * 5
        + [lambda: b"\xef\xbb\xbf" + whole, lambda: whole.replace(b"\n", b"\r\n"), lambda: whole.replace(b"\n", b"\r")]
    )()


def standing(content: bytes) -> list[str]:
    """The lines that hold something."""
    text = content.decode("utf-8-sig")
    return [line for line in text.split("\n" if "\n" in text else "\r") if line.strip()]


STS = [{"sentence1": f"first {n}", "sentence2": f"second {n}", "score": n / 2, "split": "test"} for n in range(5)]
TREC = "".join(
    f"q{query} Q0 d{(query + place) % 6} {place + 1} {3.5 - place} tag\n" for query in range(3) for place in range(3)
)


def readings(folder: Path) -> dict[str, tuple[Path, Callable[[], int]]]:
    """The file to change, and how many of its rows are read, those that are left out with a warning included."""
    def qrels() -> int:
        return sum(map(len, beir.read_retrieval(folder, "test").qrels.values()))

    def run() -> int:
        return sum(
            map(len, read_run(folder / "run.trec", folder, beir.read_retrieval(folder, "test"), "trec").values())
        )

    return {
        "qrels": (folder / "qrels" / "test.tsv", qrels),
        "corpus": (folder / "corpus.jsonl", lambda: len(beir.read_retrieval(folder, "test").corpus)),
        "queries": (folder / "queries.jsonl", lambda: len(beir.read_queries(folder))),
        "trec": (folder / "run.trec", run),
        "sts": (folder / "sts.jsonl", lambda: len(read_pairs(folder / "sts.jsonl", "test")[0].first)),
    }


def survive(kind: str, toy: Path, tmp_path: Path, seeds: range, caplog) -> dict[str, int]:
    json_lines(toy / "sts.jsonl", *STS)
    written(toy / "run.trec", TREC)
    file, count = readings(toy)[kind]
    whole, tally = file.read_bytes(), {"read": 0, "refused": 0}
    for seed in seeds:
        content = changed(whole, random.Random(seed))
        file.write_bytes(content)
        caplog.clear()
        try:
            rows = count()
        except InputError as error:
            tally["refused"] += 1
            sentence = str(error).replace(str(tmp_path), "")
            assert len(sentence) <= LONGEST, (seed, sentence)
            assert "\n" not in sentence, (seed, sentence)
            assert file.name in sentence or toy.name in sentence, (seed, sentence)
            assert ";" in sentence, (seed, sentence)  # behind it is what to do
        else:
            tally["read"] += 1
            lines = standing(content)
            expected = len({*lines} if kind == "qrels" else lines)  # a judgement that is there twice says nothing new
            told = re.search(r"(\d+) of .* left out|is taken for a header", caplog.text)
            assert rows == expected or (
                told and rows == expected - int(told[1] or 1)
            ), (seed, content, rows, caplog.text)
    return tally


@pytest.mark.parametrize("kind", ["qrels", "corpus", "queries", "trec", "sts"])
def test_any_change_ends_in_all_rows_or_in_a_sentence(kind, toy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tally = survive(kind, toy, tmp_path, range(80), caplog)
    assert min(tally.values()) >= 10, tally


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qrels", "corpus", "queries", "trec", "sts"])
def test_any_of_many_changes_ends_in_all_rows_or_in_a_sentence(kind, toy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    print(kind, survive(kind, toy, tmp_path, range(80, 3000), caplog))
