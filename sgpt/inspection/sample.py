"""What needs the texts themselves and is measured on a random sample: lengths, scripts, vocabulary."""

import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np

from sgpt.data.feed.sampling import Source
from sgpt.inspection.census import marker_counts
from sgpt.runtime.progress import progress_bar
from sgpt.text.markers import ROLES, Role
from sgpt.text.tokens import content_ids

EXAMPLES_AT_A_TIME = 64  # of the sample; their texts are tokenised whole, however long they are


@dataclass(frozen=True)
class Lengths:
    """tokens [texts]: of sampled texts of one role before truncation, markers included.

    limit: what of them the model sees.
    """

    tokens: np.ndarray
    limit: int

    @property
    def truncated(self) -> float:
        """Share of the texts."""
        return float((self.tokens > self.limit).mean())

    def __str__(self) -> str:
        middle, high = np.percentile(self.tokens, (50, 95))
        return f"{self.tokens.mean():.1f} / {middle:.0f} / {high:.0f} / {self.tokens.max()}"


@dataclass(frozen=True)
class Sample:
    """Of one source. scripts: share of the letters, largest first.

    vocabulary: entries that occur in what the model sees of the texts.
    """

    examples: int
    lengths: dict[Role, Lengths]
    scripts: dict[str, float]
    vocabulary: int


def sample(source: Source, tokenizer, num_examples: int, seed: int) -> Sample:
    """The texts are tokenised again: those in the store are cut."""
    sampled = np.random.default_rng(seed).choice(
        len(source.examples), min(num_examples, len(source.examples)), replace=False
    )
    lengths: dict[Role, list[int]] = {role: [] for role in ROLES}
    characters: Counter[str] = Counter()
    occurs = np.zeros(len(tokenizer), dtype=bool)
    with progress_bar(f"measuring {source.name}", len(sampled)) as advance:
        for start in range(0, len(sampled), EXAMPLES_AT_A_TIME):
            part = np.sort(sampled)[start : start + EXAMPLES_AT_A_TIME].tolist()
            drawn = [source.draw(number, 0, seed) for number in part]
            numbers = {
                "query": [one.query for one in drawn],
                "document": [text for one in drawn for text in one.documents],
            }
            for role in ROLES:
                texts = [source.examples.texts[number] for number in numbers[role]]
                ids = list(content_ids(texts, tokenizer))
                lengths[role] += map(len, ids)
                occurs[[token for row in ids for token in row[: source.frames[role].content_tokens]]] = True
                characters.update("".join(texts))
            advance(len(drawn))
    around = {role: marker_counts(frame) for role, frame in source.frames.items()}
    measured = {
        role: Lengths(np.array(lengths[role]) + around[role], source.frames[role].content_tokens + around[role])
        for role in ROLES
    }
    return Sample(len(sampled), measured, scripts(characters), int(occurs.sum()))


def scripts(characters: Counter[str]) -> dict[str, float]:
    """Share of the letters by script, largest first: the first word of a letter's Unicode name is its script."""
    letters: Counter[str] = Counter()
    for character, number in characters.items():
        if character.isalpha():
            letters[unicodedata.name(character, "UNNAMED").split()[0]] += number
    return {script: number / letters.total() for script, number in letters.most_common()}
