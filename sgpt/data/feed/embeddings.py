"""Embeddings of a source's texts by a frozen model: each different text once, and kept beside the texts.

    <cache>/<key>/embeddings-<key>/0.npy, 1.npy, …   float32 [4096, D], by number of the text

The second key is made of the model, of what the texts are to it, and of the versions that compute. All processes take their
share of the blocks, and a killed run loses the blocks that were under way. A block is always made of the same texts by as
many threads (`threads.json`, what the first start had), so the number of processes does not change a bit.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from sgpt.data.feed.store import Column, Examples
from sgpt.runtime.distributed import barrier, from_main, world
from sgpt.runtime.files import write_whole
from sgpt.runtime.progress import progress_bar
from sgpt.runtime.provenance import threads
from sgpt.text.markers import Role

TEXTS_AT_A_TIME = 4096
Embed = Callable[[list[str]], np.ndarray]  # texts -> [texts, D], float32, of length 1


class Embeddings:
    """`embeddings[number of a text]` is its embedding [D]. numbers [n]: of the texts that have one, ascending. blocks: in memory or mapped.

    key: by what made them they are known.
    """

    def __init__(self, numbers: np.ndarray, blocks: Sequence[np.ndarray], key: str = "") -> None:
        self.numbers, self.blocks, self.key = numbers, blocks, key

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, text: int) -> np.ndarray:
        block, row = divmod(int(self.places(text)), TEXTS_AT_A_TIME)
        return self.blocks[block][row]

    def places(self, texts: np.ndarray | int) -> np.ndarray:
        """Where texts stand among the `numbers`."""
        return np.searchsorted(self.numbers, texts)

    def at(self, places: np.ndarray) -> np.ndarray:
        """[places, D], in memory."""
        made = np.empty((len(places), self.blocks[0].shape[1]), dtype=np.float32)
        blocks = places // TEXTS_AT_A_TIME
        for block in np.unique(blocks):
            chosen = blocks == block
            made[chosen] = self.blocks[block][places[chosen] % TEXTS_AT_A_TIME]
        return made


def embeddings(examples: Examples, side: Role, embed: Embed, key: str) -> Embeddings:
    """Of all queries or all documents of a source, from the cache where they are there. All processes call it. key: of model and role."""
    numbers = text_numbers(examples, side)
    blocks = [numbers[start : start + TEXTS_AT_A_TIME] for start in range(0, len(numbers), TEXTS_AT_A_TIME)]
    if examples.folder is None:
        return Embeddings(numbers, [embed([examples.texts[int(text)] for text in block]) for block in blocks], key)
    folder = examples.folder / f"embeddings-{key}"
    files = [folder / f"{block}.npy" for block in range(len(blocks))]
    missing, begun_threads = from_main(lambda: _begin(folder, files))
    rank, processes = world()
    own = missing[rank::processes]
    title = f"embedding {len(numbers):,} texts, {side} side"
    with threads(begun_threads), progress_bar(title, len(own)) as advance:
        for block in own:
            temporary = folder / f".{block}.{os.getpid()}.tmp.npy"  # another run may make the same
            np.save(temporary, embed([examples.texts[int(text)] for text in blocks[block]]).astype(np.float32))
            temporary.replace(files[block])
            advance(1)
    barrier()
    return Embeddings(numbers, [np.load(file, mmap_mode="r") for file in files], f"{key}, {begun_threads} threads")


def _begin(folder: Path, files: Sequence[Path]) -> tuple[list[int], int]:
    """The blocks that are missing, by one look, so that all processes share out the same ones; and the threads that make them."""
    folder.mkdir(exist_ok=True)
    recorded = folder / "threads.json"
    if not recorded.is_file():
        write_whole(recorded, json.dumps(torch.get_num_threads()) + "\n")
    return [block for block, file in enumerate(files) if not file.is_file()], json.loads(recorded.read_text())


def text_numbers(examples: Examples, side: Role) -> np.ndarray:
    """Of the different texts that are queries, or positives and hard negatives; ascending."""
    columns = [examples.queries] if side == "query" else [examples.positives, examples.hard_negatives]
    return np.unique(np.concatenate([np.unique(part) for column in columns for part in _parts(column)]).astype(np.int64))


def query_numbers(examples: Examples) -> np.ndarray:
    """[examples]: the text of each one's query."""
    return np.concatenate(list(_parts(examples.queries))).astype(np.int64)


def _parts(column: Sequence) -> Iterator[np.ndarray]:
    """The numbers in a column of numbers or of lists of them."""
    if isinstance(column, Column):
        yield from ((chunk.flatten() if pa.types.is_large_list(chunk.type) else chunk).to_numpy() for chunk in column.chunks)
    else:
        yield np.array([*chain.from_iterable(column)] if column and isinstance(column[0], Sequence) else column, dtype=np.int64)
