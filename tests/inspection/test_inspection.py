"""Counts of data whose counts are known, the batches as the loss judges them, the page, and the script from the command
line.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sgpt.data.feed.example import Example
from sgpt.data.feed.sampling import Feed, Source
from sgpt.data.feed.store import Examples, Tokens, cached_examples
from sgpt.data.readers import DataConfig, build_feed
from sgpt.decoder.trunk import load_tokenizer
from sgpt.inspection import inspect as inspection
from sgpt.inspection.census import Counts, count_source
from sgpt.inspection.inspect import Inspection, inspect_batch, inspect_feed
from sgpt.inspection.page import check_output, write_inspection
from sgpt.inspection.sample import sample, scripts
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig, frames
from tests.starts import Forked, forks

REPOSITORY = Path(__file__).parents[2]
NLI = Path(__file__).parents[3] / "shared" / "data" / "nli" / "triplets.dev.jsonl.gz"
LIMITS = MarkersConfig(query_max_tokens=8, document_max_tokens=12)
EXAMPLES = [
    Example("a question", "first answer", ("bad one",), ("second answer",)),
    Example("a question", "third answer", ("second answer",)),  # which is a positive of this query, in the row above
    Example("other question", "first answer", ("bad one",)),
    Example("fourth question", "other question", ("x",)),
    Example("fifth question", "пятый ответ", ("bad one", "bad two")),
    *(Example(f"filler question number {n}", f"filler answer number {n}", ("bad one",)) for n in range(15)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("data/nano")


@pytest.fixture(scope="module")
def source(tokenizer) -> Source:
    return made(tokenizer, EXAMPLES)


def made(
    tokenizer, examples: list[Example] | Examples, *, limits: MarkersConfig = LIMITS, negatives: int = 1,
    name: str = "hand-made"
) -> Source:
    kept = examples if isinstance(examples, Examples) else Examples.of(examples)
    framed = frames(limits, tokenizer)
    tokens = Tokens(kept, tokenizer, max(frame.content_tokens for frame in framed.values()))
    return Source(name, kept, tokens, framed, negatives, weight=len(kept))


def inspected(tokenizer, *sources: Source, queries: int = 20, **options) -> Inspection:
    settings = {"num_examples": 1000, "num_batches": 1, "steps": 7, **options}
    return inspect_feed(Feed(sources, queries), tokenizer, **settings)


def length(tokenizer, text: str, limit: int = 10**9) -> int:
    return min(limit, 2 + len(tokenizer(text, add_special_tokens=False)["input_ids"]))  # two markers


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


# --- counts ---


def test_counts_are_those_that_were_made(source, tokenizer):
    texts = {text for one in EXAMPLES for text in (one.query, one.positive, *one.other_positives, *one.hard_negatives)}
    tokens = sum(
        length(tokenizer, one.query, 8)
        + mean(length(tokenizer, text, 12) for text in (one.positive, *one.other_positives))
        + mean(length(tokenizer, text, 12) for text in one.hard_negatives)
        for one in EXAMPLES
    )
    assert count_source(source) == Counts(
        examples=20, texts=len(texts), positives=21, repeated_queries=1, repeated_positives=1,
        queries_by_positives=(18, 0, 1, 0),
        hard_negatives=(1, 1.0, 2), positives_asked=1, contrary_negatives=1, short_of_negatives=0, short_texts=1,
        short_text="x",
        tokens=pytest.approx(tokens, rel=1e-9),
    )  # fmt: skip


def test_counts_do_not_depend_on_where_the_examples_lie(source, tokenizer, tmp_path, monkeypatch):
    """On disk they are counted part by part."""
    monkeypatch.setattr("sgpt.data.feed.store.ROWS_AT_A_TIME", 3)

    def fill(writer) -> None:
        for example in EXAMPLES:
            writer.example(example)

    on_disk = cached_examples(tmp_path, "key", fill)
    assert len(on_disk.queries.chunks) == 7
    counted = count_source(made(tokenizer, on_disk))
    assert counted == count_source(source)


def test_texts_that_no_example_uses_and_texts_written_twice_do_not_count(tokenizer, tmp_path):
    def fill(writer) -> None:
        query, again = writer.text("a question"), writer.text("a question")
        writer.text("y")  # of the collection, in no example
        positive = writer.text("an answer")
        writer.row(query, [positive], [])
        writer.row(again, [positive], [])

    counted = count_source(made(tokenizer, cached_examples(tmp_path, "key", fill), negatives=0))
    assert (counted.texts, counted.repeated_queries, counted.repeated_positives, counted.short_texts) == (2, 1, 1, 0)
    assert counted.queries_by_positives == (1, 0, 0, 0)  # the same pair twice is one


def test_lengths_are_measured_before_truncation_and_with_markers(source, tokenizer):
    sampled = sample(source, tokenizer, 1000, seed=0)
    assert sampled.examples == 20
    queries = sorted(length(tokenizer, one.query) for one in EXAMPLES)
    assert sorted(sampled.lengths["query"].tokens.tolist()) == queries
    assert sampled.lengths["query"].limit == 8
    assert sampled.lengths["query"].truncated == mean(tokens > 8 for tokens in queries)
    assert len(sampled.lengths["document"].tokens) == 40  # a positive and a hard negative each
    half = sample(source, tokenizer, 10, seed=0)
    assert (half.examples, len(half.lengths["document"].tokens)) == (10, 20)


def test_vocabulary_is_what_the_model_sees_of_the_texts(tokenizer):
    pair = [Example("one two three four five six seven eight nine ten", "answer")]
    content = tokenizer(pair[0].query, add_special_tokens=False)["input_ids"][:6]
    expected = {*content, *tokenizer("answer", add_special_tokens=False)["input_ids"]}
    assert sample(made(tokenizer, pair, negatives=0), tokenizer, 1, seed=0).vocabulary == len(expected)


def test_scripts_are_shares_of_the_letters():
    assert scripts(Counter("abc де 漢 12, ½!")) == {"LATIN": 3 / 6, "CYRILLIC": 2 / 6, "CJK": 1 / 6}
    assert scripts(Counter("123 …")) == {}


# --- batches ---


def test_ignored_candidates_are_those_that_a_loop_over_the_texts_finds(source, tokenizer):
    feed = Feed([source], 20)
    batch = inspect_batch(0, feed.batch(0, 0), tokenizer)
    drawn = [source.draw(example, epoch, 0) for _, example, epoch in feed.drawn_examples(0, 0)]
    queries = [source.examples.texts[one.query] for one in drawn]
    documents = [[source.examples.texts[text] for text in one.documents] for one in drawn]
    others = [[source.examples.texts[text] for text in one.other_positives] for one in drawn]
    for i, query in enumerate(batch.queries):
        wrong = {
            queries[i], *(text for j in range(20) if queries[j] == queries[i] for text in (documents[j][0], *others[j]))
        }
        expected = [
            2 * j + place
            for j, of_other in enumerate(documents) for place, text in enumerate(of_other)
            if j != i and text in wrong
        ]  # fmt: skip
        assert query.ignored == expected
    assert batch.left_out == sum(len(query.ignored) for query in batch.queries) > 0


def test_a_batch_is_shown_as_the_model_gets_it_cut_in_the_middle(tokenizer):
    words = " ".join(f"word{n}" for n in range(40))
    feed = Feed(
        [
            made(
                tokenizer,
                [Example(f"a\nquestion {n} {words}", f"answer {n}") for n in range(4)],
                limits=MarkersConfig(),
                negatives=0,
            )
        ],
        4
    )
    batch = inspect_batch(0, feed.batch(0, 0), tokenizer)
    number = feed.drawn_examples(0, 0)[0][1]
    tokens, text = batch.queries[0].query
    assert (tokens, text) == (length(tokenizer, f"a\nquestion {number} {words}"), f"[a⏎question {number} {words}]")
    lines = list(inspection.table_lines(batch, 2, 60))
    assert len(lines) == 4  # two queries, a document each
    assert lines[0].startswith(f"query 0      {tokens}  [a⏎question")
    assert lines[0].endswith("word39]")
    assert max(map(len, lines)) <= 60


def test_saved_tokens_are_those_of_the_shown_batch(tokenizer):
    examples = [Example("a question", "one answer " * n) for n in range(1, 7)]
    feed = Feed([made(tokenizer, examples, limits=MarkersConfig(), negatives=0)], 6)
    batch = inspect_batch(0, feed.batch(0, 0), tokenizer)
    query, documents = length(tokenizer, "a question"), [length(tokenizer, "one answer " * n) for n in range(1, 7)]
    assert batch.tokens == 6 * query + sum(documents)
    assert batch.computed == query + sum(documents)  # the same query is computed once
    assert batch.padded == 6 * query + 6 * max(documents)


def test_a_run_over_two_sources_is_told_by_their_weights(tokenizer):
    one = made(tokenizer, EXAMPLES, name="one")
    two = made(tokenizer, [Example(f"q {n}", f"an answer of other length {n}", ("no",)) for n in range(60)], name="two")
    found = inspected(tokenizer, one, two, queries=10, num_batches=2, batches_per_step=2)
    told = inspection.describe_run(found)
    assert told["batches an epoch"] == "8.0"
    assert told["optimizer steps an epoch"] == "4.0"
    assert told["optimizer steps of the run"] == "7"
    assert (told["queries a batch"], told["candidates a query"]) == ("10", "20")
    # weights go by size here
    assert told["tokens an epoch, about"] == f"{count_source(one).tokens + count_source(two).tokens:,.0f}"
    assert inspection.describe_sources(found)["examples"] == ["20", "60"]
    computed, padded = (sum(getattr(batch, name) for batch in found.batches) for name in ("computed", "padded"))
    assert told[
        "the same, padded to the longest row"
    ] == f"{padded:,}, of which packing saves {100 * (padded - computed) / padded:.1f}%"


# --- what looks wrong ---


def test_good_data_raises_no_warning(tokenizer):
    good = [Example(f"question {n}", f"answer {n}", ("bad one",)) for n in range(40)]
    assert inspection.warnings(inspected(tokenizer, made(tokenizer, good), queries=4)) == []


@pytest.mark.parametrize(
    ("examples", "queries", "expected"),
    [
        (
            [Example(f"question {n}", f"answer {n}", ("bad",)) for n in range(20)], 4,
            "has 20 examples, which fill 5.0 batches"
        ),
        (
            [Example(f"question {n % 30}", f"answer {n}", ("bad",)) for n in range(40)], 4,
            "25.0% of the queries repeat an earlier one"
        ),
        (
            [Example(f"question {n}", "word " * 40 + str(n), ("bad",)) for n in range(40)], 4,
            "50.0% of the documents are longer than 12 tokens"
        ),
        (
            [Example("question " * 9 + str(n), f"answer {n}", ("bad",)) for n in range(40)], 4,
            "100.0% of the queries are longer than 8 tokens"
        ),
        (
            [Example(f"question {n}", f"answer {n}", ("z",)) for n in range(40)], 4,
            "texts of one character: 1, for example 'z'"
        ),
        (
            [
                Example("question 0", "bad", ("answer 0",)),
                *(Example(f"question {n}", f"answer {n}", ("bad",)) for n in range(40))
            ],
            4, "hard negatives that are a positive of the same query in another row: 2;",
        ),
    ],
)  # fmt: skip
def test_what_looks_wrong_is_said_once_with_the_source(tokenizer, examples, queries, expected):
    told = inspection.warnings(inspected(tokenizer, made(tokenizer, examples), queries=queries))
    assert len(told) == 1
    assert told[0].startswith("hand-made")
    assert expected in told[0]


def test_a_batch_without_any_negative_is_warned_of(tokenizer):
    found = inspected(
        tokenizer, made(tokenizer, [Example(f"question {n}", f"answer {n}") for n in range(40)], negatives=0), queries=1
    )
    assert inspection.warnings(found) == [
        "a batch has one query and no hard negative, so there is nothing to learn from: raise "
        "trainer.queries_per_process"
    ]


# --- the page ---


@pytest.fixture(scope="module")
def page(tokenizer, tmp_path_factory) -> str:
    examples = [*EXAMPLES, Example("<script>alert(1)</script>", "https://example.org/ is an address", ("bad one",))]
    file = tmp_path_factory.mktemp("page") / "runs" / "x.inspection.html"
    of_them = made(tokenizer, examples, limits=MarkersConfig(), name="<i>hand</i>")
    write_inspection(inspected(tokenizer, of_them, queries=21), file, "a & b", {"note": "<b>&"})
    return file.read_text(encoding="utf-8")


def test_the_page_holds_the_numbers_the_plots_and_the_warnings(page):
    assert "<h1>a &amp; b</h1>" in page
    for label, value in {
        "examples": "21", "queries that repeat an earlier one": "1 (4.8%)",
        "positives that are another example&#x27;s query": "1 (4.5%)",
        "queries by number of positives": "1: 95.0%, 2: 0.0%, 3: 5.0%, 4+: 0.0%", "candidates a query": "42",
        "optimizer steps of the run": "7",
    }.items():  # fmt: skip
        assert f"<td>{label}</td><td>{value}</td>" in page
    assert re.findall(r"<figcaption><b>(.*?)</b>", page) == [
        f"&lt;i&gt;hand&lt;/i&gt;: tokens of the {plural}" for plural in ("queries", "documents")
    ]
    assert re.findall(r"<h2>(.*?)</h2>", page)[0] == "What looks wrong"
    assert "hard negatives that are a positive of the same query in another row: 1;" in page
    assert "[filler question number 0]" in page  # a query of the batch


def test_the_page_is_self_contained_and_escapes_the_texts(page):
    assert "[&lt;script&gt;alert(1)" in page
    assert "<dd>&lt;b&gt;&amp;</dd>" in page
    assert not re.search(r"<script|<i>|<link|<img|<iframe|<object|@import", page)
    assert not re.search(r"""(?:src|href)=["'](?!#)|url\((?!#)""", page)


@pytest.mark.parametrize("place", ["runs/x", "runs/x/report.html"])
def test_a_page_never_takes_the_place_of_a_run_or_of_its_files(place, tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "config.yaml").write_text("name: x")
    assert check_output(tmp_path / "runs" / "x.inspection.html") == tmp_path / "runs" / "x.inspection.html"
    with pytest.raises(InputError, match="which stays as it is; give an HTML file elsewhere"):
        check_output(tmp_path / place)


# --- real data, and the command line ---


def test_counts_of_real_triplets_are_those_of_plain_python(tokenizer, tmp_path):
    if not NLI.is_file():
        pytest.skip(f"no NLI triplets at {NLI}")
    config = DataConfig(
        path=str(NLI), columns={"query": "anchor"}, num_hard_negatives=1, cache=str(tmp_path), limit=2000
    )
    feed = build_feed(config, tokenizer, MarkersConfig("none", 16, 16), queries_per_process=32)
    found = inspect_feed(feed, tokenizer, num_examples=500, num_batches=1, steps=1)
    rows = list(feed.sources[0].examples)
    queries = Counter(row.query for row in rows)
    positives = {query: {row.positive for row in rows if row.query == query} for query in queries}
    counted = found.counts[0]
    assert counted.examples == len(rows) > 1000
    assert counted.texts == len({text for row in rows for text in (row.query, row.positive, *row.hard_negatives)})
    assert counted.repeated_queries == len(rows) - len(queries)
    assert counted.repeated_positives == len(rows) - len({row.positive for row in rows})
    assert counted.positives_asked == sum(row.positive in queries for row in rows)
    assert counted.contrary_negatives == sum(
        text in positives[row.query] for row in rows for text in row.hard_negatives
    )
    assert counted.queries_by_positives == tuple(
        np.bincount([min(4, len(found)) for found in positives.values()], minlength=5)[1:]
    )
    assert found.samples[0].examples == 500
    assert found.samples[0].scripts["LATIN"] > 0.99


def started(folder: Path, *arguments: str) -> Forked:
    return forks(folder, columns=120)("inspect_data", "name=look", "trainer.queries_per_process=8", *arguments)


def test_the_script_prints_and_writes_what_it_found(tmp_path):
    rows = [{"query": f"what is number {n}", "positive": f"it is {n} [sic]"} for n in range(1000, 1041)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = started(tmp_path, "data.path=pairs.jsonl", "batches=1", "trainer.epochs=3")
    assert ended.code == 0, ended.err
    assert re.search(r"examples +│ +41 │", ended.out)
    assert re.search(r"optimizer steps of the run +│ +16 │", ended.out)  # 41 * 3 / 8 = 15.4
    assert re.search(r"d0 \+ +\d+  \{it is 10\d\d \[sic\]\}", ended.out)
    assert "warning: pairs.jsonl has 41 examples, which fill 5.1 batches" in ended.out
    assert ended.out.endswith("page  runs/look.inspection.html\n")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["look.inspection.html"]  # and no run


def test_bad_input_ends_with_the_readers_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"query": "what", "positive": "that"}\n{"query": "what", "positive": " "}\n')
    ended = started(tmp_path, "data.path=pairs.jsonl")
    assert (ended.code, ended.out) == (2, "")
    assert re.search(r"^error: pairs\.jsonl, line 2, positive: the text is blank", ended.err, re.MULTILINE)
    assert not (tmp_path / "runs").exists()
