"""Re-ranked runs: the scores of a plain loop, after kills, by two processes, and from every first stage."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from safetensors.torch import load_file, save_file

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.data.formats.beir import read_retrieval
from sgpt.data.formats.trec import Run, cut, ranked, write_run
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.bm25 import bm25_run
from sgpt.retrieval.dense import retrieve
from sgpt.retrieval.metrics import perfect_rerank, ranking
from sgpt.retrieval.rerank import RerankConfig, rerank, run_rerank
from sgpt.runtime.errors import InputError
from sgpt.runtime.jobs import sole_writer
from sgpt.runtime.provenance import threads
from tests.cross_encoder.test_cross_encoder import as_the_original
from tests.starts import Start, beir, blocks, free_port, start_all


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    chance = random.Random(0)
    words = ["parser", "argument", "help", "option", "value", "name", "type", "action", "group", "error"]
    corpus = {f"d{n}": " ".join(chance.choices(words, k=chance.randint(1, 30))) for n in range(40)}
    queries = {f"q{n}": " ".join(chance.sample(words, k=3)) for n in range(12)}
    qrels = {query: dict.fromkeys(chance.sample(sorted(corpus), 3), 1) for query in queries}
    return beir(tmp_path_factory.mktemp("rerank") / "toy", corpus, queries, qrels)


@pytest.fixture(scope="module")
def started(toy, language_model, tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    (folder / "toy").symlink_to(toy)
    (folder / "base").symlink_to(language_model("gpt_neo"))
    (folder / "encoder").symlink_to(tiny_base("gpt_neo"))
    common = ["data=toy", "split=train", "model=base", "depth=20", "documents_per_block=2", "threads=1"]
    return folder, start_all("rerank", folder, {
        "whole": Start([*common, "output=whole.trec"]),
        "killed": Start([*common, "output=killed.trec"], ("killed.trec.part-0", 4)),
        "not resumed": Start([*common, "output=killed.trec"]),
        "other": Start([*common, "output=killed.trec", "prompt=A", "resume=true"]),
        "killed again": Start([*common, "output=killed.trec", "resume=true"], ("killed.trec.part-0", 9)),
        "resumed": Start([*common, "output=killed.trec", "resume=true"], port=free_port()),
        "by two": Start([*common, "output=two.trec"], port=free_port()),
        "again": Start([*common, "output=whole.trec", "resume=true"]),
        "killed with encoder": Start(
            [*common, "output=e.trec", "first=encoder", "encoder=encoder"], ("e.trec.part-0", 4)
        ),
        "whole with encoder": Start([*common, "output=f.trec", "first=encoder", "encoder=encoder"], port=free_port()),
        "no run": Start([*common, "output=x.trec", "first=run", "trec=nowhere"], port=free_port()),
        "misspelt": Start([*common, "output=x.trec", "promt=A"]),
        "no slot": Start([*common, "output=x.trec", "prompt='what is it'"]),
    })  # fmt: skip


def test_the_run_holds_the_loop_s_scores_of_bm25_s_documents(started, toy, language_model):
    folder, ended = started
    assert ended["whole"].codes == [0], ended["whole"].err
    with open(folder / "whole.trec") as lines:
        run = pytrec_eval.parse_run(lines)
    dataset = read_retrieval(toy, "train")
    first = bm25_run(dataset, 20)
    assert {query: set(documents) for query, documents in run.items()} == {
        query: set(documents) for query, documents in first.items()
    }
    some = random.Random(1).sample([(query, document) for query in run for document in run[query]], 12)
    for query, document in some:
        assert run[query][document] == pytest.approx(
            as_the_original(language_model("gpt_neo"), dataset.queries[query], dataset.corpus[document]), abs=1e-4
        )


@pytest.mark.bitwise
def test_a_killed_run_resumes_where_it_was_and_ends_with_the_same_bytes(started):
    folder, ended = started
    first, second = ended["killed"], ended["killed again"]
    assert (first.codes, second.codes, ended["resumed"].codes) == ([-9], [-9], [0, 0]), ended["resumed"].err
    assert blocks(first, "block") == list(range(len(blocks(first, "block"))))
    assert blocks(second, "block") == list(range(len(blocks(second, "block"))))  # none of them twice
    assert 4 <= len(blocks(first, "block")) < len(blocks(second, "block")) < 20
    assert (folder / "killed.trec").read_bytes() == (folder / "whole.trec").read_bytes()
    assert not [name for name in ended["resumed"].files if "killed.trec.part" in name]
    assert ended["not resumed"].codes == ended["other"].codes == [2]
    refusal = "killed.trec is unfinished, see killed.trec.manifest.json; resume with resume=true"
    assert refusal in ended["not resumed"].err
    assert "was started with another configuration: prompt: G -> A. Resume it with that one" in ended["other"].err


@pytest.mark.bitwise
def test_a_killed_run_does_not_encode_the_corpus_again(started, monkeypatch):
    folder, ended = started
    assert (
        ended["killed with encoder"].codes, ended["whole with encoder"].codes
    ) == ([-9], [0, 0]), ended["whole with encoder"].err
    (folder / "encoder").unlink()
    monkeypatch.chdir(folder)
    with threads(2):  # it was begun with one, which it takes again
        run_rerank(
            RerankConfig(
                "toy", "train", "base", output="e.trec", first="encoder", encoder="encoder", depth=20,
                documents_per_block=2, resume=True
            )
        )
    assert (folder / "e.trec").read_bytes() == (folder / "f.trec").read_bytes()
    assert sorted(file.name for file in folder.glob("e.trec.*")) == ["e.trec.json", "e.trec.manifest.json"]


def test_a_job_is_not_resumed_with_other_threads_weights_or_texts(toy, language_model, tmp_path):
    for name, source in (("toy", toy), ("base", language_model("gpt2"))):
        shutil.copytree(source, tmp_path / name)
    config = RerankConfig(
        str(tmp_path / "toy"), "train", str(tmp_path / "base"), output=str(tmp_path / "o.trec"), depth=3, threads=1
    )
    run_rerank(config)
    manifest = tmp_path / "o.trec.manifest.json"
    stated = json.loads(manifest.read_text())
    # as if it had been killed
    manifest.write_text(json.dumps({key: value for key, value in stated.items() if key != "finished"}))
    (tmp_path / "o.trec").unlink()
    with pytest.raises(
        InputError, match=r"o\.trec was started with other inputs or in another environment: threads 1 -> 2\. "
    ):
        run_rerank(replace(config, resume=True, threads=2))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file(
        {**weights, "transformer.ln_f.bias": weights["transformer.ln_f.bias"] + 1e-6},
        tmp_path / "base" / "model.safetensors", {"format": "pt"}
    )
    corpus = tmp_path / "toy" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("parser", "Parser"))
    changed = r"documents of .*/toy has changed \(hash .*\); model .*/base has changed \(hash "
    with pytest.raises(InputError, match=changed):
        run_rerank(replace(config, resume=True))


def test_a_job_keeps_its_packs_and_one_of_before_is_resumed_with_those_it_has(toy, language_model, tmp_path):
    config = RerankConfig(str(toy), "train", str(language_model("gpt2")), output=str(tmp_path / "o.trec"), depth=3)
    run_rerank(config)
    assert config.tokens_per_pack is None
    manifest, whole = tmp_path / "o.trec.manifest.json", (tmp_path / "o.trec").read_bytes()
    stated = json.loads(manifest.read_text())
    assert stated["config"]["tokens_per_pack"] == 4096  # a processor's, and once the default
    run_rerank(replace(config, resume=True))  # it is finished
    stated["config"]["tokens_per_pack"] = 64
    manifest.write_text(json.dumps({key: value for key, value in stated.items() if key != "finished"}))
    (tmp_path / "o.trec").unlink()
    with pytest.raises(InputError, match=r"another configuration: tokens_per_pack: 64 -> 4096\."):
        run_rerank(replace(config, resume=True, tokens_per_pack=4096))
    run_rerank(replace(config, resume=True))
    assert json.loads(manifest.read_text())["config"]["tokens_per_pack"] == 64
    found, expected = (
        {tuple(line.split()[:3]): float(line.split()[4]) for line in text.splitlines()}
        for text in ((tmp_path / "o.trec").read_text(), whole.decode())
    )
    assert found == pytest.approx(expected, abs=1e-4)


def test_an_output_has_one_writer(toy, language_model, tmp_path):
    config = RerankConfig(str(toy), "train", str(language_model("gpt2")), output=str(tmp_path / "o.trec"), depth=3)
    with sole_writer(tmp_path / "o.trec"), pytest.raises(
        InputError, match=r"o\.trec: another process is writing to it"
    ):
        run_rerank(config)
    assert run_rerank(config)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.bitwise
def test_two_processes_write_the_file_of_one(started):
    folder, ended = started
    assert ended["by two"].codes == [0, 0], ended["by two"].err
    assert (folder / "two.trec").read_bytes() == (folder / "whole.trec").read_bytes()


def with_the_others_behind(scores: Run, first: Run) -> Run:
    """The documents that are not re-ranked stay behind, in their old order. trec_eval reads scores in float32."""
    behind: Run = {}
    for query, documents in first.items():
        places = enumerate(ranked(documents))
        behind[query] = {document: scores[query].get(document, -1000.0 - place) for place, document in places}
    return behind


def test_the_metrics_are_trec_eval_s(started, toy):
    folder, ended = started
    results = json.loads((folder / "whole.trec.json").read_text())["toy"]
    assert list(results) == ["bm25", "bm25 → CE, 10", "bm25 → CE, 20", "perfect, 20"]
    with open(folder / "whole.trec") as lines:
        run = pytrec_eval.parse_run(lines)
    dataset = read_retrieval(toy, "train")
    whole = with_the_others_behind(run, bm25_run(dataset, 100))
    rows = pytrec_eval.RelevanceEvaluator(dataset.qrels, {"ndcg_cut.10", "map_cut.100"}).evaluate(whole).values()
    assert results["bm25 → CE, 20"]["ndcg@10"] == pytest.approx(np.mean([row["ndcg_cut_10"] for row in rows]))
    assert results["bm25 → CE, 20"]["map@100"] == pytest.approx(np.mean([row["map_cut_100"] for row in rows]))
    first = bm25_run(dataset, 20)
    shallow = {
        query: {document: run[query][document] for document in documents} for query, documents in cut(first, 10).items()
    }
    assert {metric: results["bm25 → CE, 10"][metric] for metric in ("ndcg@10", "mrr@10")} == pytest.approx(
        {metric: number for metric, number in ranking(dataset.qrels, shallow).items() if metric.endswith("@10")}
    )
    # the others stay behind the ten
    assert results["bm25 → CE, 10"]["recall@100"] == pytest.approx(results["bm25"]["recall@100"])
    assert results["perfect, 20"]["ndcg@10"] == ranking(
        dataset.qrels, perfect_rerank(dataset.qrels, first, 20)
    )["ndcg@10"] >= results["bm25"]["ndcg@10"]
    assert "bm25 → CE, 20" in ended["again"].out  # a finished run is shown
    assert ended["again"].codes == [0]


def test_the_script_refuses_in_one_sentence(started):
    _, ended = started
    assert ended["misspelt"].codes == ended["no slot"].codes == [2]
    assert "did you mean prompt or prior?" in ended["misspelt"].err
    assert ended["no slot"].err.startswith("error: prompt='what is it' is no name of A, B")
    assert ended["no slot"].err.count("\n") == 1
    assert ended["no run"].codes == [2, 2]
    assert ended["no run"].err == (
        "x.trec: what nowhere ranks for the queries of toy is scored by base, on cpu:0\n"
        "error: trec=nowhere: no such file; check the path\n"
    )


def test_any_first_stage(toy, language_model, tiny_base, tmp_path):
    folder = language_model("gpt2")
    common = {"data": str(toy), "split": "train", "model": str(folder), "depth": 10}
    by_model = run_rerank(
        RerankConfig(**common, output=str(tmp_path / "a.trec"), first="encoder", encoder=str(tiny_base("gpt_neo")))
    )
    assert next(iter(by_model)) == "encoder"
    # all that the encoder ranks: behind the ten that are scored again, the metrics count the others
    ranks = retrieve(Encoder.from_pretrained(tiny_base("gpt_neo")), read_retrieval(toy, "train"), 100)
    write_run(tmp_path / "first.trec", ranks, "encoder")
    by_run = run_rerank(
        RerankConfig(**common, output=str(tmp_path / "b.trec"), first="run", trec=str(tmp_path / "first.trec"))
    )
    assert by_run["run → CE, 10"] == by_model["encoder → CE, 10"]
    assert (tmp_path / "a.trec").read_text() == (tmp_path / "b.trec").read_text()


def test_of_a_run_the_missing_queries_are_counted_and_an_empty_one_is_refused(toy, language_model, tmp_path, caplog):
    common = {"data": str(toy), "split": "train", "model": str(language_model("gpt2")), "depth": 2, "first": "run"}
    query, document = next(
        (query, next(iter(documents))) for query, documents in read_retrieval(toy, "train").qrels.items()
    )
    (tmp_path / "one.trec").write_text(f"{query} Q0 {document} 1 1.0 x\n")
    run_rerank(RerankConfig(**common, output=str(tmp_path / "a.trec"), trec=str(tmp_path / "one.trec")))
    assert re.search(r"one\.trec: \d+ of \d+ queries are not in it and count as without results", caplog.text)
    (tmp_path / "empty.trec").write_text("")
    with pytest.raises(InputError, match=r"empty\.trec: ranks none of the queries of split 'train'"):
        run_rerank(RerankConfig(**common, output=str(tmp_path / "b.trec"), trec=str(tmp_path / "empty.trec")))
    assert not list(tmp_path.glob("b.trec*"))


@pytest.fixture
def quora(tmp_path) -> Path:
    """As in BEIR's Quora each query is a document of its id; one document has no text."""
    texts = {f"t{n}": f"question {word} of the parser" for n, word in enumerate(["one", "two", "three"])}
    return beir(tmp_path / "quora", texts | {"e": ""}, texts, {"t0": {"t1": 1}, "t1": {"t2": 1}})


def test_a_set_of_beir_follows_its_rules(quora, language_model, tmp_path):
    """A query is no candidate of its own, also where somebody's run has it; in such a run a document without a text is
    known.
    """
    (tmp_path / "theirs.json").write_text(
        json.dumps({query: {"t0": 3.0, "t1": 2.0, "t2": 1.0, "e": 0.5} for query in ("t0", "t1")})
    )
    for first, options, expected in (
        ("bm25", {}, {"t0", "t1", "t2"}), ("run", {"trec": str(tmp_path / "theirs.json")}, {"t0", "t1", "t2", "e"})
    ):
        output = tmp_path / f"{first}.trec"
        results = run_rerank(
            RerankConfig(
                str(quora), "train", str(language_model("gpt2")), output=str(output), first=first, depth=5, **options
            )
        )
        # five are fewer than the ten that are reported with a greater depth
        assert list(results) == [first, f"{first} → CE, 5", "perfect, 5"]
        with output.open() as lines:
            assert {
                query: set(documents) for query, documents in pytrec_eval.parse_run(lines).items()
            } == {name: expected - {name} for name in ("t0", "t1")}


def test_a_small_depth_leaves_the_first_stage_its_scores(toy, language_model, tmp_path):
    """BM25 is cut for the re-ranker alone: nDCG@10, MAP@100 and Recall@100 count what stands behind."""
    dataset = read_retrieval(toy, "train")
    first = bm25_run(dataset, 100)
    config = RerankConfig(str(toy), "train", str(language_model("gpt2")), output=str(tmp_path / "o.trec"), depth=2)
    results = run_rerank(config)
    with (tmp_path / "o.trec").open() as lines:
        scores = pytrec_eval.parse_run(lines)
    assert {len(documents) for documents in scores.values()} == {2}
    ours = {"ndcg@10": "ndcg_cut_10", "map@100": "map_cut_100", "recall@100": "recall_100"}
    judge = pytrec_eval.RelevanceEvaluator(dataset.qrels, {"ndcg_cut.10", "map_cut.100", "recall.100"})
    for system, run in (("bm25", first), ("bm25 → CE, 2", with_the_others_behind(scores, first))):
        by_query = judge.evaluate(run).values()
        for name, theirs in ours.items():
            expected = sum(values[theirs] for values in by_query) / len(dataset.qrels)
            assert results[system][name] == pytest.approx(expected, abs=1e-9), (system, name)


@pytest.mark.parametrize(("change", "told"), [
    ({"queries": {"q1": " "}}, r"query id 'q1' of odd is empty: it has no token"),
    ({"queries": {"q1": "parser " * 200}}, r"query 'parser parser .* takes \d+ tokens with the prompt's tail"),
    ({"corpus": {"a b": "a parser"}}, r"out\.trec: id 'a b' is empty or holds a blank"),
])  # fmt: skip
def test_what_cannot_be_scored_or_written_stops_a_run_before_it_begins(change, told, language_model, tmp_path):
    texts = {"corpus": {"d0": "a parser", "d1": "an option"}, "queries": {"q0": "parser", "q1": "option"}}
    texts = {name: rows | change.get(name, {}) for name, rows in texts.items()}
    folder = beir(tmp_path / "odd", texts["corpus"], texts["queries"], {"q0": {"d0": 1}, "q1": {"d1": 1}})
    (tmp_path / "all.json").write_text(
        json.dumps({query: dict.fromkeys(texts["corpus"], 1.0) for query in texts["queries"]})
    )
    options = {
        "output": str(tmp_path / "out.trec"), "first": "run", "trec": str(tmp_path / "all.json"),
        "documents_per_block": 1
    }
    with pytest.raises(InputError, match=told):
        run_rerank(RerankConfig(str(folder), "train", str(language_model("gpt2")), **options))
    assert not list(tmp_path.glob("out.trec*"))


def test_pairs_of_a_block_exist_at_a_time_with_and_without_parts(toy, language_model):
    class Counted(CrossEncoder):
        def score(self, queries, documents, **options):
            counts.append(len(set(documents)))
            return super().score(queries, documents, **options)

    counts: list[int] = []
    dataset, reranker = read_retrieval(toy, "train"), Counted.from_pretrained(language_model("gpt2"))
    first = bm25_run(dataset, 8)
    found = rerank(reranker, dataset, first, documents_per_block=3)
    assert max(counts) == 3
    assert len(counts) > 5
    whole = rerank(reranker, dataset, first)
    assert {query: pytest.approx(scores, abs=1e-4) for query, scores in whole.items()} == found


def test_posteriors_are_probabilities_over_a_query_s_candidates(toy, language_model):
    dataset, reranker = read_retrieval(toy, "train"), CrossEncoder.from_pretrained(language_model("gpt2"))
    first = bm25_run(dataset, 8)
    scores, posteriors = rerank(reranker, dataset, first), rerank(reranker, dataset, first, posterior=True)
    for query, found in posteriors.items():
        assert np.exp(list(found.values())).sum() == pytest.approx(1)
        shift = {round(scores[query][document] - value, 6) for document, value in found.items()}
        assert max(shift) - min(shift) < 1e-5


def test_bad_input_is_refused(toy, language_model, tmp_path):
    dataset, reranker = read_retrieval(toy, "train"), CrossEncoder.from_pretrained(language_model("gpt2"))
    with pytest.raises(InputError, match=r"document id 'nowhere' for query 'q0', and toy has no such document"):
        rerank(reranker, dataset, {"q0": {"nowhere": 1.0}})
    with pytest.raises(InputError, match=r"query id 'nobody', which toy does not have"):
        rerank(reranker, dataset, {"nobody": {"d0": 1.0}})
    (tmp_path / "bad.trec").write_text("q0 Q0 nowhere 1 2.0 x\n")
    with pytest.raises(InputError, match=r"bad\.trec, line 1: document id 'nowhere' is not in"):
        run_rerank(
            RerankConfig(
                str(toy), "train", str(language_model("gpt2")), output=str(tmp_path / "c.trec"), first="run",
                trec=str(tmp_path / "bad.trec")
            )
        )
    for given, told in (
        ({"first": "magic"}, "first='magic' is unknown; choose bm25, encoder or run"),
        ({"first": "run"}, "first=run needs trec="),
                        ({"encoder": "x"}, "first=bm25 does not read encoder=x"),
                        ({"depth": 0}, "depth=0 must be 1 or more")):
        with pytest.raises(InputError, match=told):
            RerankConfig(**given)
