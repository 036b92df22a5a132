"""An index: a folder with the embeddings of one corpus, opened by memory map, and two ways to search it.

    embeddings.npy     [documents, D], of length 1, float32 or float16, in the order of the corpus
    graph-0-<n>.faiss  with kind=faiss: the embeddings once more, with a graph of neighbours; a file for each gigabyte of them
    index.json         fingerprint of model, contract and corpus, number of documents, dtype, kind, and what it was built with:
                       versions, threads, block size; it is written last

Embeddings go into the file block by block, in `.<name>.building` next to the index, whose name it takes when it is whole. After a
kill the next start resumes there, with as many threads and blocks as large, so that every bit is that of a build without a kill.
With another fingerprint or dtype an index is stale and built again; a change of kind encodes nothing.

Exact search reads all embeddings for a query, 8 MiB at a time: it is the default, and good to about a million documents (0.15 s for
one query over 1,000,000 x 256 float32, on one core). Beyond, FAISS walks a graph (HNSW; Malkov and Yashunin 2016, arXiv 1603.09320) as
far as a sample of the documents needs, as queries, to find 99 % of its ten nearest. index.json says how far, and the recall; queries that
are unlike all documents may have a lower one. Not inverted lists: for that recall they had to read 80 of 110 lists of 12,000 questions.
"""

import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.graph import Graphs, build_graphs, import_faiss
from sgpt.retrieval.stored import Find, Stored, exact_search, is_described, read_description, write_description
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import make_once, replace_folder, reserve
from sgpt.runtime.progress import progress_bar
from sgpt.runtime.provenance import changed_environment, environment, threads
from sgpt.runtime.values import COUNT, check_ranges

log = logging.getLogger(__name__)
CHOICES = {"kind": ("exact", "faiss"), "dtype": ("float32", "float16")}


@dataclass
class IndexConfig:
    """kind: exact, or faiss (approximate, for more than about a million documents; needs the extra faiss).

    dtype: of the stored embeddings; float16 halves them, and scores change in the fourth decimal.
    documents_per_block: what a killed build loses at most.
    """

    kind: str = "exact"
    dtype: str = "float32"
    documents_per_block: int = 1024

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise InputError(f"index.{key}={getattr(self, key)!r} is unknown; choose {' or '.join(choices)}")
        check_ranges(self, "index.", documents_per_block=COUNT)


def open_index(encoder: Encoder, corpus: dict[str, str], folder: Path, config: IndexConfig | None = None) -> Find:
    """The way to search the corpus; rows are places in it. Builds what is missing or stale.

    Raises InputError for a corpus without documents, and where faiss is asked for and not there.
    """
    config = config or IndexConfig()
    if not corpus:
        raise InputError(f"{folder}: there are no documents to index; give a corpus that has some")
    if config.kind == "faiss":
        import_faiss()  # before hours of encoding
    wanted = {"fingerprint": encoder.fingerprint(corpus), "documents": len(corpus), "dtype": config.dtype}
    whole = {**wanted, "encoded": len(corpus)}
    make_once(folder, lambda: is_described(folder, whole), lambda: _encode(encoder, list(corpus.values()), folder, wanted, config.documents_per_block))
    stored = Stored(folder / "embeddings.npy")
    find = partial(exact_search, stored)
    if config.kind == "exact":
        return find
    make_once(folder, lambda: is_described(folder, {"kind": "faiss"}), lambda: build_graphs(folder, stored))
    return Graphs(folder, find)


def _encode(encoder: Encoder, texts: list[str], folder: Path, wanted: dict[str, Any], block: int) -> None:
    """Builds the index with its embeddings, or resumes; `encoded` documents are done."""
    building = folder.with_name(f".{folder.name}.building")
    file = building / "embeddings.npy"
    if not _can_resume(building, wanted):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        np.lib.format.open_memmap(file, mode="w+", dtype=wanted["dtype"], shape=(len(texts), encoder.embedding_size))
        with file.open("r+b") as made:
            reserve(made, file.stat().st_size, str(folder))
        begun_with = {"environment": environment(), "documents_per_block": block}
        write_description(building, {**wanted, **begun_with, "kind": "exact", "encoded": 0})
    begun = read_description(building)
    done, block = begun["encoded"], begun["documents_per_block"]
    title = f"encoding {len(texts):,} documents"
    with threads(begun["environment"]["threads"]), progress_bar(title, len(texts)) as advance:
        advance(done)
        for start in range(done, len(texts), block):
            embeddings = encoder.encode_documents(texts[start : start + block], normalize=True, progress=False)
            stored = np.load(file, mmap_mode="r+")  # anew for each block: an open map keeps what was written in memory
            stored[start : start + len(embeddings)] = embeddings
            stored.flush()
            write_description(building, {**begun, "encoded": start + len(embeddings)})
            advance(len(embeddings))
    replace_folder(building, folder)


def _can_resume(building: Path, wanted: dict[str, Any]) -> bool:
    """Whether a killed build is of this index, and every document would get the bits that it had got there."""
    if not is_described(building, wanted):
        return False
    begun = read_description(building)
    if "environment" not in begun:
        return False
    now = {**environment(), "threads": begun["environment"]["threads"]}  # as many are taken again
    changed = changed_environment(begun["environment"], now)
    if changed:
        log.warning("%s: a build that was stopped is begun anew, as since then %s", building, "; ".join(changed))
    elif begun["environment"]["processor"] != now["processor"]:
        log.warning("%s: resumed on another processor, so last bits may differ from here on", building)
    return not changed
