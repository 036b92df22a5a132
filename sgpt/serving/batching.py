"""Requests meet here: what many of them ask for is computed by one thread, in batches of so many tokens.

One thread, because a trunk is not shared by two forwards at once: the re-ranker wants it without the biases that the
encoder puts on it. Items are computed in the order in which they came, as many as fit `max_batch_tokens`; the first of
a batch waits `max_wait_seconds` at most for others, and not at all where the batch is full or where it has waited as
long behind the one before it.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)
Compute = Callable[[list[Any]], Sequence[Any]]  # items of one kind -> a result for each, in their order


@dataclass(frozen=True)
class ComputedBatch:
    """What was computed at a time. waits: seconds that its items stood in the queue, one of each request."""

    kind: str
    items: int
    tokens: int
    waits: list[float]
    seconds: float


@dataclass(eq=False)
class _Request:
    """Items of one caller. missing: how many of them have no result yet."""

    future: asyncio.Future
    results: list[Any]
    missing: int
    queued_at: float = field(default_factory=time.monotonic)

    def finish(self, outcome: BaseException | None = None) -> None:
        """In the event loop: wakes the caller, unless it is gone."""
        if self.future.done():
            return
        if outcome is None:
            self.future.set_result(self.results)
        else:
            self.future.set_exception(outcome)


@dataclass(eq=False)
class _Item:
    """An item in the queue. number: which of its request's."""

    value: Any
    tokens: int
    request: _Request
    number: int


class Batcher:
    """A queue of items by kind, and the thread that computes them.

    compute: what to do with items of a kind. observe: called with every batch, in the thread.
    """

    def __init__(
        self, compute: Mapping[str, Compute], max_batch_tokens: int, max_wait_seconds: float,
        observe: Callable[[ComputedBatch], None] = lambda batch: None,
    ) -> None:  # fmt: skip
        self.compute, self.observe = compute, observe
        self.max_batch_tokens, self.max_wait_seconds = max_batch_tokens, max_wait_seconds
        self.queued_tokens = 0
        self._queues: dict[str, deque[_Item]] = {kind: deque() for kind in compute}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    async def submit(self, kind: str, values: Sequence[Any], tokens: Sequence[int]) -> list[Any]:
        """The result of each value; tokens: what each counts in a batch. Raises what computing them raised."""
        if not values:
            return []
        request = _Request(asyncio.get_running_loop().create_future(), [None] * len(values), len(values))
        with self._changed:
            assert not self._stopping, "nothing is computed any more"
            for number, (value, size) in enumerate(zip(values, tokens, strict=True)):
                self._queues[kind].append(_Item(value, size, request, number))
            self.queued_tokens += sum(tokens)
            self._changed.notify()
        return await request.future

    def stop(self, seconds: float) -> None:
        """Computes what is queued, for so many seconds at most."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            kind, items = taken
            if not items:
                continue
            started = time.monotonic()
            requests = list(dict.fromkeys(item.request for item in items))
            outcomes = self._outcomes(kind, items)
            waits = [started - request.queued_at for request in requests]
            tokens = sum(item.tokens for item in items)
            self.observe(ComputedBatch(kind, len(items), tokens, waits, time.monotonic() - started))
            _wake(outcomes)

    def _outcomes(self, kind: str, items: list[_Item]) -> dict[_Request, Exception | None]:
        """The requests that are done, with what went wrong or None.

        One request's fault is not the others': each is computed again by itself.
        """
        try:
            return self._computed(kind, items)
        except Exception as error:
            requests = list(dict.fromkeys(item.request for item in items))
            if len(requests) == 1:
                return {requests[0]: error}
        outcomes: dict[_Request, Exception | None] = {}
        for request in requests:
            outcomes |= self._outcomes(kind, [item for item in items if item.request is request])
        return outcomes

    def _computed(self, kind: str, items: list[_Item]) -> dict[_Request, None]:
        """Puts the results where they belong; the requests that have all of theirs now."""
        results = self.compute[kind]([item.value for item in items])
        finished: dict[_Request, None] = {}
        for item, result in zip(items, results, strict=True):
            item.request.results[item.number] = result
            item.request.missing -= 1
            if not item.request.missing:
                finished[item.request] = None
        return finished

    def _next(self) -> tuple[str, list[_Item]] | None:
        """The kind and items of the next batch, when it is time for it; None at the end."""
        with self._changed:
            while True:
                waiting = [kind for kind, queue in self._queues.items() if queue]
                if not waiting:
                    if self._stopping:
                        return None
                    self._changed.wait()
                    continue
                kind = min(waiting, key=lambda kind: self._queues[kind][0].request.queued_at)
                first = self._queues[kind][0].request.queued_at
                left = first + self.max_wait_seconds - time.monotonic()
                if left <= 0 or self._stopping or self.queued_tokens >= self.max_batch_tokens:
                    return kind, self._take(self._queues[kind])
                self._changed.wait(left)

    def _take(self, queue: deque[_Item]) -> list[_Item]:
        """The first items, one at least, as many as fit."""
        taken: list[_Item] = []
        tokens = 0
        while queue and (not taken or tokens + queue[0].tokens <= self.max_batch_tokens):
            item = queue.popleft()
            self.queued_tokens -= item.tokens
            if not item.request.future.done():  # else it failed, or its caller is gone
                taken.append(item)
                tokens += item.tokens
        return taken


def _wake(outcomes: Mapping[_Request, BaseException | None]) -> None:
    """Tells the callers, all of a batch by one call into their event loop."""

    def finish() -> None:
        for request, outcome in outcomes.items():
            request.finish(outcome)

    if outcomes:
        loop = next(iter(outcomes)).future.get_loop()
        try:
            loop.call_soon_threadsafe(finish)
        except RuntimeError:  # the loop was closed: nobody waits any more
            log.warning("%d requests were cut off", len(outcomes))
