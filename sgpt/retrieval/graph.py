"""Approximate search: graphs of neighbours over an index (FAISS, HNSW)."""

import logging
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgpt.retrieval.stored import Search, StoredEmbeddings, exact_search, read_description, write_description
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import hash_of
from sgpt.runtime.progress import progress_bar

log = logging.getLogger(__name__)
GRAPH_BYTES = 2**30  # of embeddings in one graph, which is built in memory
# The effort is raised until SAMPLE documents, taken as queries, find this share of their NEIGHBOURS nearest ones.
SAMPLE, NEIGHBOURS, RECALL = 128, 10, 0.99
MOST_EFFORT = 8192
GRAPH_HASHES = "graph_hashes"  # in index.json, by file


class Graphs:
    """Graphs over the index's embeddings, in files opened by memory map.

    exact: answers queries for which the graphs lead to too few documents. effort: how many candidates a search of a
    graph keeps (HNSW's efSearch); more find more and take longer.
    """

    def __init__(self, folder: Path, exact: Search) -> None:
        faiss = import_faiss()
        self.exact, self.effort = exact, read_description(folder).get("effort", 16)
        files = sorted(folder.glob("graph-*.faiss"), key=lambda file: int(file.name.split("-")[1]))
        self.parts = [faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC) for file in files]
        # Searched one after the other; the second's rows follow the first's.
        self.all = faiss.IndexShards(self.parts[0].d, False, True)
        for part in self.parts:
            self.all.add_shard(part)

    def __call__(self, queries: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        scores, rows = self.by_graphs(queries, depth)
        short = (rows < 0).any(1)  # [Q]: queries for which the graphs led to too few documents
        if short.any():
            scores[short], rows[short] = self.exact(queries[short], depth)
        return scores, rows

    def by_graphs(self, queries: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Scores and rows by the graphs alone, [Q, depth]; row -1 where they led to no more documents."""
        for part in self.parts:
            part.hnsw.efSearch = max(self.effort, depth)
        scores, rows = self.all.search(queries.float().cpu().numpy(), min(depth, self.all.ntotal))
        return torch.from_numpy(scores).to(queries.device), torch.from_numpy(rows).to(queries.device)


def graphs_are_whole(folder: Path) -> bool:
    """Whether index.json says that they are there, and each is byte for byte as it was written."""
    description = read_description(folder)
    hashes = description.get(GRAPH_HASHES, {})
    as_written = [_is_as_written(folder / name, digest) for name, digest in hashes.items()]
    return description.get("kind") == "faiss" and bool(as_written) and all(as_written)


def build_graphs(folder: Path, stored: StoredEmbeddings) -> None:
    """Adds graphs to an index whose embeddings are complete; after a kill or damage, those that are missing.

    index.json says kind=faiss only when all are there and the effort that reaches RECALL has been measured.
    """
    _write_graphs(folder, stored)
    graphs = Graphs(folder, partial(exact_search, stored))
    recall = _raise_effort(graphs, stored)
    if recall < RECALL:
        log.warning(
            "%s: the graph finds %.1f %% of the %d nearest neighbours that exact search finds, below the %.0f %% "
            "aimed at; set index.kind=exact", folder, 100 * recall, NEIGHBOURS, 100 * RECALL,
        )  # fmt: skip
    of_graphs = {"kind": "faiss", "effort": graphs.effort, "recall_at_10": round(recall, 4)}
    write_description(folder, {**read_description(folder), **of_graphs})


def _write_graphs(folder: Path, stored: StoredEmbeddings) -> None:
    """A file for each GRAPH_BYTES of embeddings, with its hash in index.json; those that are whole are kept."""
    faiss = import_faiss()
    documents, size = stored.map.shape
    half = stored.map.dtype == np.float16
    ends = [*range(0, documents, max(1, GRAPH_BYTES // (size * stored.map.itemsize))), documents]
    files = {folder / f"graph-{first}-{end}.faiss": (first, end) for first, end in pairwise(ends)}
    with progress_bar(f"building the graph of {documents:,} documents", documents) as advance:
        for file, (first, end) in files.items():
            description = read_description(folder)
            hashes = description.get(GRAPH_HASHES, {})
            if _is_as_written(file, hashes.get(file.name)):
                advance(end - first)
                continue
            if file.name in hashes:
                log.warning("%s: is built again; it is missing, or not as it was written", file)
            graph = faiss.index_factory(size, f"HNSW32,{'SQfp16' if half else 'Flat'}", faiss.METRIC_INNER_PRODUCT)
            for start in range(first, end, stored.chunk):
                rows = stored[start : min(end, start + stored.chunk)].numpy()
                graph.train(rows)  # nothing to learn, but faiss asks for it
                graph.add(rows)
                advance(len(rows))
            temporary = file.with_suffix(".tmp")
            faiss.write_index(graph, str(temporary))
            temporary.replace(file)
            write_description(folder, {**description, GRAPH_HASHES: {**hashes, file.name: hash_of(file)}})


def _is_as_written(file: Path, digest: str | None) -> bool:
    return digest is not None and file.is_file() and hash_of(file) == digest


def _raise_effort(graphs: Graphs, stored: StoredEmbeddings) -> float:
    """Raises the effort until the graphs reach RECALL, or MOST_EFFORT; returns the recall that was reached."""
    documents = len(stored)
    sample = np.random.default_rng(0).choice(documents, min(documents, SAMPLE), replace=False)
    queries = stored.at(np.sort(sample))
    expected = graphs.exact(queries, NEIGHBOURS + 1)[0]  # one more: a document finds itself first
    most = min(documents, MOST_EFFORT)
    recall = _recall(graphs, queries, expected, stored)
    while recall < RECALL and graphs.effort < most:
        graphs.effort = min(most, round(1.5 * graphs.effort))
        recall = _recall(graphs, queries, expected, stored)
    return recall


def _recall(graphs: Graphs, queries: Tensor, expected: Tensor, stored: StoredEmbeddings) -> float:
    """Share of the neighbours, without the query itself, that are as good as the exact ones.

    By scores, not by rows: copies of a text may come in any order. expected: scores by exact search, [Q, neighbours +
    1].
    """
    neighbours = expected.shape[1] - 1
    if not neighbours:
        return 1.0
    rows = graphs.by_graphs(queries, neighbours + 1)[1]
    scores = torch.stack([stored.at(of_query.numpy()) @ query for query, of_query in zip(queries, rows, strict=True)])
    good = ((scores >= expected[:, -1:] - 1e-6) & (rows >= 0)).sum(1) - 1
    return good.clamp(0, neighbours).float().mean().item() / neighbours


def import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError(
            "index.kind=faiss: faiss is not installed; pip install 'sgpt-framework[faiss]', "
            "or set index.kind=exact"
        ) from None
    return faiss
