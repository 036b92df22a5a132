"""Which examples make up which batch: a function of the seed and the batch's number, and of nothing else.

So the position of a run is one integer, and a resumed run draws exactly the batches that it would have drawn. Batches
are cut from an endless stream of shuffled epochs, over all processes: every example comes exactly once an epoch, and
the batch at a border takes the end of one epoch and the beginning of the next. `data.batches=hard` shuffles runs of
near queries in place of examples (grouping.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

import numpy as np

from sgpt.data.feed.collate import Batch, Draw, make_batch
from sgpt.data.feed.embeddings import Embeddings
from sgpt.data.feed.grouping import Walk, order
from sgpt.data.feed.store import Examples, Tokens
from sgpt.runtime.errors import InputError
from sgpt.text.markers import Frame, Role


@dataclass(frozen=True)
class Source:
    """Examples with the frames their texts are put in.

    name: for messages. num_hard_negatives: H. weight: share of the batches, relative to the other sources'. symmetric:
    documents are of the queries' kind. guide: a frozen model's embeddings of the queries and of the documents. walk:
    batches are runs of it, else they are random.
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

    def draw(self, number: int, epoch: int, seed: int) -> Draw:
        """One positive of several, by a seed of example and epoch; of more than H hard negatives the next H each epoch.

        Where a query has fewer than H hard negatives (msmarco with use_all_queries, labelled pairs), positives of other
        examples are used instead.
        """
        positives, negatives = self.examples.positives[number], self.examples.hard_negatives[number]
        missing = self.num_hard_negatives - len(negatives)
        positive = 0
        if len(positives) > 1 or missing > 0:  # a generator takes longer than all the rest
            generator = np.random.default_rng((seed, epoch, number))
            if len(positives) > 1:
                positive = int(generator.integers(len(positives)))
            if missing > 0:
                negatives = [*negatives, *self._positives_of_others(positives, missing, generator)]
                if not negatives:  # a positive of its own would be trained against
                    raise InputError(
                        f"{self.name}: a query has no hard negative, and no other example has another positive to be "
                        "used instead; set data.num_hard_negatives=0, or give hard negatives"
                    )
        first = epoch * self.num_hard_negatives
        hard = [negatives[(first + offset) % len(negatives)] for offset in range(self.num_hard_negatives)]
        documents = (positives[positive], *hard)
        others = tuple(text for index, text in enumerate(positives) if index != positive)
        return Draw(
            self.examples, self.tokens, self.frames, self.examples.queries[number], documents, others, self.guide
        )  # fmt: skip

    def _positives_of_others(self, own: Sequence[int], number: int, generator: np.random.Generator) -> list[int]:
        """At most `number` texts that are none of one's `own`; fewer where a hundred draws for each find no other."""
        rows = (int(generator.integers(len(self.examples))) for _ in range(100 * number))
        texts = (self.examples.positives[row][0] for row in rows)
        return list(islice((text for text in texts if text not in own), number))


@dataclass
class Feed:
    """Batches of `queries_per_process` examples for each of `processes`.

    A batch is of one source, so that in-batch negatives are of its kind; `mixed` lets every example be of another one.
    turns: (source, turns that it had before) of each turn so far. had: turns of each source so far.
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
                    f"{source.name}: {len(source.examples)} training examples do not fill one batch of "
                    f"{self.queries_per_process} queries on each of {self.processes} processes; "
                    "lower trainer.queries_per_process or give more data"
                )
        if self.mixed and len({source.num_hard_negatives for source in self.sources}) > 1:
            raise InputError(
                "data.mixed=true puts examples of all sources into one batch, so all need the same num_hard_negatives; "
                "set it so in each"
            )

    @property
    def queries_in_total(self) -> int:
        return self.queries_per_process * self.processes

    def share(self, source: Source) -> float:
        """Of the batches, or of the queries where batches are mixed; from 0 to 1."""
        return source.weight / sum(other.weight for other in self.sources)

    @property
    def batches_per_epoch(self) -> float:
        return sum(len(source.examples) for source in self.sources) / self.queries_in_total

    def drawn_examples(self, batch: int, rank: int) -> list[tuple[int, int, int]]:
        """(source, example, epoch) of each query of one process in batch number `batch`, counted over the whole run."""
        q = self.queries_per_process
        if self.mixed:  # every query has a turn
            first = (batch * self.processes + rank) * q
            slots = [self._turn(slot) for slot in range(first, first + q)]
        else:  # a batch over all processes has one
            source, turn = self._turn(batch)
            first = (turn * self.processes + rank) * q
            slots = [(source, slot) for slot in range(first, first + q)]
        rows = []
        for source, slot in slots:  # slots of a source are counted through all its epochs
            epoch, position = divmod(slot, len(self.sources[source].examples))
            rows.append((source, int(self._order(source, epoch)[position]), epoch))
        return rows

    def batch(self, number: int, rank: int) -> Batch:
        """Batch `number`, counted over the whole run, of one process."""
        rows = self.drawn_examples(number, rank)
        return make_batch([self.sources[source].draw(example, epoch, self.seed) for source, example, epoch in rows])

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """The examples of a source as an epoch draws them, [n]."""
        walked = self.sources[source].walk
        if walked is not None:
            return order(walked, self.queries_in_total, self.seed, source, epoch)
        return _shuffled(len(self.sources[source].examples), self.seed, source, epoch)

    def _turn(self, number: int) -> tuple[int, int]:
        """Which source has turn `number`, and how many it has had: always the one furthest behind its weight."""
        if len(self.sources) == 1:
            return 0, number
        total = sum(source.weight for source in self.sources)
        while len(self.turns) <= number:
            turns = len(self.turns) + 1
            behind = [source.weight / total * turns - had for source, had in zip(self.sources, self.had, strict=True)]
            source = behind.index(max(behind))
            self.turns.append((source, self.had[source]))
            self.had[source] += 1
        return self.turns[number]


@lru_cache(maxsize=8)
def _shuffled(size: int, seed: int, source: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, source, epoch)).permutation(size)
