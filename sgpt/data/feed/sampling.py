"""Which examples make up which batch: a function of the seed and the batch's number, and of nothing else.

So the position of a run is one integer, and a resumed run draws exactly the batches that it would have drawn. Batches
are cut from an endless stream of shuffled epochs, over all processes: every example comes exactly once an epoch, and
the batch at a border takes the end of one epoch and the beginning of the next. With `data.batches=hard` whole batches
of near queries are shuffled in place of single examples (grouping.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice

import numpy as np
import pyarrow.compute as pc

from sgpt.data.feed.collate import Batch, DrawnExample, make_batch
from sgpt.data.feed.embeddings import Embeddings
from sgpt.data.feed.grouping import Walk, order
from sgpt.data.feed.store import Examples, Tokens, column_parts, whole_column
from sgpt.runtime.errors import InputError
from sgpt.text.markers import Frame, Role

FILLING = 3  # version of the rule by which texts stand in for missing hard negatives


@dataclass(frozen=True)
class Source:
    """Examples of one source, with the markers (`Frame`) that are put around their texts.

    name: for messages. num_hard_negatives: H. weight: share of the batches, relative to the other sources'. symmetric:
    documents get the queries' markers. guide: a frozen model's embeddings of the queries and of the documents. walk:
    with data.batches=hard, the order of near queries that batches are cut from (grouping.py); without, they are random.
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

    def draw(self, number: int, epoch: int, seed: int) -> DrawnExample:
        """Which of its texts example `number` brings into a batch of this epoch: one positive and H hard negatives.

        Of several positives one is drawn, by a seed of example and epoch. Of more than H hard negatives each epoch
        takes the next H. Where there are fewer (msmarco with use_all_queries, labelled pairs), positives of other
        examples are used instead, none of which the data give as an answer to the query, or the query to it.
        """
        positives, negatives = self.examples.positives[number], self.examples.hard_negatives[number]
        missing = self.num_hard_negatives - len(negatives)
        positive = 0
        if len(positives) > 1 or missing > 0:  # a generator takes longer than all the rest
            generator = np.random.default_rng((seed, epoch, number))
            if len(positives) > 1:
                positive = int(generator.integers(len(positives)))
            if missing > 0:
                negatives = [*negatives, *self._positives_of_others(number, missing, generator)]
                if not negatives:  # a positive of its own would be trained against
                    raise InputError(
                        f"{self.name}: a query has no hard negative, and no other example has another positive to be "
                        "used instead; set data.num_hard_negatives=0, or add hard negatives to the data"
                    )
        first = epoch * self.num_hard_negatives
        hard = [negatives[(first + offset) % len(negatives)] for offset in range(self.num_hard_negatives)]
        documents = (positives[positive], *hard)
        others = tuple(text for index, text in enumerate(positives) if index != positive)
        return DrawnExample(
            self.examples, self.tokens, self.frames, self.examples.queries[number], documents, others, self.guide
        )  # fmt: skip

    @property
    def lacks_hard_negatives(self) -> bool:
        """Whether some example has fewer than are drawn for it."""
        parts = column_parts("hard_negatives", self.examples.hard_negatives)
        fewest = min(pc.min(pc.list_value_length(part)).as_py() for part in parts if len(part))
        return fewest < self.num_hard_negatives

    def _positives_of_others(self, example: int, number: int, generator: np.random.Generator) -> list[int]:
        """At most `number` texts for an example, as `draw` says; fewer where a hundred draws for each find no other."""
        query = self._hash_of(self.examples.queries[example])
        own = self._answers(query)

        def is_no_answer(text: int) -> bool:
            hashed = self._hash_of(text)
            return hashed not in own and query not in self._answers(hashed)

        rows = (int(generator.integers(len(self.examples))) for _ in range(100 * number))
        return list(islice(filter(is_no_answer, (self.examples.positives[row][0] for row in rows)), number))

    def _hash_of(self, text: int) -> int:
        """Equal texts of a collection may have several numbers."""
        return self.examples.hashes[text]

    def _answers(self, text: int) -> set[int]:
        """By its hash the text itself, and all that the examples give as answers to it."""
        rows, queries = self._rows_by_query
        first, behind = np.searchsorted(queries, text, "left"), np.searchsorted(queries, text, "right")
        answers = (answer for row in rows[first:behind] for answer in self.examples.positives[int(row)])
        return {text, *map(self._hash_of, answers)}

    @cached_property
    def _rows_by_query(self) -> tuple[np.ndarray, np.ndarray]:
        """The examples [n] in the order of their queries' hashes, and those hashes [n]."""
        hashes = whole_column("hash", self.examples.hashes)
        queries = hashes[whole_column("query", self.examples.queries)]
        rows = np.argsort(queries, kind="stable")
        return rows, queries[rows]


@dataclass
class Feed:
    """Batches of `queries_per_process` examples for each of `processes`.

    Sources take turns, as often as their weights say. A turn is a whole batch, so that in-batch negatives are of one
    kind; with `mixed` it is one example of a batch. turns: (source, how many turns it had before) of each turn so far.
    turn_counts: how many turns each source had so far.
    """

    sources: Sequence[Source]
    queries_per_process: int
    processes: int = 1
    seed: int = 0
    mixed: bool = False
    turns: list[tuple[int, int]] = field(default_factory=list, init=False, repr=False)
    turn_counts: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.turn_counts = [0] * len(self.sources)
        self._order = lru_cache(maxsize=2 * len(self.sources))(self._make_order)  # this epoch's and the next one's
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
        if self.mixed:  # every query is a turn
            first = (batch * self.processes + rank) * q
            positions = [self._turn(turn) for turn in range(first, first + q)]
        else:  # a batch over all processes is one
            source, turn = self._turn(batch)
            first = (turn * self.processes + rank) * q
            positions = [(source, position) for position in range(first, first + q)]
        drawn = []
        for source, position in positions:  # in the source's endless stream of epochs
            epoch, position_in_epoch = divmod(position, len(self.sources[source].examples))
            drawn.append((source, int(self._order(source, epoch)[position_in_epoch]), epoch))
        return drawn

    def batch(self, number: int, rank: int) -> Batch:
        """Batch `number`, counted over the whole run, of one process."""
        return make_batch(self.draws(number, rank))

    def draws(self, number: int, rank: int) -> list[DrawnExample]:
        """Which texts that batch has, query by query."""
        drawn = self.drawn_examples(number, rank)
        return [self.sources[source].draw(example, epoch, self.seed) for source, example, epoch in drawn]

    def _make_order(self, source: int, epoch: int) -> np.ndarray:
        """The examples of a source as an epoch draws them, [n]."""
        walked = self.sources[source].walk
        if walked is not None:
            return order(walked, self.queries_in_total, self.seed, source, epoch)
        return np.random.default_rng((self.seed, source, epoch)).permutation(len(self.sources[source].examples))

    def _turn(self, number: int) -> tuple[int, int]:
        """Which source has turn `number`, and how many it had before: always the one furthest behind its weight."""
        if len(self.sources) == 1:
            return 0, number
        total = sum(source.weight for source in self.sources)
        while len(self.turns) <= number:
            turns = len(self.turns) + 1
            counted = zip(self.sources, self.turn_counts, strict=True)
            behind = [source.weight / total * turns - count for source, count in counted]
            source = behind.index(max(behind))
            self.turns.append((source, self.turn_counts[source]))
            self.turn_counts[source] += 1
        return self.turns[number]
