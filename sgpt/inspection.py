"""Training data, looked at before compute is spent on it: counts, lengths, scripts, and the first batches as the model will see them.

What needs numbers and hashes only is counted over all examples, from the columns of the store and some rows at a time: a
few arrays of one number an example are all that memory has to hold. What needs the texts themselves (lengths before
truncation, scripts, vocabulary) is measured on a sample of examples, each drawn as its first epoch would draw it.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from matplotlib.axes import Axes

from sgpt.data.collate import Batch
from sgpt.data.sampling import Feed, Source
from sgpt.data.store import EXAMPLES, TEXTS, TOKENS, Column, content_ids
from sgpt.errors import InputError
from sgpt.files import write_whole
from sgpt.markers import ROLES, Frame, Role
from sgpt.packing import distinct
from sgpt.page import LIGHT, Plot, figures, fold, page, section, tree
from sgpt.progress import progress_bar
from sgpt.step import Contest

EXAMPLES_AT_A_TIME = 64  # of the sample; their texts are tokenised whole, however long they are
QUERIES_AT_A_TIME = 256  # of a batch, when its duplicates are looked for: [256, C] at a time
QUERIES_ON_PAGE, QUERIES_ON_TERMINAL = 256, 3  # of each shown batch
COLUMNS_ON_PAGE = 126  # of a line of a batch
POSITIVES_TOLD_APART = 4  # 1, 2, 3, and so many or more
SCRIPTS_TOLD = 4
MOST_TRUNCATED, MOST_REPEATED, FEWEST_BATCHES = 0.2, 0.1, 10  # past these there is a warning
COLOURS: dict[Role, str] = {"query": "blue", "document": "teal"}
PLURAL: dict[Role, str] = {"query": "queries", "document": "documents"}
LIST_TYPES = {field.name: field.type for schema in (TEXTS, EXAMPLES, TOKENS) for field in schema}


@dataclass(frozen=True)
class Counts:
    """Of one source, over all of its examples; equal texts are known by their hashes.

    repeated_*: those that have the text of an earlier one. queries_by_positives: different queries with 1, 2, 3, 4 or more
    different positives, over all rows that have the query. hard_negatives: fewest, median and most an example.
    positives_asked: positives that are the query of another example. contrary_negatives: hard negatives that are a positive of
    the same query. short_of_negatives: examples with fewer than H. short_texts: of one character or none. tokens: an epoch's,
    markers included (expected, where an epoch draws).
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


@dataclass(frozen=True)
class Lengths:
    """tokens [texts]: of sampled texts of one role before truncation, markers included. limit: what of them the model sees."""

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
    """Of one source. scripts: share of the letters, largest first. vocabulary: entries that occur in what the model sees of the texts."""

    examples: int
    lengths: dict[Role, Lengths]
    scripts: dict[str, float]
    vocabulary: int


@dataclass(frozen=True)
class SeenQuery:
    """Decoded as the model gets them, with their tokens: the query, its positive, its hard negatives. ignored: candidates that are no negatives."""

    query: tuple[int, str]
    documents: list[tuple[int, str]]
    ignored: list[int]


@dataclass(frozen=True)
class SeenBatch:
    """queries: the first of them. left_out: pairs of a query and an in-batch negative that are none, being duplicates.

    tokens: of all texts; computed: of the different ones; padded: when queries and documents are each padded to the longest.
    """

    number: int
    num_queries: int
    num_documents: int
    queries: list[SeenQuery]
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
    batches: list[SeenBatch]
    steps: int
    batches_per_step: int
    vocabulary: int


def inspect_feed(feed: Feed, tokenizer, *, num_examples: int, num_batches: int, steps: int, batches_per_step: int = 1) -> Inspection:
    """num_examples: of each source's sample. num_batches: shown. The feed's seed is the sample's."""
    return Inspection(
        feed, [count(source) for source in feed.sources], [sample(source, tokenizer, num_examples, feed.seed) for source in feed.sources],
        [see(number, feed.batch(number, 0), tokenizer) for number in range(num_batches)], steps, batches_per_step, len(tokenizer),
    )  # fmt: skip


# Counting


def count(source: Source) -> Counts:
    census = _Census(source)
    with progress_bar(f"counting {source.name}", 2 * len(source.examples) + len(source.examples.texts)) as advance:
        positives, negatives, texts = census.positives(advance), census.hard_negatives(advance), census.texts(advance)
    repeated = len(source.examples) - int(census.asked.sum())
    return Counts(examples=len(source.examples), repeated_queries=repeated, tokens=float(census.tokens), **positives, **negatives, **texts)


class _Census:
    """What is known of one source so far. Texts are told apart by their hashes and numbered anew: equal texts share one number.

    numbers [texts of the store]. queries [N]. lengths: by role, [different texts], in the frame and cut. asked, used:
    [different texts], is it a query, is it of any example. pairs: query and positive as one number each, sorted.
    """

    def __init__(self, source: Source) -> None:
        self.examples, self.num_hard_negatives = source.examples, source.num_hard_negatives
        different, self.numbers = np.unique(_whole("hash", source.examples.hashes), return_inverse=True)
        self.queries = self.numbers[_whole("query", source.examples.queries)]
        content = np.zeros(len(different), dtype=np.int64)
        content[self.numbers] = _list_lengths("ids", source.tokens.ids)
        self.lengths = {role: np.minimum(content, frame.content_tokens) + _markers(frame) for role, frame in source.frames.items()}
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
        each = np.unique(self.pairs // len(self.used), return_counts=True)[1].clip(max=POSITIVES_TOLD_APART)
        by_positives = tuple(np.bincount(each, minlength=POSITIVES_TOLD_APART + 1)[1:].tolist())
        return {"positives": total, "repeated_positives": total - int(answering.sum()), "positives_asked": asked, "queries_by_positives": by_positives}

    def hard_negatives(self, advance: Callable[[float], None]) -> dict:
        contrary, tokens = 0, 0.0
        for queries, texts, shares in self._links("hard_negatives", self.examples.hard_negatives, advance):
            self.used[texts] = True
            contrary += int(_among(self.pairs, self._pairs(queries, texts)).sum())
            tokens += (np.minimum(1, self.num_hard_negatives * shares) * self.lengths["document"][texts]).sum()
        each = _list_lengths("hard_negatives", self.examples.hard_negatives)
        missing = (self.num_hard_negatives - each).clip(min=0)
        tokens += missing.mean() * self.positive_tokens  # where an example has too few, positives of others stand in
        self.tokens += tokens
        told = (int(each.min()), float(np.median(each)), int(each.max()))
        return {"hard_negatives": told, "contrary_negatives": contrary, "short_of_negatives": int((missing > 0).sum())}

    def texts(self, advance: Callable[[float], None]) -> dict:
        """After the others: only texts that an example uses count."""
        short, first, start = np.zeros_like(self.used), None, 0
        for part in _parts("text", self.examples.texts):
            numbers = self.numbers[start : start + len(part)]
            places = np.flatnonzero(pc.less_equal(pc.utf8_length(pc.utf8_trim_whitespace(part)), 1).to_numpy(zero_copy_only=False) & self.used[numbers])
            short[numbers[places]] = True
            first = part[int(places[0])].as_py() if first is None and len(places) else first
            start += len(part)
            advance(len(part))
        return {"texts": int(self.used.sum()), "short_texts": int(short.sum()), "short_text": first}

    def _links(self, name: str, column: Sequence, advance: Callable[[float], None]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(query, linked text, 1 / texts linked to its example) of every link, some examples at a time."""
        start = 0
        for part in _parts(name, column):
            each = pc.list_value_length(part).to_numpy()
            yield self.queries[start : start + len(part)].repeat(each), self.numbers[part.flatten().to_numpy()], np.repeat(1 / each.clip(min=1), each)
            start += len(part)
            advance(len(part))

    def _pairs(self, queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """One number each; int64 has room for three thousand million different texts."""
        return queries * len(self.used) + texts


def _parts(name: str, column: Sequence) -> list[pa.Array]:
    """Of a column on disk, or the whole of one in memory, as `Examples.of` makes it."""
    return column.chunks if isinstance(column, Column) else [pa.array(column, LIST_TYPES[name])]


def _whole(name: str, column: Sequence) -> np.ndarray:
    return np.concatenate([part.to_numpy() for part in _parts(name, column)])


def _list_lengths(name: str, column: Sequence) -> np.ndarray:
    return np.concatenate([pc.list_value_length(part).to_numpy() for part in _parts(name, column)])


def _among(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of the values are there: [values] boolean. `ordered` is not empty."""
    return ordered[np.searchsorted(ordered, values).clip(max=len(ordered) - 1)] == values


def _markers(frame: Frame) -> int:
    return len(frame.before) + len(frame.after)


# Sampling


def sample(source: Source, tokenizer, num_examples: int, seed: int) -> Sample:
    """The texts are tokenised again: those in the store are cut."""
    chosen = np.random.default_rng(seed).choice(len(source.examples), min(num_examples, len(source.examples)), replace=False)
    lengths: dict[Role, list[int]] = {role: [] for role in ROLES}
    characters: Counter[str] = Counter()
    occurs = np.zeros(len(tokenizer), dtype=bool)
    with progress_bar(f"measuring {source.name}", len(chosen)) as advance:
        for start in range(0, len(chosen), EXAMPLES_AT_A_TIME):
            drawn = [source.draw(number, 0, seed) for number in np.sort(chosen)[start : start + EXAMPLES_AT_A_TIME].tolist()]
            numbers = {"query": [one.query for one in drawn], "document": [text for one in drawn for text in one.documents]}
            for role in ROLES:
                texts = [source.examples.texts[number] for number in numbers[role]]
                ids = list(content_ids(texts, tokenizer))
                lengths[role] += map(len, ids)
                occurs[[token for row in ids for token in row[: source.frames[role].content_tokens]]] = True
                characters.update("".join(texts))
            advance(len(drawn))
    around = {role: _markers(frame) for role, frame in source.frames.items()}
    measured = {role: Lengths(np.array(lengths[role]) + around[role], source.frames[role].content_tokens + around[role]) for role in ROLES}
    return Sample(len(chosen), measured, scripts(characters), int(occurs.sum()))


def scripts(characters: Counter[str]) -> dict[str, float]:
    """Share of the letters by script, largest first: the first word of a letter's Unicode name is its script."""
    letters: Counter[str] = Counter()
    for character, number in characters.items():
        if character.isalpha():
            letters[unicodedata.name(character, "UNNAMED").split()[0]] += number
    return {script: number / letters.total() for script, number in letters.most_common()}


# The first batches


def see(number: int, batch: Batch, tokenizer) -> SeenBatch:
    ignored = [row for part in _ignored(batch) for row in part]
    r = batch.documents_per_query
    queries = [
        SeenQuery(_decoded(batch.queries[q], tokenizer), [_decoded(ids, tokenizer) for ids in batch.documents[q * r : (q + 1) * r]], ignored[q])
        for q in range(min(len(batch.queries), QUERIES_ON_PAGE))
    ]
    padded = sum(len(rows) * max(map(len, rows)) for rows in (batch.queries, batch.documents))
    computed = sum(map(len, distinct([*batch.queries, *batch.documents])[0]))
    return SeenBatch(number, len(batch.queries), len(batch.documents), queries, sum(map(len, ignored)), batch.num_tokens, computed, padded)


def _ignored(batch: Batch) -> Iterator[list[list[int]]]:
    """The loss' own judgement of each query: numbers of the candidates that are left out."""
    contest = Contest.of(batch, torch.device("cpu"))
    for start in range(0, len(batch.queries), QUERIES_AT_A_TIME):
        yield [row.nonzero()[:, 0].tolist() for row in contest.duplicates(slice(start, start + QUERIES_AT_A_TIME))]


def _decoded(ids: list[int], tokenizer) -> tuple[int, str]:
    """(tokens, text on one line)."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return len(ids), "".join(character if character.isprintable() else "⏎" if character == "\n" else "·" for character in text)


def _lines(seen: SeenBatch, most: int, columns: int) -> Iterator[str]:
    """Of the first `most` queries, none wider than `columns`: tokens, role, text, and which candidates are no negatives of the query."""
    for place, query in enumerate(seen.queries[:most]):
        yield _line(f"query {place}", *query.query, columns)
        for number, document in enumerate(query.documents):
            yield _line(f"  d{place * len(query.documents) + number} {'−' if number else '+'}", *document, columns)
        if query.ignored:
            yield _cut(f"  no negatives of query {place}: {', '.join(f'd{candidate}' for candidate in query.ignored)}", columns)


def _line(name: str, tokens: int, text: str, columns: int) -> str:
    return f"{name:<10} {tokens:>4}  {_cut(text, columns - 17)}"


def _cut(text: str, columns: int) -> str:
    """In the middle, so that both markers are seen."""
    if len(text) <= columns:
        return text
    tail = max(1, columns // 4)
    return f"{text[: max(1, columns - tail - 3)]} … {text[-tail:]}"


# In words


def warnings(found: Inspection) -> list[str]:
    """What looks wrong, what it does to training, and what to do."""
    told = [warning for of_source in zip(found.feed.sources, found.counts, found.samples, strict=True) for warning in _warnings(found.feed, *of_source)]
    if found.feed.queries_in_total == 1 and not all(source.num_hard_negatives for source in found.feed.sources):
        told.append("a batch has one query and no hard negative, so there is nothing to learn from: raise trainer.queries_per_process")
    return told


def _warnings(feed: Feed, source: Source, counts: Counts, sampled: Sample) -> Iterator[str]:
    batches = counts.examples / feed.queries_in_total
    if batches < FEWEST_BATCHES:
        yield (
            f"{source.name} has {counts.examples:,} examples, which fill {batches:.1f} batches, so every query soon has met all others; "
            "give more data, or lower trainer.queries_per_process"
        )
    if counts.repeated_queries > MOST_REPEATED * counts.examples:
        yield (
            f"{source.name}: {_share(counts.repeated_queries, counts.examples)} of the queries repeat an earlier one, and such a query counts as often "
            "as it stands there; put its positives into one row, or remove copies"
        )
    for role, lengths in sampled.lengths.items():
        if lengths.truncated > MOST_TRUNCATED:
            yield (
                f"{source.name}: {lengths.truncated:.1%} of the {PLURAL[role]} are longer than {lengths.limit} tokens, and the model never sees their ends; "
                f"raise markers.{role}_max_tokens, or split the texts"
            )
    if counts.short_texts:
        yield f"{source.name}: texts of one character: {counts.short_texts:,}, for example {counts.short_text!r}; remove them if they are accidents"
    if counts.short_of_negatives:
        yield (
            f"{source.name}: {_share(counts.short_of_negatives, counts.examples)} of the examples have fewer than {source.num_hard_negatives} hard negatives, "
            "and positives of other queries stand in; mine more, or lower num_hard_negatives"
        )
    if counts.contrary_negatives:
        yield (
            f"{source.name}: hard negatives that are a positive of the same query in another row: {counts.contrary_negatives:,}; hard negatives always "
            "count, so the model is taught both; remove them"
        )


def told_sources(found: Inspection) -> dict[str, list[str]]:
    """Label -> a value for each source."""
    feed = found.feed
    rows = [_told_counts(counts) | _told_sample(sampled, found.vocabulary) for counts, sampled in zip(found.counts, found.samples, strict=True)]
    if len(feed.sources) > 1:
        shares = (f"{feed.share(source):.1%}" for source in feed.sources)
        rows = [{f"share of the {'queries' if feed.mixed else 'batches'}": share} | row for share, row in zip(shares, rows, strict=True)]
    return {label: [row[label] for row in rows] for label in rows[0]}


def _told_counts(counts: Counts) -> dict[str, str]:
    fewest, median, most = counts.hard_negatives
    each = [f"{number + 1}{'+' if number + 1 == POSITIVES_TOLD_APART else ''}: {share}" for number, share in enumerate(_shares(counts.queries_by_positives))]
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


def _told_sample(sampled: Sample, vocabulary: int) -> dict[str, str]:
    told = {"measured on a sample of": f"{sampled.examples:,} examples"}
    for role, lengths in sampled.lengths.items():
        told[f"{role} tokens: mean / median / 95 % / most"] = str(lengths)
        told[f"{PLURAL[role]} over their limit"] = f"{lengths.truncated:.1%} over {lengths.limit}"
    most = [f"{script} {share:.1%}" for script, share in islice(sampled.scripts.items(), SCRIPTS_TOLD) if share >= 0.0005]
    told["letters by script"] = ", ".join(most) or "no letters"
    told["vocabulary that occurs"] = _of(sampled.vocabulary, vocabulary)
    return told


def told_run(found: Inspection) -> dict[str, str]:
    feed, queries = found.feed, found.feed.queries_in_total
    candidates = sorted({queries * (1 + source.num_hard_negatives) for source in feed.sources})
    told = {
        "queries a batch": f"{queries:,}",
        "candidates a query": " or ".join(f"{number:,}" for number in candidates),
        "batches an epoch": f"{feed.batches_per_epoch:,.1f}",
        "optimizer steps an epoch": f"{feed.batches_per_epoch / found.batches_per_step:,.1f}",
        "optimizer steps of the run": f"{found.steps:,}",
        "tokens an epoch, about": f"{_tokens_per_epoch(found):,.0f}",
    }
    if found.batches:
        tokens, computed, padded, left_out = (sum(getattr(batch, name) for batch in found.batches) for name in ("tokens", "computed", "padded", "left_out"))
        told |= {
            "tokens of the shown batches": f"{tokens:,}; {computed:,} without repeated texts",
            "the same, padded to the longest row": f"{padded:,}, of which packing saves {1 - computed / padded:.1%}",
            "duplicates left out, a query": f"{left_out / sum(batch.num_queries for batch in found.batches):.2f} candidates",
        }
    return told


def _tokens_per_epoch(found: Inspection) -> float:
    """An epoch has as many batches as the examples fill, and the sources share them by weight."""
    feed = found.feed
    mean = sum(feed.share(source) * counts.tokens / counts.examples for source, counts in zip(feed.sources, found.counts, strict=True))
    return mean * sum(counts.examples for counts in found.counts)


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({_share(part, whole)})"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def _shares(numbers: Sequence[int]) -> list[str]:
    return [_share(number, sum(numbers)) for number in numbers]


def _title(seen: SeenBatch) -> str:
    return (
        f"Batch {seen.number}: {seen.num_queries:,} queries, {seen.num_documents:,} documents, {seen.tokens:,} tokens "
        f"(padded {seen.padded:,}), {seen.left_out:,} duplicates left out"
    )


# On the terminal


def show(found: Inspection, console) -> None:
    """Tables, the beginnings of the batches, and at the end what looks wrong."""
    from rich.table import Table
    from rich.text import Text

    sources = Table("", title="training data")
    for source in found.feed.sources:
        sources.add_column(Text(source.name), justify="right")
    for label, values in told_sources(found).items():
        sources.add_row(label, *map(Text, values))
    run = Table("", title="what a run makes of it, on one process", show_header=False)
    run.add_column(justify="right")
    for label, value in told_run(found).items():
        run.add_row(label, value)
    console.print(sources, run, sep="\n")
    for seen in found.batches:
        console.print(Text(f"\n{_title(seen)}; the first queries:", style="bold"))
        for line in _lines(seen, QUERIES_ON_TERMINAL, console.width):
            console.print(Text(line), no_wrap=True, overflow="ellipsis")
    console.print()
    for warning in warnings(found):
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


# On a page


def free_place(file: Path) -> Path:
    """`file`, if a page may be written there: never over a folder or into a run's."""
    if file.is_dir() or (file.parent / "config.yaml").is_file():
        raise InputError(f"output={file}: is a folder, or in the folder of a run, which stays as it is; give an HTML file elsewhere")
    return file


def write_page(found: Inspection, file: Path, name: str, config: dict) -> None:
    """config: shown as it is. The folder is made."""
    told = warnings(found)
    lead = f"{sum(counts.examples for counts in found.counts):,} examples, {found.feed.batches_per_epoch:,.1f} batches an epoch."
    body = [
        f"<header><p class='quiet'>SGPT training data</p><h1>{escape(name)}</h1><p class='lead'>{lead}</p></header>",
        section("What looks wrong" if told else "Nothing looks wrong", *(f"<p class='fall'>{escape(warning)}.</p>" for warning in told)),
        section("The data", _table([source.name for source in found.feed.sources], told_sources(found)), figures(_plots(found))),
        section("What a run makes of it, on one process", _table([], {label: [value] for label, value in told_run(found).items()})),
        section("The first batches", BATCHES_NOTE, *map(_batch, found.batches)) if found.batches else "",
        section("How it was made", fold("Configuration", tree(config))),
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, page(f"{name} · SGPT training data", *body))


BATCHES_NOTE = """<p class='quiet'>Decoded from the token ids that the model gets, with their number. A query's documents follow it: + its positive,
− its hard negatives. Every other document of the batch is a negative of it too, but for those that are named as none.</p>"""


def _batch(seen: SeenBatch) -> str:
    lines = list(_lines(seen, QUERIES_ON_PAGE, COLUMNS_ON_PAGE))
    if seen.num_queries > QUERIES_ON_PAGE:
        lines.append(f"… and {seen.num_queries - QUERIES_ON_PAGE:,} more queries")
    return fold(escape(_title(seen)), f"<pre>{escape(chr(10).join(lines))}</pre>", opened=seen.number == 0)


def _table(heads: list[str], rows: dict[str, list[str]]) -> str:
    head = "".join(f"<th style='text-align:right'>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr><td>{escape(label)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>" for label, values in rows.items())
    return f"<div class='scroll card'><table>{f'<thead><tr><th></th>{head}</tr></thead>' if heads else ''}<tbody>{body}</tbody></table></div>"


def _plots(found: Inspection) -> list[Plot]:
    """Two of each source, side by side: an even number, or the first would be drawn wide."""
    plots = []
    for source, sampled in zip(found.feed.sources, found.samples, strict=True):
        for role, lengths in sampled.lengths.items():
            note = f"Mean / median / 95 % / most: {lengths}. Over the limit of {lengths.limit}: {lengths.truncated:.1%}. The last bar holds all longer ones."
            draw = partial(_draw_lengths, lengths=lengths, colour=COLOURS[role])
            plots.append(Plot(f"{source.name}: tokens of the {PLURAL[role]}", draw, {role: COLOURS[role], "limit": "fall"}, note))
    return plots


def _draw_lengths(axes: Axes, lengths: Lengths, colour: str) -> None:
    """Up to the longest but for two in a hundred, and always past the limit; the last bar holds all longer ones."""
    end = int(max(np.percentile(lengths.tokens, 98), 1.2 * lengths.limit))
    width = end // 60 + 1  # whole tokens: else some bars hold more lengths than others, and the plot looks like a saw
    bins = np.arange(0, end + 2 * width, width)
    shares = np.histogram(lengths.tokens.clip(max=end), bins)[0] / len(lengths.tokens)
    axes.stairs(shares, bins, fill=True, color=LIGHT[colour], alpha=0.4)
    axes.stairs(shares, bins, color=LIGHT[colour])
    axes.axvline(lengths.limit, color=LIGHT["fall"])
    axes.set(xlabel="tokens, with markers", ylabel="share of texts")
