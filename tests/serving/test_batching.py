"""The batcher by itself, over arithmetic: who is computed with whom, when, and what a failure costs the others."""

import asyncio
import threading
import time

import pytest

from sgpt.serving.batching import Batcher, ComputedBatch


def together(*calls):
    """Their results, submitted at once into one event loop."""

    async def gathered():
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(gathered())


class Squares:
    """Computes squares and keeps what came together; `gate` holds the first batch back."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()

    def __call__(self, values: list[int]) -> list[int]:
        self.gate.wait(10)
        self.batches.append(values)
        if 13 in values:
            raise ValueError("13")
        return [value * value for value in values]


def test_a_batch_is_as_many_items_as_fit_of_many_requests_in_their_order():
    squares, seen = Squares(), []
    batcher = Batcher({"square": squares}, 10, 0.0, seen.append)

    async def requests():
        first = asyncio.ensure_future(batcher.submit("square", [1], [4]))
        await asyncio.sleep(0.05)  # it is computed alone, and the others come meanwhile
        others = [batcher.submit("square", [number, -number], [3, 3]) for number in (2, 3, 4)]
        many = asyncio.gather(first, *others, batcher.submit("square", [5], [99]))
        await asyncio.sleep(0.05)
        squares.gate.set()
        return await many

    assert asyncio.run(requests()) == [[1], [4, 4], [9, 9], [16, 16], [25]]
    assert squares.batches == [[1], [2, -2, 3], [-3, 4, -4], [5]]  # 99 tokens are more than fit, and come alone
    assert [batch.tokens for batch in seen] == [4, 9, 9, 99]
    assert [len(batch.waits) for batch in seen] == [1, 2, 2, 1]
    assert batcher.queued_tokens == 0
    batcher.stop(5)


@pytest.mark.parametrize(("tokens", "low", "high"), [(1, 0.3, 2.0), (100, 0.0, 0.25)])
def test_the_first_waits_for_others_for_so_long_and_not_where_the_batch_is_full(tokens, low, high):
    squares, seen = Squares(), []
    squares.gate.set()
    batcher = Batcher({"square": squares}, 100, 0.3, seen.append)
    started = time.monotonic()
    assert together(batcher.submit("square", [3], [tokens])) == [[9]]
    assert low <= time.monotonic() - started < high
    batcher.stop(5)


def test_two_kinds_are_never_in_one_batch_and_the_older_one_comes_first():
    squares, doubled = Squares(), []
    batcher = Batcher({"square": squares, "double": lambda values: doubled.append(values) or values}, 100, 0.05)

    async def requests():
        calls = [batcher.submit("square", [1], [1]), batcher.submit("double", [2], [1])]
        many = asyncio.gather(*calls, batcher.submit("square", [3], [1]))
        await asyncio.sleep(0.2)
        assert doubled == []
        squares.gate.set()
        return await many

    assert asyncio.run(requests()) == [[1], [2], [9]]
    assert (squares.batches, doubled) == ([[1, 3]], [[2]])
    batcher.stop(5)


def test_a_request_that_fails_takes_no_other_with_it():
    squares = Squares()
    squares.gate.set()
    batcher = Batcher({"square": squares}, 100, 0.1)
    good, bad, other = together(*(batcher.submit("square", [value], [1]) for value in (2, 13, 3)))
    assert (good, other) == ([4], [9])
    assert isinstance(bad, ValueError)
    assert squares.batches == [[2, 13, 3], [2], [13], [3]]
    batcher.stop(5)


def test_stopping_computes_what_is_queued_and_nothing_that_nobody_waits_for():
    squares = Squares()
    batcher = Batcher({"square": squares}, 1, 0.0)

    async def requests():
        calls = [asyncio.ensure_future(batcher.submit("square", [value], [1])) for value in range(4)]
        await asyncio.sleep(0.05)
        calls[2].cancel()
        await asyncio.sleep(0.05)
        squares.gate.set()
        await asyncio.to_thread(batcher.stop, 5)
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(requests())
    assert results[:2] == [[0], [1]]
    assert isinstance(results[2], asyncio.CancelledError)
    assert results[3] == [9]
    assert squares.batches == [[0], [1], [3]]
    assert not batcher.alive


def test_what_is_observed_is_a_batch():
    seen: list[ComputedBatch] = []
    squares = Squares()
    squares.gate.set()
    batcher = Batcher({"square": squares}, 9, 0.0, seen.append)
    assert together(batcher.submit("square", [], [])) == [[]]
    together(batcher.submit("square", [1, 2], [3, 4]))
    batcher.stop(5)
    assert [(batch.kind, batch.items, batch.tokens) for batch in seen] == [("square", 2, 7)]
