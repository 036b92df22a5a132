"""Open text for pretraining `nano`: documents for the language model, weak pairs for the contrastive stage.

The sources are JSON-lines files below one root folder. TEXT_FILES says which fields of each hold text, and leaves out the
evaluation splits: in one place, so that nothing later has to remember it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sgpt.data.formats.beir import read_qrels
from sgpt.data.formats.jsonl import read_rows
from sgpt.data.formats.row import listed
from sgpt.runtime.errors import InputError

MIN_PARAGRAPH_WORDS, MAX_HEADING_WORDS = 20, 14


@dataclass(frozen=True)
class WeakPair:
    """Two texts that belong together because an author put them together; `group` is where they came from."""

    query: str
    document: str
    group: str


TEXT_FILES: dict[str, Callable[["_Row"], list[str]]] = {
    "open_text/train-00.jsonl.gz": lambda row: [f"{row['title']}\n\n{row['text']}"],
    "open_text/train-01.jsonl.gz": lambda row: [f"{row['title']}\n\n{row['text']}"],
    "open_text_science/train-00.jsonl.gz": lambda row: [f"{row['title']}\n\n{row['text']}"],
    "medquad/qa.jsonl.gz": lambda row: [f"{row['question']}\n{row['answer']}"] if row["split"] == "train" else [],
    "scifact/corpus.jsonl.gz": lambda row: [f"{row['title']}\n{row['text']}"],
    "tinystories_sample/stories.jsonl.gz": lambda row: [row["text"]],
    "nli/pairs.jsonl.gz": lambda row: [row["premise"]] if row["set"] in ("snli_dev", "cad_train") else [],
}
PAIR_FILES = ("open_text/train-00.jsonl.gz", "open_text/train-01.jsonl.gz", "open_text_science/train-00.jsonl.gz")


class _Row:
    """A row whose columns must be there, and text."""

    def __init__(self, where: str, row: dict) -> None:
        self.where, self.row = where, row

    def __getitem__(self, column: str) -> str:
        if not isinstance(text := self.row.get(column), str):
            raise InputError(f"{self.where}: needs the text column {column}; it has {listed(self.row)}. Is it the file that its name says?")
        return text


def read_documents(root: Path) -> Iterator[str]:
    """Every training document below `root`, in a fixed order; repeated documents once. InputError names a missing file."""
    seen: set[str] = set()
    for name, texts in TEXT_FILES.items():
        for where, row in read_rows(root / name):
            for text in texts(_Row(where, row)):
                if text not in seen:
                    seen.add(text)
                    yield text
    trained_on = {document for judged in read_qrels(root / "squad", "train").values() for document in judged}
    for where, row in read_rows(root / "squad/corpus.jsonl.gz"):
        row = _Row(where, row)
        if row["_id"] in trained_on:  # paragraphs of the test articles stay unseen
            yield f"{row['title']}\n\n{row['text']}"


def read_weak_pairs(root: Path) -> Iterator[WeakPair]:
    """title -> first paragraphs, heading -> its section, first sentence -> rest of its paragraph, paragraph -> the next one."""
    for name in PAIR_FILES:
        for where, row in read_rows(root / name):
            row = _Row(where, row)
            group = row["source"].split("@")[0]
            for query, document in weak_pairs(row["title"], row["text"]):
                yield WeakPair(query, document, group)


def weak_pairs(title: str, text: str) -> Iterator[tuple[str, str]]:
    blocks = [" ".join(block.split()) for block in text.split("\n\n")]
    blocks = [block for block in blocks if block]
    heading, previous, first = "", "", True
    for block in blocks:
        words = len(block.split())
        if words <= MAX_HEADING_WORDS and not block.endswith((".", ":", ";", ",")):
            heading, previous = block, ""
            continue
        if words < MIN_PARAGRAPH_WORDS:
            continue
        if first and len(title.split()) > 1:
            yield title, block
        elif heading:
            yield (f"{title}: {heading}" if len(heading.split()) < 3 else heading), block
        elif previous:
            yield previous, block
        sentence, rest = _first_sentence(block)
        if len(rest.split()) >= MIN_PARAGRAPH_WORDS:
            yield sentence, rest
        heading, previous, first = "", (sentence if len(sentence.split()) >= 5 else ""), False


def _first_sentence(block: str) -> tuple[str, str]:
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", block, maxsplit=1)
    return (parts[0], parts[1]) if len(parts) == 2 and 4 <= len(parts[0].split()) <= 40 else (block, "")
