"""Open text for pretraining `nano`: documents for the language model, weak pairs for the contrastive stage.

The sources are JSON-lines files below one root folder. TEXT_FILES says which fields of each hold text, and leaves out
the evaluation splits: in one place, so that nothing later has to remember it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sgpt.data.formats.beir import read_qrels
from sgpt.data.formats.jsonl import read_rows
from sgpt.data.formats.row import listed
from sgpt.data.sources.documents import weak_pairs
from sgpt.runtime.errors import InputError


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
    """A row whose columns must be there and hold text; InputError names the one that does not."""

    def __init__(self, where: str, row: dict) -> None:
        self.where, self.row = where, row

    def __getitem__(self, column: str) -> str:
        if not isinstance(text := self.row.get(column), str):
            raise InputError(
                f"{self.where}: needs the text column {column}; it has {listed(self.row)}. "
                "Is it the file that its name says?"
            )
        return text


def read_texts(root: Path) -> Iterator[str]:
    """Every training document below `root`, each once, in a fixed order. InputError names a missing file."""
    seen: set[str] = set()
    for name, texts in TEXT_FILES.items():
        for where, row in read_rows(root / name):
            for text in texts(_Row(where, row)):
                if text not in seen:
                    seen.add(text)
                    yield text
    trained_on: set[str] = set()
    for judged in read_qrels(root / "squad", "train").values():
        trained_on.update(judged)
    for where, row in read_rows(root / "squad/corpus.jsonl.gz"):
        row = _Row(where, row)
        if row["_id"] in trained_on:  # paragraphs of the test articles stay unseen
            yield f"{row['title']}\n\n{row['text']}"


def read_weak_pairs(root: Path) -> Iterator[WeakPair]:
    """Every weak pair of PAIR_FILES, in their order. InputError names a missing file."""
    for name in PAIR_FILES:
        for where, row in read_rows(root / name):
            row = _Row(where, row)
            group = row["source"].split("@")[0]
            for query, document in weak_pairs(row["title"], row["text"]):
                yield WeakPair(query, document, group)
