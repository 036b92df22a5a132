"""Runs next to each other: what differs, by how much and how surely."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import bootstrap

from sgpt.evaluation.runs import CompareConfig, comparison_table, read_runs, write_comparison
from sgpt.runtime.errors import InputError

QUERIES = 40


def make_run(folder: Path, rate: float, gain: float, hash_of_set: str = "aa") -> Path:
    folder.mkdir()
    scores = np.random.default_rng(0).random(QUERIES) * 0.5 + gain * np.arange(QUERIES) / QUERIES
    log = [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 4, "dev": {"d": {"mrr@10": 0.5}}}]
    files = {
        "config.yaml": json.dumps({"name": folder.name, "optim": {"learning_rate": rate}, "note": "<b>"}),  # YAML too
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in log),
        "results.json": json.dumps({"after": {
            "toy": {"ndcg@10": scores.mean(), "mrr@10": 0.25 + gain}, "sts": {"spearman_cosine": 0.5 - gain}
        }}),
        "analysis.json": json.dumps({"queries": {"after": {"toy": {f"q{n}": x for n, x in enumerate(scores)}}}}),
        "manifest.json": json.dumps({
            "inputs": {"test set toy": hash_of_set}, "seconds": 90, "parameters": {"trained": 1234, "total": 9999},
            "environment": {"versions": {"torch": "2.13"}},
        }),
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def runs(tmp_path) -> list[str]:
    return [str(make_run(tmp_path / name, rate, gain)) for name, rate, gain in (("a", 0.1, 0.0), ("b & c", 0.2, 0.1))]


def table_of(runs: list[str]) -> dict[str, list[str]]:
    console = Console(width=250, record=True)
    console.print(comparison_table(read_runs(CompareConfig(runs))))
    rows = [line.strip("│").split("│") for line in console.export_text().splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_sets_of_one_name_that_are_not_the_same_are_not_compared_and_it_is_said(tmp_path):
    runs = [str(make_run(tmp_path / name, 0.1, 0.0, hash_of_set)) for name, hash_of_set in (("a", "aa"), ("b", "bb"))]
    table = table_of(runs)
    first, second = table["toy · nDCG@10"]
    assert first == second  # without a difference in brackets
    assert table["inputs.test set toy"] == ["aa", "bb"]


def test_differences_have_the_interval_of_a_paired_bootstrap_where_queries_were_scored(runs):
    table = table_of(runs)
    gains = 0.1 * np.arange(QUERIES) / QUERIES  # every query of b next to the same of a
    expected = bootstrap((gains,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    low, high = expected.confidence_interval
    first, second = table["toy · nDCG@10"]
    shown = [float(number) for number in re.findall(r"[\d.]+", second)]
    # other resamples: the ends of the interval differ by a tenth of its width
    assert shown == pytest.approx([float(first) + gains.mean(), gains.mean(), low, high], abs=1e-3)
    assert shown[2] < shown[1] < shown[3]
    assert table["toy · MRR@10"] == ["0.2500", "0.3500 (+0.1000)"]  # of which no scores of queries are kept
    assert table["sts · Spearman"] == ["0.5000", "0.4000 (−0.1000)"]
    assert table["optimizer steps"] == ["4", "4"]
    assert table["minutes of training"] == ["1.5", "1.5"]


def test_only_what_differs_in_the_configuration_is_shown(runs):
    table = table_of(runs)
    assert table["optim.learning_rate"] == ["0.1", "0.2"]
    assert not {"name", "note", "environment.versions.torch"} & table.keys()


def test_no_difference_is_told_between_two_versions_of_a_set(runs, tmp_path):
    other = str(make_run(tmp_path / "other", 0.1, 0.1, hash_of_set="bb"))
    assert re.fullmatch(r"0\.\d{4}", table_of([runs[0], other])["toy · nDCG@10"][1])


def test_the_page_overlays_the_curves_and_loads_nothing(runs, tmp_path):
    write_comparison(read_runs(CompareConfig(runs)), tmp_path / "pages" / "compare.html")
    page = (tmp_path / "pages" / "compare.html").read_text()
    for title in ("Loss", "MRR@10 on d", "Results", "What differs in their configuration"):
        assert title in page
    [loss] = re.findall(r"aria-label=\"Loss\">(.*?)</svg>", page, re.DOTALL)
    assert "var(--blue)" in loss
    assert "var(--amber)" in loss
    assert "b &amp; c" in page
    assert "<b>" not in page.split("</header>")[1].split("<figcaption>")[0]
    assert "<script" not in page


def test_runs_that_train_are_compared_and_a_run_past_the_colours_is_dashed(runs, tmp_path):
    at_work = [make_run(tmp_path / name, 0.1, 0) for name in ("starts", "writes", "c", "d", "e")]
    for folder in at_work[:2]:
        (folder / "results.json").unlink()
    (at_work[0] / "metrics.jsonl").unlink()
    with (at_work[1] / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')  # as another process sees it
    table = table_of([runs[0], *map(str, at_work)])
    assert table["optimizer steps"] == ["4", "0", "4", "4", "4", "4"]
    assert table["toy · nDCG@10"][1:3] == ["–", "–"]
    write_comparison(read_runs(CompareConfig([*runs, *map(str, at_work)])), tmp_path / "many.html")
    page = (tmp_path / "many.html").read_text()
    assert f"{at_work[4]} (dashed)</span>" in page
    assert f"{at_work[3]}</span>" in page
    [loss] = re.findall(r"aria-label=\"Loss\">(.*?)</svg>", page, re.DOTALL)
    assert loss.count("stroke-dasharray: 5.92,2.56") == 1


@pytest.mark.parametrize(("file", "text", "message"), [
    ("results.json", '{"after": {"to', r"results.json, line 1: not JSON .* delete the file and start it again"),
    ("results.json", '{"after": {"toy": 3}}', r"results.json: 'after' is not a table of sets and metrics"),
    ("manifest.json", "[]", r"manifest.json: holds list, expected keys with values"),
    ("analysis.json", "", r"analysis.json, line 1: not JSON .* delete the file"),
    ("config.yaml", "a: [", r"b & c/config.yaml, line 1: not YAML .* put back the file"),
])  # fmt: skip
def test_a_damaged_file_is_refused_by_name(runs, file, text, message):
    (Path(runs[1]) / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_runs(CompareConfig(runs))


def test_what_is_no_run_is_refused_by_name(runs, tmp_path):
    with pytest.raises(InputError, match=r"runs names fewer than two runs"):
        read_runs(CompareConfig(runs[:1]))
    with pytest.raises(InputError, match=f"{tmp_path} is no training run, there is no {tmp_path}/config.yaml"):
        read_runs(CompareConfig([runs[0], str(tmp_path)]))
    with pytest.raises(InputError, match=r"names a run twice"):
        CompareConfig([runs[0], f"{runs[0]}/"])
    with pytest.raises(InputError, match=r"names 13 runs; a page shows at most 12"):
        CompareConfig([str(number) for number in range(13)])
