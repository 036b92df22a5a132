"""The scripts as a user starts them: texts in, an exported model out, found again by every other script. On a CPU,
offline.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from sentence_transformers import SentenceTransformer
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from sgpt.encoder.encoder import Encoder
from tests.starts import Forked, forks

REPOSITORY = Path(__file__).parents[1]
VERBS = ["parse", "open", "read", "write", "sort", "join", "count", "split", "find", "match"]
NOUNS = ["date", "file", "list", "path", "text"]
ROWS = [
    {
        "query": f"{verb} a {noun}", "positive": f"how to {verb} every {noun} of the folder",
        "negative": f"never {verb} any {noun}"
    }
    for verb in VERBS for noun in NOUNS
]
STEPS = 3


# name -> more arguments of train/biencoder.py, and what its one sentence says
BAD_TRAINING = {
    "no data": (["data.path=nowhere.jsonl"], r"nowhere\.jsonl: no such file; check the path"),
    "no path": (["data.path="], r"data\.path is empty; set data\.path=<file or folder> for data=file"),
    "not json": (["data.path=torn.jsonl"], r"torn\.jsonl, line 2: not JSON .*fix or remove the line"),
    "blank text": (["data.path=blank.jsonl"], r"blank\.jsonl, line 2, query: the text is blank"),
    "too few negatives": (
        ["data.num_hard_negatives=2"], r"train\.jsonl, line 1: 1 hard negatives in column 'negative'"
    ),
    "too few rows": (["trainer.queries_per_process=51"], r"50 training examples do not fill one batch of 51 queries"),
    "no negatives at all": (
        ["trainer.queries_per_process=1", "data.num_hard_negatives=0"], r"no negative at all and the loss would be 0"
    ),
    "too much accumulation": (
        ["trainer.gradient_accumulation=100"], r"the run has 6\.2 batches, less than the 100 of one optimizer step"
    ),
    "no model": (["model.path=nobody/nothing"], r"nobody/nothing: no such local folder, and .*give the local folder"),
    "limit": (["markers.document_max_tokens=129"], r"markers\.document_max_tokens=129 is more than the 128 positions"),
    "no evaluation set": (["evaluation.retrieval=[nowhere]"], r"nowhere.*no such f"),
    "no pairs": (["evaluation.sts=[nowhere.jsonl]"], r"nowhere\.jsonl: no such file"),
    "no pairs and no data": (["evaluation.sts=[gone.jsonl]", "data.path=nowhere.jsonl"], r"gone\.jsonl: no such file"),
    "one name for two sets": (["evaluation.retrieval=[toy,./toy]"], r"two evaluation sets are called 'toy'"),
    "no bias": (
        ["model.path=biasless", "tuning.add_biases=none"], r"tuning=bitfit found no bias parameters in LlamaModel"
    ),
    "wrong type": (
        ["optim.learning_rate=fast"],
        r"optim\.learning_rate: Value 'fast' of type 'str' could not be converted to Float"
    ),
}
# name -> a script with its arguments, and what its one sentence says
BAD_USE = {
    "evaluate nothing": (["evaluate", "model=base"], r"set model=<folder or hub id> and retrieval="),
    "evaluate on nothing": (["evaluate", "model=base", "retrieval=[nowhere]"], r"nowhere.*no such f"),
    "other pooling": (
        ["evaluate", "model=runs/first", "sts=[similar.jsonl]", "pooling=mean"],
        r"carries its markers and pooling in sgpt\.json; do not"
    ),
    "search nothing": (["search", "query=x"], r"set run=<folder of a run, export, adapter or other model>"),
    "export nothing": (["export", "run=nowhere"], r"run=nowhere: no run folder"),
    "export over it": (["export", "run=runs/first", "output=toy"], r"toy exists and is no export of this framework"),
}


def environment() -> dict[str, str]:
    kept = {
        key: value for key,
        value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU")
    }
    # as the door sets it, too late for a fork of a process that has the hub's library
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {
        **kept, **quiet, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200",
        "TOKENIZERS_PARALLELISM": "false"
    }


def all_started(folder: Path, starts: list[list[str]]) -> list[Forked]:
    """Each of `starts`, a script's name and its arguments, one after the other in `folder`."""
    return [forks(folder, columns=200)(*start) for start in starts]


def lines(file: Path, *rows: dict | str) -> None:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture(scope="module")
def project(tiny_base, tmp_path_factory) -> Path:
    """A folder with a base, training rows, a BEIR folder and scored pairs, and one finished run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "base").symlink_to(tiny_base("gpt_neo"))
    lines(folder / "train.jsonl", *ROWS)
    (folder / "toy" / "qrels").mkdir(parents=True)
    lines(folder / "toy" / "corpus.jsonl", *({"_id": f"d{n}", "text": row["positive"]} for n, row in enumerate(ROWS)))
    lines(folder / "toy" / "queries.jsonl", *({"_id": f"q{n}", "text": row["query"]} for n, row in enumerate(ROWS)))
    for split, part in (("dev", range(5)), ("test", range(5, 50))):
        (folder / "toy" / "qrels" / f"{split}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in part)
        )
    pairs = [
        {"sentence1": row["query"], "sentence2": other["query"], "score": n % 6} for n,
        (row, other) in enumerate(zip(ROWS, ROWS[3:], strict=False))
    ]
    lines(folder / "similar.jsonl", *pairs)
    lines(folder / "torn.jsonl", ROWS[0], "{oops")
    lines(folder / "blank.jsonl", ROWS[0], {**ROWS[1], "query": " "})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "biasless")
    shape = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "max_position_embeddings": 64
    }
    LlamaModel(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "biasless")
    ended = forks(folder, columns=200)("biencoder", *TRAIN, "name=first", *EVALUATE)
    assert ended.code == 0, ended.err
    (folder / "first.txt").write_text(ended.out)
    return folder


TRAIN = [
    "model.path=base", "data.path=train.jsonl", "data.num_hard_negatives=1", "markers.query_max_tokens=24",
    "markers.document_max_tokens=40",
    "trainer.queries_per_process=8", f"trainer.max_steps={STEPS}", "trainer.log_every_steps=1",
    "trainer.save_every_steps=2", "trainer.threads=1",
    "optim.learning_rate=1e-2",
]  # fmt: skip
EVALUATE = [
    "evaluation.retrieval=[toy]", "evaluation.sts=[similar.jsonl]", "dev.retrieval=[toy]",
    "trainer.evaluate_every_steps=2"
]


@pytest.fixture(scope="module")
def starts(project) -> dict[str, Forked]:
    """Every start after the first run, by name, in this order."""
    search = ["search", "run=runs/first", "corpus=toy", "query=how to sort every path of the folder", "top=3"]
    markers = "markers={name: brackets, query_max_tokens: 24, document_max_tokens: 40}"
    named = {
        "again": ["biencoder", *TRAIN, "name=first", *EVALUATE],
        "resumed": ["biencoder", *TRAIN, "name=first", *EVALUATE, "resume=true"],
        "resumed otherwise": ["biencoder", *TRAIN, "name=first", *EVALUATE, "resume=true", "optim.learning_rate=1e-3"],
        "evaluate": ["evaluate", "model=runs/first", "retrieval=[toy]", "sts=[similar.jsonl]", "output=out/after.json"],
        "evaluate base": [
            "evaluate", "model=base", "retrieval=[toy]", "sts=[similar.jsonl]", "output=out/before.json", markers
        ],
        "search": search,
        "search again": search,
        "export": ["export", "run=runs/first", "output=again"],
        "unscored": ["biencoder", *TRAIN, "name=unscored", "trainer.max_steps=1"],
        **{
            name: ["biencoder", *TRAIN, f"name=bad/{name.replace(' ', '-')}", *more] for name,
            (more, _) in BAD_TRAINING.items()
        },
        **{name: arguments for name, (arguments, _) in BAD_USE.items()},
    }
    return dict(zip(named, all_started(project, list(named.values())), strict=True))


def losses(folder: Path) -> list[float]:
    return [
        row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row
    ]


# --- the run folder ---


def test_the_run_folder_holds_everything_that_is_promised(project):
    run = project / "runs" / "first"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "adapter", "export", "results.json", "analysis.json",
        "report.html", "manifest.json",
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-2", "step-3"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (
        config["model"]["path"], config["optim"]["learning_rate"], config["trainer"]["max_steps"]
    ) == ("base", 0.01, STEPS)
    assert (run / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_every_logged_step_has_its_numbers(project):
    rows = [json.loads(line) for line in (project / "runs" / "first" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row.keys() >= {
            "step", "loss", "learning_rate", "grad_norm", "queries_per_second", "tokens_per_second", "padding_share",
            "positive_cosine",
                              "hardest_negative_cosine", "seconds"}  # fmt: skip
        numbers = row | row["grad_norms"]
        assert all(np.isfinite(value) for key, value in numbers.items() if key != "grad_norms")
        assert 0 <= row["padding_share"] < 1
    assert [row["step"] for row in rows if "dev" in row] == [2, 3]  # every second, and the last
    assert rows[2]["dev"]["toy"].keys() == {"ndcg@10", "map@100", "recall@100", "mrr@10"}


def test_results_stand_before_after_and_beside_bm25(project):
    results = json.loads((project / "runs" / "first" / "results.json").read_text())
    assert results.keys() == {"before", "after", "bm25"}
    for name in ("before", "after"):
        assert results[name].keys() == {"toy", "similar"}
        assert results[name]["toy"].keys() == {"ndcg@10", "map@100", "recall@100", "mrr@10"}
        assert results[name]["similar"].keys() == {"spearman_cosine", "pearson_cosine"}
    assert results["bm25"].keys() == {"toy"}
    assert results["bm25"]["toy"]["ndcg@10"] == 1.0  # verb and noun stand in one document only
    assert results["before"] != results["after"]


def test_the_manifest_says_what_was_trained_on_what(project):
    manifest = json.loads((project / "runs" / "first" / "manifest.json").read_text())
    assert manifest["data"]["examples"] == 50
    assert manifest["steps"] == STEPS
    assert manifest["processes"] == 1
    trained, total = manifest["parameters"]["trained"], manifest["parameters"]["total"]
    # two layers: norms, attention output, MLP up and down; and the last norm
    assert trained == 2 * (32 + 32 + 32 + 128 + 32) + 32
    assert total > 10 * trained
    assert manifest["environment"]["versions"].keys() >= {"python", "torch", "transformers"}
    assert 0 < manifest["bytes"]["adapter"] < manifest["bytes"]["model"]


def test_the_run_ends_with_the_table_the_folder_and_what_to_type_next(project):
    shown = (project / "first.txt").read_text()
    assert re.search(r"toy .* ndcg@10 ", shown)
    assert all(word in shown for word in ("before", "after", "bm25", "pairs per second", "runs/first"))
    assert "/train/search.py run=runs/first corpus=" in shown  # tests start it from a folder elsewhere


def test_a_run_without_a_test_set_says_how_to_name_one(starts):
    assert starts["unscored"].code == 0, starts["unscored"].err
    expected = (
        "no test set was named: evaluation.retrieval=[<BEIR folder>], evaluation.pairs=[<pairs or triplets>] or "
        "evaluation.sts=[<scored pairs>] scores the next run"
    )
    assert expected in starts["unscored"].out
    assert "ndcg@10" not in starts["unscored"].out


# --- the export ---


def test_our_encoder_and_sentence_transformers_open_the_export_with_equal_embeddings(project):
    texts = ["sort a path", "", "[[1]]", "what?", "naïve 🙂", "word " * 100]
    encoder = Encoder.from_pretrained(project / "runs" / "first" / "export")
    theirs = SentenceTransformer(str(project / "runs" / "first" / "export"), device="cpu")
    for ours, other in (
        (encoder.encode_queries, theirs.encode_query), (encoder.encode_documents, theirs.encode_document)
    ):
        # float32 over two layers, padded otherwise there; entries are about 1
        np.testing.assert_allclose(ours(texts), other(texts), rtol=0, atol=1e-5)


def test_the_adapter_over_the_base_and_the_export_again_are_the_export(project, starts, monkeypatch):
    assert starts["export"].code == 0, starts["export"].err
    monkeypatch.chdir(project)  # the adapter names its base by the path given
    texts = ["sort a path", "[[1]]", ""]
    expected = Encoder.from_pretrained("runs/first/export").encode_documents(texts)
    for folder in ("runs/first/adapter", "runs/first", "again"):
        assert np.array_equal(Encoder.from_pretrained(folder).encode_documents(texts), expected), folder


# --- starting again ---


def test_a_finished_run_is_never_overwritten_in_silence(project, starts):
    ended = starts["again"]
    assert ended.code == 2
    expected = (
        "error: runs/first holds a finished run; resume it with "
        "resume=true, or set name=<another name>\n"
    )
    assert ended.err == expected


def test_resuming_a_finished_run_shows_its_table(project, starts):
    ended = starts["resumed"]
    assert (ended.code, ended.err) == (0, "")
    said, _, shown = ended.out.partition("\n")
    assert said.startswith("runs/first was finished at ")
    assert shown == (project / "first.txt").read_text()


def test_resuming_with_another_configuration_is_refused(project, starts):
    ended = starts["resumed otherwise"]
    assert ended.code == 2
    assert "optim.learning_rate: 0.01 -> 0.001. Resume it with that one, or set name=<another name>" in ended.err
    assert ended.err.count("\n") == 1


# --- the other scripts ---


def test_evaluate_gives_the_numbers_of_the_run(project, starts):
    results = json.loads((project / "runs" / "first" / "results.json").read_text())
    for name, part in (("evaluate", "after"), ("evaluate base", "before")):
        assert starts[name].code == 0, starts[name].err
        found = json.loads((project / "out" / f"{part}.json").read_text())
        assert found.keys() == results[part].keys()
        for chosen in found:
            # the same weights, code and machine
            assert found[chosen] == pytest.approx(results[part][chosen], rel=1e-6), part
    assert re.search(r"toy .* ndcg@10 .*100\.00", starts["evaluate"].out)  # BM25 stands beside it


def test_search_finds_in_the_corpus_and_uses_its_index_again(project, starts):
    ended = starts["search"]
    assert ended.code == 0, ended.err
    index = project / "runs" / "first" / "index" / "toy"
    stored = np.load(index / "embeddings.npy")
    encoder = Encoder.from_pretrained(project / "runs" / "first" / "export")
    query = encoder.encode_queries(["how to sort every path of the folder"], normalize=True)[0]
    documents = encoder.encode_documents([row["positive"] for row in ROWS], normalize=True)
    np.testing.assert_allclose(stored, documents, rtol=0, atol=1e-6)  # in groups of other sizes
    best = np.argsort(-(documents @ query))[:3]
    shown = re.findall(r"\b0\.\d{3}\D+(d\d+)\b", ended.out)
    assert shown == [f"d{row}" for row in best]
    assert starts["search again"].out == ended.out


# --- two processes ---


def test_the_page_on_run_folders_names_every_file_and_every_key_of_the_log(project, starts):
    page = (REPOSITORY / "docs" / "run_folder.md").read_text(encoding="utf-8")
    files, keys = (set(re.findall(r"^\| `([^`]+?)/?` \|", part, re.MULTILINE)) for part in page.split("## The lines"))
    run = project / "runs" / "first"
    assert {file.name for file in run.iterdir() if not file.name.startswith(".")} == files - {"bad_batch.json"}
    lines_of_log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {key for line in lines_of_log for key in line} | {"dev", "alarm"} == keys


@pytest.fixture(scope="module")
def two_processes(project) -> Path:
    """The same run over two processes, each with half of the batch."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--main_process_port", "0"
    ]
    halves = [
        argument if not argument.startswith("trainer.queries") else "trainer.queries_per_process=4"
        for argument in TRAIN
    ]
    ended = subprocess.run(
        [*command, str(REPOSITORY / "train" / "biencoder.py"), *halves, "name=second"],
        cwd=project, env={**environment(), "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return project / "runs" / "second"


def test_two_processes_have_the_losses_of_one_with_the_whole_batch(project, two_processes):
    # float32, halves of a batch summed apart; over three steps of a learning rate of 0.01
    assert losses(two_processes) == pytest.approx(losses(project / "runs" / "first"), rel=1e-4)
    assert json.loads((two_processes / "manifest.json").read_text())["processes"] == 2
    assert {
        path.name for path in (two_processes / "checkpoints" / "step-3").iterdir()
    } >= {"random-0.pt", "random-1.pt"}


# --- bad input ---


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_input_ends_with_one_sentence_and_code_2_and_leaves_no_run_folder(name, starts, project):
    ended = starts[name]
    assert ended.code == 2, ended.err
    assert ended.out == ""
    # what will be done comes first, and how columns are read
    said_before = r"(.* is trained on .*\n)?(.*: query from .*\n)?"
    assert re.fullmatch(rf"{said_before}error: .*({BAD_TRAINING[name][1]}).*\n", ended.err), ended.err
    assert not (project / "runs" / "bad").exists()
    assert not list((project / "data" / "cache").glob(".*"))


@pytest.mark.parametrize("name", BAD_USE)
def test_a_script_that_cannot_do_what_is_asked_says_so_with_code_2(name, starts):
    ended = starts[name]
    assert ended.code == 2, ended.err
    # what will be done comes first
    announced = r"(.* is evaluated on .*; first all are opened\n|.* is exported to .*\n)?"
    assert re.fullmatch(rf"{announced}error: .*({BAD_USE[name][1]}).*\n", ended.err), ended.err
