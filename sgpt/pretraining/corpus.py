"""The text that `nano` learns from: read, tokenised once, and drawn by (seed, step)."""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgpt.data.formats.jsonl import read_rows
from sgpt.data.sources import pydocs
from sgpt.pretraining.model import END, PretrainConfig
from sgpt.pretraining.open_text import read_documents, read_weak_pairs
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import progress_bar

log = logging.getLogger(__name__)


@dataclass
class Corpus:
    """Token ids on disk: `stream` [tokens], documents in shuffled order; the pairs as two ragged arrays and their starts."""

    stream: np.ndarray
    queries: np.ndarray
    query_starts: np.ndarray
    documents: np.ndarray
    document_starts: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        return cls(**{part.name: np.load(folder / f"{part.name}.npy", mmap_mode="r") for part in fields(cls)})

    def pair(self, number: int, config: PretrainConfig) -> tuple[list[int], list[int]]:
        return (
            _ragged(self.queries, self.query_starts, number, config.max_query_tokens),
            _ragged(self.documents, self.document_starts, number, config.max_document_tokens),
        )


def prepare(config: PretrainConfig) -> Corpus:
    """Trains the tokenizer and tokenises everything, once; later calls open what is there."""
    if not config.text:
        raise InputError("set text=<folder> of the open text sources; sgpt/pretraining/open_text.py says which files lie in it")
    folder = Path(config.folder)
    if not (folder / "stream.npy").is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        log.info("reading text below %s", config.text)
        docstrings = (f"{row['query']}\n\n{row['positive']}" for _, row in read_rows(pydocs.build(Path(config.pydocs)) / "train.jsonl"))
        documents = list(chain(read_documents(Path(config.text)), docstrings))
        tokenizer = _train_tokenizer(documents, config.nano.vocabulary)
        tokenizer.save(str(folder / "tokenizer.json"))
        pairs = list(read_weak_pairs(Path(config.text)))
        for name, texts, limit in (("query", [pair.query for pair in pairs], config.max_query_tokens),
                                   ("document", [pair.document for pair in pairs], config.max_document_tokens)):
            ids = [np.array(row[:limit], dtype=np.uint16) for row in _tokenise(tokenizer, texts)]
            np.save(folder / f"{name}_starts.npy", np.cumsum([0, *map(len, ids)]))
            np.save(folder / ("queries.npy" if name == "query" else "documents.npy"), np.concatenate(ids))
        random.Random(config.seed).shuffle(documents)
        end = tokenizer.token_to_id(END)
        np.save(folder / "stream.npy", np.concatenate([np.array([*row, end], dtype=np.uint16) for row in _tokenise(tokenizer, documents)]))
    corpus = Corpus.open(folder)
    log.info("%s tokens of text, %s weak pairs", f"{len(corpus.stream):,}", f"{len(corpus.query_starts) - 1:,}")
    return corpus


def language_windows(corpus: Corpus, config: PretrainConfig, step: int) -> Tensor:
    """[windows_per_step, window_tokens + 1]; the windows of one epoch are a permutation of the stream."""
    length = config.window_tokens
    windows = (len(corpus.stream) - 1) // length
    epoch, first = divmod(step * config.windows_per_step, windows)
    order = np.random.default_rng((config.seed, epoch)).permutation(windows)
    chosen = np.take(order, range(first, first + config.windows_per_step), mode="wrap")
    return torch.stack([torch.from_numpy(corpus.stream[i * length : (i + 1) * length + 1].astype(np.int64)) for i in chosen])


def pair_numbers(pairs: int, count: int, config: PretrainConfig, step: int) -> list[int]:
    """`count` pairs, without replacement inside an epoch: runs of neighbouring pairs, the runs in shuffled order."""
    run = config.neighbours
    runs = pairs // run
    epoch, first = divmod(step * (count // run), runs)
    generator = np.random.default_rng((config.seed, 1, epoch, 0))
    order, shift = generator.permutation(runs), generator.integers(run)
    return [int((order[(first + i) % runs] * run + shift + j) % pairs) for i in range(count // run) for j in range(run)]


def _train_tokenizer(documents: list[str], vocabulary: int):
    """Byte-level BPE as GPT-2's; single bytes, brackets and braces among them, are always tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    return tokenizer


def _tokenise(tokenizer, texts: list[str], size: int = 10_000) -> Iterator[list[int]]:
    with progress_bar("tokenising", len(texts)) as advance:
        for start in range(0, len(texts), size):
            yield from (encoding.ids for encoding in tokenizer.encode_batch(texts[start : start + size]))
            advance(size)


def _ragged(ids: np.ndarray, starts: np.ndarray, row: int, limit: int) -> list[int]:
    return ids[starts[row] : min(starts[row + 1], starts[row] + limit)].tolist()
