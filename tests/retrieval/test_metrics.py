"""Metrics against hand-worked numbers, against pytrec_eval called directly, and against the formulas of correlations
and intervals.
"""

import math
import random
from itertools import permutations

import numpy as np
import pytest
import pytrec_eval

from sgpt.data.formats.trec import cut, ranked
from sgpt.retrieval.metrics import correlations, difference, main_metric, perfect_rerank, ranking, ranking_per_query


def run(*documents: str) -> dict[str, float]:
    """Ranked as given, by falling scores."""
    return {document: float(len(documents) - place) for place, document in enumerate(documents)}


def test_one_relevant_document_at_rank_three():
    found = ranking({"q": {"d": 1}}, {"q": run("a", "b", "d", "c")})
    assert found == pytest.approx({"ndcg@10": 1 / math.log2(4), "map@100": 1 / 3, "recall@100": 1.0, "mrr@10": 1 / 3})


def test_graded_relevance_gains_as_stated_and_not_as_a_power_of_two():
    """trec_eval's nDCG: gain 2 and 1, discounts log2(rank + 1)."""
    found = ranking({"q": {"a": 1, "b": 2}}, {"q": run("a", "b")})
    assert found["ndcg@10"] == pytest.approx(
        (1 / math.log2(2) + 2 / math.log2(3)) / (2 / math.log2(2) + 1 / math.log2(3))
    )


def test_map_and_recall_count_relevant_documents_that_were_not_found():
    found = ranking({"q": {"a": 1, "b": 1, "lost": 1, "not": 0}}, {"q": run("a", "x", "b")})
    assert found["map@100"] == pytest.approx((1 / 1 + 2 / 3) / 3)
    assert found["recall@100"] == pytest.approx(2 / 3)


def test_reciprocal_rank_is_cut_at_ten():
    ten, eleven = [f"x{n}" for n in range(9)], [f"x{n}" for n in range(10)]
    assert ranking({"q": {"d": 1}}, {"q": run(*ten, "d")})["mrr@10"] == pytest.approx(1 / 10)
    assert ranking({"q": {"d": 1}}, {"q": run(*eleven, "d")})["mrr@10"] == 0


def test_documents_past_100_count_for_nothing():
    documents = [f"x{n:03}" for n in range(100)]
    assert ranking({"q": {"d": 1}}, {"q": run(*documents, "d")}) == {
        "ndcg@10": 0, "map@100": 0, "recall@100": 0, "mrr@10": 0
    }


@pytest.mark.parametrize(("relevant", "rank"), [("c", 1), ("b", 2), ("a", 3)])
def test_ties_rank_by_document_id_from_the_end_of_the_alphabet(relevant, rank):
    found = ranking({"q": {relevant: 1}}, {"q": dict.fromkeys(("a", "b", "c"), 0.5)})
    assert found == pytest.approx(
        {"ndcg@10": 1 / math.log2(rank + 1), "map@100": 1 / rank, "recall@100": 1, "mrr@10": 1 / rank}
    )


def test_ties_at_the_cut_of_ten_are_cut_as_trec_eval_ranks_them():
    tied = dict.fromkeys([f"d{n:02}" for n in range(12)], 1.0)  # d11 … d02 are the ten
    assert ranking({"q": {"d02": 1}}, {"q": tied})["mrr@10"] == pytest.approx(1 / 10)
    assert ranking({"q": {"d01": 1}}, {"q": tied})["mrr@10"] == 0


def test_a_query_without_results_counts_zero_in_the_mean():
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 1}}
    found = ranking(qrels, {"q1": run("a"), "q2": {}})
    assert found == pytest.approx(dict.fromkeys(("ndcg@10", "map@100", "recall@100", "mrr@10"), 1 / 3))
    assert ranking_per_query(qrels, {"q1": run("a")})["q3"] == dict.fromkeys(found, 0.0)


def test_queries_without_a_relevant_document_and_results_without_judgement_are_left_out():
    found = ranking({"q1": {"a": 1}, "q2": {"a": 0}}, {"q1": run("b", "a"), "q2": run("a"), "q9": run("a")})
    assert found["mrr@10"] == 0.5


def test_random_runs_equal_pytrec_eval_called_directly():
    """trec_eval knows no MRR@10: its reciprocal rank is set to zero here where it says eleven or more."""
    chance = random.Random(0)
    documents = [f"d{n}" for n in range(150)]
    qrels = {
        f"q{n}": {document: chance.choice([0, 1, 1, 2]) for document in chance.sample(documents, 12)} for n in range(30)
    }
    # many ties
    results = {
        query: {document: round(chance.random(), 1) for document in chance.sample(documents, chance.randint(1, 140))}
        for query in qrels
    }
    theirs = pytrec_eval.RelevanceEvaluator(
        qrels, {"ndcg_cut.10", "map_cut.100", "recall.100", "recip_rank"}
    ).evaluate(results)
    for query, row in ranking_per_query(qrels, results).items():
        reciprocal = theirs[query]["recip_rank"]
        expected = {
            "ndcg@10": theirs[query]["ndcg_cut_10"], "map@100": theirs[query]["map_cut_100"],
            "recall@100": theirs[query]["recall_100"],
                    "mrr@10": reciprocal if reciprocal > 1 / 10.5 else 0}  # fmt: skip
        assert row == pytest.approx(expected)
    means = ranking(qrels, results)
    assert means["ndcg@10"] == pytest.approx(sum(row["ndcg_cut_10"] for row in theirs.values()) / len(qrels))


def test_correlations_of_a_small_sample_by_hand():
    """Scores 1, 2, 3, 4 and cosines in the order 1, 3, 2, 4: one swap of neighbours."""
    found = correlations([1, 2, 3, 4], [0.0, 0.5, 0.4, 0.9])
    assert found["spearman_cosine"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert found["pearson_cosine"] == pytest.approx(1.3 / math.sqrt(5 * 0.41))  # Σ(x-x̄)(y-ȳ) / √(Σ(x-x̄)² Σ(y-ȳ)²)


def test_tied_scores_share_their_ranks():
    """Ranks 1.5, 1.5, 3 against 1, 2, 3: Pearson of the ranks."""
    assert correlations([1, 1, 2], [0.1, 0.2, 0.3])["spearman_cosine"] == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_the_main_metric_is_ndcg_or_spearman():
    assert main_metric({"mrr@10": 0.3, "ndcg@10": 0.2}) == ("ndcg@10", 0.2)
    assert main_metric({"pearson_cosine": 0.3, "spearman_cosine": 0.1}) == ("spearman_cosine", 0.1)


def test_scores_that_differ_past_single_precision_are_ties_as_for_trec_eval():
    scores = {"a": 1.0 + 1e-9, "b": 1.0, "c": 1.0 + 1e-5}
    assert ranked(scores) == ["c", "b", "a"]
    theirs = {
        document: pytrec_eval.RelevanceEvaluator(
            {"q": {document: 1}}, {"recip_rank"}
        ).evaluate({"q": scores})["q"]["recip_rank"]
        for document in scores
    }
    assert theirs == pytest.approx({"c": 1, "b": 1 / 2, "a": 1 / 3})
    assert cut({"q": scores}, 2) == {"q": {"c": 1.0 + 1e-5, "b": 1.0}}


def test_a_perfect_reranker_is_as_good_as_the_best_of_all_orders():
    chance = random.Random(0)
    for _ in range(20):
        qrels = {"q": {document: chance.choice([0, 1, 2]) for document in "abcdxyz"}}
        run = {"q": {document: chance.random() for document in "abcdefgh"}}
        top, rest = ranked(run["q"])[:5], ranked(run["q"])[5:]
        orders = (
            {"q": {document: float(-place) for place, document in enumerate((*order, *rest))}}
            for order in permutations(top)
        )
        best = max(ranking(qrels, order)["ndcg@10"] for order in orders)
        assert ranking(qrels, perfect_rerank(qrels, run, 5))["ndcg@10"] == pytest.approx(best)


def test_the_perfect_reranker_of_a_run_without_relevant_documents_scores_zero():
    assert perfect_rerank({"q": {"a": 1}}, {"q": {"b": 2.0}, "r": {"a": 1.0}}, 10) == {"q": {"b": 0.0}, "r": {"a": 0.0}}


def test_the_interval_of_many_queries_is_the_normal_one():
    """The mean of 2,000 differences is normal by the central limit theorem; 10,000 resamples leave about 3 % of the
    half width to chance.
    """
    chance = np.random.default_rng(1)
    theirs = chance.uniform(0, 1, 2000)
    ours = theirs + chance.exponential(0.1, 2000) - 0.08
    found = difference(ours, theirs)
    half = 1.96 * (ours - theirs).std() / math.sqrt(2000)
    assert found.mean == pytest.approx((ours - theirs).mean())
    assert (found.low, found.high) == (
        pytest.approx(found.mean - half, abs=0.05 * half), pytest.approx(found.mean + half, abs=0.05 * half)
    )


def test_the_interval_is_paired_and_equals_percentiles_of_a_loop_over_resamples():
    """Queries differ by far more than the systems: unpaired resampling would give an interval ten times as wide."""
    chance = np.random.default_rng(2)
    theirs = chance.uniform(0, 1, 40)
    ours = theirs + chance.normal(0.02, 0.03, 40)
    found = difference(ours, theirs)
    rows = [chance.integers(0, 40, 40) for _ in range(10_000)]
    low, high = np.percentile([ours[row].mean() - theirs[row].mean() for row in rows], [2.5, 97.5])
    # two samplings of 10,000
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
    assert found == difference(ours, theirs)  # seeded
    assert found != difference(ours, theirs, seed=1)


def test_equal_systems_differ_by_nothing_and_one_query_has_no_interval():
    assert difference([0.5, 0.2, 0.9], [0.5, 0.2, 0.9]) == (same := difference([1, 2], [1, 2]))
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert (difference([0.5], [0.25]).mean, difference([0.5], [0.25]).low, difference([], []).mean) == (0.25, None, 0.0)


def test_what_stands_behind_the_reranked_documents_keeps_its_order():
    run = {"q": {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0, "e": 1.0}}
    assert ranked(perfect_rerank({"q": {"b": 1, "d": 2}}, run, 2)["q"]) == ["b", "a", "c", "d", "e"]


def test_cosines_that_are_all_equal_count_as_no_correlation_and_are_told(caplog):
    assert correlations([1.0, 2.0, 5.0], [0.5, 0.5, 0.5]) == {"spearman_cosine": 0.0, "pearson_cosine": 0.0}
    assert "all 3 cosines are 0.5, so they correlate with nothing" in caplog.text
