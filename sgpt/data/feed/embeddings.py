"""Embeddings of a source's texts by a frozen model: each different text once, and kept next to the texts.

    <cache>/<key>/embeddings-<key>/0.npy, 1.npy, …   float32 [4096, D], by number of the text

The second key is made of the model, of what the texts are to it, and of the versions that compute. All processes take
their share of the blocks, and a killed run loses only the blocks that were under way (sgpt/runtime/embed.py).
`threads.json` holds the number of threads of the first start, which later ones take again.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sgpt.data.feed.store import Examples, texts_named, whole_column
from sgpt.runtime.distributed import from_main
from sgpt.runtime.embed import embed_blocks
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import make_once, write_whole
from sgpt.runtime.progress import Advance, progress_bar
from sgpt.text.markers import Role

TEXTS_AT_A_TIME = 4096
Embed = Callable[[list[str], Advance], np.ndarray]  # as EmbedRows, of texts


class Embeddings:
    """Embeddings of some texts of a table: `embeddings[number of a text]` is one [D].

    numbers [n]: of the texts that have one, ascending. blocks: [TEXTS_AT_A_TIME, D] each, in memory or mapped. key: of
    what computed them: the model, the role of the texts, versions and threads.
    """

    def __init__(self, numbers: np.ndarray, blocks: Sequence[np.ndarray], key: str = "") -> None:
        self.numbers, self.blocks, self.key = numbers, blocks, key

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, text: int) -> np.ndarray:
        block, row = divmod(int(self.rows(text)), TEXTS_AT_A_TIME)
        return self.blocks[block][row]

    def rows(self, texts: np.ndarray | int) -> np.ndarray:
        """The rows of the embeddings of texts, which are given by their numbers."""
        return np.searchsorted(self.numbers, texts)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The embeddings [rows, D], in memory."""
        embeddings = np.empty((len(rows), self.blocks[0].shape[1]), dtype=np.float32)
        blocks = rows // TEXTS_AT_A_TIME
        for block in np.unique(blocks):
            here = blocks == block
            embeddings[here] = self.blocks[block][rows[here] % TEXTS_AT_A_TIME]
        return embeddings


def embeddings(examples: Examples, side: Role, embed: Embed, key: str) -> Embeddings:
    """Of all queries or all documents of a source, from the cache where they are in it. All processes call it.

    key: of the model and of the role that it gives the texts.
    """
    numbers = text_numbers(examples, side)

    def embed_rows(rows: slice, advance: Advance) -> np.ndarray:
        return embed([examples.texts[int(text)] for text in numbers[rows]], advance)

    starts = range(0, len(numbers), TEXTS_AT_A_TIME)
    title = f"embedding {len(numbers):,} texts, {side} side"
    if examples.folder is None:
        with progress_bar(title, len(numbers)) as advance:
            blocks = [embed_rows(slice(start, start + TEXTS_AT_A_TIME), advance) for start in starts]
        return Embeddings(numbers, blocks, key)
    folder = examples.folder / f"embeddings-{key}"
    files = [folder / f"{block}.npy" for block in range(len(starts))]

    def save(block: int, rows: slice, block_embeddings: np.ndarray) -> None:
        temporary = folder / f".{block}.{os.getpid()}.tmp.npy"  # by process: another run may embed the same block now
        np.save(temporary, block_embeddings.astype(np.float32))
        temporary.replace(files[block])

    missing, first_threads = from_main(lambda: _start(folder, files))
    embed_blocks(embed_rows, save, missing, TEXTS_AT_A_TIME, title, first_threads=first_threads)
    return Embeddings(numbers, [np.load(file, mmap_mode="r") for file in files], f"{key}, {first_threads} threads")


def _start(folder: Path, files: Sequence[Path]) -> tuple[list[int], int]:
    """The blocks that are missing, and the threads of the first start.

    By one look of the main process, so that all processes share out the same blocks.
    """
    folder.mkdir(exist_ok=True)
    recorded = folder / "threads.json"
    # once: another run may start to embed the same texts now
    make_once(recorded, recorded.is_file, lambda: write_whole(recorded, json.dumps(torch.get_num_threads()) + "\n"))
    missing = [block for block, file in enumerate(files) if not file.is_file()]
    try:
        return missing, int(json.loads(recorded.read_text()))
    except (ValueError, TypeError):
        raise InputError(f"{recorded} is damaged; remove the folder {folder}, and all is embedded again") from None


def text_numbers(examples: Examples, side: Role) -> np.ndarray:
    """Numbers of the different texts that are queries, or positives and hard negatives; ascending."""
    if side == "query":
        return np.unique(whole_column("query", examples.queries))
    of_columns = (("positives", examples.positives), ("hard_negatives", examples.hard_negatives))
    return np.unique(np.concatenate([texts_named(*column) for column in of_columns]))
