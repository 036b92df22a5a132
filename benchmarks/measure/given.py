"""What both engines are given: a model of random weights, and real texts."""

import argparse
import importlib.util
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)
from transformers.utils import logging

import sgpt
from sgpt.data.feed.example import Example
from sgpt.data.formats import beir
from sgpt.data.formats.jsonl import read_rows
from sgpt.data.sources import pydocs
from sgpt.decoder.trunk import load_tokenizer
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig

REPOSITORY = Path(sgpt.__file__).parents[1]  # of what is imported and measured

VOCABULARY = 50257  # of the GPT-2 tokenizer, which every shape uses
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
SHAPES: dict[str, PretrainedConfig] = {
    "125m": GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=768, num_layers=12, num_heads=12, attention_types=[[["global", "local"], 6]],
        window_size=256
    ),
    "small": GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=256
    ),
    "gpt2_125m": GPT2Config(n_embd=768, n_layer=12, n_head=12, **NO_DROPOUT["gpt2"]),
    "llama_small": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True, mlp_bias=True,  # as no published Llama has: else there is no bias to train
    ),
    "smollm2": LlamaConfig(  # SmolLM2-135M with biases in every linear layer
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
    ),
    "1.3b": GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=2048, num_layers=24, num_heads=16,
        attention_types=[[["global", "local"], 12]], window_size=256
    ),
    "6b": GPTJConfig(n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, **NO_DROPOUT["gpt2"]),
    "neox_125m": GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "neox_small": GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """files: of JSON lines, with their columns for query, positive and hard negatives. limits: tokens of a query, of a
    document.
    """

    files: tuple[tuple[str, tuple[str, ...]], ...]
    limits: tuple[int, int]


_TRIPLETS, _POSITIVES = "nli/triplets.train.jsonl.gz", "nli/positives.train.jsonl.gz"
SOURCES = {
    "nli": Source(((_TRIPLETS, ("anchor", "positive", "negative")),), (75, 75)),
    "squad": Source((("squad", ()),), (75, 300)),  # a BEIR folder
    "medquad": Source((("medquad/qa.jsonl.gz", ("question", "answer")),), (75, 300)),
    "pydocs": Source((("train.jsonl", ("query", "positive", "negative")),), (48, 96)),  # harvested when first used
    "pairs": Source(  # of sentences, enough for a batch of 16384
        (
            (_TRIPLETS, ("anchor", "positive")), (_POSITIVES, ("anchor", "positive")),
            ("quora/pairs.jsonl.gz", ("question1", "question2"))
        ),
        (75, 75),
    ),
}  # fmt: skip
DOCUMENTS = {
    "nli": ("nli/pairs.jsonl.gz", "sentence1"), "squad": ("squad/corpus.jsonl.gz", "text"),
    "medquad": ("medquad/qa.jsonl.gz", "answer")
}


@dataclass(frozen=True)
class Setting:
    """What both engines are given. folder: holds model/ and texts.json. keep_memory: theirs keeps freed memory, too, as
    every script of ours does. device: cpu, or cuda in benchmarks/gpu.py.
    """

    folder: str
    shape: str
    data: str
    batch: int
    precision: str
    threads: int
    keep_memory: bool = False
    device: str = "cpu"

    @property
    def model(self) -> str:
        return f"{self.folder}/model"

    @property
    def markers(self) -> MarkersConfig:
        return MarkersConfig("none", *SOURCES[self.data].limits)

    def texts(self) -> list:
        return json.loads(Path(self.folder, "texts.json").read_text(encoding="utf-8"))

    def examples(self) -> list[Example]:
        return [Example(query, positive, tuple(negatives)) for query, positive, *negatives in self.texts()]


@contextmanager
def setting(
    options: argparse.Namespace, data: str, texts: Callable[[Path], list], *, batch: int = 1
) -> Iterator[Setting]:
    """A temporary folder with a model of random weights and `texts(folder of data)`, or a clear refusal."""
    shared = (REPOSITORY / options.shared).resolve()
    if importlib.util.find_spec("sentence_transformers") is None:
        refuse(
            "sentence-transformers is not installed, so there is nothing to compare with; run make bench, or pip "
            "install -e '.[dev]'"
        )
    if not (shared / "data").is_dir() or not (shared / "models" / "tokenizer-gpt2").is_dir():
        refuse(
            f"{shared}: no data/ and models/tokenizer-gpt2/ there, which the benchmarks read; name the folder by "
            f"--shared"
        )
    with tempfile.TemporaryDirectory(prefix="sgpt-bench-") as folder:
        try:
            Path(folder, "texts.json").write_text(
                json.dumps(texts(shared / "data"), ensure_ascii=False), encoding="utf-8"
            )
            save_model(options.shape, shared / "models" / "tokenizer-gpt2", Path(folder, "model"))
        except InputError as error:
            refuse(str(error))
        yield Setting(folder, options.shape, data, batch, options.precision, options.threads, options.keep_memory)


def refuse(sentence: str) -> NoReturn:
    print(f"benchmark skipped: {sentence}", file=sys.stderr)
    sys.exit(2)


def save_model(shape: str, tokenizer: Path, folder: Path) -> None:
    """Random weights, biases too: of zeros, a forgotten bias would not show in the comparison of the losses."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = SHAPES[shape]
    for dropout in ("resid_dropout", "embed_dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder)
    load_tokenizer(str(tokenizer)).save_pretrained(folder)


def read_texts(data: str, number: int, folder: Path) -> list[list[str]]:
    """`number` shuffled examples as [query, positive, hard negatives …], no text twice: our loss masks repeated texts,
    ST's does not.
    """
    folder = pydocs.build(REPOSITORY / "data/raw/pydocs") if data == "pydocs" else folder
    read = [texts for path, columns in SOURCES[data].files for texts in _read(folder / path, columns)]
    random.Random(0).shuffle(read)
    found = _distinct(read)
    if len(found) < number:
        raise InputError(
            f"--data {data} has {len(found)} examples without a repeated text, {number} are asked for; ask for less or "
            f"take --data nli"
        )
    return found[:number]


def _read(path: Path, columns: tuple[str, ...]) -> Iterator[list[str]]:
    if columns:
        yield from ([row[column] for column in columns] for _, row in read_rows(path))
    else:
        for example in beir.beir_examples(path, "train", "triples.train.tsv", 1):
            yield [example.query, example.positive, *example.hard_negatives]


def _distinct(read: Iterable[list[str]]) -> list[list[str]]:
    """Those none of whose texts was seen before."""
    seen: set[str] = set()
    kept = []
    for texts in read:
        if len({*texts}) == len(texts) and not seen.intersection(texts):
            seen.update(texts)
            kept.append(texts)
    return kept


def read_documents(data: str, number: int, folder: Path) -> list[str]:
    """`number` shuffled documents, all different."""
    path, column = DOCUMENTS[data]
    texts = sorted({row[column] for _, row in read_rows(folder / path)})
    random.Random(0).shuffle(texts)
    if len(texts) < number:
        raise InputError(
            f"--data {data} has {len(texts)} different documents, {number} are asked for; lower --documents or take "
            f"--data medquad"
        )
    return texts[:number]
