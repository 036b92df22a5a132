"""What looks wrong in a run that can be trained: one sentence each, with what it does and what to do."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sgpt.data.feed.overlap import Overlap, alike_positives, answers_among_hard_negatives, known_texts, training_hashes
from sgpt.data.feed.sampling import Feed
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import Sets
from sgpt.text.markers import ROLES, Frame, Role
from sgpt.text.special_tokens import token_warnings
from sgpt.text.tokens import TokenLists, content_ids

SAMPLED = 256  # examples of the first batches whose texts are looked at


@dataclass(frozen=True)
class SampledTexts:
    """Queries and positives of the first batches.

    rows: their token ids with what stands around them, uncut. truncated: share of each role's texts that are longer
    than their limit, 0 to 1.
    """

    texts: Sequence[str]
    rows: TokenLists
    truncated: dict[Role, float]
    examples: int

    @classmethod
    def of(cls, feed: Feed, tokenizer) -> "SampledTexts":
        batches = (feed.drawn_examples(number, 0) for number in range(math.ceil(SAMPLED / feed.queries_per_process)))
        drawn = [*dict.fromkeys((source, example) for batch in batches for source, example, _ in batch)][:SAMPLED]
        texts: list[str] = []
        rows: TokenLists = []
        truncated: dict[Role, float] = {}
        for role in ROLES:
            of_role, frames = zip(*(_text_of(feed, *number, role) for number in drawn), strict=True)
            contents = [*content_ids(of_role, tokenizer)]
            pairs = [*zip(contents, frames, strict=True)]
            truncated[role] = sum(len(ids) > frame.content_tokens for ids, frame in pairs) / len(pairs)
            texts += of_role
            rows += [[*frame.before, *ids, *frame.after] for ids, frame in pairs]
        return cls(texts, rows, truncated, len(drawn))


def _text_of(feed: Feed, source: int, number: int, role: Role) -> tuple[str, Frame]:
    example = feed.sources[source].examples[number]
    return example.query if role == "query" else example.positive, feed.sources[source].frames[role]


def trap_warnings(encoder: Encoder, feed: Feed, sampled: SampledTexts) -> Iterator[str]:
    """Of the texts that are trained on."""
    frames = feed.sources[0].frames
    yield from token_warnings(sampled.texts, sampled.rows, frames, encoder.tokenizer, encoder.trunk.config)
    for source in feed.sources:
        if source.num_hard_negatives and (overlap := answers_among_hard_negatives(source)).count:
            yield (
                f"{source.name}: {overlap.count:,} hard negatives are a positive or the text of their own query, "
                f"{_shown(overlap)}; they always count as negatives, so the model is taught both; remove them"
            )
        if (overlap := alike_positives(source)).count:
            yield (
                f"{source.name}: {overlap.count:,} positives equal another one but for case, blanks or forms of "
                f"letters, {_shown(overlap)}; in one batch they are negatives of each other's queries; make them equal"
            )


def test_sets_in_training(feed: Feed, sets: dict[str, Sets]) -> Iterator[tuple[str, bool]]:
    """Of each set that holds texts which are trained on, how many; and whether results of a test set are of these.

    sets: by what they are for, "test" and "dev".
    """
    if not any(of_purpose.retrieval or of_purpose.sts for of_purpose in sets.values()):
        return
    known = training_hashes(feed.sources)
    for purpose, of_purpose in sets.items():
        for dataset in of_purpose.retrieval:
            queries = [dataset.queries[query] for query in dataset.qrels]
            texts = {"queries": queries, "documents": [*dataset.corpus.values()]}
            yield from _known_warning(dataset.name, purpose, texts, known)
        for pairs in of_purpose.sts:
            yield from _known_warning(pairs.name, purpose, {"texts": [*pairs.first, *pairs.second]}, known)


def _known_warning(
    name: str, purpose: str, texts: dict[str, list[str]], known: np.ndarray
) -> Iterator[tuple[str, bool]]:  # fmt: skip
    """texts: by what they are in the set."""
    overlaps = {kind: known_texts(of_kind, known) for kind, of_kind in texts.items()}
    told = [f"{overlap.count:,} of {len(texts[kind]):,} {kind}" for kind, overlap in overlaps.items() if overlap.count]
    if told:
        first = next(overlap for overlap in overlaps.values() if overlap.count)
        asked = any(overlap.count for kind, overlap in overlaps.items() if kind != "documents")
        then = "its results are then not of new texts; take them out of the data"
        if not asked:
            then = "where training and test share a corpus that is so, and its results are of new queries"
        yield (
            f"{name}: {' and '.join(told)} of this {purpose} set are in the training data, {_shown(first)}; {then}",
            asked and purpose == "test",
        )


def _shown(overlap: Overlap) -> str:
    return f"for example {overlap.example!r:.80}"
