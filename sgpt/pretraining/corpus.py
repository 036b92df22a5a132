"""The text that `nano` learns from: read, tokenised once, and drawn by (seed, step)."""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgpt.data.formats.jsonl import read_rows
from sgpt.data.sources import pydocs
from sgpt.pretraining.model import END, PretrainConfig
from sgpt.pretraining.open_text import read_texts, read_weak_pairs
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import announce, progress_bar

log = logging.getLogger(__name__)


@dataclass
class Corpus:
    """Token ids on disk.

    stream [tokens]: documents in shuffled order. queries and documents [tokens] of the weak pairs, one after the other;
    *_starts [pairs + 1]: where each begins, and the end.
    """

    stream: np.ndarray
    queries: np.ndarray
    query_starts: np.ndarray
    documents: np.ndarray
    document_starts: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Reads nothing yet: the arrays are mapped from the disk."""
        return cls(**{array.name: np.load(folder / f"{array.name}.npy", mmap_mode="r") for array in fields(cls)})

    @property
    def num_pairs(self) -> int:
        return len(self.query_starts) - 1

    def pairs(self, numbers: list[int], config: PretrainConfig) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the queries and of the documents of these pairs, cut at their limits."""
        queries, documents = [], []
        for number in numbers:
            queries.append(_row(self.queries, self.query_starts, number, config.max_query_tokens))
            documents.append(_row(self.documents, self.document_starts, number, config.max_document_tokens))
        return queries, documents


def prepare_corpus(config: PretrainConfig) -> Corpus:
    """Trains the tokenizer and tokenises everything, once; later calls open what is there."""
    if not config.text:
        raise InputError(
            "set text=<folder> of the open text sources; sgpt/pretraining/open_text.py says which files lie in it"
        )
    announce(f"{config.output}: a base is pretrained on the text below {config.text}, in {config.folder}")
    folder = Path(config.folder)
    if not (folder / "stream.npy").is_file():  # written last
        _write_corpus(folder, config)
    corpus = Corpus.open(folder)
    log.info("%s tokens of text, %s weak pairs", f"{len(corpus.stream):,}", f"{corpus.num_pairs:,}")
    return corpus


def _write_corpus(folder: Path, config: PretrainConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log.info("reading text below %s", config.text)
    docstring_rows = read_rows(pydocs.build(Path(config.pydocs)) / "train.jsonl")
    docstrings = (f"{row['query']}\n\n{row['positive']}" for _, row in docstring_rows)
    documents = [*read_texts(Path(config.text)), *docstrings]
    tokenizer = _train_tokenizer(documents, config.nano.vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))

    pairs = list(read_weak_pairs(Path(config.text)))
    queries = _tokenise(tokenizer, [pair.query for pair in pairs])
    _save_rows(queries, config.max_query_tokens, folder / "queries.npy", folder / "query_starts.npy")
    answers = _tokenise(tokenizer, [pair.document for pair in pairs])
    _save_rows(answers, config.max_document_tokens, folder / "documents.npy", folder / "document_starts.npy")

    random.Random(config.seed).shuffle(documents)
    end = tokenizer.token_to_id(END)
    rows = [np.array([*row, end], dtype=np.uint16) for row in _tokenise(tokenizer, documents)]
    temporary = folder / ".stream.tmp.npy"  # a kill, or a full disk, leaves none that looks whole
    np.save(temporary, np.concatenate(rows))
    temporary.replace(folder / "stream.npy")


def _save_rows(rows: Iterator[list[int]], limit: int, ids_file: Path, starts_file: Path) -> None:
    """Writes rows of at most `limit` token ids one after the other, and where each begins."""
    arrays = [np.array(row[:limit], dtype=np.uint16) for row in rows]
    np.save(starts_file, np.cumsum([0, *map(len, arrays)]))
    np.save(ids_file, np.concatenate(arrays))


def language_windows(corpus: Corpus, config: PretrainConfig, step: int) -> Tensor:
    """Token ids [windows_per_step, window_tokens + 1]; the windows of one epoch are a permutation of the stream."""
    length = config.window_tokens
    num_windows = (len(corpus.stream) - 1) // length
    epoch, first = divmod(step * config.windows_per_step, num_windows)
    order = np.random.default_rng((config.seed, epoch)).permutation(num_windows)
    windows = []
    for number in np.take(order, range(first, first + config.windows_per_step), mode="wrap"):
        ids = corpus.stream[number * length : (number + 1) * length + 1]  # one more: the last token's target
        windows.append(torch.from_numpy(ids.astype(np.int64)))
    return torch.stack(windows)


def pair_numbers(pairs: int, count: int, config: PretrainConfig, step: int) -> list[int]:
    """`count` pairs, without replacement inside an epoch: runs of neighbouring pairs, the runs in shuffled order."""
    run = config.neighbours
    num_runs = pairs // run
    epoch, first = divmod(step * (count // run), num_runs)
    generator = np.random.default_rng((config.seed, 1, epoch, 0))
    order = generator.permutation(num_runs)
    shift = generator.integers(run)  # so that runs begin elsewhere in every epoch
    numbers = []
    for number_of_run in range(first, first + count // run):
        start = order[number_of_run % num_runs] * run + shift
        numbers += [int((start + offset) % pairs) for offset in range(run)]
    return numbers


def _train_tokenizer(documents: list[str], vocabulary: int):
    """Byte-level BPE as GPT-2's; single bytes, brackets and braces among them, are always tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    return tokenizer


def _tokenise(tokenizer, texts: list[str], size: int = 10_000) -> Iterator[list[int]]:
    with progress_bar("tokenising", len(texts)) as advance:
        for start in range(0, len(texts), size):
            yield from (encoding.ids for encoding in tokenizer.encode_batch(texts[start : start + size]))
            advance(size)


def _row(ids: np.ndarray, starts: np.ndarray, row: int, limit: int) -> list[int]:
    """The token ids of one of the rows that are stored one after the other, at most so many."""
    start = starts[row]
    return ids[start : min(starts[row + 1], start + limit)].tolist()
