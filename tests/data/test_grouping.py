"""The walk through near queries and its runs: every example once, near ones together, equal queries apart, the same on
every start.
"""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from sgpt.data.feed.embeddings import Embeddings
from sgpt.data.feed.grouping import Walk, nearness, order, walk
from sgpt.data.readers import DataConfig, build_feed
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.text.markers import MarkersConfig
from sgpt.training.guide import with_hard_batches
from sgpt.training.loss import LossConfig


def topics(number: int, each: int, spread: float = 0.3, size: int = 16) -> np.ndarray:
    """[number · each, size], unit rows about as many centres, in no order; row i is of topic i % number."""
    draw = np.random.default_rng(0)
    made = np.tile(
        draw.standard_normal((number, size)), (each, 1)
    ) + spread * draw.standard_normal((number * each, size))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def embeddings_of(rows: np.ndarray) -> Embeddings:
    return Embeddings(np.arange(len(rows)), [rows[start : start + 4096] for start in range(0, len(rows), 4096)])


def greedy(rows: np.ndarray) -> np.ndarray:
    """The plain walk that needs all pairs: always the nearest that is left."""
    cosines, steps = rows @ rows.T, [0]
    for _ in range(len(rows) - 1):
        cosines[:, steps[-1]] = -np.inf
        steps.append(int(np.argmax(cosines[steps[-1]])))
    return np.array(steps)


@pytest.mark.parametrize(("number", "each"), [(1, 1), (1, 2), (3, 7), (20, 64), (7, 900)])
def test_the_walk_visits_every_query_once(number, each):
    rows = topics(number, each)
    assert sorted(walk(embeddings_of(rows), np.arange(len(rows)))) == list(range(len(rows)))


def test_queries_that_cannot_be_told_apart_are_visited_once_too():
    rows = np.ones((3000, 4), dtype=np.float32) / 2
    assert sorted(walk(embeddings_of(rows), np.arange(3000))) == list(range(3000))


def test_runs_are_of_one_topic_and_about_as_near_as_those_of_the_walk_that_needs_all_pairs():
    rows = topics(40, 100)
    walked = walk(embeddings_of(rows), np.arange(4000))
    same = np.mean([len({int(example) % 40 for example in walked[start : start + 50]}) for start in range(0, 4000, 50)])
    assert same < 2  # random batches hold 29 of the 40
    found = embeddings_of(rows)
    near, random = nearness(found, np.arange(4000), walked, 50)
    best, _ = nearness(found, np.arange(4000), greedy(rows), 50)
    assert near - random > 0.8 * (best - random)
    assert random < 0.1 < 0.3 < near


def test_the_memory_is_bounded_whatever_the_number_of_queries(monkeypatch):
    asked = []
    real = Embeddings.at
    monkeypatch.setattr(Embeddings, "at", lambda self, places: asked.append(len(places)) or real(self, places))
    monkeypatch.setattr("sgpt.data.feed.grouping.ROWS_AT_A_TIME", 1000)
    monkeypatch.setattr("sgpt.data.feed.grouping.SAMPLE", 500)
    rows = topics(7, 900)
    assert sorted(walk(embeddings_of(rows), np.arange(6300))) == list(range(6300))
    assert max(asked) == 1000


def test_equal_queries_do_not_share_a_batch():
    """Each of 100 queries has three examples; the walk sees all once before it sees one again."""
    rows = topics(4, 25)
    queries = np.repeat(np.arange(100), 3)
    walked = walk(embeddings_of(rows), queries)
    assert sorted(walked) == list(range(300))
    for start in range(0, 300, 100):
        assert sorted(queries[walked[start : start + 100]]) == list(range(100))


@pytest.mark.parametrize(("size", "batch"), [(100, 8), (64, 16), (17, 4), (5, 5)])
def test_whole_batches_are_runs_of_the_walk_in_every_epoch(size, batch):
    """The batch at a border takes the end of one epoch and the beginning of the next; each of the others is a run,
    round the end of the walk.
    """
    walked = np.random.default_rng(5).permutation(size)
    place = np.argsort(walked)
    stream = np.concatenate([order(Walk(walked), batch, 7, 0, epoch) for epoch in range(6)])
    cuts = set()
    for start in range(0, len(stream) - batch + 1, batch):
        if start // size != (start + batch - 1) // size:
            continue
        places = place[stream[start : start + batch]]
        assert np.array_equal(places, (places[0] + np.arange(batch)) % size)
        cuts.add(int(places[0]))
    assert len(cuts) > size // batch or size == batch  # other cuts in other epochs


def write(file: Path, number: int = 24) -> Path:
    topic = ["parse a date", "open a file", "sort words"]
    file.write_text(
        "".join(
            json.dumps({"query": f"{topic[n % 3]} {n}", "positive": f"how to {topic[n % 3]} {n} times"}) + "\n"
            for n in range(number)
        )
    )
    return file


def refused(texts: list[str], **options) -> None:
    raise AssertionError("embedded again")


@pytest.mark.bitwise
def test_a_second_start_draws_the_same_batches_bit_for_bit_and_embeds_nothing(
    tmp_path, tiny_encoder, monkeypatch, caplog
):
    export(tiny_encoder("gpt2", pooling="mean"), tmp_path / "model", card="")
    file, tokenizer = write(tmp_path / "train.jsonl"), tiny_encoder("gpt_neo").tokenizer
    config = DataConfig(
        path=str(file), cache=str(tmp_path / "cache"), batches="hard", grouping_model=str(tmp_path / "model")
    )

    def feed():
        return with_hard_batches(
            build_feed(
                config, tokenizer, MarkersConfig(query_max_tokens=24, document_max_tokens=40), queries_per_process=4
            ),
            config,
            loss=LossConfig(),
        )

    with caplog.at_level(logging.INFO):
        first = feed()
    expected = (
        "more in-batch candidates false negatives: set "
        "loss.false_negative_margin or loss.guide=<folder of a model> with it"
    )
    assert expected in caplog.text
    logged = caplog.text.split("two queries of a batch ")[1].split("\n")[0]
    near, random = (float(number) for number in logged.split("; in random batches "))
    assert near > random
    opened = Encoder.from_pretrained(tmp_path / "model")
    monkeypatch.setattr(Encoder, "from_pretrained", lambda folder: opened)
    monkeypatch.setattr(opened, "encode", refused)
    again = feed()
    for batch in range(13):
        assert first.drawn_examples(batch, 0) == again.drawn_examples(batch, 0)
    write(file, 25)
    with pytest.raises(AssertionError, match="embedded again"):  # other data: nothing old is served
        feed()
