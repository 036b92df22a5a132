"""A file of pairs or triplets is scored as the BEIR folder that somebody would make of it."""

import json
from pathlib import Path

import pytest

from sgpt.data.formats.beir import read_retrieval
from sgpt.data.test_sets.own_pairs import read_own_pairs
from sgpt.evaluation.evaluate import EvaluationConfig, Sets, evaluate, read_sets
from sgpt.runtime.errors import InputError
from tests.starts import beir

ROWS = [
    {"query": "sort a list", "positive": "sorted(x)", "negative": "reversed(x)"},
    {"query": "read a file", "positive": "open(x).read()", "negative": "sorted(x)"},
    {"query": "sort a list", "positive": "x.sort()", "negative": "max(x)"},
]


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_corpus_is_all_documents_once_and_a_query_has_all_its_positives(tiny_encoder, tmp_path):
    ours = read_own_pairs(write(tmp_path / "mine.jsonl", ROWS), "dev")
    corpus = {"a": "sorted(x)", "b": "reversed(x)", "c": "open(x).read()", "d": "x.sort()", "e": "max(x)"}
    queries, qrels = {"1": "sort a list", "2": "read a file"}, {"1": {"a": 1, "d": 1}, "2": {"c": 1}}
    theirs = read_retrieval(beir(tmp_path / "mine", corpus, queries, qrels), "train")
    assert sorted(ours.corpus.values()) == sorted(corpus.values())
    encoder = tiny_encoder("gpt2")
    assert evaluate(encoder, Sets([ours], [])) == evaluate(encoder, Sets([theirs], []))


def test_pairs_without_negatives_and_the_rows_of_another_split(tmp_path):
    rows = [{"query": f"q {n}", "positive": f"p {n}", "split": "dev" if n < 3 else "train"} for n in range(5)]
    file = write(tmp_path / "pairs.jsonl", rows)
    (dataset,) = read_sets(EvaluationConfig(pairs=[str(file)], split="dev")).retrieval
    assert dataset.name == "pairs"
    assert list(dataset.corpus.values()) == ["p 0", "p 1", "p 2"]
    assert [dataset.queries[query] for query in dataset.qrels] == ["q 0", "q 1", "q 2"]


def test_every_document_is_in_the_corpus_whatever_says_that_it_is_no_answer(tmp_path):
    """Labels, scores, columns with names of their own, and rows with any number of negatives."""
    titled = [{"title": "sort a list", "body": "sorted(x)"}]
    labelled = [
        {"question1": "sort a list", "question2": "sorted(x)", "is_duplicate": 1},
        {"question1": "sort a list", "question2": "max(x)", "is_duplicate": 0},
    ]
    scored = [
        {"query": "sort a list", "positive": "sorted(x)", "score": 0.9},
        {"query": "sort a list", "positive": "max(x)", "score": 0.2},
    ]
    mined = [{**ROWS[0], "negative": []}, {**ROWS[2], "negative": ["max(x)", "min(x)"]}]
    for rows, options, documents, positives in (
        (labelled, {}, 2, 1),
        (scored, {"positive_score": 0.5}, 2, 1),
        (titled, {"columns": {"query": "title", "positive": "body"}}, 1, 1),
        (mined, {}, 4, 2),
    ):
        config = EvaluationConfig(pairs=[str(write(tmp_path / "pairs.jsonl", rows))], split="dev", **options)
        (dataset,) = read_sets(config, "dev").retrieval
        assert len(dataset.corpus) == documents
        assert [len(judged) for judged in dataset.qrels.values()] == [positives]


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"title": "a", "body": "b"}, "set dev.columns.query=<column>"),
        ({"query": "a", "positive": "b", "score": 0.5}, "set dev.positive_score=<score>"),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, "dev.labels="),
    ],
)
def test_what_is_to_be_set_is_a_key_that_is_read_here(row, remedy, tmp_path):
    config = EvaluationConfig(pairs=[str(write(tmp_path / "pairs.jsonl", [row]))], split="dev")
    with pytest.raises(InputError) as error:
        read_sets(config, "dev")
    assert remedy in str(error.value)
    assert "data." not in str(error.value)


def test_negatives_that_begin_late_in_the_file_are_not_left_out_in_silence(tmp_path):
    rows = [{"query": f"q {n}", "positive": f"p {n}"} for n in range(150)]
    file = write(tmp_path / "pairs.jsonl", [*rows, {"query": "q", "positive": "p", "negative": "n"}])
    with pytest.raises(InputError, match=r"line 151: the column 'negative', .* or set dev\.columns\.negative=''"):
        read_sets(EvaluationConfig(pairs=[str(file)], split="dev"), "dev")


def test_a_bad_row_is_named(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [*ROWS, {"query": "no answer", "positive": 3, "negative": "x"}])
    with pytest.raises(InputError, match=r"pairs\.jsonl, line 4"):
        read_own_pairs(file, "dev")
