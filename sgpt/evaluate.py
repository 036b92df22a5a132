"""Evaluation of an encoder: retrieval over BEIR folders, similarity of sentence pairs, and BM25 beside it.

Exact search in chunks, and embeddings beyond a gigabyte in a file: memory beside the texts is bounded, whatever the corpus.
"""

import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sgpt.data.beir import PairSet, RetrievalSet, read_pairs
from sgpt.data.beir_sets import places, read_place
from sgpt.encoder import Encoder
from sgpt.errors import InputError
from sgpt.files import reserve
from sgpt.metrics import Run, correlations, ranking
from sgpt.progress import under_way

DEPTH = 100  # results kept for each query; the deepest metric is at 100
IN_MEMORY = 2**30  # bytes of a corpus' embeddings
QUERIES_AT_A_TIME = 4096  # whose scores with a chunk of documents exist: 256 MB
BEIR_ROOT = "data/raw/beir"  # where sets of BEIR are looked for and downloaded to
Results = dict[str, dict[str, float]]
LETTERS = (  # of the scripts without blanks: Chinese and Japanese; Thai, Lao; Tibetan, Burmese; Khmer. With their marks, which re's \w leaves out
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0edf\u0f20-\u0f33\u0f40-\u0fbc\u1000-\u1049\u1050-\u109f\u1780-\u17d3\u17e0-\u17e9"
)
HAN = re.compile("[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
INDIC = "\u0900-\u0963\u0966-\u0df3"  # with blanks, but with marks inside of words as well
WITHOUT_BLANKS = re.compile(f"[{LETTERS}]+")
WORD = rf"(?u)[{LETTERS}]+|[{INDIC}][{INDIC}\u200c\u200d]+|\b\w\w+\b"  # the last is bm25s' own

log = logging.getLogger(__name__)


@dataclass
class EvaluationConfig:
    """retrieval: BEIR folders, or names of BEIR's sets. sts: files of scored sentence pairs. bm25: score retrieval sets by BM25 too.

    split: of both; None is each set's own, which is test but for BEIR's msmarco.

    limit: so many queries and pairs, with the queries' documents and as many others; for trying things out.
    """

    retrieval: list[str] = field(default_factory=list)
    sts: list[str] = field(default_factory=list)
    split: str | None = "test"
    bm25: bool = True
    limit: int | None = None


@dataclass(frozen=True)
class Sets:
    """What is evaluated, read and checked."""

    retrieval: list[RetrievalSet]
    sts: list[PairSet]


def read_sets(config: EvaluationConfig) -> Sets:
    """Reads every file now: what is missing or cannot be scored must stop a run before it trains, not after."""
    retrieval = [read_place(place) for place in places(config.retrieval, config.split, Path(BEIR_ROOT))]
    pairs = [chosen for file in config.sts for chosen in read_pairs(Path(file), config.split or "test")]
    names = [chosen.name for chosen in (*retrieval, *pairs)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two evaluation sets are called {twice!r}, and results are kept by name; rename a folder, or evaluate one after the other")
    if config.limit is None:
        return Sets(retrieval, pairs)
    sets = Sets([_fewer(chosen, config.limit) for chosen in retrieval], [_fewer_pairs(chosen, config.limit) for chosen in pairs])
    for chosen in sets.retrieval:
        if not any(score > 0 and document in chosen.corpus for judged in chosen.qrels.values() for document, score in judged.items()):
            raise InputError(f"evaluation.limit={config.limit}: the first queries of {chosen.name} have no relevant document; raise it")
    for chosen in sets.sts:
        if len(set(chosen.scores)) < 2:
            raise InputError(f"evaluation.limit={config.limit}: the first pairs of {chosen.name} have one score, nothing to correlate; raise it")
    return sets


def evaluate(encoder: Encoder, sets: Sets) -> Results:
    """Set name -> metrics."""
    results: Results = {}
    for chosen in sets.retrieval:
        with under_way(f"evaluating on {chosen.name}, {len(chosen.qrels):,} queries and {len(chosen.corpus):,} documents"):
            results[chosen.name] = ranking(chosen.qrels, retrieve(encoder, chosen))
    for pairs in sets.sts:
        with under_way(f"evaluating on {pairs.name}, {len(pairs.scores):,} pairs"):
            results[pairs.name] = correlations(pairs.scores, cosines(encoder, pairs))
    return results


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
    return _found(chosen, scores, rows, depth)


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


def cosines(encoder: Encoder, pairs: PairSet) -> list[float]:
    """Both sides are encoded as queries: a similarity of equals has one role."""
    with naming(pairs.name):
        sides = (pairs.first, pairs.second)
        first, second = (encoder.encode_queries(side, normalize=True, as_tensor=True) for side in sides)
    return (first * second).sum(1).tolist()


def bm25(sets: Sets) -> Results:
    """BM25 (bm25s, Lucene's variant, English stop words) on the retrieval sets."""
    results: Results = {}
    for chosen in sets.retrieval:
        with under_way(f"BM25 on {chosen.name}, {len(chosen.corpus):,} documents"):
            results[chosen.name] = ranking(chosen.qrels, bm25_run(chosen))
    return results


def bm25_run(chosen: RetrievalSet, depth: int = DEPTH, index=None) -> Run:
    """index: of `bm25_index`, when it is there already. A document without any of the query's words is no result."""
    index, words = index or bm25_index(list(chosen.corpus.values())), bm25_words(list(chosen.queries.values()))
    rows, scores = index.retrieve(words, k=min(depth + chosen.skip_own_id, len(chosen.corpus)), show_progress=False)
    run = _found(chosen, torch.from_numpy(scores), torch.from_numpy(rows), depth)
    run = {query: {document: score for document, score in documents.items() if score > 0} for query, documents in run.items()}
    tell_unmatched(chosen.name, sum(not documents for documents in run.values()), len(run))
    return run


def tell_unmatched(name: str, without: int, queries: int) -> None:
    """A warning where BM25 finds nothing for most queries: its score is then low for a reason that nobody sees in it."""
    if 2 * without > queries:
        told = "%s: BM25 finds no document for %d of %d queries, as no word of theirs is in the corpus; are both of one language, and texts?"
        log.warning(told, name, without, queries)


def bm25_index(documents: list[str]):
    """The bm25s index of Lucene's variant, to be asked with `bm25_words`."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25(method="lucene")
    words = bm25_words(documents, return_ids=True)
    if not any(words.ids):  # bm25s cannot do without a word; this one is in no query
        words = bm25s.tokenization.Tokenized([[0] for _ in documents], {"\n": 0})
    index.index(words, show_progress=False)
    return index


def bm25_words(texts: list[str], *, return_ids: bool = False):
    """The words of each text but for English stop words; return_ids: numbered, as an index is made of them.

    Scripts that are written without blanks have no words to be seen: of them every two neighbouring letters are one, and every
    Chinese character too, as Lucene's CJKBigramFilter cuts them when it is asked for both.
    """
    import bm25s

    cut = [WITHOUT_BLANKS.sub(_pairs_of_letters, text) for text in texts]
    return bm25s.tokenize(cut, stopwords="en", token_pattern=WORD, return_ids=return_ids, show_progress=False)


def _pairs_of_letters(run: re.Match[str]) -> str:
    letters = run[0]
    pairs = [letters[place : place + 2] for place in range(len(letters) - 1)]
    single = [letter for letter in letters if HAN.match(letter) or not pairs]
    return f" {' '.join(pairs + single)} "


def table(columns: Mapping[str, Results], title: str):
    """A rich table: a row for each set and metric, a column for each system."""
    from rich.table import Table

    made = Table("set", "metric", *columns, title=title)
    for name in dict.fromkeys(name for results in columns.values() for name in results):
        for metric in dict.fromkeys(metric for results in columns.values() for metric in results.get(name, {})):
            made.add_row(name, metric, *(f"{100 * results[name][metric]:.2f}" if metric in results.get(name, {}) else "–" for results in columns.values()))
    return made


def similarity_sample(encoder: Encoder, queries: Sequence[str], positives: Sequence[str]) -> dict[str, list[float]]:
    """Cosines of matching pairs and of each query with the next one's document, for the report's histogram."""
    left = F.normalize(encoder.encode_queries(queries, as_tensor=True), dim=1)
    right = F.normalize(encoder.encode_documents(positives, as_tensor=True), dim=1)
    return {"positive": (left * right).sum(1).tolist(), "negative": (left * right.roll(1, 0)).sum(1).tolist()}


def _found(chosen: RetrievalSet, scores: Tensor, rows: Tensor, depth: int) -> Run:
    """The results without each query's own document, where the set says so."""
    run = as_run(list(chosen.queries), list(chosen.corpus), scores, rows)
    if not chosen.skip_own_id:
        return run
    return {query: dict(islice(((name, score) for name, score in documents.items() if name != query), depth)) for query, documents in run.items()}


def fewer_queries(chosen: RetrievalSet, limit: int | None) -> RetrievalSet:
    """The first `limit` queries, all if None, over the whole corpus."""
    qrels = dict(islice(chosen.qrels.items(), limit))
    return replace(chosen, queries={query: chosen.queries[query] for query in qrels}, qrels=qrels)


def _fewer(chosen: RetrievalSet, limit: int) -> RetrievalSet:
    few = fewer_queries(chosen, limit)
    judged = {document for documents in few.qrels.values() for document in documents}
    kept = judged | set(islice(chosen.corpus, len(judged)))
    return replace(few, corpus={document: text for document, text in chosen.corpus.items() if document in kept})


def _fewer_pairs(pairs: PairSet, limit: int) -> PairSet:
    return PairSet(pairs.name, pairs.first[:limit], pairs.second[:limit], pairs.scores[:limit])
