"""The next batch is prepared while this one is computed."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


def prefetch(make: Callable[[Item], Prepared], items: Iterable[Item]) -> Iterator[Prepared]:
    """make(item) of every item, in order, one item ahead in a thread: torch lets other threads work while it computes.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting = None
        for item in items:
            coming = pool.submit(make, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
