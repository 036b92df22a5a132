"""Systems side by side, BEIR's rules, and the script: against pytrec_eval, numbers worked by hand and the parts called
alone.
"""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import torch
import transformers

import sgpt.retrieval.dense
from sgpt.data.formats.beir import read_retrieval
from sgpt.data.formats.scored_pairs import read_pairs
from sgpt.data.formats.trec import ranked
from sgpt.data.test_sets.beir_sets import (
    AVERAGES,
    BEIR_SETS,
    FORUMS,
    BeirFolder,
    averages,
    find_beir_folders,
    read_beir_folder,
)
from sgpt.data.test_sets.own_pairs import read_own_pairs
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation import compare, systems
from sgpt.evaluation.evaluate import EvaluationConfig, check_there, read_sets
from sgpt.evaluation.systems import EvaluateConfig, find_sets, scored_splits
from sgpt.evaluation.table import beir_averages, systems_table, with_cqadupstack
from sgpt.retrieval.bm25 import bm25_run
from sgpt.retrieval.dense import retrieve, search
from sgpt.retrieval.fusion import interpolated, reciprocal_rank_fusion
from sgpt.retrieval.metrics import ranking, ranking_per_query
from sgpt.runtime.errors import InputError
from tests.conftest import SIZES, byte_level
from tests.starts import forks

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
VERBS = ["parse", "open", "read", "write", "sort", "join", "count", "split", "find", "match"]
NOUNS = ["date", "file", "list", "path", "text"]
PAIRS = [(f"{verb}-{noun}", verb, noun) for verb in VERBS for noun in NOUNS]


def beir(
    folder: Path, corpus: dict[str, str], queries: dict[str, str], qrels: dict[str, dict[str, dict[str, int]]]
) -> Path:
    """qrels: split -> query -> document -> relevance."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        )
    for split, judged in qrels.items():
        lines = [
            f"{query}\t{document}\t{score}" for query, documents in judged.items() for document,
            score in documents.items()
        ]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Fifty documents; thirty queries of test, twenty of dev, some with a word that no document has."""
    corpus = {f"d-{name}": f"how to {verb} every {noun} of the folder" for name, verb, noun in PAIRS}
    queries = {
        f"q-{name}": f"{verb} a {noun}" if place % 4 else f"unheard {noun}" for place,
        (name, verb, noun) in enumerate(PAIRS)
    }
    judged = {f"q-{name}": {f"d-{name}": 2, f"d-{VERBS[0]}-{noun}": 1} for name, _, noun in PAIRS}
    dev = list(judged)[30:]
    splits = {
        "test": {query: judged[query] for query in judged if query not in dev},
        "dev": {query: judged[query] for query in dev}
    }
    return beir(tmp_path_factory.mktemp("sets") / "toy", corpus, queries, splits)


def shared_words(chosen, run, depth):
    """A scorer of some worth, of our interface: the words that query and document share, the shorter document first."""
    def score(query: str, document: str) -> float:
        words = set(chosen.queries[query].split()) & set(chosen.corpus[document].split())
        return len(words) - len(chosen.corpus[document]) / 1000
    return {
        query: {document: score(query, document) for document in ranked(documents)[:depth]} for query,
        documents in run.items()
    }


@pytest.fixture(scope="module")
def compared(toy, tiny_encoder):
    encoder, chosen = tiny_encoder(), read_retrieval(toy, "test")
    dev, reason = compare.tuning_set(BeirFolder("toy", toy, "test", None), chosen, "dev")
    assert reason == ""
    systems = compare.run_systems(encoder, chosen, dev, rerank=shared_words, depth=20)
    return encoder, chosen, dev, systems, compare.system_metrics(chosen, systems, depth=20)


# --- systems ---


def test_the_systems_are_the_parts_called_alone(compared):
    encoder, chosen, _, systems, _ = compared
    assert list(systems) == ["bm25", "model", "bm25_reranked", "model_reranked", "reciprocal_rank", "interpolated"]
    assert systems["bm25"].run == bm25_run(chosen)
    assert systems["model"].run == retrieve(encoder, chosen)
    assert systems["reciprocal_rank"].run == reciprocal_rank_fusion([bm25_run(chosen), retrieve(encoder, chosen)], 100)
    for name, first in (("bm25_reranked", "bm25"), ("model_reranked", "model")):
        expected = shared_words(chosen, systems[first].run, 20)
        for query, documents in systems[name].run.items():
            assert ranked(documents)[: len(expected[query])] == ranked(expected[query])
            assert set(documents) == set(systems[first].run[query])


def test_the_weight_is_the_best_on_dev_and_knows_nothing_of_test(compared):
    encoder, chosen, dev, systems, _ = compared
    left, right = bm25_run(dev), retrieve(encoder, dev)

    def mean(weight: float) -> float:
        evaluator = pytrec_eval.RelevanceEvaluator(
            {query: dict(documents) for query, documents in dev.qrels.items()}, {"ndcg_cut.10"}
        )
        rows = evaluator.evaluate(
            {query: dict(documents) for query, documents in interpolated(left, right, weight, 100).items()}
        )
        return sum(row["ndcg_cut_10"] for row in rows.values()) / len(dev.qrels)

    scores = {step / 20: mean(step / 20) for step in range(21)}
    assert scores[systems["interpolated"].weight] == pytest.approx(max(scores.values()))
    judged_otherwise = replace(chosen, qrels={query: {"d-match-text": 1} for query in chosen.qrels})
    other = compare.run_systems(encoder, judged_otherwise, dev)
    assert other["interpolated"].weight == systems["interpolated"].weight
    assert set(dev.queries).isdisjoint(chosen.queries)


def test_a_folder_of_its_own_tunes_the_weight_over_its_own_documents(compared, tmp_path):
    encoder, chosen, *_ = compared
    texts = {f"e-{name}": f"{verb} the {noun}, and nothing else" for name, verb, noun in PAIRS[::3]}
    queries = {f"p-{name}": f"{verb} {noun}s" for name, verb, noun in PAIRS[::3]}
    judged = {f"p-{name}": {f"e-{name}": 1} for name, *_ in PAIRS[::3]}
    folder = beir(tmp_path / "other", texts, queries, {"dev": judged})
    place = BeirFolder("toy", tmp_path / "toy", "dev", None)  # which has one split, of the same name
    dev, reason = compare.tuning_set(place, chosen, "dev", str(folder))
    assert reason == ""
    run = compare.run_systems(encoder, chosen, dev)["interpolated"]
    left, right = bm25_run(dev), retrieve(encoder, dev)
    scores = {step / 20: ranking(judged, interpolated(left, right, step / 20, 100))["ndcg@10"] for step in range(21)}
    assert scores[run.weight] == pytest.approx(max(scores.values()))
    assert run.run == interpolated(bm25_run(chosen), retrieve(encoder, chosen), run.weight, 100)


def test_a_folder_to_tune_on_is_there_and_not_the_one_that_is_scored(toy, compared, tmp_path):
    _, chosen, *_ = compared
    for split, reason in (
        ("test", "on split 'test', which is what is scored"), ("train", "dev, test; set dev_split=dev$"),
    ):  # fmt: skip
        place = f"{toy}/../{toy.name}"
        dev, said = compare.tuning_set(BeirFolder("toy", toy, "test", None), chosen, split, place)
        assert dev is None
        assert re.search(reason, said), said
    other = BeirFolder("toy", tmp_path, "test", None)
    assert compare.tuning_set(other, chosen, "train", str(toy))[1].endswith("set dev_split=dev or dev_split=test")
    with pytest.raises(InputError, match=r"^dev_folder=none: no such folder; check the path$"):
        systems.check_request(EvaluateConfig(model="base", retrieval=["toy"], dev_folder="none"))


def test_of_equal_weights_the_one_nearest_to_one_half_is_taken():
    run = {"q": {"a": 2.0, "b": 1.0}}
    assert compare.best_weight({"q": {"a": 1}}, run, run, 10) == 0.5


def test_without_a_split_to_tune_on_the_fusion_by_scores_is_left_out_and_the_reason_is_given(toy, compared, tmp_path):
    encoder, chosen, *_ = compared
    alone = beir(tmp_path / "alone", {"d": "a text"}, {"q": "a text"}, {"test": {"q": {"d": 1}}})
    assert compare.tuning_set(BeirFolder("alone", alone, "test", None), chosen, "dev")[1].endswith(
        "alone has: test; no other split is there; set dev_folder=<a BEIR folder of other queries>"
    )
    for split, reason in (
        ("train", r"on split 'train', and .*toy has: dev, test; set dev_split=dev$"),
        ("test", r"on split 'test', which is what is scored")
    ):
        dev, said = compare.tuning_set(BeirFolder("toy", toy, "test", None), chosen, split)
        assert dev is None
        assert re.search(reason, said), said
    assert list(compare.run_systems(encoder, chosen)) == ["bm25", "model", "reciprocal_rank"]
    assert list(compare.run_systems(encoder, chosen, fuse=False)) == ["bm25", "model"]
    assert list(compare.run_systems(encoder, chosen, bm25=False, rerank=shared_words)) == ["model", "model_reranked"]


# --- what is said of them ---


def test_the_numbers_are_those_of_the_runs(compared):
    _, chosen, _, systems, found = compared
    for name, numbers in found.items():
        assert numbers["metrics"] == ranking(chosen.qrels, systems[name].run)
        assert numbers["cost"]["queries_per_second"] == pytest.approx(len(chosen.queries) / systems[name].seconds)
    assert found["model"]["cost"][
        "bytes_per_document"
    ] == found["model_reranked"]["cost"]["bytes_per_document"] == 32 * 4
    assert "bytes_per_document" not in found["reciprocal_rank"]["cost"]
    assert systems["model_reranked"].seconds > systems["model"].seconds


def test_ten_reranked_documents_come_from_the_same_scores(compared):
    """Worked again from the first stage's ten best, by pytrec_eval: what stands behind them cannot enter the first ten.
    """
    _, chosen, _, systems, found = compared
    for name, first in (("bm25_reranked", "bm25"), ("model_reranked", "model")):
        ten = {
            query: {document: systems[name].scores[query][document] for document in ranked(run)[:10]} for query,
            run in systems[first].run.items()
        }
        evaluator = pytrec_eval.RelevanceEvaluator(
            {query: dict(documents) for query, documents in chosen.qrels.items()}, {"ndcg_cut.10"}
        )
        rows = evaluator.evaluate({query: documents for query, documents in ten.items() if documents})
        expected = sum(row["ndcg_cut_10"] for row in rows.values()) / len(chosen.qrels)
        assert found[name]["reranking"]["ndcg@10_reranked_top_10"] == pytest.approx(expected)


def test_a_depth_below_ten_is_called_by_its_number(compared):
    encoder, chosen, *_ = compared
    found = compare.system_metrics(chosen, compare.run_systems(encoder, chosen, rerank=shared_words, depth=4), depth=4)
    assert [
        list(found[name]["reranking"]) for name in ("bm25", "bm25_reranked")
    ] == [["ndcg@10_perfect_top_4"], ["ndcg@10_reranked_top_4"]]
    assert found["bm25_reranked"]["reranking"]["ndcg@10_reranked_top_4"] == found["bm25_reranked"]["metrics"]["ndcg@10"]


def test_no_reranking_passes_the_bound_of_its_first_stage(compared):
    *_, found = compared
    for name, first in (("bm25_reranked", "bm25"), ("model_reranked", "model")):
        bounds = found[first]["reranking"]
        assert found[name]["metrics"]["ndcg@10"] <= bounds["ndcg@10_perfect_top_20"] + 1e-9
        assert found[name]["reranking"]["ndcg@10_reranked_top_10"] <= bounds["ndcg@10_perfect_top_10"] + 1e-9
        assert bounds["ndcg@10_perfect_top_10"] <= bounds["ndcg@10_perfect_top_20"]


def test_differences_stand_against_bm25_and_the_first_stage(compared):
    *_, found = compared
    assert {name: set(numbers["differences"]) for name, numbers in found.items()} == {
        "bm25": set(), "model": {"bm25"}, "bm25_reranked": {"bm25"}, "model_reranked": {"bm25", "model"},
        "reciprocal_rank": {"bm25"}, "interpolated": {"bm25"},
    }  # fmt: skip
    for numbers in found.values():
        for other, interval in numbers["differences"].items():
            assert interval["mean"] == pytest.approx(numbers["metrics"]["ndcg@10"] - found[other]["metrics"]["ndcg@10"])
            assert interval["low"] <= interval["mean"] <= interval["high"]


def test_the_table_has_a_column_for_each_system_and_a_dash_for_what_is_not_there(compared):
    *_, found = compared
    made = systems_table({"toy": found, "stsb": {"model": {"metrics": {"spearman_cosine": 0.5}}}}, "title")
    assert [column.header for column in made.columns] == ["set", "metric", *compare.SYSTEMS.values()]
    rows = dict(
        zip(made.columns[1].cells, zip(*(list(column.cells) for column in made.columns[2:]), strict=True), strict=True)
    )
    assert rows["ndcg@10"] == tuple(f"{100 * found[system]['metrics']['ndcg@10']:.2f}" for system in compare.SYSTEMS)
    assert rows["spearman_cosine"] == ("–", "50.00", "–", "–", "–", "–")
    assert rows["bytes per document"][1] == "128"
    assert re.fullmatch(r"[+-]\d+\.\d\d \([+-]\d+\.\d\d … [+-]\d+\.\d\d\)", rows["ndcg@10 − first stage's"][3])


def test_runs_are_files_that_pytrec_eval_scores_alike(compared, tmp_path):
    _, chosen, _, systems, _ = compared
    compare.write_runs(tmp_path, replace(chosen, name="cqadupstack/android"), systems)
    assert {file.name for file in tmp_path.iterdir()} == {f"cqadupstack_android.{system}.trec" for system in systems}
    for name, system in systems.items():
        with (tmp_path / f"cqadupstack_android.{name}.trec").open() as lines:
            assert ranking_per_query(
                chosen.qrels, pytrec_eval.parse_run(lines)
            ) == ranking_per_query(chosen.qrels, system.run)


# --- BEIR's rules ---


def test_a_full_disk_is_told_of_before_anything_is_encoded(toy, tiny_encoder, monkeypatch):
    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sgpt.retrieval.dense, "IN_MEMORY", 0)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        InputError, match=r"TMPDIR can name: no room for 0\.00 GB of embeddings \(No space left on device\)"
    ):
        retrieve(tiny_encoder("gpt_neo"), read_retrieval(toy, "test"))


def test_many_queries_are_searched_for_some_at_a_time(monkeypatch):
    queries, documents = (
        torch.randn(number, 16, generator=torch.Generator().manual_seed(number)) for number in (23, 500)
    )
    expected, rows = (queries @ documents.T).topk(20, dim=1)
    monkeypatch.setattr(sgpt.retrieval.dense, "QUERIES_AT_A_TIME", 5)
    found = search(queries, documents, 20, chunk=64)
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[1], rows)
    assert search(queries[:0], documents, 20)[0].shape == (0, 20)


def test_embeddings_in_a_file_give_the_same_results(toy, tiny_encoder, monkeypatch):
    chosen, encoder = read_retrieval(toy, "test"), tiny_encoder("gpt_neo")
    in_memory = retrieve(encoder, chosen)
    monkeypatch.setattr(sgpt.retrieval.dense, "IN_MEMORY", 0)
    assert retrieve(encoder, chosen) == in_memory


@pytest.fixture
def beir_root(tmp_path) -> Path:
    """ArguAna and another set, in which queries are documents under one id; MS MARCO with two splits; CQADupStack."""
    texts = {
        f"t{n}": f"argument {word} stands against {other}" for n,
        (word, other) in enumerate([("one", "two"), ("two", "three"), ("three", "one")])
    }
    qrels = {"t0": {"t1": 1}, "t1": {"t2": 1}}
    for name in ("arguana", "other"):
        beir(tmp_path / name, texts, texts, {"test": qrels})
    beir(
        tmp_path / "msmarco", {"d": "a text", "e": "another"}, {"q": "a text", "r": "other"},
        {"test": {"q": {"d": 1}}, "dev": {"r": {"e": 1}}}
    )
    for forum in FORUMS:
        beir(tmp_path / "cqadupstack" / forum, {"d": f"of {forum}"}, {"q": forum}, {"test": {"q": {"d": 1}}})
    return tmp_path


def test_the_query_itself_is_no_result_where_beir_says_so(beir_root, tiny_encoder):
    encoder = tiny_encoder()
    for name, own in (("arguana", False), ("other", True)):
        [place] = find_beir_folders([str(beir_root / name)], None, beir_root)
        chosen = read_beir_folder(place)
        for run in (bm25_run(chosen, 2), retrieve(encoder, chosen, 2)):
            assert {query in documents for query, documents in run.items()} == {own}, name
            assert {len(documents) for documents in run.values()} == {2}


def test_a_limit_keeps_as_many_other_documents(tmp_path):
    corpus = {f"d{n}": f"text {n}" for n in range(9)}  # the judged ones first, as often
    folder = beir(tmp_path / "toy", corpus, {"q": "one", "r": "two", "s": "three"},
                  {"test": {"q": {"d0": 1, "d1": 1}, "r": {"d2": 1}, "s": {"d8": 1}}})  # fmt: skip
    [limited] = read_sets(EvaluationConfig([str(folder)], limit=2)).retrieval
    assert list(limited.queries) == ["q", "r"]
    assert list(limited.corpus) == [f"d{n}" for n in range(6)]


def test_a_limit_that_leaves_nothing_names_the_key_it_was_set_by(tmp_path):
    judged = {"q": {"d": 0}, "r": {"d": 1}}
    folder = beir(tmp_path / "toy", {"d": "a text"}, {"q": "text", "r": "a"}, {"test": judged})
    with pytest.raises(InputError, match=r"^dev\.limit=1: the first queries of toy have no relevant document"):
        read_sets(EvaluationConfig([str(folder)], limit=1), "dev")


def test_msmarco_counts_on_dev_unless_a_split_is_named(beir_root):
    assert [place.split for place in find_beir_folders(["msmarco", "arguana"], None, beir_root)] == ["dev", "test"]
    assert [place.split for place in find_beir_folders(["msmarco"], "test", beir_root)] == ["test"]
    # any folder of the root
    assert [place.folder for place in find_beir_folders(["other"], None, beir_root)] == [beir_root / "other"]
    [chosen] = read_sets(EvaluationConfig([str(beir_root / "msmarco")], split=None)).retrieval
    assert list(chosen.qrels) == ["r"]


def test_documents_with_an_empty_text_are_no_candidates_in_a_set_of_beir(tmp_path):
    for name, kept in (("trec-covid", ["d"]), ("mine", ["d", "e"])):
        folder = beir(tmp_path / name, {"d": "a text", "e": ""}, {"q": "text"}, {"test": {"q": {"d": 1, "e": 1}}})
        [place] = find_beir_folders([str(folder)], None, tmp_path)
        chosen = read_beir_folder(place)
        assert list(chosen.corpus) == kept
        # a relevant document that cannot be found costs, as in the original
        assert chosen.qrels == {"q": {"d": 1, "e": 1}}


def test_cqadupstack_is_the_mean_of_its_twelve_forums(beir_root):
    there = find_beir_folders(["cqadupstack"], None, beir_root)
    assert [place.name for place in there] == [f"cqadupstack/{forum}" for forum in FORUMS]
    assert read_beir_folder(there[0]).corpus == {"d": "of android"}
    sets = {
        place.name: {"model": {"metrics": {"ndcg@10": number / 100}, "reranking": {}, "cost": {}}} for number,
        place in enumerate(there)
    }
    assert with_cqadupstack(sets)["cqadupstack"]["model"]["metrics"]["ndcg@10"] == pytest.approx(0.055)
    del sets["cqadupstack/tex"]
    assert with_cqadupstack(sets) == sets


def test_the_averages_are_the_papers(beir_root):
    """nDCG@10 of SGPT-BE-5.8B and of BM25, table 4 of the paper: .490 and .428 over 18 sets, .550 and .477 over 11."""
    names = [
        "trec-covid", "bioasq", "nfcorpus", "nq", "hotpotqa", "fiqa", "signal1m", "trec-news", "robust04", "arguana",
        "webis-touche2020",
             "cqadupstack", "quora", "dbpedia-entity", "scidocs", "fever", "climate-fever", "scifact"]  # fmt: skip
    sgpt = [.873, .413, .362, .524, .593, .372, .267, .481, .514, .514, .254, .381, .846, .399, .197, .783, .305, .747]
    bm25 = [.688, .488, .306, .326, .602, .254, .330, .405, .425, .472, .347, .326, .808, .320, .165, .649, .186, .611]
    scores = zip(names, sgpt, bm25, strict=True)
    sets = {
        name: {"model": {"metrics": {"ndcg@10": ours}}, "bm25": {"metrics": {"ndcg@10": theirs}}} for name, ours,
        theirs in scores
    }
    sets["msmarco"] = {"model": {"metrics": {"ndcg@10": 0.399}}}
    found = beir_averages(sets)
    numbers = {
        kind: {system: round(groups["metrics"]["ndcg@10"], 3) for system, groups in systems.items()} for kind,
        systems in found.items()
    }
    assert numbers == {"average": {"bm25": 0.428, "model": 0.490}, "sub_average": {"bm25": 0.477, "model": 0.550}}
    assert {kind: len(names) for kind, names in AVERAGES.items()} == {"average": 18, "sub_average": 11}
    assert len(BEIR_SETS) == 19
    del sets["scidocs"]
    assert beir_averages(sets).keys() == {"sub_average"}
    assert averages({"scifact": {"ndcg@10": 0.5}}) == {}


def test_what_is_not_there_is_refused_with_what_to_do(beir_root):
    cases = {
        "scifactt": r"scifactt: no such folder, none of this name in .*, and no name of a BEIR set; did you mean "
        r"scifact\?",
        "nowhere": r"nowhere: no such folder, none of this name in .*, and no name of a BEIR set; a BEIR folder with "
        r".* or one of msmarco, trec-covid",
        "robust04": r"robust04: not in .*, and its licence allows no public copy; make it as .* then set "
        r"beir_root=<folder that holds robust04/>",
    }
    for entry, message in cases.items():
        with pytest.raises(InputError, match=message):
            find_beir_folders([entry], None, beir_root)
    with pytest.raises(
        InputError, match=r"arguana/qrels/dev\.tsv: no such file; .*arguana has the splits: test; set split="
    ):
        find_beir_folders(["arguana"], "dev", beir_root)
    with pytest.raises(InputError, match=r"two evaluation sets are called 'arguana'"):
        find_beir_folders(["arguana", str(beir_root / "arguana")], None, beir_root)


# --- similarity of pairs by year ---


def test_a_set_that_reading_the_data_writes_need_not_be_there_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("pydocs/pydocs_test", "x/../pydocs/pydocs_test", str(tmp_path / "pydocs" / "pydocs_test")):
        for folder in ("pydocs", str(tmp_path / "pydocs")):
            check_there(EvaluationConfig([given]), made=[folder])
        with pytest.raises(InputError, match="pydocs_test: no such folder"):
            check_there(EvaluationConfig([given]))
    with pytest.raises(InputError, match=r"gone\.tsv: no such file"):
        check_there(EvaluationConfig(sts=["gone.tsv"]))


def test_the_semeval_files_give_a_set_a_year_and_all_sources_of_it_together(tmp_path):
    rows = [{"year": year, "file": file, "part": part, "score": place, "sentence1": f"{file} {place}", "sentence2": "b"}
            for place,
            (year, file, part) in enumerate(
                [(2012, "MSRpar", "test"), (2012, "OnWN", "test"), (2012, "OnWN", "train"), (2013, "FNWN", "test"),
                                                        (2013, "OnWN", "test")])]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_pairs(tmp_path / "pairs.jsonl", "test")
    assert (first.name, first.first, first.scores) == ("STS12", ["MSRpar 0", "OnWN 1"], [0.0, 1.0])
    assert (second.name, second.first) == ("STS13", ["FNWN 3", "OnWN 4"])
    with pytest.raises(InputError, match=r"1 pairs of STS12 in split 'train' with fewer than two different scores"):
        read_pairs(tmp_path / "pairs.jsonl", "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_the_shared_files_have_as_many_pairs_as_mteb():
    """STS13, STS14, STS-B and SICK-R have MTEB's test sets; STS12 lacks the 750 pairs of MSRvid, see SOURCE.md."""
    files = [SHARED / name / "pairs.jsonl.gz" for name in ("sts12_14", "stsb", "sick")]
    counts = {pairs.name: len(pairs.scores) for file in files for pairs in read_pairs(file, "test")}
    assert counts == {"STS12": 3108 - 750, "STS13": 1500, "STS14": 3750, "stsb": 1379, "sick": 4927}


# --- the script ---


def test_keys_of_pairs_are_refused_without_any():
    for keys, said in (
        ({"columns": {"query": "x"}}, r"columns\.query=x of evaluation or dev"),
        ({"labels": ["duplicate"]}, r"labels=\['duplicate'\] of evaluation or dev"),
        ({"positive_score": 3.0}, r"positive_score=3\.0 of evaluation or dev"),
    ):
        with pytest.raises(InputError, match=said + r": is for its `pairs` alone, and none are named"):
            EvaluationConfig(sts=["scored.csv"], **keys)


def test_a_file_without_splits_that_is_taken_for_one_is_said_to_be(tmp_path, caplog):
    (tmp_path / "mine.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,0\n")
    (tmp_path / "pairs.csv").write_text("query,positive\na,b\nc,d\n")
    (tmp_path / "pairs_dev.csv").write_text("query,positive\na,b\nc,d\n")
    with caplog.at_level(logging.INFO):
        for split in ("test", "dev"):
            read_pairs(tmp_path / "mine.csv", split)
            read_own_pairs(tmp_path / "pairs.csv", split)
        read_own_pairs(tmp_path / "pairs_dev.csv", "dev")
    said = [message for message in caplog.messages if "no column split" in message]
    assert said == [
        f"{tmp_path / name}: has no column split, so all of its rows are taken for 'dev'"
        for name in ("mine.csv", "pairs.csv")
    ]


@pytest.mark.parametrize(("options", "message"), [
    ({"depth": 0}, r"depth=0 must be 1 or more"),
    ({"rerank": "gpt"}, r"rerank=gpt has nothing to rank again; set retrieval="),
    ({"sts": ["x"], "runs": "trec"}, r"^runs has no effect without retrieval sets"),
    ({"sts": ["x"], "dev_split": "train"}, r"^dev_split has no effect without retrieval sets"),
    ({"sts": ["x"], "dev_folder": "y"}, r"^dev_folder has no effect without retrieval sets"),
    ({"retrieval": ["x"], "prompt": "A"}, r"^prompt has no effect without rerank=<decoder>"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        EvaluateConfig(**options)


@pytest.fixture(scope="module")
def project(toy, tiny_base, tmp_path_factory) -> Path:
    """A bi-encoder's base, a decoder with its head, a BERT, and the set, in one folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = byte_level()
    decoder = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, attention_types=[[["global", "local"], 1]], **SIZES))
    decoder.save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    for name, place in (("base", tiny_base("gpt_neo")), ("bert", tiny_base("bert")), ("toy", toy)):
        (folder / name).symlink_to(place)
    pairs = [
        {"sentence1": f"{verb} a {noun}", "sentence2": f"how to {verb}", "score": place} for place,
        (_, verb, noun) in enumerate(PAIRS)
    ]
    (folder / "similar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def test_the_script_gives_one_table_of_all_systems_their_runs_and_both_files(project):
    ended = forks(project, columns=200)(
        "evaluate", "model=base", "retrieval=[toy]", "sts=[similar.jsonl]", "rerank=decoder", "prompt=G", "depth=12",
        "runs=out/runs",
                    "output=out/model.json", "systems_output=out/systems.json")  # fmt: skip
    assert ended.code == 0, ended.err
    model, systems = (json.loads((project / "out" / f"{name}.json").read_text()) for name in ("model", "systems"))
    assert {name: set(metrics) for name, metrics in model.items()} == {  # as before there were other systems
        "toy": {"ndcg@10", "map@100", "recall@100", "mrr@10"}, "similar": {"spearman_cosine", "pearson_cosine"}}
    assert list(systems["sets"]["toy"]) == list(compare.SYSTEMS)
    assert systems["sets"]["toy"]["model"]["metrics"] == model["toy"]
    chosen = read_retrieval(project / "toy", "test")
    for name, numbers in systems["sets"]["toy"].items():
        with (project / "out" / "runs" / f"toy.{name}.trec").open() as lines:
            assert ranking(chosen.qrels, pytrec_eval.parse_run(lines)) == pytest.approx(numbers["metrics"])
    assert re.search(
        r"set .* BM25 .* bi-encoder .* BM25→CE .* bi-encoder→CE .* fused by rank .* fused by score", ended.out
    )
    assert ended.out.count("┏") == 1


def test_the_script_opens_the_model_in_the_dtype_that_is_asked_for(project):
    pairs = [json.loads(line) for line in (project / "similar.jsonl").read_text().splitlines()]
    pearson = {}
    for dtype in ("float32", "bfloat16"):
        ended = forks(project)(
            "evaluate", "model=base", "sts=[similar.jsonl]", f"dtype={dtype}", f"output={dtype}.json"
        )
        assert ended.code == 0, ended.err
        pearson[dtype] = json.loads((project / f"{dtype}.json").read_text())["similar"]["pearson_cosine"]
        encoder = Encoder.from_pretrained(project / "base", dtype=dtype)
        left, right = (encoder.encode([row[key] for row in pairs], "query") for key in ("sentence1", "sentence2"))
        cosines = (left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))
        expected = scipy.stats.pearsonr(cosines.astype(np.float64), [row["score"] for row in pairs]).statistic
        assert pearson[dtype] == pytest.approx(expected, abs=1e-5)
    assert pearson["bfloat16"] != pearson["float32"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["model=base", "dtype=half", "retrieval=[toy]"], r"dtype='half' is unknown; choose float32, bfloat16"),
    (["model=base", "retrieval=[toy]", "rerank=bert"], r"bert"),
    (["model=base", "retrieval=[toy]", "rerank=decoder", "prompt=Z"], r"prompt"),
    (["model=base", "retrieval=[toy,./toy]"], r"two evaluation sets are called 'toy'"),
    (
        ["model=base", "retrieval=[toy]", "split=train"],
        r"toy/qrels/train\.tsv: no such file; toy has the splits: dev, test"
    ),
    (["model=base", "useb=toy"], r"useb=toy: holds none of askubuntu, cqadupstack, twitterpara, scidocs"),
    (["model=base", "retrieval=[toy]", "output=toy"], r"output=toy is a folder; name a file in it"),
    (
        ["model=base", "retrieval=[toy]", "systems_output=toy/corpus.jsonl/s.json"],
        r"toy/corpus\.jsonl/s\.json cannot be written"
    ),
    (["model=base"], r"set model=<folder or hub id> and retrieval="),
])  # fmt: skip
def test_the_script_refuses_in_one_sentence(arguments, message, project):
    ended = forks(project)("evaluate", *arguments)
    assert (ended.code, ended.out) == (2, ""), ended.err
    *log, error = ended.err.splitlines()
    assert re.match(f"error: .*{message}", error)
    assert not [line for line in log if "error" in line or "Traceback" in line]


@pytest.mark.parametrize(("names", "split", "title"), [
    (["toy"], None, "test"), (["msmarco"], None, "dev of msmarco"), (["toy", "msmarco"], None, "test, dev of msmarco"),
    (["toy", "msmarco"], "dev", "dev"),
])  # fmt: skip
def test_the_table_says_which_splits_were_scored(names, split, title, tmp_path):
    for name in names:
        beir(tmp_path / name, {"d": "text"}, {"q": "text"}, {"test": {"q": {"d": 1}}, "dev": {"q": {"d": 1}}})
    config = EvaluateConfig(model="base", retrieval=[str(tmp_path / name) for name in names], split=split)
    assert scored_splits(find_sets(config), config) == title


def test_a_broken_corpus_is_refused_before_any_set_is_scored_and_large_ones_are_read_twice(tmp_path, monkeypatch):
    for name in ("one", "two"):
        beir(tmp_path / name, {"d": f"text of {name}"}, {"q": "text"}, {"test": {"q": {"d": 1}}})
    config = EvaluateConfig(model="base", retrieval=[str(tmp_path / "one"), str(tmp_path / "two")])
    folders, reasons = find_sets(config).retrieval, []
    for kept in (systems.KEPT_CHARACTERS, 0):
        monkeypatch.setattr(systems, "KEPT_CHARACTERS", kept)
        texts = [tuned.dataset.corpus["d"] for _, tuned in systems.read_retrieval_sets(folders, config, reasons.append)]
        assert texts == ["text of one", "text of two"]
    assert len(reasons) == 4  # one a set, each time before anything is scored: there is no split to tune on
    beir(tmp_path / "dev", {"e": "text of dev"}, {"q": "another text"}, {"dev": {"q": {"e": 1}}})
    beside = replace(config, dev_folder=str(tmp_path / "dev"))
    of_dev = [tuned.dev.corpus for _, tuned in systems.read_retrieval_sets(folders, beside, reasons.append)]
    assert (of_dev, len(reasons)) == ([{"e": "text of dev"}] * 2, 4)
    with (tmp_path / "two" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "a b", "text": ""}\n')
    with pytest.raises(InputError, match=r"out/two\.model\.trec: id 'a b' is empty or holds a blank, and a TREC run"):
        systems.read_retrieval_sets(folders, replace(config, runs="out"), reasons.append)
    with (tmp_path / "two" / "corpus.jsonl").open("a") as corpus:
        corpus.write("{]\n")
    with pytest.raises(InputError, match=r"two/corpus\.jsonl, line 3: not JSON"):
        systems.read_retrieval_sets(folders, config, reasons.append)
