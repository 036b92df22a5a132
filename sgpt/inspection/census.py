"""What is counted over all examples of a source, without reading their texts twice."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from sgpt.data.feed.sampling import Source
from sgpt.data.feed.store import column_parts, whole_column
from sgpt.runtime.progress import progress_bar
from sgpt.text.markers import Frame

MOST_POSITIVES_COUNTED = 4  # 1, 2, 3, and so many or more


@dataclass(frozen=True)
class Counts:
    """Of one source, over all of its examples; equal texts are known by their hashes.

    repeated_*: those that have the text of an earlier one. queries_by_positives: different queries with 1, 2, 3, 4 or
    more different positives, over all rows that have the query. hard_negatives: fewest, median and most an example.
    positives_asked: positives that are the query of another example. contrary_negatives: hard negatives that are a
    positive of the same query. short_of_negatives: examples with fewer than H. short_texts: of one character or none.
    tokens: an epoch's, markers included (expected, where an epoch draws).
    """

    examples: int
    texts: int
    positives: int
    repeated_queries: int
    repeated_positives: int
    queries_by_positives: tuple[int, ...]
    hard_negatives: tuple[int, float, int]
    positives_asked: int
    contrary_negatives: int
    short_of_negatives: int
    short_texts: int
    short_text: str | None
    tokens: float


def count_source(source: Source) -> Counts:
    census = _Census(source)
    with progress_bar(f"counting {source.name}", 2 * len(source.examples) + len(source.examples.texts)) as advance:
        positives, negatives, texts = census.positives(advance), census.hard_negatives(advance), census.texts(advance)
    repeated = len(source.examples) - int(census.asked.sum())
    return Counts(
        examples=len(source.examples),
        repeated_queries=repeated,
        tokens=float(census.tokens),
        **positives,
        **negatives,
        **texts,
    )


class _Census:
    """What is known of one source so far.

    Texts are known by their hashes and numbered anew: equal texts share one number.

    numbers [texts of the store]. queries [N]. lengths: by role, [different texts], in the frame and cut. asked, used:
    [different texts], is it a query, is it of any example. pairs: query and positive as one number each, sorted.
    """

    def __init__(self, source: Source) -> None:
        self.examples, self.num_hard_negatives = source.examples, source.num_hard_negatives
        different, self.numbers = np.unique(whole_column("hash", source.examples.hashes), return_inverse=True)
        self.queries = self.numbers[whole_column("query", source.examples.queries)]
        content = np.zeros(len(different), dtype=np.int64)
        content[self.numbers] = _list_lengths("ids", source.tokens.ids)
        self.lengths = {
            role: np.minimum(content, frame.content_tokens) + marker_counts(frame)
            for role, frame in source.frames.items()
        }
        self.asked = np.zeros(len(different), dtype=bool)
        self.asked[self.queries] = True
        self.used, self.pairs = self.asked.copy(), np.zeros(0, dtype=np.int64)
        self.tokens, self.positive_tokens = self.lengths["query"][self.queries].sum(), 0.0

    def positives(self, advance: Callable[[float], None]) -> dict:
        answering, total, asked, pairs = np.zeros_like(self.used), 0, 0, []
        for queries, texts, shares in self._links("positives", self.examples.positives, advance):
            answering[texts] = True
            total += len(texts)
            asked += int((self.asked[texts] & (queries != texts)).sum())
            self.positive_tokens += (shares * self.lengths["document"][texts]).sum()
            pairs.append(self._pairs(queries, texts))
        self.used |= answering
        self.tokens += self.positive_tokens
        self.pairs = np.unique(np.concatenate(pairs))
        each = np.unique(self.pairs // len(self.used), return_counts=True)[1].clip(max=MOST_POSITIVES_COUNTED)
        by_positives = tuple(np.bincount(each, minlength=MOST_POSITIVES_COUNTED + 1)[1:].tolist())
        return {
            "positives": total,
            "repeated_positives": total - int(answering.sum()),
            "positives_asked": asked,
            "queries_by_positives": by_positives,
        }

    def hard_negatives(self, advance: Callable[[float], None]) -> dict:
        contrary, tokens = 0, 0.0
        for queries, texts, shares in self._links("hard_negatives", self.examples.hard_negatives, advance):
            self.used[texts] = True
            contrary += int(_among(self.pairs, self._pairs(queries, texts)).sum())
            tokens += (np.minimum(1, self.num_hard_negatives * shares) * self.lengths["document"][texts]).sum()
        each = _list_lengths("hard_negatives", self.examples.hard_negatives)
        missing = (self.num_hard_negatives - each).clip(min=0)
        # where an example has too few, positives of others are used instead
        tokens += missing.mean() * self.positive_tokens
        self.tokens += tokens
        lengths = (int(each.min()), float(np.median(each)), int(each.max()))
        return {
            "hard_negatives": lengths,
            "contrary_negatives": contrary,
            "short_of_negatives": int((missing > 0).sum()),
        }

    def texts(self, advance: Callable[[float], None]) -> dict:
        """After the others: only texts that an example uses count."""
        short, first, start = np.zeros_like(self.used), None, 0
        for part in column_parts("text", self.examples.texts):
            numbers = self.numbers[start : start + len(part)]
            places = np.flatnonzero(
                pc.less_equal(pc.utf8_length(pc.utf8_trim_whitespace(part)), 1).to_numpy(zero_copy_only=False)
                & self.used[numbers]
            )
            short[numbers[places]] = True
            first = part[int(places[0])].as_py() if first is None and len(places) else first
            start += len(part)
            advance(len(part))
        return {"texts": int(self.used.sum()), "short_texts": int(short.sum()), "short_text": first}

    def _links(
        self, name: str, column: Sequence, advance: Callable[[float], None]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(query, linked text, 1 / texts linked to its example) of every link, some examples at a time."""
        start = 0
        for part in column_parts(name, column):
            each = pc.list_value_length(part).to_numpy()
            yield (
                self.queries[start : start + len(part)].repeat(each),
                self.numbers[part.flatten().to_numpy()],
                np.repeat(1 / each.clip(min=1), each),
            )
            start += len(part)
            advance(len(part))

    def _pairs(self, queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """One number each; int64 has room for three thousand million different texts."""
        return queries * len(self.used) + texts


def _list_lengths(name: str, column: Sequence) -> np.ndarray:
    return np.concatenate([pc.list_value_length(part).to_numpy() for part in column_parts(name, column)])


def _among(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of the values are there: [values] boolean. `ordered` is not empty."""
    return ordered[np.searchsorted(ordered, values).clip(max=len(ordered) - 1)] == values


def marker_counts(frame: Frame) -> int:
    return len(frame.before) + len(frame.after)
