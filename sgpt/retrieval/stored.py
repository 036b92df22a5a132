"""The files of an index (sgpt/retrieval/index.py): embeddings read by memory map in slices, and index.json."""

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgpt.retrieval.dense import search
from sgpt.runtime.files import hash_of, write_whole

# Searches one index: query embeddings [Q, D] of length 1, and a depth -> scores and rows, [Q, depth], best first.
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]
INDEX_EMBEDDINGS = "embeddings.npy"
CHUNK_BYTES = 8 * 2**20  # of float32 at a time; with a quarter of it calls take a third of the time


class StoredEmbeddings:
    """Embeddings in a file, as `search` takes documents: slices, of `chunk` rows at most, are float32 [rows, D].

    A slice is good until the next one: only the last stays in resident memory, and float16 is converted into the same
    memory each time.
    """

    def __init__(self, file: Path) -> None:
        self.map = np.load(file, mmap_mode="c")  # nothing is written; torch has no read-only tensors
        # For float16 in float32: new memory for every slice takes more than twice the time.
        self.converted = torch.empty(self.chunk, self.map.shape[1])

    def __len__(self) -> int:
        return len(self.map)

    def __getitem__(self, rows: slice) -> Tensor:
        self._release()
        part = torch.from_numpy(np.asarray(self.map[rows]))
        return part if part.dtype == torch.float32 else self.converted[: len(part)].copy_(part)

    def at(self, rows: np.ndarray) -> Tensor:
        """Single rows, float32 [rows, D], in memory."""
        parts = []
        for some in np.array_split(rows, len(rows) // self.chunk + 1):
            self._release()
            parts.append(torch.from_numpy(self.map[some]).float())
        return torch.cat(parts)

    def _release(self) -> None:
        """Takes the pages that were read out of this process's memory; the system goes on caching them.

        A search is 10 % slower, and takes a gigabyte less.
        """
        self.map.base.madvise(mmap.MADV_DONTNEED)

    @property
    def chunk(self) -> int:
        """Rows at a time."""
        return max(1, CHUNK_BYTES // (4 * self.map.shape[1]))


def read_description(folder: Path) -> dict[str, Any]:
    """The content of index.json; {} where there is none, or it holds no JSON object."""
    file = folder / "index.json"
    try:
        description = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return {}
    return description if isinstance(description, dict) else {}


def description_matches(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether index.json is there and has these values."""
    return wanted.items() <= read_description(folder).items()


def is_whole(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether index.json has these values, and the embeddings are byte for byte those that were written.

    All of them are read for that, as fast as the disk gives them (`hash_of`): as long as one exact search takes.
    """
    file = folder / INDEX_EMBEDDINGS
    description = read_description(folder)
    if not wanted.items() <= description.items() or not file.is_file():
        return False
    return description.get("embeddings_hash") == hash_of(file)


def write_description(folder: Path, description: dict[str, Any]) -> None:
    write_whole(folder / "index.json", json.dumps(description, indent=2) + "\n")


def exact_search(stored: StoredEmbeddings, queries: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """All embeddings against all queries; as `Search`, once `stored` is given."""
    return search(queries, stored, depth, stored.chunk)
