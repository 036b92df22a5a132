"""Exact search by embeddings, in chunks, and the embeddings of a corpus that memory may not hold."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sgpt.data.formats.beir import RetrievalSet
from sgpt.data.formats.trec import Run
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import reserve

DEPTH = 100  # results kept for each query; the deepest metric is at 100
IN_MEMORY = 2**30  # bytes of a corpus' embeddings
QUERIES_AT_A_TIME = 4096  # whose scores with a chunk of documents exist: 256 MB


@contextmanager
def naming(name: str) -> Iterator[None]:
    """What is wrong inside is said with the set's name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def retrieve(encoder: Encoder, chosen: RetrievalSet, depth: int = DEPTH, documents: Tensor | None = None) -> Run:
    """Cosine scores of the best `depth` documents of each query. documents: their embeddings, when they are there already."""
    with naming(chosen.name):
        queries = encoder.encode_queries(list(chosen.queries.values()), normalize=True, as_tensor=True)
    scores, rows = search(queries, embedded(encoder, chosen) if documents is None else documents, depth + chosen.skip_own_id)
    return as_results(chosen, scores, rows, depth)


def embedded(encoder: Encoder, chosen: RetrievalSet) -> Tensor:
    """The corpus [documents, D], float32 of length 1. What is large lies in a file without a name, and memory holds what it can."""
    shape = len(chosen.corpus), encoder.embedding_size
    out = None
    if 4 * math.prod(shape) > IN_MEMORY:
        with tempfile.TemporaryFile() as file:
            reserve(file, 4 * math.prod(shape), f"{tempfile.gettempdir()}, the folder of temporary files that TMPDIR can name")
            out = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
    with naming(chosen.name):
        return encoder.encode_documents(list(chosen.corpus.values()), normalize=True, as_tensor=True, out=out)


def search(queries: Tensor, documents: Tensor, depth: int, chunk: int = 16_384) -> tuple[Tensor, Tensor]:
    """Best `depth` documents by inner product: scores and rows, [Q, depth], best first. Exact.

    On the queries' device; documents may be elsewhere, a memory map too, and come over a chunk at a time.
    """
    scores, rows = zip(*(_search(some, documents, depth, chunk) for some in queries.split(QUERIES_AT_A_TIME)), strict=True)
    return torch.cat(scores), torch.cat(rows)


def _search(queries: Tensor, documents: Tensor, depth: int, chunk: int) -> tuple[Tensor, Tensor]:
    scores = torch.empty(len(queries), 0, device=queries.device)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(documents), chunk):
        part = queries @ documents[start : start + chunk].to(queries.device).T
        best, where = part.topk(min(depth, part.shape[1]), dim=1)
        scores, rows = torch.cat([scores, best], 1), torch.cat([rows, where + start], 1)
        scores, order = scores.topk(min(depth, scores.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return scores, rows


def as_run(query_ids: Sequence[str], document_ids: Sequence[str], scores: Tensor, rows: Tensor) -> Run:
    return {
        query: {document_ids[row]: score for row, score in zip(found, values, strict=True)}
        for query, found, values in zip(query_ids, rows.tolist(), scores.tolist(), strict=True)
    }


def as_results(chosen: RetrievalSet, scores: Tensor, rows: Tensor, depth: int) -> Run:
    """The results without each query's own document, where the set says so."""
    run = as_run(list(chosen.queries), list(chosen.corpus), scores, rows)
    if not chosen.skip_own_id:
        return run
    return {query: dict(islice(((name, score) for name, score in documents.items() if name != query), depth)) for query, documents in run.items()}
