"""Run files against pytrec_eval's own reader. That bad ones are refused with their place is in test_mine."""

import gzip
import json
import random

import pytest
import pytrec_eval

from sgpt.data.formats.beir import RetrievalSet
from sgpt.data.formats.lines import read_json_file
from sgpt.data.formats.trec import read_run, write_run
from sgpt.retrieval.metrics import ranking_per_query
from sgpt.runtime.errors import InputError

CHANCE = random.Random(0)
DOCUMENTS = {f"d{n:02}": f"text {n}" for n in range(30)}
RUN = {
    f"q{n}": {
        document: CHANCE.choice([1.0, 1 / 3, -2e-7, 1e20, 0.1 + 0.2])
        for document in CHANCE.sample(sorted(DOCUMENTS), 20)
    }
    for n in range(6)
}
QRELS = {
    query: {document: CHANCE.choice([0, 1, 2]) for document in CHANCE.sample(sorted(DOCUMENTS), 10)} for query in RUN
}


@pytest.fixture
def chosen(tmp_path) -> RetrievalSet:
    rows = [{"_id": query, "text": f"text of {query}"} for query in RUN]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RetrievalSet("toy", DOCUMENTS, {row["_id"]: row["text"] for row in rows}, QRELS)


def test_a_written_run_is_what_pytrec_eval_reads_and_ranks_alike(tmp_path):
    file = tmp_path / "runs" / "toy.bm25.trec"
    write_run(file, RUN, "BM25 of us")
    with file.open() as lines:
        assert pytrec_eval.parse_run(lines) == RUN  # every bit of every score
    ranks: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        query, q0, document, rank, _, tag = line.split()
        assert (q0, tag) == ("Q0", "BM25_of_us")
        ranks.setdefault(query, []).append(document)
        assert int(rank) == len(ranks[query])
    # a document at our rank r has the reciprocal rank 1/r by trec_eval: ties rank as there
    for query, documents in ranks.items():
        for rank, document in enumerate(documents, 1):
            found = pytrec_eval.RelevanceEvaluator({query: {document: 1}}, {"recip_rank"}).evaluate({query: RUN[query]})
            assert found[query]["recip_rank"] == pytest.approx(1 / rank)
    assert [path.name for path in file.parent.iterdir()] == ["toy.bm25.trec"]


@pytest.mark.parametrize("kind", ["trec", "trec.gz", "json"])
def test_what_is_read_is_what_was_written(kind, chosen, tmp_path):
    file = tmp_path / f"run.{kind}"
    write_run(tmp_path / "run.trec", RUN, "tag")
    if kind == "trec.gz":
        file.write_bytes(gzip.compress((tmp_path / "run.trec").read_bytes()))
    elif kind == "json":
        file.write_text(json.dumps(RUN))
    assert read_run(file, tmp_path, chosen, "trec") == RUN
    assert ranking_per_query(QRELS, read_run(file, tmp_path, chosen, "trec")) == ranking_per_query(QRELS, RUN)


def test_scores_that_single_precision_does_not_tell_apart_are_read_as_they_were_written(chosen, tmp_path):
    """trec_eval ranks such documents by their ids, whatever the last digits say."""
    scores = {"d01": -79.10521619021893, "d02": -79.10521851480007, "d03": -80.0}
    write_run(tmp_path / "run.trec", {"q0": scores}, "ce")
    assert [line.split()[2] for line in (tmp_path / "run.trec").read_text().splitlines()] == ["d02", "d01", "d03"]
    assert read_run(tmp_path / "run.trec", tmp_path, chosen, "trec") == {"q0": scores}


def test_a_missing_file_is_named_with_its_key(chosen, tmp_path):
    with pytest.raises(InputError, match=r"first=nowhere: no such file; check the path"):
        read_run(tmp_path.__class__("nowhere"), tmp_path, chosen, "first")


@pytest.mark.parametrize("run", [{"a query": {"d": 1.0}}, {"q": {"a document": 1.0}}, {"q": {"": 1.0}}])
def test_an_id_that_the_format_cannot_hold_is_refused_and_nothing_is_written(run, tmp_path):
    with pytest.raises(InputError, match=r"run: id '.*' is empty or holds a blank.*rename it, or write no TREC run"):
        write_run(tmp_path / "run", run, "tag")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "message"), [
    (b'{"a": 1,\n "b": }', r"a\.json, line 2: not JSON \(Expecting value at column 7\); write it again"),
    (b'{"a": 1,\n "b": "\xff"}', r"a\.json, line 2: not UTF-8 at column 8"),
    (b'{"a": 1, "a": 2}', r"a\.json: not JSON \(the key 'a' is there twice\)"),
    (b"[" * 100_000, r"a\.json: not JSON \(brackets too deep\)"),
    (b"\xff\xfe{", r"a\.json, line 1: begins with the mark of UTF-16"),
])  # fmt: skip
def test_a_whole_file_that_is_no_json_is_refused_with_its_line(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json_file(tmp_path / "a.json", "write it again")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}\r\n')
    assert read_json_file(tmp_path / "a.json") == {"a": [1]}
