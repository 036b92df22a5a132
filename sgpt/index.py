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

import json
import logging
import mmap
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgpt.encoder import Encoder
from sgpt.errors import InputError
from sgpt.evaluate import search
from sgpt.files import make_once, replace_folder, reserve, write_whole
from sgpt.progress import progress_bar
from sgpt.provenance import changed_environment, content_hash, environment, threads, tokenizer_hash, weights_hash
from sgpt.values import COUNT, check_ranges

log = logging.getLogger(__name__)

Find = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # queries [Q, D] of length 1, and a depth -> scores and rows, [Q, depth], best first

CHUNK_BYTES = 8 * 2**20  # of float32 at a time; with a quarter of it calls take a third of the time
GRAPH_BYTES = 2**30  # of embeddings in one graph, which is made in memory
SAMPLE, NEIGHBOURS, RECALL, MOST_EFFORT = 128, 10, 0.99, 8192
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


class Stored:
    """Embeddings in a file, as `search` takes documents: slices, of `chunk` rows at most, are float32 [rows, D].

    A slice is good until the next one: only the last stays in resident memory, and float16 is converted into the same room each time.
    """

    def __init__(self, file: Path) -> None:
        self.map = np.load(file, mmap_mode="c")  # nothing is written; torch has no read-only tensors
        self.room = torch.empty(self.chunk, self.map.shape[1])  # new memory for every slice takes more than twice the time

    def __len__(self) -> int:
        return len(self.map)

    def __getitem__(self, rows: slice) -> Tensor:
        self._let_go()
        part = torch.from_numpy(np.asarray(self.map[rows]))
        return part if part.dtype == torch.float32 else self.room[: len(part)].copy_(part)

    def at(self, rows: np.ndarray) -> Tensor:
        """Single rows, float32 [rows, D], in memory."""
        parts = []
        for some in np.array_split(rows, len(rows) // self.chunk + 1):
            self._let_go()
            parts.append(torch.from_numpy(self.map[some]).float())
        return torch.cat(parts)

    def _let_go(self) -> None:
        self.map.base.madvise(mmap.MADV_DONTNEED)  # 10 % slower, and a gigabyte less; the pages stay cached while nobody needs the room

    @property
    def chunk(self) -> int:
        """Rows at a time."""
        return max(1, CHUNK_BYTES // (4 * self.map.shape[1]))


def open_index(encoder: Encoder, corpus: dict[str, str], folder: Path, config: IndexConfig | None = None) -> Find:
    """The way to search the corpus; rows are places in it. Builds what is missing or stale.

    Raises InputError for a corpus without documents, and where faiss is asked for and not there.
    """
    config = config or IndexConfig()
    if not corpus:
        raise InputError(f"{folder}: there are no documents to index; give a corpus that has some")
    if config.kind == "faiss":
        _faiss()  # before hours of encoding
    wanted = {"fingerprint": fingerprint(encoder, corpus), "documents": len(corpus), "dtype": config.dtype}
    whole = {**wanted, "encoded": len(corpus)}
    make_once(folder, lambda: _is(folder, whole), lambda: _encode(encoder, list(corpus.values()), folder, wanted, config.documents_per_block))
    stored = Stored(folder / "embeddings.npy")
    find = partial(_exact, stored)
    if config.kind == "exact":
        return find
    make_once(folder, lambda: _is(folder, {"kind": "faiss"}), lambda: _link(folder, stored))
    return Graphs(folder, find)


def fingerprint(encoder: Encoder, corpus: dict[str, str]) -> str:
    """Changes with any weight, any rule of the tokenizer, any part of the contract, any document."""
    with encoder.weights:
        weights = weights_hash(dict(encoder.trunk.named_parameters()))
    return content_hash([encoder.contract.fingerprint(), weights, tokenizer_hash(encoder.tokenizer)], corpus)


def read_description(folder: Path) -> dict[str, Any]:
    """What index.json says; {} where there is none."""
    file = folder / "index.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _is(folder: Path, wanted: dict[str, Any]) -> bool:
    return wanted.items() <= read_description(folder).items()


def _describe(folder: Path, description: dict[str, Any]) -> None:
    write_whole(folder / "index.json", json.dumps(description, indent=2) + "\n")


def _exact(stored: Stored, queries: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    return search(queries, stored, depth, stored.chunk)


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
        _describe(building, {**wanted, **begun_with, "kind": "exact", "encoded": 0})
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
            _describe(building, {**begun, "encoded": start + len(embeddings)})
            advance(len(embeddings))
    replace_folder(building, folder)


def _can_resume(building: Path, wanted: dict[str, Any]) -> bool:
    """Whether a killed build is of this index, and every document would get the bits that it had got there."""
    if not _is(building, wanted):
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


class Graphs:
    """Graphs over the index's embeddings, in files opened by memory map. `exact` answers where they find too few documents.

    effort: documents that a walk keeps in sight, hnswlib's ef.
    """

    def __init__(self, folder: Path, exact: Find) -> None:
        faiss = _faiss()
        self.exact, self.effort = exact, read_description(folder).get("effort", 16)
        files = sorted(folder.glob("graph-*.faiss"), key=lambda file: int(file.name.split("-")[1]))
        self.parts = [faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC) for file in files]
        self.all = faiss.IndexShards(self.parts[0].d, False, True)  # one after the other; the second's rows follow the first's
        for part in self.parts:
            self.all.add_shard(part)

    def __call__(self, queries: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        scores, rows = self.found(queries, depth)
        if (short := (rows < 0).any(1)).any():
            scores[short], rows[short] = self.exact(queries[short], depth)
        return scores, rows

    def found(self, queries: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """By the graphs alone; row -1 where they led to no more documents."""
        for part in self.parts:
            part.hnsw.efSearch = max(self.effort, depth)
        scores, rows = self.all.search(queries.float().cpu().numpy(), min(depth, self.all.ntotal))
        return torch.from_numpy(scores).to(queries.device), torch.from_numpy(rows).to(queries.device)


def _link(folder: Path, stored: Stored) -> None:
    """Adds graphs to a whole index, after a kill those that are missing. The effort that reaches RECALL goes into index.json."""
    faiss = _faiss()
    documents, size = stored.map.shape
    half = stored.map.dtype == np.float16
    ends = [*range(0, documents, max(1, GRAPH_BYTES // (size * stored.map.itemsize))), documents]
    files = {folder / f"graph-{first}-{end}.faiss": (first, end) for first, end in pairwise(ends)}
    with progress_bar(f"linking {documents:,} documents", documents) as advance:
        for file, (first, end) in files.items():
            if file.is_file():
                advance(end - first)
                continue
            graph = faiss.index_factory(size, f"HNSW32,{'SQfp16' if half else 'Flat'}", faiss.METRIC_INNER_PRODUCT)
            for start in range(first, end, stored.chunk):
                rows = stored[start : min(end, start + stored.chunk)].numpy()
                graph.train(rows)  # nothing to learn, but faiss asks for it
                graph.add(rows)
                advance(len(rows))
            temporary = file.with_suffix(".tmp")
            faiss.write_index(graph, str(temporary))
            temporary.replace(file)
    made = Graphs(folder, partial(_exact, stored))
    queries = stored.at(np.sort(np.random.default_rng(0).choice(documents, min(documents, SAMPLE), replace=False)))
    expected = made.exact(queries, NEIGHBOURS + 1)[0]  # a document finds itself first
    most = min(documents, MOST_EFFORT)
    while (reached := _recall(made, queries, expected, stored)) < RECALL and made.effort < most:
        made.effort = min(most, round(1.5 * made.effort))
    if reached < RECALL:
        log.warning("%s: the graph finds %.1f %% of a document's neighbours, not %.0f %%; search with index.kind=exact", folder, 100 * reached, 100 * RECALL)
    _describe(folder, {**read_description(folder), "kind": "faiss", "effort": made.effort, "recall_at_10": round(reached, 4)})


def _recall(made: Graphs, queries: Tensor, expected: Tensor, stored: Stored) -> float:
    """Share of the neighbours, without the query itself, that are as good as the exact ones. By scores: copies of a text change places."""
    neighbours = expected.shape[1] - 1
    if not neighbours:
        return 1.0
    rows = made.found(queries, neighbours + 1)[1]
    scores = torch.stack([stored.at(of_query.numpy()) @ query for query, of_query in zip(queries, rows, strict=True)])
    good = ((scores >= expected[:, -1:] - 1e-6) & (rows >= 0)).sum(1) - 1
    return good.clamp(0, neighbours).float().mean().item() / neighbours


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError("index.kind=faiss: faiss is not installed; pip install 'sgpt-framework[faiss]', or search exactly with index.kind=exact") from None
    return faiss
