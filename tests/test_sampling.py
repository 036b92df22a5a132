"""Batches as a function of seed and position."""

import pytest

from sgpt.data.sampling import Schedule
from sgpt.errors import InputError

SIZES = [(100, 8, 1), (100, 8, 3), (64, 8, 2), (17, 1, 4), (5, 5, 1)]  # examples, queries a process, processes


@pytest.mark.parametrize(("examples", "queries", "processes"), SIZES)
def test_an_epoch_sees_every_row_at_most_once_over_all_processes(examples, queries, processes):
    schedule = Schedule(examples, queries, processes, seed=3)
    for epoch in range(2):
        places = range(epoch * schedule.batches_per_epoch, (epoch + 1) * schedule.batches_per_epoch)
        batches = [schedule.rows(batch, rank) for batch in places for rank in range(processes)]
        assert all(len(batch) == queries for batch in batches)  # no process ever holds fewer
        drawn = [row for batch in batches for row in batch]
        assert len(drawn) == len(set(drawn))
        assert set(drawn) <= set(range(examples))
        assert examples - len(drawn) < queries * processes  # only a last partial batch is dropped


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_together_draw_the_batch_of_one_process_that_is_as_large(processes):
    several, one = Schedule(100, 4, processes, seed=0), Schedule(100, 4 * processes, 1, seed=0)
    assert several.batches_per_epoch == one.batches_per_epoch
    for batch in range(3 * one.batches_per_epoch):
        assert [row for rank in range(processes) for row in several.rows(batch, rank)] == one.rows(batch, 0)


def test_rows_depend_on_the_position_alone():
    one, other = Schedule(50, 4, 2, seed=1), Schedule(50, 4, 2, seed=1)
    forwards = [one.rows(batch, 1) for batch in range(20)]
    assert [other.rows(batch, 1) for batch in reversed(range(20))] == forwards[::-1]


def test_epochs_and_seeds_are_shuffled_differently():
    schedule = Schedule(50, 50, 1, seed=1)
    assert schedule.rows(0, 0) != schedule.rows(1, 0)
    assert sorted(schedule.rows(0, 0)) == sorted(schedule.rows(1, 0)) == list(range(50))
    assert schedule.rows(0, 0) != Schedule(50, 50, 1, seed=2).rows(0, 0)
    assert schedule.rows(1, 0) != Schedule(50, 50, 1, seed=2).rows(0, 0)  # the next epoch is not the next seed


def test_too_few_examples_for_one_batch_are_refused():
    with pytest.raises(InputError, match=r"7 training examples do not fill one batch of 4 queries on each of 2 processes; lower trainer\.queries_per_process"):
        Schedule(7, 4, 2, seed=0)
