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


def test_a_bad_row_is_named(tmp_path):
    file = write(tmp_path / "pairs.jsonl", [*ROWS, {"query": "no answer", "positive": 3, "negative": "x"}])
    with pytest.raises(InputError, match=r"pairs\.jsonl, line 4"):
        read_own_pairs(file, "dev")
