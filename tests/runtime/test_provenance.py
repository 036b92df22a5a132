"""A resumed run is the same run: the same bits on fewer cores, and refused by name where data, weights or processes are
others.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sgpt.runtime.errors import InputError
from sgpt.runtime.provenance import (
    check_same,
    computing_versions,
    content_hash,
    environment,
    flat,
    set_threads,
    tokenizer_hash,
    weights_hash,
)
from tests.starts import Ended, Start, beir, free_port, start_all

WORDS = ["parse", "date", "string", "open", "file", "read", "write", "sort", "list", "number", "path", "folder"]
ROWS = [
    {"query": f"{a} the {b}", "positive": f"how to {a} every {b} of it"}
    for place, a in enumerate(WORDS) for b in WORDS[place + 1 : place + 5]
]  # fmt: skip
COMMON = [
    "model.path=base", "data.path=train.jsonl", "markers.query_max_tokens=24", "markers.document_max_tokens=40",
    "trainer.queries_per_process=8", "trainer.max_steps=5", "trainer.log_every_steps=1", "trainer.save_every_steps=2",
    "optim.learning_rate=1e-2", "evaluation.retrieval=[toy]",
]  # fmt: skip
CHANGED = {  # what is changed -> the file, and how the refusal names it
    "data": ("train.jsonl", "training data train.jsonl has changed"),
    "base": ("base/model.safetensors", "base model base has changed"),
    "tokenizer": ("base/tokenizer.json", "tokenizer of base has changed"),
    "test set": ("toy/qrels/test.tsv", "test set toy has changed"),
}


@pytest.fixture(scope="module")
def project(tiny_base, tmp_path_factory) -> Path:
    """`<file>.other` next to each file of CHANGED: as good an input, but not the one that the run began with."""
    folder = tmp_path_factory.mktemp("provenance")
    shutil.copytree(tiny_base("gpt2"), folder / "base")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    corpus = {f"d{n}": row["positive"] for n, row in enumerate(ROWS)}
    queries = {f"q{n}": row["query"] for n, row in enumerate(ROWS)}
    qrels = {f"q{n}": {f"d{n}": 1} for n in range(len(ROWS))}
    (beir(folder / "toy", corpus, queries, qrels) / "qrels" / "train.tsv").rename(folder / "toy" / "qrels" / "test.tsv")
    (folder / "train.jsonl.other").write_text((folder / "train.jsonl").read_text().replace("how to", "why to"))
    weights = load_file(folder / "base" / "model.safetensors")
    weights["ln_f.bias"][3] += 1e-3
    save_file(weights, folder / "base" / "model.safetensors.other", {"format": "pt"})
    vocabulary = json.loads((folder / "base" / "tokenizer.json").read_text())
    vocabulary["normalizer"] = {"type": "Lowercase"}
    (folder / "base" / "tokenizer.json.other").write_text(json.dumps(vocabulary))
    lines = (folder / "toy" / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (folder / "toy" / "qrels" / "test.tsv.other").write_text("".join(lines[:10]))
    return folder


@pytest.fixture(scope="module")
def started(project) -> dict[str, Ended]:
    killed = [*COMMON, "name=killed"]
    starts = {
        "whole": Start([*COMMON, "name=whole"]),
        "killed": Start(killed, ("runs/killed/metrics.jsonl", 3)),
    }
    restore = ""
    for name, (file, _) in CHANGED.items():
        swap = f"cp {file} {file}.first && cp {file}.other {file}"
        starts[f"other {name}"] = Start([*killed, "resume=true"], before=restore + swap)
        restore = f"cp {file}.first {file} && "
    starts["two processes"] = Start([*killed, "resume=true"], port=free_port(), before=f"{restore}true")
    starts["other threads"] = Start([*killed, "resume=true", "trainer.threads=3"])
    starts["resumed"] = Start([*killed, "resume=true"], cores=1)
    return start_all("biencoder", project, starts)


@pytest.mark.bitwise
def test_a_run_resumed_on_fewer_cores_takes_as_many_threads_again_and_ends_with_the_same_bits(started, project):
    assert (started["whole"].codes, started["killed"].codes) == ([0], [-9]), started["whole"].err
    assert started["resumed"].codes == [0], started["resumed"].err
    whole, resumed = (project / "runs" / name for name in ("whole", "killed"))
    for file in ("checkpoints/step-5/trained.safetensors", "adapter/trained.safetensors", "export/model.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file
    assert json.loads((whole / "results.json").read_text()) == json.loads((resumed / "results.json").read_text())
    measured = {"queries_per_second", "tokens_per_second", "peak_memory_bytes", "seconds"}
    losses = []
    for run in (whole, resumed):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([{key: value for key, value in line.items() if key not in measured} for line in lines])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", CHANGED)
def test_a_run_is_not_resumed_on_another(name, started):
    ended = started[f"other {name}"]
    assert ended.codes == [2], ended.err
    start = f"error: runs/killed was started with other inputs or in another environment: {CHANGED[name][1]} (hash "
    assert start in ended.err
    hashes_and_remedy = r" has changed \(hash (\w{12}) -> (?!\1)\w{12}\)\. Restore that and resume, or set name=<"
    assert re.search(hashes_and_remedy, ended.err)


def test_a_run_is_not_resumed_by_another_number_of_processes_or_threads(started):
    assert started["two processes"].codes == [2, 2], started["two processes"].err
    expected = (
        "runs/killed was started with other inputs or in another environment: processes 1 -> 2 (dropout and last bits "
    )
    assert expected in started["two processes"].err
    assert started["other threads"].codes == [2]
    expected = (
        "runs/killed was started with another configuration: "
        "trainer.threads: None -> 3"
    )
    assert expected in started["other threads"].err


def recorded(**changed) -> dict:
    return {"inputs": {"data": "a", "processes": 2}, "environment": {**environment(), **changed}}


@pytest.mark.parametrize(
    ("changed", "inputs", "said"),
    [
        ({}, {"data": "b", "processes": 2}, r"data has changed \(hash a -> b\)"),
        ({}, {"data": "a", "processes": 3}, r"processes 2 -> 3 \(dropout and last bits .*\)"),
        ({}, {"data": "a", "processes": 2, "test set": "c"}, "test set was no input and is one now"),
        ({}, {"processes": 2}, "data was an input and is none now"),
        ({"threads": 99}, {"data": "a", "processes": 2}, r"threads 99 -> \d+"),
        ({"device": "NVIDIA H100"}, {"data": "a", "processes": 2}, "device NVIDIA H100 -> cpu"),
        (
            {"versions": computing_versions() | {"torch": "1.0"}}, {"data": "a", "processes": 2},
            r"torch 1\.0 -> .* \(pip install torch==1\.0\)"
        ),
    ],
)
def test_what_has_changed_is_named(changed, inputs, said):
    with pytest.raises(
        InputError,
        match=rf"^run was started with other inputs or in another env.*: {said}\. Restore that and resume, or rename$"
    ):
        check_same(Path("run"), recorded(**changed), inputs, otherwise="rename")


def test_a_manifest_of_before_inputs_were_recorded_is_refused():
    with pytest.raises(
        InputError,
        match=r"^run has no record of its inputs \(manifest\.json was deleted, or is of an older version\), so it "
              r"cannot be resumed; rename$"
    ):
        check_same(Path("run"), {"environment": {"threads": 2}}, {}, otherwise="rename")


def test_another_processor_is_told_and_what_is_finished_depends_on_its_inputs_alone(caplog):
    inputs = {"data": "a", "processes": 2}
    check_same(Path("run"), recorded(**{"processor": "i486", "instruction set": "SSE"}), inputs, otherwise="")
    assert "run: its processor was i486 and is " in caplog.text
    assert "run: its instruction set was SSE and is " in caplog.text
    caplog.clear()
    check_same(Path("run"), {**recorded(processor="i486", threads=99), "finished": "today"}, inputs, otherwise="")
    assert not caplog.text


def test_hashes_change_with_every_bit_of_what_they_are_of(tiny_base):
    assert content_hash({"a": "b"}) != content_hash({"ab": ""}) != content_hash({"a": "b", "c": ""})
    assert content_hash(["a"], ["b"]) != content_hash(["a", "b"])
    weights = {"w": torch.zeros(1000, dtype=torch.bfloat16)}
    first = weights_hash(weights)
    weights["w"][777] = 1e-3
    assert weights_hash(weights) != first != weights_hash({"w": torch.zeros(1000)})
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("gpt2"))
    before = tokenizer_hash(tokenizer)
    tokenizer.add_tokens(["a new one"])
    assert tokenizer_hash(tokenizer) != before


def test_fewer_threads_than_asked_for_are_told(caplog, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # as OMP_THREAD_LIMIT does
    set_threads(before + 1)
    assert f"{before + 1} threads were asked for and {before} are given" in caplog.text


def test_names_are_joined_and_lists_are_texts():
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2]}) == {"a.b": 1, "a.c.d": "None", "e": "[1, 2]"}
    assert flat({"after": {"set": {"ndcg@10": 0.5}}}, "/") == {"after/set/ndcg@10": 0.5}
