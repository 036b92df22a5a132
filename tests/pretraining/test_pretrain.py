"""Pretraining of the small base: its loss against torch's, its start against the lexical stage, resuming, its files."""

import gzip
import json
import logging
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgpt.data.sources import pydocs
from sgpt.pretraining import open_text
from sgpt.pretraining.corpus import Corpus, prepare_corpus
from sgpt.pretraining.lexical import bag_of_tokens, overlapping
from sgpt.pretraining.model import NanoConfig, PretrainConfig, build_model, refuse_other_model, save_model, start_from
from sgpt.pretraining.next_token_loss import next_token_loss, perplexity
from sgpt.pretraining.pretrain import embed, pretrain
from sgpt.runtime.errors import InputError
from sgpt.runtime.interrupt import Interrupted
from sgpt.runtime.provenance import threads

SHAPE = NanoConfig(vocabulary=400, hidden_size=32, layers=2, heads=2, positions=64, window=16)
WORDS = ["river", "stone", "light", "paper", "garden", "winter", "music", "bread",
         "window", "letter", "forest", "engine", "market", "bridge", "hill", "sea"]  # fmt: skip


@pytest.fixture(scope="module")
def text_root(tmp_path_factory) -> Path:
    """Every source file that pretraining reads, with a few hundred made-up paragraphs."""
    root, random = tmp_path_factory.mktemp("text"), np.random.default_rng(0)

    def paragraph() -> str:
        return " ".join(" ".join(random.choice(WORDS, 8)).capitalize() + "." for _ in range(4))

    def row(name: str, number: int) -> dict:
        text = "\n\n".join(paragraph() for _ in range(3))
        return {
            "title": f"The {WORDS[number % 16]} and the {WORDS[number % 7]}",
            "text": text,
            "source": f"author/{name}@1:{number // 5}",
            "question": "What is it?",
            "answer": text,
            "split": "train",
            "premise": paragraph(),
            "set": "snli_dev",
            "_id": str(number),
        }

    for name in (*open_text.TEXT_FILES, "squad/corpus.jsonl.gz"):
        (root / name).parent.mkdir(exist_ok=True)
        with gzip.open(root / name, "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(row(name, number)) + "\n" for number in range(30))
    (root / "squad/qrels").mkdir()
    (root / "squad/qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\n")
    return root


@pytest.fixture(scope="module")
def config(text_root, tmp_path_factory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("nano")
    (folder / "pydocs").mkdir()
    (folder / "pydocs" / "train.jsonl").write_text(
        json.dumps({"query": "Open a file.", "positive": "(path) Opens it for reading."}) + "\n"
    )
    (folder / "pydocs" / "manifest.json").write_text(json.dumps({"key": pydocs._key()}))
    return PretrainConfig(
        text=str(text_root), pydocs=str(folder / "pydocs"), folder=str(folder / "run"), output=str(folder / "out"),
        nano=SHAPE, lexical_steps=3, lexical_pairs_per_step=32, joint_steps=6, language_steps=2, window_tokens=32,
        windows_per_step=4, pairs_per_step=16, max_query_tokens=12, max_document_tokens=24, warmup_steps=2,
        save_every_steps=4, log_every_steps=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_document_tokens": 65}, "max_document_tokens=65 is more than nano.positions=64"),
        ({"max_query_tokens": 65}, "max_query_tokens=65 is more than nano.positions=64"),
        ({"nano": replace(SHAPE, vocabulary=256)}, "nano.vocabulary=256: it has 256 bytes and the end token at least"),
        ({"nano": replace(SHAPE, vocabulary=65_537)}, "65536 words at most, as token ids are kept in two bytes"),
    ],
)
def test_what_cannot_be_pretrained_is_refused_before_anything_is_read(config, changed, said):
    with pytest.raises(InputError, match=re.escape(said)):
        replace(config, **changed)


def test_next_token_loss_is_torchs_cross_entropy_with_its_gradients():
    torch.manual_seed(0)
    hidden, weight, targets = (
        torch.randn(1100, 16, requires_grad=True),
        torch.randn(50, 16, requires_grad=True),
        torch.randint(50, (1100,)),
    )
    loss = next_token_loss(hidden, weight, targets)
    (loss * 0.5).backward()
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    reference = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (reference * 0.5).backward()
    torch.testing.assert_close(loss, reference)
    # chunks of 512 sum in another order
    torch.testing.assert_close(ours, (hidden.grad, weight.grad), rtol=1e-4, atol=1e-5)


def test_the_joint_stage_starts_where_the_lexical_stage_ended():
    model, table, bias = build_model(SHAPE, 0), torch.randn(400, 32), torch.randn(32)
    start_from(model, table, bias)
    rows = [[5, 9, 7], [1, 2, 3, 4, 5, 6, 7, 8], [42]]
    embeddings, _ = embed(model, rows)
    torch.testing.assert_close(
        embeddings, bag_of_tokens(F.layer_norm(table, (32,), bias=bias), rows), rtol=1e-4, atol=1e-5
    )


def test_pairs_that_share_a_paragraph_are_no_negatives():
    ignored = overlapping(torch.arange(16), replace(PretrainConfig(), neighbours=8))
    assert ignored[3].nonzero().flatten().tolist() == [1, 2, 4, 5]
    assert ignored[7].nonzero().flatten().tolist() == [5, 6]  # 8 is of another run
    assert not ignored.diagonal().any()


@pytest.mark.bitwise
def test_a_stopped_pretraining_goes_on_bit_for_bit(config, tmp_path):
    whole = replace(config, folder=str(tmp_path / "whole"))
    corpus = prepare_corpus(whole)
    straight = pretrain(whole, corpus, Accelerator()).state_dict()
    for checkpoint in Path(whole.folder).glob("step-8.pt"):
        checkpoint.unlink()  # as if killed after step 4's checkpoint
    resumed = pretrain(whole, corpus, Accelerator()).state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    untrained = build_model(SHAPE, 0).state_dict()
    assert not any(
        torch.equal(straight[name], untrained[name])
        for name in straight
        if name.endswith("weight") and "ln" not in name
    )


def test_pretraining_is_resumed_as_it_was_begun_or_refused(config, tmp_path):
    begun = replace(config, folder=str(tmp_path / "begun"), joint_steps=1, language_steps=1, save_every_steps=1)
    corpus = prepare_corpus(begun)
    with threads(1):
        pretrain(begun, corpus, Accelerator())
    assert json.loads((tmp_path / "begun" / "manifest.json").read_text())["environment"]["threads"] == 1
    refusal = r"begun was started with another configuration: seed: 0 -> 1\. Resume it with that one, or set folder="
    with pytest.raises(InputError, match=refusal):
        pretrain(replace(begun, seed=1), corpus, Accelerator())
    stream = np.load(tmp_path / "begun" / "stream.npy")
    np.save(tmp_path / "begun" / "stream.npy", stream[::-1])
    with pytest.raises(InputError, match=r"begun was started with other inputs .*: stream has changed"):
        pretrain(begun, Corpus.open(tmp_path / "begun"), Accelerator())
    (tmp_path / "begun" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"begun has no record of its inputs"):
        pretrain(begun, corpus, Accelerator())


def test_the_written_model_opens_everywhere_and_has_learned(config):
    corpus = prepare_corpus(config)
    model = pretrain(config, corpus, Accelerator())
    output = save_model(model, config)
    opened, tokenizer = (
        AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32),
        AutoTokenizer.from_pretrained(output),
    )
    assert next(AutoModelForCausalLM.from_pretrained(output).parameters()).dtype == torch.float16
    for marker in "[]{}":
        assert len(tokenizer(marker)["input_ids"]) == 1
    assert tokenizer.pad_token == "<|endoftext|>"
    ids = torch.tensor([tokenizer("The river and the stone.")["input_ids"]])
    with torch.inference_mode():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits, rtol=0.02, atol=0.02)  # fp16 weights
    held_out = np.array(corpus.stream[:2000], dtype=np.int64)
    assert perplexity(model, held_out, 32) < perplexity(build_model(SHAPE, 0), held_out, 32)


def test_a_model_of_others_is_not_replaced(config, tmp_path):
    corpus = prepare_corpus(config)
    other = replace(config, output=str(tmp_path / "output"))
    model = build_model(SHAPE, 0)
    shutil.copytree("data/nano", other.output)
    for refuses in (refuse_other_model, lambda given: save_model(model, given)):
        with pytest.raises(InputError, match=r"output=.*model\.safetensors is there, and the run of folder=.* did not"):
            refuses(other)
    (tmp_path / "output" / "model.safetensors").unlink()
    save_model(model, other)
    save_model(model, other)  # its own
    assert (tmp_path / "output" / "README.md").is_file()
    assert len(corpus.stream)


def test_a_log_has_no_step_twice(config, tmp_path):
    again = replace(config, folder=str(tmp_path / "again"), log_every_steps=1)
    corpus = prepare_corpus(again)
    pretrain(again, corpus, Accelerator())
    log = tmp_path / "again" / "metrics.jsonl"
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    (tmp_path / "again" / "step-8.pt").unlink()
    log.write_text(log.read_text() + '{"step"')  # a kill left half a line
    pretrain(again, corpus, Accelerator())
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == steps == [*range(1, 9)]


def test_a_corpus_that_was_half_written_is_written_again(config, tmp_path, monkeypatch):
    half = replace(config, folder=str(tmp_path / "half"))

    def full(file: Path, array: np.ndarray) -> None:
        save(file, array)
        if "stream" in Path(file).name:
            os.truncate(file, 100)
            raise OSError(28, "No space left on device")

    save = np.save
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_corpus(half)
    monkeypatch.setattr(np, "save", save)
    assert len(prepare_corpus(half).stream) == len(prepare_corpus(config).stream)


def test_missing_text_is_named(config, tmp_path):
    with pytest.raises(InputError, match=r"open_text/train-00\.jsonl\.gz"):
        prepare_corpus(replace(config, text=str(tmp_path), folder=str(tmp_path / "run")))


def test_the_folder_of_texts_must_be_given():
    with pytest.raises(InputError, match=r"set text=<folder> of the open text sources"):
        prepare_corpus(PretrainConfig())


def test_an_interrupted_pretraining_is_saved_after_its_step(ctrl_c, config, tmp_path):
    class Press(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("step 3/"):
                os.kill(os.getpid(), signal.SIGINT)

    settings = replace(config, folder=str(tmp_path / "run"), output=str(tmp_path / "out"))
    log, press = logging.getLogger("sgpt.pretraining.pretrain"), Press()
    corpus, level = prepare_corpus(settings), log.level
    log.addHandler(press)
    log.setLevel(logging.INFO)
    try:
        with pytest.raises(Interrupted, match="step 3 of 8 is saved"):
            pretrain(settings, corpus, Accelerator(cpu=True))
    finally:
        log.removeHandler(press)
        log.setLevel(level)
    assert [file.name for file in (tmp_path / "run").glob("step-*.pt")] == ["step-3.pt"]
