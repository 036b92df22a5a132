"""Texts that stand where they should not: positives among hard negatives, a test set inside the training data.

Texts are known by the hashes of what is left of them without case, blanks and forms of letters (Unicode's NFKC), in
which copies of a text differ more often than in anything else. The hashes of a store are made once and kept next to it.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from sgpt.data.feed.sampling import Source
from sgpt.data.feed.store import Examples, column_parts, text_batches, text_hash, texts_named, whole_column
from sgpt.runtime.files import make_once
from sgpt.runtime.progress import progress_bar


@dataclass(frozen=True)
class Overlap:
    """How many texts stand where they should not, and one of them; "" where there are none."""

    count: int
    example: str = ""


def normalised_hash(text: str) -> int:
    """A hash, signed 64 bits, that is the same for texts which differ in case, blanks and forms of letters alone."""
    return text_hash(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def normalised_hashes(examples: Examples) -> np.ndarray:
    """`normalised_hash` of every text of the store, [texts] int64."""
    if examples.folder is None:
        return np.array([normalised_hash(text) for text in examples.texts], dtype=np.int64)
    file = examples.folder / "normalised.npy"
    make_once(file, file.is_file, lambda: _write_hashes(examples, file))
    return np.load(file, mmap_mode="r")


def _write_hashes(examples: Examples, file: Path) -> None:
    hashes = np.empty(len(examples.texts), dtype=np.int64)
    start = 0
    with progress_bar("hashing texts", len(hashes)) as advance:
        for texts in text_batches(examples.texts):
            hashes[start : start + len(texts)] = [normalised_hash(text) for text in texts]
            start += len(texts)
            advance(len(texts))
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as out:
        np.save(out, hashes)
    temporary.replace(file)


def answers_among_hard_negatives(source: Source) -> Overlap:
    """Hard negatives that are their query's own text, or a positive of it in this or another row.

    They always count as negatives, so the model is taught both.
    """
    examples = source.examples
    different, numbers = np.unique(normalised_hashes(examples), return_inverse=True)
    queries = numbers[whole_column("query", examples.queries)]
    # one number for each pair of a query and a text; int64 has room for three thousand million different texts
    own = [queries * len(different) + queries]
    for asked, texts in _links(queries, "positives", examples.positives):
        own.append(asked * len(different) + numbers[texts])
    answers = np.unique(np.concatenate(own))
    count, example = 0, ""
    for asked, texts in _links(queries, "hard_negatives", examples.hard_negatives):
        wrong = np.isin(asked * len(different) + numbers[texts], answers)
        if wrong.any() and not count:
            example = examples.texts[int(texts[wrong.argmax()])]
        count += int(wrong.sum())
    return Overlap(count, example)


def alike_positives(source: Source) -> Overlap:
    """Positives that differ from an earlier one in case, blanks or forms of letters alone.

    Equal texts of a batch are no negatives of each other; these are.
    """
    examples = source.examples
    rows = texts_named("positives", examples.positives)
    exact = whole_column("hash", examples.hashes)[rows]
    rows = rows[np.unique(exact, return_index=True)[1]]  # one row for each different text
    normalised = normalised_hashes(examples)[rows]
    _, first, counts = np.unique(normalised, return_index=True, return_counts=True)
    twice = first[counts > 1]
    example = examples.texts[int(rows[twice[0]])] if len(twice) else ""
    return Overlap(len(rows) - len(first), example)


def training_hashes(sources: Sequence[Source]) -> np.ndarray:
    """Sorted `normalised_hash` of every text that training sees."""
    hashes = []
    for source in sources:
        examples = source.examples
        rows = [whole_column("query", examples.queries), texts_named("positives", examples.positives)]
        if source.num_hard_negatives:
            rows.append(texts_named("hard_negatives", examples.hard_negatives))
        hashes.append(normalised_hashes(examples)[np.unique(np.concatenate(rows))])
    return np.unique(np.concatenate(hashes))


def known_texts(texts: Sequence[str], known: np.ndarray) -> Overlap:
    """Those of the texts that are among `known`, which `training_hashes` gave."""
    hashes = np.array([normalised_hash(text) for text in texts], dtype=np.int64)
    inside = np.flatnonzero(np.isin(hashes, known))
    return Overlap(len(inside), texts[int(inside[0])] if len(inside) else "")


def _links(queries: np.ndarray, name: str, column: Sequence) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(query, row of the linked text) of every link, some examples at a time. queries: of each example."""
    start = 0
    for part in column_parts(name, column):
        each = pc.list_value_length(part).to_numpy()
        yield queries[start : start + len(part)].repeat(each), part.flatten().to_numpy()
        start += len(part)
