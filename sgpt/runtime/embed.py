"""Many texts embedded so that a kill loses little: block by block, each on the disk before it counts as done.

Used by the index of a corpus, by encoding to Parquet, by mining and by a guide of training. They differ in what says
that a block is done (a number in `index.json`, a line of a job, a file of its own), so each brings its own `save`. A
text's embedding differs in its last bits with the texts that are computed together with it and with the number of
threads: blocks are therefore always cut alike, and a start that resumes takes the threads of the first one. So neither
a kill nor the number of processes changes a bit.

Evaluation keeps nothing and embeds alone: it takes from here only its file without a name (`temporary_embeddings`).
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sgpt.runtime.distributed import barrier
from sgpt.runtime.files import reserve
from sgpt.runtime.jobs import own_blocks
from sgpt.runtime.progress import Advance, progress_bar
from sgpt.runtime.provenance import threads

# rows of the texts, and what is told how many more are embedded -> [rows, D], float32, of length 1
EmbedRows = Callable[[slice, Advance], np.ndarray]
SaveBlock = Callable[[int, slice, np.ndarray], None]  # number of the block, its rows, their embeddings [rows, D]


def embed_blocks(
    embed: EmbedRows, save: SaveBlock, missing: Sequence[int], size: int, title: str, *,
    first_threads: int | None = None, alone: bool = False,
) -> None:  # fmt: skip
    """Embeds and saves this process's share of the `missing` blocks, and waits for the other processes.

    size: texts in a block. first_threads: the threads of the first start, None where they are set already. alone: this
    process does all blocks and waits for nobody, for work that only one process has the lock of.
    """
    own = own_blocks(missing, alone=alone)
    with threads(first_threads), progress_bar(title, len(own)) as advance:
        for block in own:
            rows = slice(block * size, (block + 1) * size)
            save(block, rows, embed(rows, lambda texts: advance(texts / size)))
    if not alone:
        barrier()  # everybody has written its blocks, now all may be read


class EmbeddingsFile:
    """Embeddings [texts, D] in one `.npy` file, filled block by block through a memory map."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @classmethod
    def create(cls, file: Path, shape: tuple[int, int], dtype: str = "float32", *, owner: Path) -> "EmbeddingsFile":
        """A file of zeros with its disk reserved. owner: what it is for, for the InputError when the disk is full."""
        temporary = file.with_suffix(".tmp")
        np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        with temporary.open("r+b") as content:
            reserve(content, temporary.stat().st_size, str(owner))
        temporary.replace(file)
        return cls(file)

    def write(self, rows: slice, embeddings: np.ndarray) -> None:
        """They are on the disk when it returns."""
        stored = np.load(self.file, mmap_mode="r+")  # anew for each block: an open map keeps what was written in memory
        stored[rows] = embeddings
        stored.flush()

    def open(self) -> np.ndarray:
        """The embeddings [texts, D], by memory map."""
        return np.load(self.file, mmap_mode="c")  # nothing is written back; torch has no read-only tensors


def temporary_embeddings(shape: tuple[int, int]) -> np.ndarray:
    """A memory map [texts, D], float32, of a file without a name, which the system removes with this process."""
    with tempfile.TemporaryFile() as file:
        folder = f"{tempfile.gettempdir()}, the folder of temporary files that TMPDIR can name"
        reserve(file, 4 * math.prod(shape), folder)
        return np.memmap(file, np.float32, "w+", shape=shape)
