"""Mined rows against a reference of a few lines, the same from every source, after kills, and by two processes."""

import csv
import gzip
import json
import random
import re
from pathlib import Path

import pytest
import torch

from sgpt.data.formats.beir import RetrievalSet, read_retrieval
from sgpt.data.formats.jsonl import read_rows
from sgpt.data.readers import DataConfig, read_examples
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import EvaluationConfig, read_sets
from sgpt.mining.config import PATH_OF_SOURCE, MineConfig
from sgpt.mining.mine import mine, mining_inputs
from sgpt.mining.rankers import RANKERS
from sgpt.mining.rules import load_rescorer, mine_block
from sgpt.mining.task import read_task
from sgpt.retrieval.bm25 import bm25_run
from sgpt.runtime.errors import InputError
from sgpt.runtime.jobs import Blocks, sole_writer
from tests.cross_encoder.test_cross_encoder import as_the_original
from tests.starts import Ended, Start, beir, blocks, free_port, start_all

REPOSITORY = Path(__file__).parents[2]
SCIFACT = REPOSITORY.parent / "shared" / "data" / "scifact"
WIDE = {"first_rank": 1, "last_rank": 50, "negatives_per_query": 5}
needs_scifact = pytest.mark.skipif(not SCIFACT.is_dir(), reason=f"no SciFact at {SCIFACT}")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """70 documents, among them copies, a blank one and a query's text; 24 queries with one to three positives, two of
    them with equal texts.
    """
    chance = random.Random(0)
    words = ["cat", "dog", "house", "tree", "river", "stone", "cloud", "train", "music", "bread", "glass", "light"]
    corpus = {f"d{n}": " ".join(chance.choices(words, k=chance.randint(3, 8))) for n in range(70)}
    corpus |= {f"d{n}": f" {corpus[f'd{n - 7}']} " for n in (10, 20, 30, 40)} | {"d50": "  "}
    queries = {f"q{n}": " ".join(chance.sample(words, k=3)) for n in range(24)}
    queries["q11"] = queries["q5"]
    corpus["d60"] = queries["q3"]
    qrels = {
        query: {document: chance.randint(0, 2) for document in chance.sample(sorted(corpus), 3)} for query in queries
    }
    qrels["q0"] = {"d50": 1}  # blank: nothing to learn from
    qrels["q3"] = {"d60": 1, "d3": 2, "d13": 1}  # d60 is the query itself
    qrels["q4"] = {"d10": 2, "d3": 1}  # copies of each other
    return beir(tmp_path_factory.mktemp("mine") / "toy", corpus, queries, qrels)


def scores_of(folder: Path, seed: int = 1) -> dict[str, dict[str, float]]:
    """Random scores with many ties for every query and document; a copy may have another score than its original."""
    chance = random.Random(seed)
    dataset = read_retrieval(folder, "train")
    return {
        query: {document: round(chance.uniform(1, 9), 1) for document in dataset.corpus} for query in dataset.queries
    }


def trec(file: Path, run: dict[str, dict[str, float]]) -> Path:
    ranked = ((query, sorted(scores.items(), key=lambda pair: -pair[1])) for query, scores in run.items())
    file.write_text(
        "".join(
            f"{query} Q0 {document} {rank} {score!r} tag\n" for query, scores in ranked for rank,
            (document, score) in enumerate(scores, 1)
        )
    )
    return file


def as_json(file: Path, run: dict) -> Path:
    file.write_text(json.dumps(run))
    return file


def rows_of(folder: Path, scratch: Path, **options) -> list[dict]:
    """The rows without the files around them."""
    config = MineConfig(data=str(folder), output=str(scratch / "rows.jsonl"), **{**WIDE, **options})
    task = read_task(config)
    ranker = RANKERS[config.source](task)
    ranker.prepare(Blocks(Path(config.output)))
    rescore = load_rescorer(config.rescore, task.device) if config.rescore else None
    return mine_block(task.queries, task, ranker, rescore)[0]


def reference(
    dataset: RetrievalSet, run: dict[str, dict[str, float]], first: int, last: int, count: int, margin: float,
    ratio: float
) -> dict:
    """query id -> [(text, score)] of its negatives, from texts alone. Every document has a positive score in the run.
    """
    corpus, found = {document: text.strip() for document, text in dataset.corpus.items()}, {}
    place = {text: number for number, text in reversed([*enumerate(corpus.values())])}
    for query, judged in dataset.qrels.items():
        text = dataset.queries[query]
        twins = [other for other in dataset.qrels if dataset.queries[other] == text]
        never = {
            corpus[document] for twin in twins for document, score in dataset.qrels[twin].items() if score > 0
        } | {text, ""}
        own = {corpus[document] for document, score in judged.items() if score > 0} - {text, ""}
        if not own:
            continue
        best = {
            text: max(score for document, score in run[query].items() if corpus[document] == text) for text in place
        }
        ranking = sorted(best.keys() - never, key=lambda text: (-best[text], place[text]))[first - 1 : last]
        weakest = min(best[text] for text in own)
        found[query] = [
            (text, best[text]) for text in ranking if best[text] <= weakest - margin and best[text] <= ratio * weakest
        ][:count]
    return found


# --- the rules ---


@pytest.mark.parametrize("margin", [None, 0.0, 1.5])
@pytest.mark.parametrize("ratio", [None, 0.8])
@pytest.mark.parametrize(("first", "last", "count"), [(1, 50, 5), (10, 30, 3), (3, 4, 1), (60, 100, 9)])
def test_negatives_are_those_of_a_reference_of_ten_lines(first, last, count, ratio, margin, toy, tmp_path):
    run = scores_of(toy)
    rows = rows_of(
        toy, tmp_path, source="run", trec=str(as_json(tmp_path / "run.json", run)), score_margin=margin,
        score_ratio=ratio,
                   first_rank=first, last_rank=last, negatives_per_query=count)  # fmt: skip
    expected = reference(
        read_retrieval(toy, "train"), run, first, last, count, -1e9 if margin is None else margin,
        1e9 if ratio is None else ratio
    )
    assert {
        row["ids"]["query"]: list(zip(row["negative"], row["scores"]["negative"], strict=True)) for row in rows
    } == expected
    assert "q0" not in expected


def test_positives_are_all_there_the_most_relevant_first_without_copies_and_the_query_itself(toy, tmp_path):
    rows = {row["ids"]["query"]: row for row in rows_of(toy, tmp_path)}
    corpus = read_retrieval(toy, "train").corpus
    assert "q0" not in rows
    assert rows["q3"]["ids"]["positive"] == ["d3", "d13"]  # d60 is the query
    assert rows["q4"]["ids"]["positive"] == ["d10"]
    several = [row for row in rows.values() if isinstance(row["positive"], list)]
    assert several
    for row in several:
        assert row["positive"] == [corpus[document] for document in row["ids"]["positive"]]


def test_random_negatives_come_from_the_window_and_depend_on_the_seed_only(toy, tmp_path):
    options = {
        "source": "run", "trec": str(as_json(tmp_path / "run.json", scores_of(toy))), "first_rank": 5, "last_rank": 30,
        "score_ratio": 0.9
    }
    whole = {row["ids"]["query"]: row["negative"] for row in rows_of(toy, tmp_path, **options, negatives_per_query=26)}
    drawn = [rows_of(toy, tmp_path, **options, pick="random", seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != rows_of(toy, tmp_path, **options)
    for row in drawn[0]:
        eligible = whole[row["ids"]["query"]]
        assert [text for text in eligible if text in row["negative"]] == row["negative"]  # in ranked order
        assert len(row["negative"]) == min(5, len(eligible))
    again = rows_of(toy, tmp_path, **options, pick="random", limit=4)  # neither do other queries matter
    assert again == drawn[0][: len(again)]


def test_a_ratio_below_zero_means_as_far_below(tmp_path):
    folder = beir(tmp_path / "b", {"p": "p", "a": "a", "b": "b", "c": "c"}, {"q": "q"}, {"q": {"p": 1}})
    file = as_json(tmp_path / "run.json", {"q": {"p": -2.0, "a": -1.9, "b": -2.15, "c": -2.25}})
    [row] = rows_of(folder, tmp_path, source="run", trec=str(file), score_ratio=0.9)
    assert row["negative"] == ["c"]  # -2.2 and less; 0.9 * -2 would let all through that is worse than -1.8


# --- the sources ---


def test_bm25_its_trec_run_and_its_json_give_the_same_bytes(toy, tmp_path):
    """Some positives share no word with their query; margins are left out, as these have no score in a run."""
    found = {
        query: {d: s for d, s in scores.items() if s > 0} for query,
        scores in bm25_run(read_retrieval(toy, "train"), depth=70).items()
    }
    files = {"bm25": None, "trec": trec(tmp_path / "run.trec", found), "json": as_json(tmp_path / "run.json", found)}
    rows = {
        name: rows_of(toy, tmp_path, **({"source": "run", "trec": str(file)} if file else {})) for name,
        file in files.items()
    }
    assert rows["trec"] == rows["json"]
    for row, other in zip(rows["trec"], rows["bm25"], strict=True):
        row["scores"]["positive"] = [score or 0.0 for score in row["scores"]["positive"]]
        assert row == other


def test_a_models_cosines_rank_and_the_window_is_exact(toy, tiny_base, tmp_path):
    base, options = str(tiny_base("gpt_neo")), {"first_rank": 4, "last_rank": 40, "score_margin": 0.01}
    rows = rows_of(toy, tmp_path, source="model", model=base, documents_per_block=16, **options)
    encoder, dataset = Encoder.from_pretrained(base), read_retrieval(toy, "train")
    documents = torch.from_numpy(encoder.encode_documents(list(dataset.corpus.values()), normalize=True))
    queries = torch.from_numpy(encoder.encode_queries(list(dataset.queries.values()), normalize=True))
    run = {
        query: dict(zip(dataset.corpus, row.tolist(), strict=True)) for query,
        row in zip(dataset.queries, queries @ documents.T, strict=True)
    }
    expected = reference(dataset, run, 4, 40, 5, 0.01, 1e9)
    assert [row["ids"]["query"] for row in rows] == list(expected)
    for row in rows:  # scores and not texts: float32 may order neighbours otherwise in other packs
        assert row["scores"]["negative"] == pytest.approx(
            [score for _, score in expected[row["ids"]["query"]]], abs=1e-5
        )
        assert row["scores"]["negative"] == pytest.approx(
            [run[row["ids"]["query"]][document] for document in row["ids"]["negative"]], abs=1e-5
        )


def test_a_decoder_orders_the_window_by_the_log_probability_of_the_query(toy, language_model, tmp_path):
    folder = language_model("gpt2")
    window = {
        row["ids"]["query"]: row["negative"]
        for row in rows_of(toy, tmp_path, first_rank=2, last_rank=21, negatives_per_query=20)
    }
    rows = rows_of(toy, tmp_path, first_rank=2, last_rank=21, rescore=str(folder))
    for row in rows[:3]:
        scores = sorted(
            (as_the_original(folder, row["query"], text) for text in window[row["ids"]["query"]]), reverse=True
        )
        assert row["scores"]["negative"] == pytest.approx(scores[: len(row["negative"])], abs=1e-4)


def test_a_query_that_a_decoder_cannot_read_is_refused_before_anything_is_mined(language_model, tmp_path):
    corpus = {f"d{number}": f"apple {number}" for number in range(9)}
    folder = beir(
        tmp_path / "long", corpus, {"short": "apple", "long": "apple " * 200}, {"short": {"d1": 1}, "long": {"d2": 1}}
    )
    with pytest.raises(InputError, match=r"query 'apple apple .* takes \d+ tokens"):
        mined(
            folder, tmp_path / "rows.jsonl", rescore=str(language_model("gpt2")), queries_per_block=1, last_rank=5,
            negatives_per_query=2
        )
    assert not list(tmp_path.glob("rows.jsonl*"))


def test_a_cross_encoder_orders_the_window_and_margins_are_by_its_scores(toy, tiny_base, tmp_path):
    from sentence_transformers import CrossEncoder
    from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path / "cross"
    torch.manual_seed(3)
    model = BertForSequenceClassification.from_pretrained(tiny_base("bert"), num_labels=1)
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_base("bert")).save_pretrained(folder)
    window = {
        row["ids"]["query"]: row["negative"]
        for row in rows_of(toy, tmp_path, first_rank=2, last_rank=21, negatives_per_query=20)
    }
    rows = rows_of(toy, tmp_path, first_rank=2, last_rank=21, rescore=str(folder), score_ratio=0.98)
    scorer = CrossEncoder(str(folder), device="cpu")
    dropped = 0
    for row in rows[:6]:
        positives = row["positive"] if isinstance(row["positive"], list) else [row["positive"]]
        scores = [
            float(scorer.predict([(row["query"], text)])[0]) for text in (*positives, *window[row["ids"]["query"]])
        ]
        weakest, others = min(scores[: len(positives)]), sorted(scores[len(positives) :], reverse=True)
        kept = [score for score in others if score <= 0.98 * weakest]
        dropped += len(others) - len(kept)
        # alone and in a padded batch
        assert row["scores"]["positive"] == pytest.approx(scores[: len(positives)], abs=1e-4)
        assert row["scores"]["negative"] == pytest.approx(kept[:5], abs=1e-4)
    assert dropped > 0


# --- the file ---


def mined(folder: Path, output: Path, **options) -> tuple[dict, bytes]:
    statistics = mine(MineConfig(data=str(folder), output=str(output), threads=1, **{**WIDE, **options}))
    return statistics, output.read_bytes()


def test_rows_are_read_as_training_examples(toy, tmp_path):
    statistics, _ = mined(toy, tmp_path / "rows.jsonl", on_few="drop")
    examples = read_examples(DataConfig(path=str(tmp_path / "rows.jsonl"), num_hard_negatives=5), tmp_path / "cache")
    rows = [row for _, row in read_rows(tmp_path / "rows.jsonl")]
    assert len(examples) == len(rows) == statistics["counts"]["rows"] > 10
    for example, row in zip(examples, rows, strict=True):
        positives = row["positive"] if isinstance(row["positive"], list) else [row["positive"]]
        assert (
            example.query, [example.positive, *example.other_positives], [*example.hard_negatives]
        ) == (row["query"], positives, row["negative"])
    assert any(example.other_positives for example in examples)


def test_queries_with_few_negatives_are_kept_or_dropped_and_counted(toy, tmp_path):
    run = as_json(tmp_path / "run.json", scores_of(toy))
    options = {"source": "run", "trec": str(run), "score_ratio": 0.9, "negatives_per_query": 10}
    kept, _ = mined(toy, tmp_path / "kept.jsonl", **options)
    dropped, _ = mined(toy, tmp_path / "dropped.jsonl", on_few="drop", **options)
    rows = {name: [row for _, row in read_rows(tmp_path / f"{name}.jsonl")] for name in ("kept", "dropped")}
    assert rows["dropped"] == [row for row in rows["kept"] if len(row["negative"]) == 10]
    assert 0 < len(rows["dropped"]) < len(rows["kept"])
    assert kept["counts"]["few"] == dropped["counts"]["few"] == len(rows["kept"]) - len(rows["dropped"])
    unusable = kept["counts"]["unusable"]
    assert (kept["counts"]["queries"], kept["counts"]["rows"]) == (24, 24 - unusable)
    assert kept["counts"]["negatives"] == sum(len(row["negative"]) for row in rows["kept"])
    assert (kept["counts"]["documents"], kept["counts"]["blank"]) == (70, 1)
    assert kept["counts"]["copies"] == 70 - 1 - len(
        {text.strip() for text in read_retrieval(toy, "train").corpus.values()} - {""}
    )


def test_a_compressed_output_holds_the_same_rows_in_the_same_bytes_each_time(toy, tmp_path):
    plain = mined(toy, tmp_path / "rows.jsonl")[1]
    first, second = (mined(toy, tmp_path / folder / "rows.jsonl.gz")[1] for folder in ("a", "b"))
    assert first == second
    assert gzip.decompress(first) == plain


def test_the_report_shows_counts_and_samples_and_stands_alone(tmp_path):
    texts = {"p": "<script>alert(1)</script> cat", **{f"n{n}": f"cat {n} & more" for n in range(9)}}
    folder = beir(tmp_path / "b", texts, {"q": "<b>cat</b>"}, {"q": {"p": 1}})
    mined(folder, tmp_path / "rows.jsonl")
    page = (tmp_path / "rows.report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; cat" in page
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!#)", page)
    assert page.count("<svg") == 1
    assert "<td>rows written</td><td>1</td>" in page


# --- going on ---


def test_a_finished_output_is_kept_and_resuming_it_shows_its_statistics(toy, tmp_path):
    output = tmp_path / "rows.jsonl"
    statistics, content = mined(toy, output)
    with pytest.raises(InputError, match=r"rows\.jsonl exists; resume with resume=true, or set output="):
        mined(toy, output)
    before = output.stat().st_mtime_ns
    assert mined(toy, output, resume=True) == (statistics, content)
    assert output.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"another configuration: last_rank: 50 -> 40\. Resume it with that one"):
        mined(toy, output, resume=True, last_rank=40)
    assert {file.name for file in tmp_path.iterdir()} == {"rows.jsonl", "rows.jsonl.manifest.json", "rows.report.html"}
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("{}\n")
    with pytest.raises(InputError, match=r"foreign\.jsonl exists without .*foreign\.jsonl\.manifest\.json"):
        mined(toy, foreign, resume=True)


def test_resuming_on_other_texts_is_refused(toy, tmp_path):
    dataset = read_retrieval(toy, "train")
    for number, corpus in enumerate((dataset.corpus, {**dataset.corpus, "d69": "another text"})):
        folder = beir(
            tmp_path / str(number) / "b", dataset.corpus if number == 0 else corpus, dataset.queries, dataset.qrels
        )
        (tmp_path / "b").unlink(missing_ok=True)
        (tmp_path / "b").symlink_to(folder)
        if number == 0:
            mined(tmp_path / "b", tmp_path / "rows.jsonl")
    with pytest.raises(
        InputError,
        match=r"rows\.jsonl was started with other inputs .*: corpus of .*/b has changed \(hash .* -> .*\)\. Res"
    ):
        mined(tmp_path / "b", tmp_path / "rows.jsonl", resume=True)


# --- as it is started ---


@pytest.fixture(scope="module")
def started(toy, tiny_base, tmp_path_factory) -> tuple[Path, dict[str, Ended]]:
    folder = tmp_path_factory.mktemp("started")
    (folder / "toy").symlink_to(toy)
    (folder / "base").symlink_to(tiny_base("gpt_neo"))
    wide = [f"{key}={value}" for key, value in WIDE.items()]
    model = [
        "data=toy", "source=model", "model=base", "queries_per_block=1", "documents_per_block=4", "threads=1", *wide
    ]
    named = {
        "model": Start([*model, "output=model.jsonl"]),
        "model killed": Start([*model, "output=killed.jsonl"], ("killed.jsonl.part-0", 5)),
        "model not resumed": Start([*model, "output=killed.jsonl"]),
        "model killed again": Start([*model, "output=killed.jsonl", "resume=true"], ("killed.jsonl.part-0", 19)),
        "model resumed": Start([*model, "output=killed.jsonl", "resume=true"], port=free_port()),
        "model by two": Start([*model, "output=two.jsonl"], port=free_port()),
        "model again": Start([*model, "output=model.jsonl"]),
        "no model": Start(["data=toy", "output=x.jsonl", "source=model"]),
    }
    if SCIFACT.is_dir():
        [some] = read_sets(EvaluationConfig([str(SCIFACT)], split="train", limit=150)).retrieval
        beir(folder / "scifact", some.corpus, some.queries, some.qrels)
        rules = ["first_rank=2", "last_rank=20", "negatives_per_query=3", "score_ratio=0.9"]
        scifact = ["data=scifact", "queries_per_block=1", "threads=1", *rules]
        named |= {
            "scifact": Start([*scifact, "output=scifact.jsonl"]),
            "scifact killed": Start([*scifact, "output=scifact_killed.jsonl"], ("scifact_killed.jsonl.part-0", 20)),
            "scifact resumed": Start([*scifact, "output=scifact_killed.jsonl", "resume=true"], port=free_port()),
        }
    return folder, start_all("mine", folder, named)


@pytest.mark.bitwise
def test_a_killed_run_of_a_model_resumes_where_it_was_and_ends_with_the_same_bytes(started):
    folder, ended = started
    assert ended["model"].codes == [0], ended["model"].err
    first, second = ended["model killed"], ended["model killed again"]
    assert (first.codes, second.codes, ended["model resumed"].codes) == ([-9], [-9], [0, 0])
    assert blocks(first, "documents") == list(range(len(blocks(first, "documents"))))  # while encoding
    assert blocks(second, "documents") == list(range(17))  # 65 texts in blocks of 4, none of them twice
    assert blocks(second, "block") == list(range(len(blocks(second, "block"))))
    assert 2 <= len(blocks(second, "block")) < 22
    assert (folder / "killed.jsonl").read_bytes() == (folder / "model.jsonl").read_bytes()
    assert not [name for name in ended["model resumed"].files if "part" in name or "embeddings" in name]


@pytest.mark.bitwise
@needs_scifact
def test_a_killed_run_of_scifact_resumes_where_it_was_and_ends_with_the_same_bytes(started):
    folder, ended = started
    assert (ended["scifact"].codes, ended["scifact resumed"].codes) == ([0], [0, 0]), ended["scifact resumed"].err
    killed = ended["scifact killed"]
    assert killed.codes == [-9]
    assert blocks(killed, "block") == list(range(len(blocks(killed, "block"))))
    assert 20 <= len(blocks(killed, "block")) < 150
    assert "scifact_killed.jsonl" not in killed.files
    content = (folder / "scifact.jsonl").read_bytes()
    assert (folder / "scifact_killed.jsonl").read_bytes() == content
    assert content.count(b"\n") == 150


def test_an_output_has_one_writer(toy, tmp_path):
    with sole_writer(tmp_path / "rows.jsonl"), pytest.raises(
        InputError, match=r"rows\.jsonl: another process is writing to it"
    ):
        mined(toy, tmp_path / "rows.jsonl")
    assert mined(toy, tmp_path / "rows.jsonl")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.bitwise
def test_two_processes_write_the_file_of_one(started):
    folder, ended = started
    assert ended["model by two"].codes == [0, 0], ended["model by two"].err
    assert (folder / "two.jsonl").read_bytes() == (folder / "model.jsonl").read_bytes()


def test_the_script_ends_with_a_table_and_refuses_in_one_sentence(started):
    _, ended = started
    assert re.search(r"rows written .* 2\d", ended["model"].out)
    assert re.search(r"negative scores, median .*\d\.\d", ended["model"].out)
    assert re.search(r"report +model\.report\.html", ended["model"].out)
    assert ended["model again"].codes == ended["no model"].codes == [2]
    announced, refused = ended["model again"].err.splitlines()
    assert announced == "model.jsonl: hard negatives are mined for the queries of toy, ranked by base"
    assert refused == "error: model.jsonl exists; resume with resume=true, or set output=<another path>"
    assert ended["no model"].err == "error: source=model needs model=<path>\n"
    assert ended["model not resumed"].err == (
        "killed.jsonl: hard negatives are mined for the queries of toy, ranked by base\n"
        "error: killed.jsonl is unfinished, see killed.jsonl.manifest.json; resume with resume=true, or set "
        "output=<another path>\n"
    )


@needs_scifact
def test_bm25_margins_count_positives_at_any_depth(started):
    dataset = read_retrieval(started[0] / "scifact", "train")
    rows, expected, deep = [
        row for _, row in read_rows(started[0] / "scifact.jsonl")
    ], bm25_run(dataset, len(dataset.corpus)), 0
    for row in rows:
        scores = expected[row["ids"]["query"]]
        for side in ("positive", "negative"):
            assert row["scores"][side] == pytest.approx(
                [scores.get(document, 0.0) for document in row["ids"][side]], abs=1e-6
            )
        judged = {document for document, score in dataset.qrels[row["ids"]["query"]].items() if score > 0}
        weakest = min(scores.get(document, 0.0) for document in judged)
        others = sorted(
            (score for document, score in scores.items() if document not in judged and score > 0), reverse=True
        )[1:20]
        assert row["scores"]["negative"] == pytest.approx(
            [score for score in others if score <= 0.9 * weakest][:3], abs=1e-6
        )
        deep += weakest < others[-1]
    assert deep > 0  # some positive is ranked below the window


# --- bad input ---


LINE = "q1 Q0 d1 1 3.5 tag\n"
BAD_RUNS = {
    "six fields": (
        LINE + "q1 Q0 d2 2 1.5\n", {},
        r"run, line 2: 5 fields, a TREC run has 6, query-id Q0 document-id rank score tag: 'q1 Q0 d2 2 1\.5'"
    ),
    "no number": ("q1 Q0 d1 1 high tag\n", {}, r"run, line 1: rank '1' or score 'high' is no number"),
    "not finite": ("q1 Q0 d1 1 nan tag\n", {}, r"run, line 1: score 'nan' is not finite"),
    "unknown query": (
        "q99 Q0 d1 1 3.5 tag\n", {}, r"run, line 1: query id 'q99' is not in .*toy; the run belongs to another folder"
    ),
    "unknown document": ("q1 Q0 x1 1 3.5 tag\n", {}, r"run, line 1: document id 'x1' is not in .*toy"),
    "twice": (LINE + LINE, {}, r"run, line 2: document id 'd1' stands twice under query id 'q1'"),
    "distances": (
        LINE + "q1 Q0 d2 2 4.5 tag\n", {},
        r"run, line 2: rank 2 scores 4\.5, more than rank 1 with 3\.5; higher must be better"
    ),
    "nothing": ("", {}, r"run: ranks none of the queries of split 'train'"),
    "no positive": (
        LINE, {"score_ratio": 0.95},
        r"run: query id 'q1' has no score for its positive 'd\d+', and score_margin and score_ratio need one"
    ),
    "not json": ('{"q1": ', {}, r"run, line 1: not JSON"),
    "a list": ('{"q1": ["d1"]}', {}, r"run, query id 'q1': holds list, expected document ids with scores"),
    "a text": ('{"q1": {"d1": "3"}}', {}, r"run, query id 'q1': score '3' of 'd1' is no finite number"),
    "unknown in json": ('{"q1": {"x1": 3}}', {}, r"run, query id 'q1': document id 'x1' is not in"),
    "not text": (b"\xff\xfe", {}, r"run, line 1: begins with the mark of UTF-16; save the file as UTF-8"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_bad_run_file_is_refused_with_its_place_and_leaves_nothing(name, toy, tmp_path):
    content, options, message = BAD_RUNS[name]
    (tmp_path / "run").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        mined(toy, tmp_path / "rows.jsonl", source="run", trec=str(tmp_path / "run"), **options)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "tfidf"}, r"source='tfidf' is unknown; choose bm25, model or run"),
        ({"source": "model"}, r"source=model needs model=<path>"),
        ({"source": "run"}, r"source=run needs trec=<path>"),
        ({"model": "base"}, r"source=bm25 does not read model=base; set source=model, or leave it out"),
        ({"pooling": "cls"}, r"^pooling has no effect without source=model"),
        ({"documents_per_block": 3}, r"^documents_per_block has no effect without source=model"),
        ({"seed": 7}, r"^seed has no effect without pick=random"),
        ({"max_error_share": 0.5}, r"^max_error_share has no effect without on_error=skip"),
        ({"pick": "first"}, r"pick='first' is unknown; choose top or random"),
        ({"on_few": "fill"}, r"on_few='fill' is unknown; choose keep or drop"),
        ({"first_rank": 0}, r"first_rank=0 must be 1 or more"),
        (
            {"first_rank": 98, "last_rank": 100, "negatives_per_query": 4},
            r"first_rank=98 to last_rank=100 cannot hold negatives_per_query=4"
        ),
        ({"score_margin": -0.1}, r"score_margin=-0\.1 must be 0 or more"),
        ({"score_ratio": 1.5}, r"score_ratio=1\.5 must be above 0 and at most 1"),
        (
            {"on_error": "skip", "columns": {"query": "title"}},
            r"columns\.query, on_error: for pairs in a file only, and data=.* is read as a BEIR folder; leave out"
        ),
        ({"output": "rows.json"}, r"output=rows\.json: rows are written as JSON lines; end the name in \.jsonl or"),
        ({"data": ""}, r"set data=<BEIR folder or file of pairs> and output="),
        ({"output": ""}, r"set data=<BEIR folder or file of pairs> and output="),
        ({"split": "dev"}, r"dev\.tsv: no such file; .* has the splits: train"),
        ({"source": "run", "trec": "nowhere"}, r"trec=nowhere: no such file"),
        ({"rescore": "nowhere"}, r"rescore=nowhere: no folder with a config\.json"),
    ],
)
def test_what_cannot_be_is_refused(options, message, toy):
    with pytest.raises(InputError, match=message):
        mine(MineConfig(**{"data": str(toy), "output": "rows.jsonl", **options}))


def test_every_source_of_the_config_has_a_ranker():
    assert PATH_OF_SOURCE.keys() == RANKERS.keys()


def test_a_folder_without_columns_or_positives_is_refused(tmp_path):
    folder = beir(tmp_path / "b", {"d": "text"}, {"q": "query"}, {"q": {"d": 0}})
    with pytest.raises(
        InputError, match=r"train\.tsv: no judgement is above 0, so no document is relevant to any query"
    ):
        mined(folder, tmp_path / "rows.jsonl")
    (folder / "corpus.jsonl").write_text('{"_id": "d", "body": "text"}\n')
    with pytest.raises(InputError, match=r"corpus\.jsonl, line 1: needs the columns _id and text; it has _id, body"):
        mined(folder, tmp_path / "rows.jsonl")


def test_a_model_without_a_scoring_head_is_no_cross_encoder(toy, tiny_base, tmp_path):
    with pytest.raises(InputError, match=r"BertModel is no cross-encoder; its scores would come from random weights"):
        mined(toy, tmp_path / "rows.jsonl", rescore=str(tiny_base("bert")))


def test_a_bi_encoder_of_sentence_transformers_is_no_cross_encoder(toy, tiny_base, tmp_path):
    """Theirs opens it with a new random head."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(str(tiny_base("bert")))
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(tmp_path / "biencoder"))
    with pytest.raises(InputError, match=r"BertModel is no cross-encoder; its scores would come from random weights"):
        mined(toy, tmp_path / "rows.jsonl", rescore=str(tmp_path / "biencoder"))


def test_a_gguf_file_that_rescores_is_one_of_the_inputs(toy, tmp_path):
    file = tmp_path / "decoder.gguf"
    task = read_task(MineConfig(data=str(toy), output=str(tmp_path / "rows.jsonl"), source="bm25", rescore=str(file)))
    hashes = set()
    for content in (b"one", b"other"):
        file.write_bytes(content)
        hashes.add(mining_inputs(task, RANKERS["bm25"](task))[f"rescore {file}"])
    assert len(hashes) == 2


@pytest.mark.parametrize("columns", [{}, {"query": "title", "positive": "body"}])
def test_pairs_are_mined_as_the_beir_folder_that_they_make(columns, toy, tmp_path):
    """Written out by hand: a query a row, its positive a document."""
    dataset = read_retrieval(toy, "train")
    judged = (
        (dataset.queries[query], dataset.corpus[document]) for query,
        documents in dataset.qrels.items() for document in documents
    )
    pairs = [(query, text) for query, text in judged if text.strip() and text != query]
    asked, answer = columns.get("query", "question"), columns.get("positive", "answer")
    with (tmp_path / "pairs.csv").open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([(asked, answer), *pairs])
    queries, documents = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True))
    qrels = {
        f"q{n}": {f"d{documents.index(text)}": 1 for query, text in pairs if query == asked_for} for n,
        asked_for in enumerate(queries)
    }
    folder = beir(
        tmp_path / "same", {f"d{n}": text for n, text in enumerate(documents)},
        {f"q{n}": text for n, text in enumerate(queries)}, qrels
    )
    few = {"last_rank": 20, "negatives_per_query": 3}
    expected = mined(folder, tmp_path / "folder.jsonl", **few)[1]
    assert mined(tmp_path / "pairs.csv", tmp_path / "file.jsonl", columns=columns, **few)[1] == expected
    assert expected.count(b"\n") > 10


def test_pairs_whose_columns_are_not_clear_are_refused_by_the_keys_of_mining(tmp_path):
    (tmp_path / "pairs.csv").write_text("title,body\na,b\n")
    with pytest.raises(InputError, match=r"set columns\.query=<column> and columns\.positive=<column>$"):
        mined(tmp_path / "pairs.csv", tmp_path / "rows.jsonl")


def test_bad_rows_of_pairs_stop_mining_or_are_skipped_and_listed(tmp_path):
    pairs = [("same", "same"), *((f"question {n}", f"answer {n} of question {n}") for n in range(30))]
    with (tmp_path / "pairs.csv").open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([("question", "answer"), *pairs])
    with pytest.raises(
        InputError,
        match=r"pairs\.csv, line 2: the positive equals the query 'same'; .* or skip such rows with on_error=skip$"
    ):
        mined(tmp_path / "pairs.csv", tmp_path / "rows.jsonl")
    few = {"last_rank": 20, "negatives_per_query": 3, "on_error": "skip"}
    assert mined(tmp_path / "pairs.csv", tmp_path / "rows.jsonl", max_error_share=0.1, **few)[1].count(b"\n") == 30
    assert '"where": "' + str(tmp_path / "pairs.csv, line 2") in (tmp_path / "rows.jsonl.rejected.jsonl").read_text()
    with pytest.raises(InputError, match=r"1 of 31 rows rejected, .* More than max_error_share=0\.01 are not skipped"):
        mined(tmp_path / "pairs.csv", tmp_path / "other.jsonl", **few)
