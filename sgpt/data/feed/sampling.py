"""Which examples make up which batch: a function of the seed and the batch's number, and of nothing else.

So the position of a run is one integer, and a resumed run draws exactly the batches that it would have drawn. Batches are
cut from an endless stream of shuffled epochs, over all processes: every example comes exactly once an epoch, and the
batch at a border takes the end of one epoch and the beginning of the next. `data.batches=hard` shuffles runs of near
queries in place of examples (grouping.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

import numpy as np

from sgpt.data.feed.collate import Batch, Drawn, batch_of
from sgpt.data.feed.embeddings import Embeddings
from sgpt.data.feed.grouping import Walk, order
from sgpt.data.feed.store import Examples, Tokens
from sgpt.runtime.errors import InputError
from sgpt.text.markers import Frame, Role


@dataclass(frozen=True)
class Source:
    """Examples with the frames their texts are put in. weight: share of the batches, relative to the other sources'.

    num_hard_negatives: H. name: for messages. symmetric: documents are of the queries' kind. guide: a frozen model's embeddings
    of the queries and of the documents. walk: batches are runs of it, else they are random.
    """

    name: str
    examples: Examples
    tokens: Tokens
    frames: dict[Role, Frame]
    num_hard_negatives: int = 0
    weight: float = 1.0
    symmetric: bool = False
    guide: dict[Role, Embeddings] | None = None
    walk: Walk | None = None

    def draw(self, number: int, epoch: int, seed: int) -> Drawn:
        """One positive of several, seeded by example and epoch; of more than H hard negatives the next H, epoch by epoch.

        Where a query has fewer than H hard negatives (msmarco with use_all_queries, labelled pairs), positives of others are used instead.
        """
        positives, negatives = self.examples.positives[number], self.examples.hard_negatives[number]
        missing = self.num_hard_negatives - len(negatives)
        draw = np.random.default_rng((seed, epoch, number)) if len(positives) > 1 or missing > 0 else None
        chosen = int(draw.integers(len(positives))) if len(positives) > 1 else 0
        if missing > 0:
            others = (self.examples.positives[int(draw.integers(len(self.examples)))][0] for _ in range(100 * missing))
            negatives = [*negatives, *islice((text for text in others if text not in positives), missing)] or positives
        first = epoch * self.num_hard_negatives
        hard = (negatives[(first + place) % len(negatives)] for place in range(self.num_hard_negatives))
        others = tuple(text for place, text in enumerate(positives) if place != chosen)
        return Drawn(self.examples, self.tokens, self.frames, self.examples.queries[number], (positives[chosen], *hard), others, self.guide)


@dataclass
class Feed:
    """Batches of `queries_per_process` examples for each of `processes`.

    A batch is of one source, so that in-batch negatives are of its kind; `mixed` lets every example be of another one.
    """

    sources: Sequence[Source]
    queries_per_process: int
    processes: int = 1
    seed: int = 0
    mixed: bool = False
    turns: list[tuple[int, int]] = field(default_factory=list, init=False, repr=False)
    had: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.had = [0] * len(self.sources)
        for source in self.sources:
            if len(source.examples) < self.queries_in_total and not (self.mixed and len(self.sources) > 1):
                raise InputError(
                    f"{source.name}: {len(source.examples)} training examples do not fill one batch of {self.queries_per_process} queries on each of "
                    f"{self.processes} processes; lower trainer.queries_per_process or give more data"
                )
        if self.mixed and len({source.num_hard_negatives for source in self.sources}) > 1:
            raise InputError("data.mixed=true puts examples of all sources into one batch, so all need the same num_hard_negatives; set it so in each")

    @property
    def queries_in_total(self) -> int:
        return self.queries_per_process * self.processes

    def share(self, source: Source) -> float:
        """Of the batches, or of the queries where batches are mixed."""
        return source.weight / sum(other.weight for other in self.sources)

    @property
    def batches_per_epoch(self) -> float:
        return sum(len(source.examples) for source in self.sources) / self.queries_in_total

    def rows(self, batch: int, rank: int) -> list[tuple[int, int, int]]:
        """(source, example, epoch) of each query of one process in batch number `batch`, counted over the whole run."""
        q = self.queries_per_process
        if self.mixed:
            slots = [self._turn(slot) for slot in range((batch * self.processes + rank) * q, (batch * self.processes + rank + 1) * q)]
        else:
            source, turn = self._turn(batch)
            slots = [(source, slot) for slot in range((turn * self.processes + rank) * q, (turn * self.processes + rank + 1) * q)]
        placed = [(source, *divmod(slot, len(self.sources[source].examples))) for source, slot in slots]
        return [(source, int(self._order(source, epoch)[place]), epoch) for source, epoch, place in placed]

    def batch(self, number: int, rank: int) -> Batch:
        return batch_of([self.sources[source].draw(example, epoch, self.seed) for source, example, epoch in self.rows(number, rank)])

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """The examples of a source as an epoch draws them, [n]."""
        walked = self.sources[source].walk
        if walked is not None:
            return order(walked, self.queries_in_total, self.seed, source, epoch)
        return _shuffled(len(self.sources[source].examples), self.seed, source, epoch)

    def _turn(self, number: int) -> tuple[int, int]:
        """Which source has turn `number`, and how many it has had: always the one that is furthest behind its weight."""
        if len(self.sources) == 1:
            return 0, number
        total = sum(source.weight for source in self.sources)
        while len(self.turns) <= number:
            behind = [source.weight / total * (len(self.turns) + 1) - had for source, had in zip(self.sources, self.had, strict=True)]
            chosen = behind.index(max(behind))
            self.turns.append((chosen, self.had[chosen]))
            self.had[chosen] += 1
        return self.turns[number]


@lru_cache(maxsize=8)
def _shuffled(size: int, seed: int, source: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, source, epoch)).permutation(size)
