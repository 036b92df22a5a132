"""The two training sets of SGPT, built by rule: against a plain reading of the original's scripts, with its own
dictionaries and sets.
"""

import gzip
import json
import logging
import os
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sgpt.data.feed.example import Example
from sgpt.data.feed.store import cached_examples
from sgpt.data.sources import msmarco, nli
from sgpt.runtime.errors import InputError

REAL_PAIRS = Path(__file__).parents[3] / "shared" / "data" / "nli" / "pairs.jsonl.gz"


def write(file: Path, *rows: object) -> Path:
    """Objects as JSON, strings as they are, a line each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


# --- NLI ---


def original_triplets(pairs: list[tuple[str, str, str]], seed: int) -> list[tuple[str, str, str]]:
    """`training_nli_v2.py` line by line, but for the seed and for the order of a set: by first appearance."""
    train_data, draw = {}, random.Random(seed)

    def add_to_samples(sent1, sent2, label):
        train_data.setdefault(sent1, {"contradiction": set(), "entailment": set(), "neutral": set()})[label].add(sent2)

    for label, sent1, sent2 in pairs:
        add_to_samples(sent1.strip(), sent2.strip(), label)
        add_to_samples(sent2.strip(), sent1.strip(), label)
    place = {sentence: number for number, sentence in enumerate(train_data)}
    samples = []
    for sent1, others in train_data.items():
        entailed, contradicted = (sorted(others[label], key=place.get) for label in ("entailment", "contradiction"))
        if len(entailed) > 0 and len(contradicted) > 0:
            samples.append((sent1, draw.choice(entailed), draw.choice(contradicted)))
            samples.append((draw.choice(entailed), sent1, draw.choice(contradicted)))
    return samples


def triplets(path: Path, seed: int = 0) -> list[tuple[str, str, str]]:
    found = list(nli.nli_examples(path, seed))
    assert not any(example.other_positives for example in found)
    return [(example.query, example.positive, *example.hard_negatives) for example in found]


def without_repeats(samples: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [texts for texts in samples if len(set(texts)) == 3 and all(texts)]


@pytest.fixture(scope="module")
def real_pairs() -> list[tuple[str, str, str]]:
    if not REAL_PAIRS.is_file():
        pytest.skip(f"no sample of SNLI and MultiNLI at {REAL_PAIRS}")
    with gzip.open(REAL_PAIRS, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["label"], row["premise"], row["hypothesis"]) for row in rows if not row["set"].endswith("_test")]


def test_real_pairs_give_the_originals_triplets(real_pairs, caplog):
    with caplog.at_level(logging.INFO, "sgpt"):
        found = triplets(REAL_PAIRS, seed=3)
    samples = original_triplets(real_pairs, seed=3)
    assert found == without_repeats(samples)
    expected = (
        f"{len(samples)} triplets, without {len(samples) - len(found)} of them "
        f"that name a text twice and 0 with a blank text"
    )
    assert expected in caplog.text
    assert (len(real_pairs), len(samples)) == (48696, 23912)
    assert len(samples) - len(found) < 0.005 * len(samples)


def test_another_seed_draws_other_partners_for_the_same_sentences(real_pairs, tmp_path):
    rows = (
        {"label": label, "premise": premise, "hypothesis": hypothesis} for label, premise,
        hypothesis in real_pairs[:6000]
    )
    file = write(tmp_path / "pairs.jsonl", *rows)
    first, again, other = (triplets(file, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    of_both = Counter(query for query, *_ in first) & Counter(query for query, *_ in other)
    assert 0.6 * len(first) < of_both.total() < len(first)  # half of the queries are drawn, the other half are not


PAIRS = [
    ("entailment", 'A "man" eats', "Somebody eats ☕"),
    ("contradiction", 'A "man" eats', " Nobody eats"),  # stripped
    ("neutral", 'A "man" eats', "It is noon"),
    ("-", 'A "man" eats', "A man may eat"),
    ("entailment", 'A "man" eats', "A person\u2028eats"),
    ("entailment", 'A "man" eats', "Somebody eats ☕"),
    ("neutral", "Two dogs", "Two animals"),
    ("entailment", "Two dogs", "Two animals"),
    ("contradiction", "Two cats", "Two dogs"),
    ("entailment", "Alone", "Only entailed"),
    ("contradiction", '"Unclosed', "Two dogs"),
]


def test_hand_worked_triplets(tmp_path):
    file = write(
        tmp_path / "snli_1.0_train.jsonl", *({"gold_label": a, "sentence1": b, "sentence2": c} for a, b, c in PAIRS)
    )
    drawn = {(number, texts) for seed in range(60) for number, texts in enumerate(triplets(file, seed))}
    man, eaters = 'A "man" eats', ("Somebody eats ☕", "A person\u2028eats")
    assert drawn == {
        *((0, (man, eater, "Nobody eats")) for eater in eaters),
        *((1, (eater, man, "Nobody eats")) for eater in eaters),
        *((2, ("Two dogs", "Two animals", other)) for other in ("Two cats", '"Unclosed')),
        *((3, ("Two animals", "Two dogs", other)) for other in ("Two cats", '"Unclosed')),
    }


def tab_separated(file: Path, header: list[str], rows: list[dict]) -> Path:
    return write(file, "\t".join(header), *("\t".join(row.get(name, "x") for name in header) for row in rows))


def every_form(folder: Path) -> list[Path]:
    raw = [{"gold_label": label, "sentence1": first, "sentence2": second} for label, first, second in PAIRS]
    own = [
        {"set": "snli_dev", "premise": first, "hypothesis": second, "label": label} for label, first, second in PAIRS
    ]
    all_nli = [{"split": "train", "label": row["gold_label"], **row} for row in raw]
    other = [
        {"split": split, "label": "entailment", "sentence1": "Two dogs", "sentence2": "Never trained on"}
        for split in ("dev", "test")
    ]
    test_set = {"set": "snli_test", "premise": "Two dogs", "hypothesis": "Never trained on", "label": "entailment"}
    txt = ["gold_label", "sentence1_binary_parse", "sentence1", "sentence2", "captionID", "label1"]
    tsv = ["split", "dataset", "filename", "sentence1", "sentence2", "label"]
    twins = folder / "downloaded"
    write(twins / "snli_1.0" / "snli_1.0_train.jsonl.gz", *raw)
    write(twins / "snli_1.0" / "snli_1.0_dev.jsonl", *(other[0] | {"gold_label": "entailment"} for _ in range(3)))
    tab_separated(
        twins / "snli_1.0" / "snli_1.0_train.txt", txt, [{**row, "gold_label": "read twice, if at all"} for row in raw]
    )
    write(twins / "triplets.train.jsonl", {"anchor": "a"})
    return [
        write(folder / "raw.jsonl", *raw), write(folder / "raw.jsonl.gz", *raw),
        write(folder / "pairs.jsonl", test_set, *own, test_set),
        tab_separated(folder / "snli_1.0_train.txt", txt, raw),
        tab_separated(folder / "multinli_1.0_train.txt.gz", txt, raw),
        tab_separated(folder / "AllNLI.tsv", tsv, [other[0], *all_nli, other[1]]),
        tab_separated(folder / "AllNLI.tsv.gz", tsv, [*other, *all_nli]), twins,
    ]  # fmt: skip


def test_every_form_of_the_same_pairs_gives_the_same_triplets(tmp_path, caplog):
    expected = without_repeats(original_triplets([pair for pair in PAIRS if pair[0] != "-"], seed=5))
    for path in every_form(tmp_path):
        caplog.clear()
        with caplog.at_level(logging.INFO, "sgpt"):
            assert triplets(path, seed=5) == expected, path
        assert "10 pairs" in caplog.text
        assert "1 without a gold label left out" in caplog.text


def test_a_folder_gives_the_pairs_of_all_its_training_files(tmp_path):
    rows = [{"gold_label": label, "sentence1": first, "sentence2": second} for label, first, second in PAIRS]
    write(tmp_path / "b" / "snli_1.0_train.jsonl", *rows[:6])
    write(tmp_path / "a" / "multinli_1.0_train.jsonl", *rows[6:])
    write(tmp_path / "whole.jsonl", *rows[6:], *rows[:6])
    assert nli.training_files(tmp_path) == [
        tmp_path / "a" / "multinli_1.0_train.jsonl", tmp_path / "b" / "snli_1.0_train.jsonl"
    ]
    assert triplets(tmp_path) == triplets(tmp_path / "whole.jsonl")


def test_triplets_that_name_a_text_twice_or_a_blank_one_are_left_out_and_counted(tmp_path, caplog):
    pairs = [
        ("entailment", "a", "b"), ("contradiction", "a", "b"), ("entailment", "c", "c"), ("contradiction", "c", "d"),
             ("entailment", "e", " "), ("contradiction", "e", "f"), ("entailment", "g", "h"),
             ("contradiction", "g", "i")]
    file = write(tmp_path / "pairs.jsonl", *({"gold_label": a, "sentence1": b, "sentence2": c} for a, b, c in pairs))
    with caplog.at_level(logging.INFO, "sgpt"):
        assert triplets(file) == [("g", "h", "i"), ("h", "g", "i")]
    assert "10 triplets, without 6 of them that name a text twice and 2 with a blank text" in caplog.text


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "a.jsonl", [{"gold_label": "maybe", "sentence1": "a", "sentence2": "b"}],
            r"line 1, label: 'maybe' is unknown; labels are entailment, neutral,"
        ),
        (
            "a.jsonl", [{"gold_label": "entailment", "sentence1": "a"}],
            r"line 1: no column sentence2 or hypothesis; it has gold_label, sentence1\. Fix it"
        ),
        (
            "a.jsonl", [{"label": 0, "premise": "a", "hypothesis": "b"}],
            r"line 1, label: expected text, got int 0; give a string"
        ),
        (
            "a.jsonl", [{"label": "neutral", "premise": None, "hypothesis": "b"}],
            r"line 1, premise: expected text, got NoneType None; give a string"
        ),
        ("a.jsonl", ["{]"], r"a\.jsonl, line 1: not JSON"),
        (
            "a.jsonl", [{"label": "entailment", "premise": "a", "hypothesis": "b"}],
            r"a\.jsonl: no sentence has both an entailment and a contradiction"
        ),
        ("a.jsonl", [], r"a\.jsonl: no sentence has both"),
        (
            "a.txt", ["gold_label\tsentence1\tsentence2", "neutral\ta\tb", "", "neutral\ta"],
            r"line 4: no column sentence2 or hypothesis; it has gold_label"
        ),
        (
            "a.tsv", ["split\tsentence1\tsentence2", "train\ta\tb"],
            r"line 2: no column gold_label or label; it has split, sentence1"
        ),
        (
            "a.csv", ["gold_label,sentence1,sentence2"],
            r"a\.csv: pairs are read from \.jsonl, .*; give a file of one of these forms"
        ),
        (
            "nothing/b.jsonl", ["{}"],
            r"nothing: no AllNLI\.tsv, snli_\*_train, multinli_\*_train or pairs\.jsonl in it; it has b\.jsonl"
        ),
    ],
)
def test_bad_pairs_are_named_with_the_remedy(name, rows, message, tmp_path):
    file = write(tmp_path / name, *rows)
    with pytest.raises(InputError, match=message):
        triplets(file.parent if "/" in name else file)


@pytest.mark.parametrize("name", ["a.tsv.gz", "a.txt"])
def test_unreadable_pairs_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes("sentence1\tnaïve\n".encode("latin-1"))
    with pytest.raises(InputError, match=rf"{name}, line 1: (cannot be read from here on|not UTF-8 at column 13)"):
        triplets(tmp_path / name)
    with pytest.raises(InputError, match=r"nowhere: no such file or folder; give AllNLI\.tsv\.gz"):
        triplets(tmp_path / "nowhere")


# --- MS MARCO ---

SYSTEMS = ("bm25", "dense", "other")
SCORES_NAME = "cross-encoder-ms-marco-MiniLM-L-6-v2-scores"


def made_up(seed: int, num_passages: int = 60, num_queries: int = 25) -> dict:
    """Passages, queries, mined lines and scores as the original holds them; ids are neither in order nor without gaps.
    """
    draw = random.Random(seed)
    pids, qids = draw.sample(range(1000), num_passages), draw.sample(range(1000), num_queries)
    mined, scores = [], {}
    for number, qid in enumerate(qids):
        positives, pool = draw.sample(pids, draw.choice([0, 1, 1, 2]) if number else 1), draw.sample(pids, 20)
        neg = {system: draw.sample(pool, 12) for system in SYSTEMS if not number or draw.random() < 0.8}
        mined.append({"qid": qid, "pos": positives, "neg": neg})
        scores[qid] = {
            pid: round(draw.uniform(-8, 4), 2) for pid in {*positives, *pool}
        } | {pid: round(draw.uniform(0, 6), 2) for pid in positives}
    return {
        "corpus": {pid: f"passage {pid} ☕" for pid in pids}, "queries": {qid: f"query {qid}" for qid in qids},
        "mined": mined, "scores": scores
    }


def original_queries(
    data: dict, systems=None, num_negs=5, margin=3.0, use_all=False
) -> dict[int, tuple[list[int], set[int]]]:
    """`train_bi-encoder_mnrl.py` line by line: qid -> positives and the set of negatives."""
    negs_to_use, train_queries = systems, {}
    for line in data["mined"]:
        if len(line["pos"]) == 0:
            continue
        threshold = min(data["scores"][line["qid"]][pid] for pid in line["pos"]) - margin
        if negs_to_use is None:
            negs_to_use = list(line["neg"].keys())
        neg_pids = set()
        for system_name in negs_to_use:
            if system_name not in line["neg"]:
                continue
            negs_added = 0
            for pid in line["neg"][system_name]:
                if data["scores"][line["qid"]][pid] > threshold:
                    continue
                if pid not in neg_pids:
                    neg_pids.add(pid)
                    negs_added += 1
                    if negs_added >= num_negs:
                        break
        if use_all or len(neg_pids) > 0:
            train_queries[line["qid"]] = (line["pos"], neg_pids)
    return train_queries


def published(folder: Path, data: dict, *, inline: bool = False, ending: str = "") -> Path:
    """The files in the original's forms; inline: the older one, with scores in the mined lines."""
    write(folder / f"collection.tsv{ending}", *(f"{pid}\t{text}" for pid, text in data["corpus"].items()))
    write(folder / f"queries.train.tsv{ending}", *(f"{qid}\t{text}" for qid, text in data["queries"].items()))
    mined = data["mined"]
    if inline:
        scored = [(data["scores"][line["qid"]], line) for line in mined]
        mined = [
            {"qid": line["qid"], "pos": [{"pid": pid, "ce-score": of[pid]} for pid in line["pos"]],
             "neg": {
                 system: [{"pid": pid, "ce-score": of[pid]} for pid in ranked] for system, ranked in line["neg"].items()
             }}
            for of, line in scored
        ]  # fmt: skip
    else:
        lines = [{"qid": qid} | {str(pid): score for pid, score in of.items()} for qid, of in data["scores"].items()]
        # not in the order of the queries
        write(folder / f"{SCORES_NAME}.jsonl{ending}", *random.Random(1).sample(lines, len(lines)))
    write(folder / f"msmarco-hard-negatives.jsonl{ending}", *mined)
    return folder


def built(folder: Path, cache: Path, **options):
    return cached_examples(cache, "key", lambda writer: msmarco.fill(folder, writer, **options))


def as_ids(examples) -> dict[int, tuple[list[int], list[int]]]:
    """qid -> positives, negatives, out of the texts."""

    def number(text: str) -> int:
        return int(text.split()[1])

    return {
        number(one.query): (
            [number(text) for text in (one.positive, *one.other_positives)], [*map(number, one.hard_negatives)]
        )
        for one in examples
    }


@pytest.mark.parametrize(
    ("options", "originals"),
    [
        ({}, {}),
        ({"negatives_per_system": 2}, {"num_negs": 2}),
        ({"negatives_per_system": 100, "score_margin": 0.5}, {"num_negs": 100, "margin": 0.5}),
        ({"score_margin": 9.0}, {"margin": 9.0}),
        ({"score_margin": 9.0, "use_all_queries": True}, {"margin": 9.0, "use_all": True}),
        ({"systems": ["other", "bm25"], "negatives_per_system": 3}, {"systems": ["other", "bm25"], "num_negs": 3}),
    ],
)
def test_negatives_are_those_of_the_original(options, originals, tmp_path):
    for seed in range(3):
        data = made_up(seed)
        expected = original_queries(data, **originals)
        found = as_ids(built(published(tmp_path / f"{seed}", data), tmp_path / f"cache{seed}", **options))
        assert {qid: (positives, set(negatives)) for qid, (positives, negatives) in found.items()} == expected
        assert list(found) == list(expected)
        assert all(len(negatives) == len(set(negatives)) for _, negatives in found.values())


def test_hand_worked_negatives(tmp_path):
    """Threshold 4 - 3: 12 scores exactly that and stays, 13 a little more and goes; of dense, 11 was chosen before and
    does not count.
    """
    data = {
        "corpus": {pid: f"passage {pid}" for pid in range(10, 20)}, "queries": {5: "query 5"},
        "mined": [
            {"qid": 5, "pos": [10, 19], "neg": {"bm25": [13, 11, 12, 14], "dense": [11, 14, 15, 16], "other": [10, 17]}}
        ],
        "scores": {5: {10: 6.5, 11: -1.0, 12: 1.0, 13: 1.01, 14: 0.0, 15: -4, 16: -2.0, 17: 0.5, 19: 4.0}},
    }  # fmt: skip
    (example,) = built(published(tmp_path / "data", data), tmp_path / "cache", negatives_per_system=2)
    assert (example.query, example.positive, example.other_positives) == ("query 5", "passage 10", ("passage 19",))
    assert sorted(example.hard_negatives) == ["passage 11", "passage 12", "passage 14", "passage 15", "passage 17"]
    (one_system,) = built(
        published(tmp_path / "data", data), tmp_path / "one", negatives_per_system=2, systems=["dense"]
    )
    assert sorted(one_system.hard_negatives) == ["passage 11", "passage 14"]


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_form_gives_the_same_examples(inline, ending, tmp_path):
    data = made_up(7)
    first = list(built(published(tmp_path / "plain", data), tmp_path / "cache"))
    assert list(
        built(published(tmp_path / "other", data, inline=inline, ending=ending), tmp_path / "other_cache")
    ) == first
    renumbered = {pid: place for place, pid in enumerate(data["corpus"])}  # ids 0, 1, 2 …
    in_order = {
        "corpus": {renumbered[pid]: text for pid, text in data["corpus"].items()}, "queries": data["queries"],
        "mined": [
            {
                **line, "pos": [renumbered[pid] for pid in line["pos"]],
                "neg": {s: [renumbered[pid] for pid in of] for s, of in line["neg"].items()}
            }
                  for line in data["mined"]],
        "scores": {qid: {renumbered[pid]: score for pid, score in of.items()} for qid, of in data["scores"].items()},
    }  # fmt: skip
    assert list(built(published(tmp_path / "in_order", in_order, inline=inline), tmp_path / "in_order_cache")) == first


def test_the_store_holds_the_whole_collection_in_its_order_and_then_the_queries_in_use(tmp_path):
    data = made_up(1)
    examples = built(published(tmp_path / "data", data), tmp_path / "cache")
    in_use = [data["queries"][qid] for qid in original_queries(data)]
    assert [examples.texts[number] for number in range(len(examples.texts))] == [*data["corpus"].values(), *in_use]
    assert examples[0] == Example(in_use[0], data["corpus"][data["mined"][0]["pos"][0]], examples[0].hard_negatives)


def test_negatives_are_shuffled_once_by_the_seed_and_a_limit_changes_nothing_else(tmp_path):
    folder = published(tmp_path / "data", made_up(2))
    whole, again, other = (
        list(built(folder, tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert whole == again
    assert whole != other
    assert [set(one.hard_negatives) for one in whole] == [set(one.hard_negatives) for one in other]
    assert list(built(folder, tmp_path / "d", limit=4)) == whole[:4]


def test_a_positive_is_never_a_negative_and_repeated_ids_count_once(tmp_path):
    data = {
        "corpus": {0: "passage 0", 1: "passage 1"}, "queries": {5: "query 5"}, "scores": {5: {0: 1.0, 1: 1.0}},
        "mined": [{"qid": 5, "pos": [0, 0], "neg": {"bm25": [0, 1, 1]}}],
    }  # fmt: skip
    assert list(
        built(published(tmp_path / "data", data), tmp_path / "cache", score_margin=0)
    ) == [Example("query 5", "passage 0", ("passage 1",))]


def test_systems_that_the_first_query_lacks_are_left_out_with_a_warning_and_can_be_named(tmp_path, caplog):
    data = made_up(3)
    data["mined"][1] = {
        "qid": data["mined"][1]["qid"], "pos": data["mined"][0]["pos"], "neg": {"late": data["mined"][0]["neg"]["bm25"]}
    }
    data["scores"][data["mined"][1]["qid"]] = data["scores"][data["mined"][0]["qid"]]
    folder = published(tmp_path / "data", data)
    assert set(as_ids(built(folder, tmp_path / "a"))) == set(original_queries(data))
    assert "no negatives of late are used" in caplog.text
    assert set(as_ids(built(folder, tmp_path / "b", systems=["late"]))) == {data["mined"][1]["qid"]}


def test_lines_are_stripped_before_they_are_split(tmp_path):
    data = {
        "corpus": {3: "  blanks before  ", 4: "passage\u20284\r"}, "queries": {5: " query 5 "},
        "scores": {5: {3: 9.0, 4: 1.0}},
        "mined": [{"qid": 5, "pos": [3], "neg": {"bm25": [4]}}],
    }  # fmt: skip
    assert list(
        built(published(tmp_path / "data", data), tmp_path / "cache")
    ) == [Example(" query 5", "  blanks before", ("passage\u20284",))]


MINED_LINE = {"qid": 5, "pos": [0], "neg": {"bm25": [1, 2]}}
SCORES_LINE = {"qid": 5, "0": 9, "1": 0.5, "2": -1e1}
COLLECTION = ["0\tzero", "1\tone", "2\ttwo"]


def by_hand(folder: Path, changed: dict[str, list]) -> Path:
    files = {
        "collection.tsv": COLLECTION, "queries.train.tsv": ["5\tfive", "6\tsix"],
        "msmarco-hard-negatives.jsonl": [MINED_LINE], f"{SCORES_NAME}.jsonl": [SCORES_LINE],
    }  # fmt: skip
    for name, rows in (files | changed).items():
        if rows:
            write(folder / name, *rows)
    return folder


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "collection.tsv", [*COLLECTION, "2\tagain"],
            r"collection\.tsv, line 4: id 2 was used before, in line 3; ids must be unique"
        ),
        (
            "collection.tsv", ["0\tzero", "one", "2\ttwo"],
            r"collection\.tsv, line 2: expected an id, a whole number, one tab and a text, got 'one'; fix"
        ),
        (
            "collection.tsv", ["0\tzero", "x\tone"],
            r"collection\.tsv, line 2: expected an id, a whole number, one tab and a text, got 'x\\tone'"
        ),
        (
            "collection.tsv", ["0\tzero", "1\tone\ttwo"],
            r"collection\.tsv, line 2: expected an id, .* got '1\\tone\\ttwo'"
        ),
        ("collection.tsv", ["0\tzero", "1\t "], r"collection\.tsv, line 2: expected an id"),
        ("collection.tsv", ["0\tzero", "", "1\tone"], r"collection\.tsv, line 2: expected an id, .* got ''"),
        ("collection.tsv", ["-1\tone"], r"collection\.tsv, line 1: expected an id, .* got '-1\\tone'"),
        ("collection.tsv", ["9" * 30 + "\tone"], r"collection\.tsv, line 1: expected an id"),
        (
            "collection.tsv", COLLECTION[:2],
            r"negatives\.jsonl, line 1: passage id 2 is not in .*collection\.tsv; the files do not belong together"
        ),
        (
            "collection.tsv", ["7\tseven", *COLLECTION[:2]],
            r"line 1: passage id 2 is not in .*collection\.tsv; the files do not belong together"
        ),
        (
            "queries.train.tsv", ["6\tsix"],
            r"negatives\.jsonl, line 1: query id 5 is not in .*queries\.train\.tsv; the files do not belong together"
        ),
        ("queries.train.tsv", ["5\tfive", "5\tsix"], r"queries\.train\.tsv, line 2: id 5 was used before, in line 1"),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE, MINED_LINE],
            r"negatives\.jsonl, line 2: query id 5 was used before; ids must be unique"
        ),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"qid": 6}],
            r"negatives\.jsonl, line 1: query id 6 has no line in .*scores\.jsonl; the files do not"
        ),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"qid": "5"}],
            r"line 1: needs qid, a number, .*; it has qid: str, pos: list, neg: dict"
        ),
        (
            "msmarco-hard-negatives.jsonl", [{"qid": 5, "pos": [0]}],
            r"line 1: needs qid, .* and neg, lists of them by system; it has qid: int, pos: list"
        ),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"neg": {"bm25": 1}}],
            r"line 1, neg, bm25: expected a list of passage ids, got int 1"
        ),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"neg": {"bm25": ["1"]}}],
            r"line 1, neg, bm25: passage id '1' is no whole number; fix or remove it"
        ),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"pos": [0.5]}],
            r"line 1, pos: passage id 0\.5 is no whole number"
        ),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"pos": [{"pid": 0}]}],
            r"line 1, pos: expected an object with pid and ce-score, .* got \{'pid': 0\}"
        ),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"pos": [{"pid": 0, "ce-score": 1}, 0]}],
            r"line 1, pos: expected an object with pid .* got 0"
        ),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"pos": [-1]}],
            r"line 1, pos: passage id -1 is no whole number"
        ),
        ("msmarco-hard-negatives.jsonl", [MINED_LINE | {"pos": [10**20]}], r"line 1, pos: passage id 1000"),
        ("msmarco-hard-negatives.jsonl", [MINED_LINE | {"qid": 10**20}], r"line 1: needs qid, a number"),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"pos": []}],
            r"negatives\.jsonl: no examples in it, 1 without positives left out; lower the score"
        ),
        ("msmarco-hard-negatives.jsonl", ["{"], r"negatives\.jsonl, line 1: not JSON"),
        (
            "msmarco-hard-negatives.jsonl", [MINED_LINE | {"neg": {"bm25": [1, 3]}}],
            r"line 1: the score of passage 3 for query 5 is missing; it must be"
        ),
        (
            f"{SCORES_NAME}.jsonl", [SCORES_LINE | {"0": "high"}],
            r"line 1: the score of passage 0 for query 5 is 'high'; it must be a number, fix it"
        ),
        (
            f"{SCORES_NAME}.jsonl", [SCORES_LINE | {"1": float("nan")}],
            r"line 1: the score of passage 1 for query 5 is nan; it must be a number"
        ),
        (f"{SCORES_NAME}.jsonl", [SCORES_LINE, SCORES_LINE], r"scores\.jsonl, line 2: id 5 was used before, in line 1"),
        (
            f"{SCORES_NAME}.jsonl", [{"0": 9, "qid": "5"}],
            r"scores\.jsonl, line 1: qid '5' is no whole number; write qid and, by passage id, the scores"
        ),
        (f"{SCORES_NAME}.jsonl", ['{"qid": 5, "0": 9'], r"scores\.jsonl, line 1: not JSON"),
        (f"{SCORES_NAME}.jsonl", [[5]], r"scores\.jsonl, line 1: expected a JSON object, got list"),
        (
            f"{SCORES_NAME}.jsonl", [],
            r"scores\.jsonl: no such file, nor .*\.gz, and .*negatives\.jsonl has no scores in it; .* says where they "
            r"are from"
        ),
        ("collection.tsv", [], r"collection\.tsv: no such file, nor collection\.tsv\.gz; .* says where it is from"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_value(name, rows, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        built(by_hand(tmp_path / "data", {name: rows}), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "key").exists()


def test_good_lines_by_hand_are_built(tmp_path):
    assert set(
        *(one.hard_negatives for one in built(by_hand(tmp_path / "data", {}), tmp_path / "cache"))
    ) == {"one", "two"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"systems": ["bm25", "bm26"]}, r"negatives\.jsonl: no negatives of the system 'bm26'; it has bm25"),
        (
            {"negatives_per_system": 0},
            r"negatives_per_system=0 and limit=None must be 1 or more, score_margin=3\.0 a number"
        ),
        ({"limit": 0}, r"limit=0 must be 1 or more"),
        ({"score_margin": float("nan")}, r"score_margin=nan a number"),
        (
            {"score_margin": 99},
            r"negatives\.jsonl: no examples in it, 1 without negatives left out; lower the score margin 99, or use all "
            r"queries"
        ),
    ],
)
def test_settings_that_give_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        built(by_hand(tmp_path / "data", {}), tmp_path / "cache", **options)


def test_a_pickle_of_scores_is_refused_and_not_opened(tmp_path):
    folder = by_hand(tmp_path / "data", {f"{SCORES_NAME}.jsonl": []})
    (folder / f"{SCORES_NAME}.pkl.gz").write_bytes(b"not even a pickle")
    with pytest.raises(
        InputError,
        match=r"scores\.pkl\.gz: a pickle may run any code when it is loaded, so it is not; turn it into .*\.jsonl "
        r"once, as"
    ):
        built(folder, tmp_path / "cache")


def convert_as_the_docstring_says(folder: Path, monkeypatch, content: object) -> None:
    (folder / f"{SCORES_NAME}.pkl.gz").write_bytes(gzip.compress(pickle.dumps(content)))
    code = msmarco.__doc__.split("\n    import gzip")[1].split("\n\n")[0]
    monkeypatch.chdir(folder)
    exec("\n".join(line.removeprefix("    ") for line in f"    import gzip{code}".splitlines()), {})


@pytest.mark.parametrize("number", [float, np.float32])
def test_the_docstrings_conversion_of_the_pickle_gives_the_scores(number, tmp_path, monkeypatch):
    folder = by_hand(tmp_path / "data", {f"{SCORES_NAME}.jsonl": []})
    convert_as_the_docstring_says(
        folder, monkeypatch, {5: {int(pid): number(score) for pid, score in SCORES_LINE.items() if pid != "qid"}}
    )
    assert len(built(folder, tmp_path / "cache")) == 1


def test_the_docstrings_conversion_runs_no_code(tmp_path, monkeypatch):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, ("harmed",)

    folder = by_hand(tmp_path / "data", {f"{SCORES_NAME}.jsonl": []})
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir is no number"):
        convert_as_the_docstring_says(folder, monkeypatch, {5: Harmful()})
    assert not (folder / "harmed").exists()


@pytest.mark.parametrize("name", ["collection.tsv", "queries.train.tsv"])
def test_unreadable_tables_are_refused(name, tmp_path):
    folder = by_hand(tmp_path / "data", {})
    (folder / name).write_bytes(b"0\tna\xefve\n")
    with pytest.raises(InputError, match=rf"{name}, line 1: not UTF-8 \(.*\), got '0\\tna.ve'; fix or remove the line"):
        built(folder, tmp_path / "cache")
    (folder / f"{name}.gz").write_bytes(gzip.compress(b"0\tzero\n" * 1000)[:-9])
    (folder / name).unlink()
    with pytest.raises(
        InputError, match=rf"{name}\.gz: cannot be read \(.*\); it should be text, gzipped when it ends in \.gz"
    ):
        built(folder, tmp_path / "cache")
