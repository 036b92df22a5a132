"""Batches as a function of seed and position; every example exactly once an epoch; sources by weight."""

from collections import Counter

import numpy as np
import pytest

from sgpt.data.feed.example import Example
from sgpt.data.feed.grouping import Walk
from sgpt.data.feed.sampling import Feed, Source
from sgpt.data.feed.store import Examples, Writer, cached_examples
from sgpt.runtime.errors import InputError
from sgpt.text.markers import Frame

FRAMES = {"query": Frame((90,), (91,), 5), "document": Frame((92,), (93,), 5)}
SIZES = [(100, 8, 1), (100, 8, 3), (64, 8, 2), (17, 1, 4), (5, 5, 1)]  # examples, queries a process, processes
BATCHES = ["random", "hard"]


class Numbers:
    """Stands where token ids stand: the number of the text itself."""

    def __getitem__(self, text: int) -> list[int]:
        return [text]


def source(
    size: int, *, positives: int = 1, negatives: int = 0, take: int = 0, weight: float = 1.0, name: str = "s",
    batches: str = "random"
) -> Source:  # fmt: skip
    made = Examples.of(
        Example(
            f"{name} q{n}", f"{name} p{n}.0", tuple(f"{name} n{n}.{k}" for k in range(negatives)),
            tuple(f"{name} p{n}.{k}" for k in range(1, positives))
        )
        for n in range(size)
    )
    walked = Walk(np.random.default_rng(9).permutation(size)) if batches == "hard" else None
    return Source(name, made, Numbers(), FRAMES, take, weight, walk=walked)


def feed(examples: int, queries: int, processes: int, seed: int, batches: str = "random") -> Feed:
    return Feed([source(examples, batches=batches)], queries, processes, seed)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize(("examples", "queries", "processes"), SIZES)
def test_an_epoch_sees_every_example_exactly_once_over_all_processes(examples, queries, processes, batches):
    made = feed(examples, queries, processes, seed=3, batches=batches)
    batches = [
        made.drawn_examples(batch, rank) for batch in range(-(-3 * examples // (queries * processes)))
        for rank in range(processes)
    ]
    assert all(len(batch) == queries for batch in batches)  # no process ever holds fewer
    seen = Counter((epoch, example) for batch in batches for _, example, epoch in batch)
    assert set(seen.values()) == {1}
    assert {(epoch, example) for epoch in range(3) for example in range(examples)} <= seen.keys()
    assert len(seen) - 3 * examples < queries * processes  # the last batch takes the beginning of the next epoch


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_together_draw_the_batch_of_one_process_that_is_as_large(processes, batches):
    several, one = (feed(100, queries, number, 0, batches) for queries, number in ((4, processes), (4 * processes, 1)))
    for batch in range(40):
        drawn = [row for rank in range(processes) for row in several.drawn_examples(batch, rank)]
        assert drawn == one.drawn_examples(batch, 0)


@pytest.mark.parametrize("batches", BATCHES)
def test_rows_depend_on_the_position_alone(batches):
    one, other = (
        Feed([source(50, name="a", batches=batches), source(70, name="b", weight=2, batches=batches)], 4, 2, 1)
        for _ in range(2)
    )
    forwards = [one.drawn_examples(batch, 1) for batch in range(20)]
    assert [other.drawn_examples(batch, 1) for batch in reversed(range(20))] == forwards[::-1]


@pytest.mark.parametrize("batches", BATCHES)
def test_epochs_and_seeds_are_shuffled_differently(batches):
    made, reseeded = feed(50, 50, 1, 1, batches), feed(50, 50, 1, 2, batches)
    first, second, other = (
        [example for _, example, _ in one.drawn_examples(batch, 0)]
        for one, batch in ((made, 0), (made, 1), (reseeded, 0))
    )
    assert sorted(first) == sorted(second) == sorted(other) == list(range(50))
    assert first != second != other != first
    assert second != [example for _, example, _ in reseeded.drawn_examples(1, 0)]  # the next epoch is not the next seed


def test_batches_are_of_one_source_and_sources_come_by_weight():
    made = Feed([source(50, name="a", weight=3), source(20, name="b", weight=1)], 4, 2, 0)
    drawn = [{row[0] for rank in range(2) for row in made.drawn_examples(batch, rank)} for batch in range(40)]
    assert all(len(sources) == 1 for sources in drawn)
    assert Counter(sources.pop() for sources in drawn) == {0: 30, 1: 10}
    small = [
        example for batch in range(40) for rank in range(2) for source, example,
        epoch in made.drawn_examples(batch, rank) if source == 1 and epoch == 0
    ]
    assert sorted(small) == list(range(20))  # each source has epochs of its own


def test_mixed_batches_hold_every_source_by_weight():
    made = Feed([source(50, name="a", weight=3), source(20, name="b", weight=1)], 8, 1, 0, mixed=True)
    for batch in range(20):
        assert Counter(source for source, _, _ in made.drawn_examples(batch, 0)) == {0: 6, 1: 2}


def test_one_positive_is_drawn_each_epoch_and_the_others_are_known():
    made = source(3, positives=4)
    drawn = [made.draw(1, epoch, seed=0) for epoch in range(40)]
    assert {one.documents[0] for one in drawn} == set(made.examples.positives[1])
    assert all({one.documents[0], *one.other_positives} == set(made.examples.positives[1]) for one in drawn)
    assert drawn == [made.draw(1, epoch, seed=0) for epoch in range(40)]
    assert drawn != [made.draw(1, epoch, seed=1) for epoch in range(40)]


def test_hard_negatives_go_round_epoch_by_epoch():
    made = source(2, negatives=5, take=2)
    negatives = made.examples.hard_negatives[1]
    drawn = [made.draw(1, epoch, seed=0).documents[1:] for epoch in range(5)]
    assert drawn[:3] == [(negatives[0], negatives[1]), (negatives[2], negatives[3]), (negatives[4], negatives[0])]
    assert Counter(text for documents in drawn for text in documents) == dict.fromkeys(negatives, 2)


def test_the_positives_of_others_stand_in_for_hard_negatives_and_never_ones_own():
    one = source(5, positives=2, take=3)
    for number in range(5):
        for epoch in range(100):
            documents = one.draw(number, epoch, seed=0).documents
            own = set(one.examples.positives[number])
            assert documents[0] in own
            assert len(documents) == 4
            assert not own.intersection(documents[1:])


def test_no_answer_of_the_data_stands_in_for_a_hard_negative():
    """Chains of paraphrases, each the answer to the one before: neither a query's own text, nor the answer of another
    row with the same query, nor a text whose answer it is.
    """
    chain = [Example("a0", "a1"), Example("a0", "a2"), Example("a1", "a3"), Example("a3", "a0"), Example("b", "c")]
    made = Source("s", Examples.of(chain), Numbers(), FRAMES, 1)
    texts = made.examples.texts
    drawn = [{texts[made.draw(row, epoch, seed=0).documents[1]] for epoch in range(200)} for row in range(5)]
    assert drawn == [{"c"}, {"c"}, {"a2", "c"}, {"a2", "c"}, {"a0", "a1", "a2", "a3"}]


def test_a_copy_of_an_answer_does_not_stand_in_for_a_hard_negative(tmp_path):
    """Collections too large to compare have a number for each copy of a text."""

    def fill(writer: Writer) -> None:
        queries = [writer.text(f"q{number}") for number in range(3)]
        same, copy, other = (writer.text(text) for text in ("same", "same", "other"))
        for query, positive in zip(queries, (same, copy, other), strict=True):
            writer.row(query, [positive], [])

    made = Source("s", cached_examples(tmp_path, "k", fill), Numbers(), FRAMES, 1)
    drawn = [{made.examples.texts[made.draw(row, epoch, seed=0).documents[1]] for epoch in range(50)} for row in (0, 1)]
    assert drawn == [{"other"}, {"other"}]


@pytest.mark.parametrize(("negatives", "take", "lacks"), [(0, 0, False), (2, 2, False), (1, 2, True), (0, 1, True)])
def test_a_source_knows_whether_hard_negatives_are_missing(negatives, take, lacks):
    assert source(3, negatives=negatives, take=take).lacks_hard_negatives == lacks


def test_as_many_sources_as_one_likes_are_shuffled_once_an_epoch(monkeypatch):
    """Mixed, each query is another source's turn; counted below numpy's own generator."""
    made = Feed([source(40, name=f"s{n}") for n in range(12)], 24, mixed=True)
    shuffled = []
    generator = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: shuffled.append(seed) or generator(seed))
    for number in range(10):
        made.drawn_examples(number, 0)
    assert len(shuffled) == 12


def test_a_positive_of_its_own_is_never_taken_for_a_hard_negative():
    """Where all examples share one positive there is no other text: the query would be trained against its answer."""
    one_positive = Examples.of([Example(f"q{n}", "the answer") for n in range(4)])
    with pytest.raises(InputError, match=r"s: a query has no hard negative, and no other example has another positive"):
        Source("s", one_positive, Numbers(), FRAMES, 1).draw(0, 0, 0)


def test_a_batch_has_framed_ids_and_hashes_in_query_major_order():
    made = Feed([source(4, positives=2, negatives=3, take=2)], 4)
    batch, rows = made.batch(0, 0), made.drawn_examples(0, 0)
    examples = made.sources[0].examples
    assert batch.documents_per_query == 3
    for place, (_, example, epoch) in enumerate(rows):
        drawn = made.sources[0].draw(example, epoch, 0)
        assert batch.queries[place] == [90, drawn.query, 91]
        assert batch.documents[3 * place : 3 * place + 3] == [[92, text, 93] for text in drawn.documents]
        assert batch.query_hashes[place] == examples.hashes[drawn.query]
        assert batch.document_hashes[3 * place] == examples.hashes[drawn.documents[0]]
        assert batch.other_positive_hashes[place].tolist() == [examples.hashes[text] for text in drawn.other_positives]


def test_too_few_examples_for_one_batch_are_refused():
    with pytest.raises(
        InputError,
        match=r"s: 7 training examples do not fill one batch of 4 queries on each of 2 processes; lower trainer"
    ):
        feed(7, 4, 2, seed=0)


def test_mixed_sources_need_the_same_number_of_hard_negatives():
    with pytest.raises(
        InputError,
        match=r"data\.mixed=true puts examples of all sources into one batch, so all need the same num_hard_negatives"
    ):
        Feed([source(50, negatives=1, take=1), source(50, name="b")], 4, mixed=True)
