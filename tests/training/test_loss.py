"""InfoNCE against a float64 double loop over `exp` and `log`, and the in-batch duplicates against hand-made cases."""

import math

import pytest
import torch

from sgpt.runtime.errors import InputError
from sgpt.training.loss import LOSSES, LossConfig, info_nce
from sgpt.training.negatives import duplicate_queries, duplicates, positive_rows, scaled_cosines, unit


def loss_of(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    scale: float,
    positives: torch.Tensor,
    ignored: torch.Tensor | None = None,
) -> torch.Tensor:
    """`info_nce` of embeddings of any length; ignored [Q, C]."""
    mask = None if ignored is None else lambda rows, scores, scale: ignored[rows]
    return info_nce(unit(queries), unit(candidates), scale, positives, mask)


def by_loop(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    scale: float,
    positives: list[int],
    ignored: list[set[int]] | None = None,
) -> float:
    """Mean over queries of -log(exp(scale·cos+) / Σ exp(scale·cos)), with Python's floats."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(math.fsum(x * x for x in a)) / math.sqrt(math.fsum(y * y for y in b))

    losses = []
    for number, query in enumerate(queries.tolist()):
        left_out = ignored[number] if ignored else set()
        terms = {
            row: math.exp(scale * cosine(query, document))
            for row, document in enumerate(candidates.tolist())
            if row not in left_out
        }
        losses.append(-math.log(terms[positives[number]] / math.fsum(terms.values())))
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("hard_negatives", [0, 1, 3])
def test_info_nce_equals_the_double_loop(hard_negatives, scale):
    torch.manual_seed(hard_negatives)
    r = 1 + hard_negatives
    queries, candidates = torch.randn(5, 7, dtype=torch.float64) * 3, torch.randn(5 * r, 7, dtype=torch.float64)
    expected = by_loop(queries, candidates, scale, [i * r for i in range(5)])
    positives = positive_rows(5, r, 0)
    assert loss_of(queries, candidates, scale, positives).item() == pytest.approx(expected, rel=1e-12)  # float64 both
    # float32: cosines are good to 1e-7, times the scale
    assert loss_of(queries.float(), candidates.float(), scale, positives).item() == pytest.approx(expected, rel=1e-5)


def test_the_second_process_finds_its_positives_after_the_gather():
    torch.manual_seed(0)
    queries, candidates = torch.randn(3, 4, dtype=torch.float64), torch.randn(2 * 3 * 2, 4, dtype=torch.float64)
    positives = positive_rows(3, 2, rank=1)
    assert positives.tolist() == [6, 8, 10]
    assert loss_of(queries, candidates, 20.0, positives).item() == pytest.approx(
        by_loop(queries, candidates, 20.0, [6, 8, 10]), rel=1e-12
    )


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("candidates", [2, 6, 600])
def test_equal_candidates_give_the_logarithm_of_their_number(candidates, scale):
    loss = loss_of(torch.ones(2, 3), torch.full((candidates, 3), 2.0), scale, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(candidates), rel=1e-6)  # float32


def test_the_gradient_is_that_of_the_double_loop():
    """Central differences of the loop; their error at a step of 1e-6 is about 1e-9."""
    torch.manual_seed(0)
    queries, candidates = (
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
    )
    loss_of(queries, candidates, 20.0, positive_rows(2, 2, 0)).backward()
    for tensor in (queries, candidates):
        for index in range(tensor.numel()):
            values = []
            for step in (1e-6, -1e-6):
                moved = [t.detach().clone() for t in (queries, candidates)]
                moved[0 if tensor is queries else 1].view(-1)[index] += step
                values.append(by_loop(*moved, 20.0, [0, 2]))
            assert tensor.grad.view(-1)[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)


def test_ignored_candidates_are_no_negatives(monkeypatch):
    torch.manual_seed(0)
    queries, candidates = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    ignored = torch.tensor([[False, True, False, False], [True, False, False, True]])
    expected = by_loop(queries, candidates, 20.0, [0, 2], [{1}, {0, 3}])
    positives = torch.tensor([0, 2])
    assert loss_of(queries, candidates, 20.0, positives, ignored).item() == pytest.approx(expected, rel=1e-12)
    # one query at a time: each chunk is given its own rows
    monkeypatch.setattr("sgpt.training.loss.SCORES_AT_A_TIME", 4)
    assert loss_of(queries, candidates, 20.0, positives, ignored).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_scored_in_float32(dtype):
    torch.manual_seed(0)
    queries, candidates = torch.randn(4, 64).to(dtype), torch.randn(8, 64).to(dtype)
    loss = loss_of(queries, candidates, 20.0, positive_rows(4, 2, 0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_loop(queries.double(), candidates.double(), 20.0, [0, 2, 4, 6]), rel=1e-5)


def test_autocast_does_not_take_the_scores_out_of_float32():
    """A bfloat16 product is off by up to 0.4 % of the scale: 0.08 in the exponent."""
    torch.manual_seed(0)
    queries, candidates = torch.randn(4, 64), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        scores = scaled_cosines(unit(queries), unit(candidates), 20.0)
    torch.testing.assert_close(scores, scaled_cosines(unit(queries), unit(candidates), 20.0), rtol=0, atol=0)


# what the protocol `Loss` promises, of every row of LOSSES


def four_queries() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [4, 16] and candidates [8, 16] of length 1, and the row of each query's positive."""
    torch.manual_seed(0)
    return unit(torch.randn(4, 16)), unit(torch.randn(8, 16)), positive_rows(4, 2, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_scalar_in_float32_with_a_gradient_for_queries_and_candidates(name):
    queries, candidates, positives = four_queries()
    loss = LOSSES[name](queries.requires_grad_(), candidates.requires_grad_(), 20.0, positives)
    loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    for embeddings in (queries, candidates):
        assert embeddings.grad.isfinite().all()
        assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_mean_over_the_queries(name):
    queries, candidates, positives = four_queries()
    alone = [LOSSES[name](queries[[row]], candidates, 20.0, positives[[row]]).item() for row in range(4)]
    assert LOSSES[name](queries, candidates, 20.0, positives).item() == pytest.approx(sum(alone) / 4, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_falls_when_a_positive_comes_nearer(name):
    queries, candidates, positives = four_queries()
    query, positive = queries[[2]], positives[[2]]  # alone: to the other queries its positive is a negative
    nearer = candidates.clone()
    nearer[positive] = unit(candidates[positive] + 0.1 * query)
    assert LOSSES[name](query, nearer, 20.0, positive) < LOSSES[name](query, candidates, 20.0, positive)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_see_ignored_candidates(name):
    queries, candidates, positives = four_queries()
    ignored = torch.zeros(4, 8, dtype=torch.bool)
    ignored[:, 5] = True  # the hard negative of the third query
    other = candidates.clone()
    other[5] = queries[0]

    def loss(documents: torch.Tensor) -> float:
        return LOSSES[name](queries, documents, 20.0, positives, lambda rows, scores, scale: ignored[rows]).item()

    assert loss(candidates) == loss(other)
    assert LOSSES[name](queries, other, 20.0, positives).item() != loss(other)


def ignored_pairs(
    queries: list[str], documents: list[str], r: int, rank: int = 0, processes: int = 1
) -> set[tuple[int, int]]:
    """(query of this process, candidate) pairs that are ignored; texts stand for their hashes."""
    number = {text: index for index, text in enumerate(dict.fromkeys([*queries, *documents]))}
    all_queries, all_documents = (torch.tensor([number[text] for text in texts]) for texts in (queries, documents))
    per_process = len(queries) // processes
    own = all_queries[rank * per_process : (rank + 1) * per_process]
    positives = positive_rows(per_process, r, rank)
    ignored = duplicates(own, all_queries, all_documents, positives, r)
    later = duplicates(own[1:], all_queries, all_documents, positives[1:], r)
    assert torch.equal(ignored[1:], later)  # each row for itself
    if processes == 1:  # the other direction: a positive document and the queries of which it is no negative
        assert torch.equal(duplicate_queries(own, all_queries, all_documents, positives, r), ignored[:, ::r].T)
    return {tuple(pair) for pair in ignored.nonzero().tolist()}


def test_different_texts_ignore_nothing():
    assert ignored_pairs(["a", "b"], ["A", "A-", "B", "B-"], r=2) == set()


def test_a_duplicate_of_the_own_positive_is_ignored_wherever_it_stands():
    assert ignored_pairs(["a", "b"], ["X", "A-", "X", "B-"], r=2) == {(0, 2), (1, 0)}  # the other query's positive
    # the other query's hard negative; b chose it and keeps it
    assert ignored_pairs(["a", "b"], ["X", "A-", "B", "X"], r=2) == {(0, 3)}


def test_the_positive_of_an_equal_query_is_ignored_and_its_hard_negative_is_not():
    assert ignored_pairs(["a", "a"], ["A1", "A1-", "A2", "A2-"], r=2) == {(0, 2), (1, 0)}


def test_an_answer_to_an_equal_query_is_ignored_wherever_it_stands():
    """c curated A2 for itself; for both a it is an answer that happens to stand there, and for c it stays."""
    assert ignored_pairs(["a", "a", "c"], ["A1", "A1-", "A2", "A2-", "C", "A2"], r=2) == {
        (0, 2),
        (0, 5),
        (1, 0),
        (1, 5),
    }
    # the first a chose A2, and keeps it
    assert ignored_pairs(["a", "a", "c"], ["A1", "A2", "A2", "A2-", "C", "C-"], r=2) == {(0, 2), (1, 0), (1, 1)}


def test_another_positive_of_an_equal_query_is_ignored():
    """Texts are numbers: the queries 1, 1, 2 with the positives 10, 11, 12 and the hard negatives 20, 21, 13.

    13 is another positive of the second query.
    """
    queries, documents = torch.tensor([1, 1, 2]), torch.tensor([10, 20, 11, 21, 12, 13])
    others = torch.tensor([[10], [13], [12]])
    ignored = duplicates(queries, queries, documents, positive_rows(3, 2, 0), 2, others)
    assert {tuple(pair) for pair in ignored.nonzero().tolist()} == {(0, 2), (0, 5), (1, 0), (1, 5)}
    back = duplicate_queries(queries, queries, documents, positive_rows(3, 2, 0), 2, others)
    assert torch.equal(back, ignored[:, ::2].T)


def test_a_document_with_the_querys_own_text_is_ignored():
    assert ignored_pairs(["a", "b"], ["A", "b"], r=1) == set()  # as its own positive it counts
    assert ignored_pairs(["a", "b"], ["b", "B"], r=1) == {(1, 0)}


def test_a_curated_hard_negative_stays_even_when_it_is_another_querys_positive():
    # a keeps B as its negative; for b it is a duplicate
    assert ignored_pairs(["a", "b"], ["A", "B", "B", "B-"], r=2) == {(1, 1)}


def test_a_curated_hard_negative_stays_even_when_it_is_the_querys_own_text():
    assert ignored_pairs(["a", "b"], ["A", "a", "B", "B-"], r=2) == set()
    assert ignored_pairs(["a", "b"], ["A", "A-", "B", "a"], r=2) == {(0, 3)}  # somebody else's


def test_duplicates_are_found_across_processes():
    queries, documents = ["a", "b", "a", "c"], ["A", "B", "A2", "B"]
    assert ignored_pairs(queries, documents, r=1, rank=0, processes=2) == {(0, 2), (1, 3)}
    assert ignored_pairs(queries, documents, r=1, rank=1, processes=2) == {(0, 0), (1, 1)}


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match=r"loss\.scale=0\.0 must be positive; it is 1 / temperature"):
        LossConfig(scale=0.0)
    with pytest.raises(InputError, match=r"loss\.name='triplet' is unknown; choose info_nce$"):
        LossConfig("triplet")
