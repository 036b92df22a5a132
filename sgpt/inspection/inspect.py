"""Training data, looked at before compute is spent on it: counts, lengths, scripts, and the first batches as the model
will see them.

What needs numbers and hashes only is counted over all examples, from the columns of the store and some rows at a time:
a few arrays of one number an example are all that memory has to hold. What needs the texts themselves (lengths before
truncation, scripts, vocabulary) is measured on a sample of examples, each drawn as its first epoch would draw it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from sgpt.data.feed.collate import Batch
from sgpt.data.feed.sampling import Feed, Source
from sgpt.decoder.packing import distinct
from sgpt.inspection.census import MOST_POSITIVES_COUNTED, Counts, count_source
from sgpt.inspection.sample import Sample, sample
from sgpt.runtime.values import COUNT, COUNT_OR_NONE, check_ranges
from sgpt.text.markers import Role
from sgpt.training.config import TrainConfig
from sgpt.training.negatives import Negatives

QUERIES_PER_PASS = 256  # of a batch, when its duplicates are looked for: [256, C] at a time
QUERIES_ON_PAGE, QUERIES_ON_TERMINAL = 256, 3  # of each shown batch
SCRIPTS_SHOWN = 4
MOST_TRUNCATED, MOST_REPEATED, FEWEST_BATCHES = 0.2, 0.1, 10  # past these there is a warning
PLURAL: dict[Role, str] = {"query": "queries", "document": "documents"}


@dataclass(frozen=True)
class InspectedQuery:
    """Decoded as the model gets them, with their tokens: the query, its positive, its hard negatives.

    ignored: candidates that are no negatives.
    """

    query: tuple[int, str]
    documents: list[tuple[int, str]]
    ignored: list[int]


@dataclass(frozen=True)
class InspectedBatch:
    """queries: the first of them. left_out: pairs of a query and an in-batch negative that are none, being duplicates.

    tokens: of all texts; computed: of the different ones; padded: when queries and documents are each padded to the
    longest.
    """

    number: int
    num_queries: int
    num_documents: int
    queries: list[InspectedQuery]
    left_out: int
    tokens: int
    computed: int
    padded: int


@dataclass(frozen=True)
class Inspection:
    """counts, samples: of each source of the feed. steps: of the optimizer, in the whole run."""

    feed: Feed
    counts: list[Counts]
    samples: list[Sample]
    batches: list[InspectedBatch]
    steps: int
    batches_per_step: int
    vocabulary: int


def inspect_feed(
    feed: Feed, tokenizer, *, num_examples: int, num_batches: int, steps: int, batches_per_step: int = 1
) -> Inspection:
    """num_examples: of each source's sample. num_batches: shown. The feed's seed is the sample's."""
    return Inspection(
        feed=feed,
        counts=[count_source(source) for source in feed.sources],
        samples=[sample(source, tokenizer, num_examples, feed.seed) for source in feed.sources],
        batches=[inspect_batch(number, feed.batch(number, 0), tokenizer) for number in range(num_batches)],
        steps=steps,
        batches_per_step=batches_per_step,
        vocabulary=len(tokenizer),
    )


def inspect_batch(number: int, batch: Batch, tokenizer) -> InspectedBatch:
    ignored = [row for part in _ignored(batch) for row in part]
    r = batch.documents_per_query
    queries = [
        InspectedQuery(
            _decoded(batch.queries[q], tokenizer),
            [_decoded(ids, tokenizer) for ids in batch.documents[q * r : (q + 1) * r]],
            ignored[q],
        )
        for q in range(min(len(batch.queries), QUERIES_ON_PAGE))
    ]
    padded = sum(len(rows) * max(map(len, rows)) for rows in (batch.queries, batch.documents))
    computed = sum(map(len, distinct([*batch.queries, *batch.documents])[0]))
    return InspectedBatch(
        number,
        len(batch.queries),
        len(batch.documents),
        queries,
        sum(map(len, ignored)),
        batch.num_tokens,
        computed,
        padded,
    )


def _ignored(batch: Batch) -> Iterator[list[list[int]]]:
    """The loss' own judgement of each query: numbers of the candidates that are left out."""
    negatives = Negatives.of(batch, torch.device("cpu"))
    for start in range(0, len(batch.queries), QUERIES_PER_PASS):
        ignored = negatives.duplicates(slice(start, start + QUERIES_PER_PASS))
        yield [row.nonzero()[:, 0].tolist() for row in ignored]


def _decoded(ids: list[int], tokenizer) -> tuple[int, str]:
    """(tokens, text on one line)."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return len(ids), "".join(
        character if character.isprintable() else "⏎" if character == "\n" else "·" for character in text
    )


def table_lines(seen: InspectedBatch, most: int, columns: int) -> Iterator[str]:
    """Of the first `most` queries, none wider than `columns`: tokens, role, text, and which candidates are no negatives
    of the query.
    """
    for row, query in enumerate(seen.queries[:most]):
        yield _line(f"query {row}", *query.query, columns)
        for number, document in enumerate(query.documents):
            yield _line(f"  d{row * len(query.documents) + number} {'−' if number else '+'}", *document, columns)
        if query.ignored:
            yield _cut(
                f"  no negatives of query {row}: {', '.join(f'd{candidate}' for candidate in query.ignored)}", columns
            )


def _line(name: str, tokens: int, text: str, columns: int) -> str:
    return f"{name:<10} {tokens:>4}  {_cut(text, columns - 17)}"


def _cut(text: str, columns: int) -> str:
    """In the middle, so that both markers are seen."""
    if len(text) <= columns:
        return text
    tail = max(1, columns // 4)
    return f"{text[: max(1, columns - tail - 3)]} … {text[-tail:]}"


def warnings(inspection: Inspection) -> list[str]:
    """What looks wrong, what it does to training, and what to do."""
    lines = [
        warning
        for of_source in zip(inspection.feed.sources, inspection.counts, inspection.samples, strict=True)
        for warning in _warnings(inspection.feed, *of_source)
    ]
    if inspection.feed.queries_in_total == 1 and not all(
        source.num_hard_negatives for source in inspection.feed.sources
    ):
        lines.append(
            "a batch has one query and no hard negative, so there is nothing to learn from: "
            "raise trainer.queries_per_process"
        )
    return lines


def _warnings(feed: Feed, source: Source, counts: Counts, sampled: Sample) -> Iterator[str]:
    batches = counts.examples / feed.queries_in_total
    if batches < FEWEST_BATCHES:
        yield (
            f"{source.name} has {counts.examples:,} examples, which fill {batches:.1f} batches, "
            "so every query soon has met all others; give more data, or lower trainer.queries_per_process"
        )
    if counts.repeated_queries > MOST_REPEATED * counts.examples:
        yield (
            f"{source.name}: {_share(counts.repeated_queries, counts.examples)} of the queries repeat an earlier one, "
            "and such a query counts as often as it stands there; put its positives into one row, or remove copies"
        )
    for role, lengths in sampled.lengths.items():
        if lengths.truncated > MOST_TRUNCATED:
            yield (
                f"{source.name}: {lengths.truncated:.1%} of the {PLURAL[role]} are longer than {lengths.limit} "
                f"tokens, and the model never sees their ends; raise markers.{role}_max_tokens, or split the texts"
            )
    if counts.short_texts:
        yield (
            f"{source.name}: texts of one character: {counts.short_texts:,}, for example {counts.short_text!r}; "
            "remove them if they are accidents"
        )
    if counts.short_of_negatives:
        yield (
            f"{source.name}: {_share(counts.short_of_negatives, counts.examples)} of the examples have fewer than "
            f"{source.num_hard_negatives} hard negatives, and positives of other queries are used instead; "
            "mine more, or lower num_hard_negatives"
        )
    if counts.contrary_negatives:
        yield (
            f"{source.name}: hard negatives that are a positive of the same query in another row: "
            f"{counts.contrary_negatives:,}; hard negatives always count, so the model is taught both; remove them"
        )


def describe_sources(inspection: Inspection) -> dict[str, list[str]]:
    """Label -> a value for each source."""
    feed = inspection.feed
    rows = [
        _describe_counts(counts) | _describe_sample(sampled, inspection.vocabulary)
        for counts, sampled in zip(inspection.counts, inspection.samples, strict=True)
    ]
    if len(feed.sources) > 1:
        shares = (f"{feed.share(source):.1%}" for source in feed.sources)
        rows = [
            {f"share of the {'queries' if feed.mixed else 'batches'}": share} | row
            for share, row in zip(shares, rows, strict=True)
        ]
    return {label: [row[label] for row in rows] for label in rows[0]}


def _describe_counts(counts: Counts) -> dict[str, str]:
    fewest, median, most = counts.hard_negatives
    each = [
        f"{number + 1}{'+' if number + 1 == MOST_POSITIVES_COUNTED else ''}: {share}"
        for number, share in enumerate(_shares(counts.queries_by_positives))
    ]
    return {
        "examples": f"{counts.examples:,}",
        "different texts": f"{counts.texts:,}",
        "queries that repeat an earlier one": _of(counts.repeated_queries, counts.examples),
        "positives that repeat an earlier one": _of(counts.repeated_positives, counts.positives),
        "positives that are another example's query": _of(counts.positives_asked, counts.positives),
        "queries by number of positives": ", ".join(each),
        "hard negatives a query: fewest / median / most": f"{fewest} / {median:g} / {most}",
        "hard negatives that are a positive of their query": f"{counts.contrary_negatives:,}",
        "texts of one character": f"{counts.short_texts:,}",
        "tokens an example, cut at the limits": f"{counts.tokens / counts.examples:.1f}",
    }


def _describe_sample(sampled: Sample, vocabulary: int) -> dict[str, str]:
    described = {"measured on a sample of": f"{sampled.examples:,} examples"}
    for role, lengths in sampled.lengths.items():
        described[f"{role} tokens: mean / median / 95 % / most"] = str(lengths)
        described[f"{PLURAL[role]} over their limit"] = f"{lengths.truncated:.1%} over {lengths.limit}"
    most = [
        f"{script} {share:.1%}" for script, share in islice(sampled.scripts.items(), SCRIPTS_SHOWN) if share >= 0.0005
    ]
    described["letters by script"] = ", ".join(most) or "no letters"
    described["vocabulary that occurs"] = _of(sampled.vocabulary, vocabulary)
    return described


def describe_run(inspection: Inspection) -> dict[str, str]:
    feed, queries = inspection.feed, inspection.feed.queries_in_total
    candidates = sorted({queries * (1 + source.num_hard_negatives) for source in feed.sources})
    described = {
        "queries a batch": f"{queries:,}",
        "candidates a query": " or ".join(f"{number:,}" for number in candidates),
        "batches an epoch": f"{feed.batches_per_epoch:,.1f}",
        "optimizer steps an epoch": f"{feed.batches_per_epoch / inspection.batches_per_step:,.1f}",
        "optimizer steps of the run": f"{inspection.steps:,}",
        "tokens an epoch, about": f"{_tokens_per_epoch(inspection):,.0f}",
    }
    if inspection.batches:
        tokens, computed, padded, left_out = (
            sum(getattr(batch, name) for batch in inspection.batches)
            for name in ("tokens", "computed", "padded", "left_out")
        )
        shown_queries = sum(batch.num_queries for batch in inspection.batches)
        described |= {
            "tokens of the shown batches": f"{tokens:,}; {computed:,} without repeated texts",
            "the same, padded to the longest row": f"{padded:,}, of which packing saves {1 - computed / padded:.1%}",
            "duplicates left out, a query": f"{left_out / shown_queries:.2f} candidates",
        }
    return described


def _tokens_per_epoch(inspection: Inspection) -> float:
    """An epoch has as many batches as the examples fill, and the sources share them by weight."""
    feed = inspection.feed
    mean = sum(
        feed.share(source) * counts.tokens / counts.examples
        for source, counts in zip(feed.sources, inspection.counts, strict=True)
    )
    return mean * sum(counts.examples for counts in inspection.counts)


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({_share(part, whole)})"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def _shares(numbers: Sequence[int]) -> list[str]:
    return [_share(number, sum(numbers)) for number in numbers]


def title_of(seen: InspectedBatch) -> str:
    return (
        f"Batch {seen.number}: {seen.num_queries:,} queries, {seen.num_documents:,} documents, {seen.tokens:,} tokens "
        f"(padded {seen.padded:,}), {seen.left_out:,} duplicates left out"
    )


def print_inspection(inspection: Inspection, console) -> None:
    """Tables, the beginnings of the batches, and at the end what looks wrong."""
    from rich.table import Table
    from rich.text import Text

    sources = Table("", title="training data")
    for source in inspection.feed.sources:
        sources.add_column(Text(source.name), justify="right")
    for label, values in describe_sources(inspection).items():
        sources.add_row(label, *map(Text, values))
    run = Table("", title="what a run makes of it, on one process", show_header=False)
    run.add_column(justify="right")
    for label, value in describe_run(inspection).items():
        run.add_row(label, value)
    console.print(sources, run, sep="\n")
    for seen in inspection.batches:
        console.print(Text(f"\n{title_of(seen)}; the first queries:", style="bold"))
        for line in table_lines(seen, QUERIES_ON_TERMINAL, console.width):
            console.print(Text(line), no_wrap=True, overflow="ellipsis")
    console.print()
    for warning in warnings(inspection):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


@dataclass
class InspectConfig(TrainConfig):
    """Whatever training takes, so that the same overrides can be given, and three keys more."""

    output: str | None = None
    """The page, an HTML file; null is <runs>/<name>.inspection.html."""
    examples: int = 20_000
    """Drawn at random from each source, for what needs the texts themselves."""
    batches: int = 2
    """Batches that are shown as the model will see them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, examples=COUNT, batches=COUNT_OR_NONE)
