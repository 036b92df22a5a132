"""Exact search by embeddings, in chunks; and of a whole test set, whose corpus' embeddings memory may not hold."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from sgpt.data.formats.beir import RetrievalSet
from sgpt.data.formats.trec import Run
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.embed import temporary_embeddings
from sgpt.runtime.errors import InputError

DEPTH = 100  # results kept for each query; the deepest metric is at 100
IN_MEMORY = 2**30  # bytes of a corpus' embeddings
QUERIES_AT_A_TIME = 4096  # whose scores with a chunk of documents exist: 256 MB


@contextmanager
def name_in_errors(name: str) -> Iterator[None]:
    """An InputError raised inside begins with `name`, which is the set's."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def retrieve(encoder: Encoder, dataset: RetrievalSet, depth: int = DEPTH, documents: Tensor | None = None) -> Run:
    """Cosine scores of the best `depth` documents of each query.

    documents: their embeddings [documents, D] in the order of the corpus, when they have been computed already.
    """
    with name_in_errors(dataset.name):
        queries = encoder.encode_queries(list(dataset.queries.values()), normalize=True, as_tensor=True)
    if documents is None:
        documents = embed_corpus(encoder, dataset)
    # One more where the query's own document is taken out afterwards.
    scores, rows = search(queries.to(encoder.device), documents, depth + dataset.skip_own_id)
    return as_results(dataset, scores, rows, depth)


def embed_corpus(encoder: Encoder, dataset: RetrievalSet) -> Tensor:
    """The embeddings of the corpus [documents, D], float32, of length 1.

    Those of a large corpus lie in a file without a name, of which memory holds what it can. They are not made block by
    block as in sgpt/runtime/embed.py: evaluation keeps none of them, so there is nothing to resume.
    """
    shape = len(dataset.corpus), encoder.embedding_size
    out = None
    if 4 * math.prod(shape) > IN_MEMORY:
        out = torch.from_numpy(temporary_embeddings(shape))
    with name_in_errors(dataset.name):
        return encoder.encode_documents(list(dataset.corpus.values()), normalize=True, as_tensor=True, out=out)


def search(queries: Tensor, documents: Tensor, depth: int, chunk: int = 16_384) -> tuple[Tensor, Tensor]:
    """Best `depth` documents by inner product: scores and rows, [Q, depth], best first. Exact.

    On the queries' device; documents may be elsewhere, a memory map too, and come over a chunk at a time.
    """
    results = [_search_chunks(some, documents, depth, chunk) for some in queries.split(QUERIES_AT_A_TIME)]
    scores, rows = zip(*results, strict=True)
    return torch.cat(scores), torch.cat(rows)


def _search_chunks(queries: Tensor, documents: Tensor, depth: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The best so far, merged with the best of one chunk of documents after the other."""
    scores = torch.empty(len(queries), 0, device=queries.device)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(documents), chunk):
        products = queries @ documents[start : start + chunk].to(queries.device).T  # [Q, chunk]
        best, columns = products.topk(min(depth, products.shape[1]), dim=1)
        scores = torch.cat([scores, best], 1)  # at most [Q, 2 * depth]
        rows = torch.cat([rows, columns + start], 1)
        scores, order = scores.topk(min(depth, scores.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return scores, rows


def as_run(query_ids: Sequence[str], document_ids: Sequence[str], scores: Tensor, rows: Tensor) -> Run:
    """Scores and rows [Q, depth] by the ids of queries and documents."""
    run: Run = {}
    for query, of_query, values in zip(query_ids, rows.tolist(), scores.tolist(), strict=True):
        run[query] = {document_ids[row]: score for row, score in zip(of_query, values, strict=True)}
    return run


def as_results(dataset: RetrievalSet, scores: Tensor, rows: Tensor, depth: int) -> Run:
    """A run of the results [Q, depth], without each query's own document where the set says so."""
    run = as_run(list(dataset.queries), list(dataset.corpus), scores, rows)
    if not dataset.skip_own_id:
        return run
    results: Run = {}
    for query, documents in run.items():
        others = ((name, score) for name, score in documents.items() if name != query)
        results[query] = dict(islice(others, depth))
    return results
