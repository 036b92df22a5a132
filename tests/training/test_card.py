"""The card of an export, made by a run and read as somebody would who has the folder alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from scipy.stats import bootstrap

from sgpt.encoder.onnx import is_here
from sgpt.training.card import _license
from tests.encoder.test_formats import needs_onnx, runs_as_it_says

SECRET = "the merger is announced on Monday"


@pytest.fixture(scope="module")
def run(start, training, tmp_path_factory) -> Path:
    """A run that was evaluated on twelve queries, and exported in every format that a GPT-2 has and that needs no more
    than is installed.
    """
    folder = tmp_path_factory.mktemp("card")
    rows = [{"query": f"query {n}", "positive": f"{SECRET} {n}"} for n in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "toy" / "qrels").mkdir(parents=True)
    for file, kind in (("corpus", "document"), ("queries", "query")):
        texts = ({"_id": f"{kind}{n}", "text": f"{kind} of {n} and {n * n}"} for n in range(12))
        (folder / "toy" / f"{file}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    judged = "".join(f"query{n}\tdocument{n}\t1\n" for n in range(12))
    (folder / "toy" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    data, sets = f"data.path={folder / 'train.jsonl'}", f"evaluation.retrieval=[{folder}/toy]"
    shutil.copyfile(folder / "train.jsonl", folder / "seen.jsonl")
    seen = f"evaluation.pairs=[{folder}/seen.jsonl]"
    ended = start("biencoder", *training(folder), data, sets, seen, "optim.learning_rate=0.05")
    assert ended.code == 0, ended.said
    formats = ["transformers", *(["onnx"] if is_here("onnx") and is_here("onnxruntime") else [])]
    ended = start("export", f"run={folder}/runs/run", f"formats=[{','.join(formats)}]", "push_to_hub=me/model")
    assert ended.code == 0, ended.said
    assert "me/model-transformers: " in ended.said
    assert "nothing was uploaded; dry_run=false uploads it" in ended.said
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def card(run) -> str:
    return (run / "export" / "README.md").read_text()


@pytest.mark.parametrize("form", ["", "-transformers", pytest.param("-onnx", marks=needs_onnx)])
def test_the_lines_of_the_card_print_what_it_says(form, run):
    runs_as_it_says((run / f"export{form}" / "README.md").read_text())


def test_its_front_matter_is_what_the_hub_reads(card):
    stated = yaml.safe_load(card.split("---")[1])
    assert (stated["library_name"], stated["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert {"sgpt", "bitfit"} <= {*stated["tags"]}
    assert "base_model" not in stated  # a folder here, which nobody finds by its name
    scored = {result["dataset"]["name"]: result for result in stated["model-index"][0]["results"]}
    metrics = {name: {metric["type"] for metric in result["metrics"]} for name, result in scored.items()}
    assert scored["toy"]["task"]["type"] == "information-retrieval"
    assert metrics["toy"] >= {"cosine_ndcg@10", "cosine_map@100"}
    assert metrics["scored"] == {"spearman_cosine", "pearson_cosine"}


def test_the_license_is_that_of_a_base_of_the_hub(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert _license(hub("me/base", tmp_path)) == "mit"


def test_counts_and_hashes_are_those_of_the_manifest(run, card):
    manifest = json.loads((run / "manifest.json").read_text())
    [source] = manifest["data"]["sources"]
    assert f"| data | 24 examples, hash `{source['key'][:16]}` |" in card
    base = manifest["contract"]["base"]
    assert f"weights `{manifest['inputs'][f'base model {base}'][:16]}`" in card
    assert f"| learns | bitfit, {manifest['parameters']['trained']:,} numbers in float32" in card


def test_the_difference_has_the_interval_of_a_paired_bootstrap(run, card):
    """By scipy over the scores of each query, which the run has kept."""
    results = json.loads((run / "results.json").read_text())
    queries = json.loads((run / "analysis.json").read_text())["queries"]
    before, after = (queries[when]["toy"] for when in ("before", "after"))
    assert len(after) == 12
    assert sum(after.values()) / 12 == pytest.approx(results["after"]["toy"]["ndcg@10"])
    gains = [after[query] - before[query] for query in sorted(after)]
    interval = bootstrap((gains,), lambda x, axis: x.mean(axis), n_resamples=10_000, method="percentile", rng=0)
    [row] = re.findall(r"\| toy \| nDCG@10 \| (.*) \|", card)
    base, trained, difference, _ = row.split(" | ")
    assert float(base) == pytest.approx(100 * results["before"]["toy"]["ndcg@10"], abs=0.006)
    assert float(trained) == pytest.approx(100 * results["after"]["toy"]["ndcg@10"], abs=0.006)
    mean, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", difference).groups())
    assert mean == pytest.approx(100 * sum(gains) / 12, abs=0.006)
    bounds = interval.confidence_interval
    assert (low, high) == pytest.approx((100 * bounds.low, 100 * bounds.high), abs=1.5)  # other random numbers


def test_no_training_text_is_in_it_unless_asked(run, card, start):
    for file in run.glob("export*/README.md"):
        assert SECRET not in file.read_text()
    ended = start("export", f"run={run}", "examples=2", f"output={run}/shown")
    assert ended.code == 0, ended.said
    shown = (run / "shown" / "README.md").read_text()
    assert shown.count(SECRET) == 2
    assert json.dumps({"query": "query 0", "positive": f"{SECRET} 0"}) in shown


def test_the_card_of_a_run_that_is_not_finished_says_so(run, start, tiny_base):
    """As a run whose scoring was killed, over a base whose own card is no card."""
    unfinished, base_card = run.with_name("unfinished"), tiny_base("gpt2") / "README.md"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("export*"))
    for name, keys in (("manifest", ("steps", "seconds", "processes", "finished", "export")), ("results", ("after",))):
        file = unfinished / f"{name}.json"
        stated = {key: value for key, value in json.loads(file.read_text()).items() if key not in keys}
        file.write_text(json.dumps(stated))
    base_card.write_text("---\nlicense: [mit\n---\n")
    try:
        ended = start("export", f"run={unfinished}")
    finally:
        base_card.unlink()
    assert ended.code == 0, ended.said
    assert "README.md cannot be read" in ended.said
    text = (unfinished / "export" / "README.md").read_text()
    steps = json.loads((run / "manifest.json").read_text())["steps"]
    assert f", {steps} steps of a run that is not finished, seed" in text
    assert "The run was not finished when this was exported, so nothing was measured yet." in text
    assert "No test set was named" not in text


def test_results_of_texts_that_were_trained_on_are_called_so(run, card):
    """On card and report, and not where the hub compares models."""
    said = "seen: 24 of 24 queries and 24 of 24 documents of this test set are in the training data"
    assert f"**Not of new texts alone:** {said}" in card
    assert said in (run / "report.html").read_text()
    results = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert {result["dataset"]["name"] for result in results} == {"scored", "toy"}


def test_a_format_that_is_refused_leaves_nothing_and_the_others_are_made(run, start):
    """GPT-2's adapter is in no form of PEFT."""
    made = run / "export-transformers" / "model.safetensors"
    before = made.stat().st_mtime_ns
    refused = start("export", f"run={run}", "formats=[peft,transformers]")
    assert "in no form of PEFT" in refused.sentence
    assert made.stat().st_mtime_ns > before
    assert not [*run.glob("*export-peft*"), *run.glob(".export*")]
    assert "no position-weighted mean" in start("export", f"run={run}", "formats=[gguf]").sentence
