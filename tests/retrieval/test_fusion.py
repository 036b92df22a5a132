"""Fusion against numbers worked by hand and a loop over sorted lists; what is put in stays as it was."""

import copy
import random

import pytest

from sgpt.retrieval.fusion import interpolated, min_max, reciprocal_rank_fusion, reordered

LEXICAL = {"q": {"a": 12.0, "b": 8.0, "c": 2.0}}
DENSE = {"q": {"c": 0.9, "a": 0.5, "d": 0.1}}


def test_reciprocal_ranks_are_summed_over_the_runs_that_hold_the_document():
    """a: ranks 1 and 2; c: 3 and 1; b: 2; d: 3. Cormack et al., k = 60."""
    found = reciprocal_rank_fusion([LEXICAL, DENSE], depth=10)
    assert found == {"q": pytest.approx({"a": 1 / 61 + 1 / 62, "c": 1 / 63 + 1 / 61, "b": 1 / 62, "d": 1 / 63})}
    assert list(found["q"]) == ["a", "c", "b", "d"]
    assert list(reciprocal_rank_fusion([LEXICAL, DENSE], depth=2)["q"]) == ["a", "c"]


def test_a_smaller_constant_lets_the_first_rank_weigh_more():
    runs = [{"q": {"x": 3.0, "y": 2.0, "z": 1.0}}, {"q": {"z": 3.0, "y": 2.0, "x": 1.0}}, {"q": {"y": 1.0}}]
    assert reciprocal_rank_fusion(runs, depth=3, k=1)["q"] == pytest.approx(
        {"x": 1 / 2 + 1 / 4, "y": 1 / 3 + 1 / 3 + 1 / 2, "z": 1 / 4 + 1 / 2}
    )


def test_random_runs_fuse_as_a_loop_over_sorted_pairs_does():
    chance = random.Random(0)
    # many ties
    runs = [
        {f"q{n}": {f"d{d:02}": chance.choice([1.0, 2.0, 3.5]) for d in chance.sample(range(40), 20)} for n in range(5)}
        for _ in range(3)
    ]
    found = reciprocal_rank_fusion(runs, depth=100)
    for query in runs[0]:
        expected: dict[str, float] = {}
        for run in runs:
            pairs = sorted(((score, document) for document, score in run[query].items()), reverse=True)
            for place in range(len(pairs)):
                expected[pairs[place][1]] = expected.get(pairs[place][1], 0) + 1.0 / (61 + place)
        assert found[query] == pytest.approx(expected)


def test_scores_are_brought_to_zero_to_one_for_each_query():
    assert min_max({**LEXICAL, "one": {"x": -35.0}, "equal": {"x": 2.0, "y": 2.0}, "none": {}}) == {
        "q": pytest.approx({"a": 1.0, "b": 0.6, "c": 0.0}), "one": {"x": 1.0}, "equal": {"x": 1.0, "y": 1.0},
        "none": {}}


def test_interpolation_weighs_the_second_run_and_a_document_not_found_counts_zero():
    """lexical a 1, b 0.6, c 0; dense c 1, a 0.5, d 0."""
    found = interpolated(LEXICAL, DENSE, 0.25, depth=10)
    assert found == {"q": pytest.approx({"a": 0.75 + 0.125, "b": 0.45, "c": 0.25, "d": 0.0})}
    assert list(interpolated(LEXICAL, DENSE, 0.0, depth=3)["q"])[:2] == ["a", "b"]
    assert list(interpolated(LEXICAL, DENSE, 1.0, depth=2)["q"]) == ["c", "a"]


def test_a_query_that_one_run_lacks_is_fused_from_the_other():
    alone = {"q": {"a": 2.0, "b": 1.0}}
    assert list(
        reciprocal_rank_fusion([alone, {}], depth=5)["q"]
    ) == list(interpolated({}, alone, 0.5, depth=5)["q"]) == ["a", "b"]


def test_reordering_moves_the_first_and_keeps_the_others_behind_them():
    first = {"q": {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0}}
    scores = {"q": {"a": -9.0, "b": -3.0, "c": -1.0, "d": 0.0}}
    assert list(reordered(first, scores, 2)["q"]) == ["b", "a", "c", "d"]
    assert list(reordered(first, scores, 4)["q"]) == ["d", "c", "b", "a"]
    assert list(reordered(first, {"q": {"c": -1.0}}, 3)["q"]) == ["c", "a", "b", "d"]
    assert reordered(first, scores, 3)["q"] == {"c": 4.0, "b": 3.0, "a": 2.0, "d": 1.0}


def test_no_run_is_changed():
    runs = copy.deepcopy([LEXICAL, DENSE])
    reciprocal_rank_fusion(runs, 2), interpolated(*runs, 0.5, 2), reordered(runs[0], runs[1], 2)
    assert runs == [LEXICAL, DENSE]
