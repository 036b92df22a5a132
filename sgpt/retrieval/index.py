"""An index: a folder with the embeddings of one corpus, opened by memory map, and two ways to search it.

    embeddings.npy     [documents, D], of length 1, float32 or float16, in the order of the corpus
    graph-<first>-<end>.faiss
                       with kind=faiss: the embeddings of these rows once more, with a graph of neighbours; a file for
                       each gigabyte of embeddings
    index.json         fingerprint of model, contract and corpus, the contract and the hashes of the model, by which
                       what has changed is named; number of documents, how many of them are encoded, hashes of the
                       embeddings and graphs, dtype, kind, block size and environment (versions, threads …); written
                       anew after each block

Embeddings go into the file block by block (sgpt/runtime/embed.py), in `.<name>.building` next to the index, whose name
it takes when it is whole. After a kill the next start resumes there, with as many threads and blocks as large, so that
every bit is that of a build without a kill; with other versions of what computes it starts again, and says so. With
another fingerprint or dtype, or with embeddings that are not as they were written, an index is stale and built again; a
change of kind encodes nothing.

Exact search reads all embeddings for a query, 8 MiB at a time: it is the default, and good to about a million documents
(0.15 s for one query over 1,000,000 x 256 float32, on one core). Beyond, FAISS walks a graph (HNSW; Malkov and Yashunin
2016, arXiv 1603.09320). How far it walks is measured: a sample of documents, taken as queries, must find 99 % of their
ten nearest neighbours. index.json says how far, and the recall; queries that are unlike all documents may have a lower
one. Inverted lists were tried and left out: on 12,000 questions they had to read 80 of 110 lists to reach that recall.
"""

import logging
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.graph import Graphs, build_graphs, graphs_are_whole, import_faiss
from sgpt.retrieval.stored import (
    INDEX_EMBEDDINGS,
    Search,
    StoredEmbeddings,
    description_matches,
    exact_search,
    is_whole,
    read_description,
    write_description,
)
from sgpt.runtime.embed import EmbeddingsFile, embed_blocks
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import hash_of, hash_of_numbers, make_once, replace_folder
from sgpt.runtime.progress import Advance
from sgpt.runtime.provenance import changed_environment, differences, environment
from sgpt.runtime.values import COUNT, check_choice, check_ranges

log = logging.getLogger(__name__)
BLOCK_HASHES = "block_hashes"  # in index.json while it is built
CHOICES = {"kind": ("exact", "faiss"), "dtype": ("float32", "float16")}


@dataclass
class IndexConfig:
    """How a corpus is kept and searched."""

    kind: str = "exact"
    """exact; or faiss: approximate, for more than about a million documents, needs the extra `faiss`."""
    dtype: str = "float32"
    """Of the stored embeddings; float16 takes half the bytes, and scores change in the fourth decimal."""
    documents_per_block: int = 1024
    """Documents encoded at a time: what a killed build loses at most."""

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            check_choice(f"index.{key}", getattr(self, key), choices)
        check_ranges(self, "index.", documents_per_block=COUNT)


def open_index(encoder: Encoder, corpus: dict[str, str], folder: Path, config: IndexConfig | None = None) -> Search:
    """Opens the index of a corpus, and builds what is missing or stale; returns the function that searches it.

    Rows are counted in the order of the corpus.

    Raises InputError for a corpus without documents, and where faiss is asked for and not installed.
    """
    config = config or IndexConfig()
    if not corpus:
        raise InputError(f"{folder}: the corpus is empty, so there is nothing to index; give one with documents")
    if config.kind == "faiss":
        import_faiss()  # before hours of encoding
    wanted = {"fingerprint": encoder.fingerprint(corpus), "documents": len(corpus), "dtype": config.dtype}
    complete = {**wanted, "encoded": len(corpus)}
    texts = list(corpus.values())
    make_once(
        folder,
        lambda: is_whole(folder, complete),
        lambda: _encode(encoder, texts, folder, wanted, config.documents_per_block),
    )
    stored = StoredEmbeddings(folder / INDEX_EMBEDDINGS)
    exact = partial(exact_search, stored)
    if config.kind == "exact":
        return exact
    make_once(folder, lambda: graphs_are_whole(folder), lambda: build_graphs(folder, stored))
    return Graphs(folder, exact)


def _model(encoder: Encoder) -> dict[str, Any]:
    return {"contract": encoder.contract.stated(), **encoder.hashes()}


def _why_stale(folder: Path, encoder: Encoder, wanted: dict[str, Any]) -> str:
    """Why the index that is there is not the whole one of this model and corpus, and so is built again."""
    stored = read_description(folder)
    if not stored:
        return "index.json is missing or no JSON object"
    if wanted.items() <= stored.items():
        return f"{INDEX_EMBEDDINGS} is missing, or not as it was written"
    before, now = stored.get("model"), _model(encoder)
    changed = [] if before is None else differences(before, now)  # indexes of older versions do not say
    if stored.get("dtype") != wanted["dtype"]:
        changed.append(f"dtype: {stored.get('dtype')} -> {wanted['dtype']}")
    return f"changed: {'; '.join(changed) or 'the documents'}"


def _encode(encoder: Encoder, texts: list[str], folder: Path, wanted: dict[str, Any], size: int) -> None:
    """Encodes the corpus into an index with kind=exact, or resumes a killed build.

    size: documents in a block, of a new build; one that is resumed keeps its own.
    """
    if folder.exists():
        log.warning("%s: is built again; %s", folder, _why_stale(folder, encoder, wanted))
    building = folder.with_name(f".{folder.name}.building")
    file = EmbeddingsFile(building / INDEX_EMBEDDINGS)
    if not _can_resume(building, wanted):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        EmbeddingsFile.create(file.file, (len(texts), encoder.embedding_size), wanted["dtype"], owner=folder)
        first_start = {"environment": environment(), "documents_per_block": size, "model": _model(encoder)}
        write_description(building, {**wanted, **first_start, "kind": "exact", "encoded": 0, BLOCK_HASHES: []})
    description = read_description(building)
    size = description["documents_per_block"]

    def embed(rows: slice, advance: Advance) -> np.ndarray:
        return encoder.encode_documents(texts[rows], normalize=True, progress=advance)

    def save(block: int, rows: slice, embeddings: np.ndarray) -> None:
        file.write(rows, embeddings)
        description[BLOCK_HASHES].append(hash_of_numbers(embeddings.astype(wanted["dtype"])))
        write_description(building, {**description, "encoded": rows.start + len(embeddings)})

    done = math.ceil(description["encoded"] / size)
    missing = range(done, math.ceil(len(texts) / size))
    title = f"encoding {len(texts):,} documents"
    # Alone, for only this process has the lock of the folder (`make_once`); the others wait for it there.
    embed_blocks(embed, save, missing, size, title, first_threads=description["environment"]["threads"], alone=True)
    whole = {"encoded": len(texts), "embeddings_hash": hash_of(building / INDEX_EMBEDDINGS)}
    del description[BLOCK_HASHES]
    write_description(building, {**description, **whole})
    replace_folder(building, folder)


def _blocks_are_whole(building: Path, description: dict[str, Any]) -> bool:
    """Whether the blocks of a killed build are there, with the numbers that were written."""
    if not {"documents_per_block", "encoded", BLOCK_HASHES} <= description.keys():
        return False
    try:
        stored = np.load(building / INDEX_EMBEDDINGS, mmap_mode="r")
    except (OSError, ValueError):
        return False
    encoded = stored[: description["encoded"]]
    starts = range(0, len(encoded), description["documents_per_block"])
    blocks = (encoded[start : start + starts.step] for start in starts)
    return [hash_of_numbers(block) for block in blocks] == description[BLOCK_HASHES]


def _can_resume(building: Path, wanted: dict[str, Any]) -> bool:
    """Whether a killed build is of this index, and every document would get the bits that it would have got then."""
    if not description_matches(building, wanted):
        return False
    description = read_description(building)
    then = description.get("environment")
    if then is None:
        return False
    now = {**environment(), "threads": then["threads"]}  # as many are taken again
    if changed := changed_environment(then, now):
        log.warning(
            "%s: the unfinished index is built again from the start, because the environment has changed: %s",
            building, "; ".join(changed),
        )  # fmt: skip
        return False
    if not _blocks_are_whole(building, description):
        log.warning("%s: the unfinished index is built again from the start; it is not as it was written", building)
        return False
    if then["processor"] != now["processor"]:
        log.warning("%s: resumed on another processor; last bits of the embeddings may differ from here on", building)
    return True
