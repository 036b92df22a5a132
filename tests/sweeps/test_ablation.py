"""What the ablation makes of the sweeps that it starts."""

import argparse
import re
from itertools import product
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from benchmarks.ablation import VALUES, Scored, estimate, report, swept


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_effects_have_the_interval_over_seeds_and_what_failed_is_named():
    factors = {"pooling": ["mean", "max", "cls"], "tuning": ["bitfit"], "markers": ["none"], "queries": ["16", "64"]}
    gains = [1.0, 2.0, 4.0]  # of max, by seed
    runs = []
    for seed, pooling, queries in product(range(3), ("mean", "max"), ("16", "64")):
        score = 50 + seed + (gains[seed] if pooling == "max" else 0) + (10 if queries == "64" else 0)
        values = {"pooling": pooling, "tuning": "bitfit", "markers": "none", "queries": queries}
        if not (seed == 0 and queries == "64"):  # which failed
            runs.append(Scored(values, seed, score))
    rows = rows_of(report(runs, factors, "the command"))
    low, high = ttest_1samp(gains, 0).confidence_interval(0.95)
    [gain] = [row[3] for row in rows if row[1] == "max" and row[0] == "pooling"]
    assert gain == f"{(low + high) / 2:.2f} ± {(high - low) / 2:.2f}"
    assert ["pooling", "cls", "failed", "failed", "failed", ""] in rows
    assert ["cls", "bitfit", "none", "64", "failed"] in rows
    assert [row[3] for row in rows if row[:2] == ["queries", "64"]] == ["10.00 ± 0.00"]  # of seeds 1 and 2
    [alone] = [row[4] for row in rows if row[:2] == ["pooling", "max"]]
    assert alone == gain  # the same in batches of 16, which are the first of `queries`


def test_what_the_results_print_behind_a_mean_is_the_interval_over_the_seeds_behind_it():
    seeds_behind = r"([\d.]+ ± [\d.]+)\*{0,2}(?: nDCG@10)? \(([\d., ]+)\)"
    printed = re.findall(seeds_behind, Path("benchmarks/RESULTS.md").read_text())
    assert len(printed) == 6
    for shown, seeds in printed:
        assert shown == str(estimate([float(score) for score in seeds.split(", ")]))


def test_a_sweep_that_is_refused_gives_no_results_of_an_earlier_one(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # where there is no train/biencoder.py
    earlier = tmp_path / "runs" / "x" / "bitfit-16-sweep" / "sweep.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"jobs": []}')
    options = argparse.Namespace(**VALUES, name="x", jobs_at_a_time=1, pairs=64, seeds=[0], overrides=[])
    with pytest.raises(SystemExit) as ended:
        list(swept(options, "bitfit", 16))
    assert ended.value.code == 2
    assert "No such file" in capfd.readouterr().err
