"""What ranks the documents for a query: BM25, a model, or a run that someone else made."""

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sgpt.data.formats.trec import read_run
from sgpt.encoder.encoder import Encoder
from sgpt.mining.task import Query, Task
from sgpt.retrieval.bm25 import bm25_index, bm25_words
from sgpt.retrieval.dense import search
from sgpt.runtime.distributed import barrier, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import reserve
from sgpt.runtime.jobs import Parts, beside
from sgpt.runtime.provenance import file_hash


class Candidate(NamedTuple):
    row: int
    score: float


class Ranked(NamedTuple):
    """candidates: best first, barred rows among them. positives: their scores in the order of the query, None where the source has none."""

    candidates: list[Candidate]
    positives: list[float | None]


class Source(Protocol):
    """digest: changes with anything that decides scores. `prepare` does the long work that can be resumed."""

    digest: str

    def prepare(self, parts: Parts) -> None: ...
    def rank(self, queries: Sequence[Query]) -> list[Ranked]: ...


def by_score(rows: Iterable[int], scores: Iterable[float]) -> list[Candidate]:
    """Best first, equal scores in the order of the corpus."""
    return sorted(map(Candidate, rows, scores), key=lambda candidate: (-candidate.score, candidate.row))


class Bm25:
    """As `sgpt.retrieval.bm25.bm25_run` scores. A document without any of the query's words is no candidate."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.digest = f"bm25s {importlib.metadata.version('bm25s')}"

    def prepare(self, parts: Parts) -> None:
        self.index = bm25_index(list(self.task.chosen.corpus.values()))

    def rank(self, queries: Sequence[Query]) -> list[Ranked]:
        ranked = []
        for query, words in zip(queries, bm25_words([query.text for query in queries]), strict=True):
            scores = (self.index.get_scores(words) if words else np.zeros(len(self.task.chosen.corpus)))[self.task.pool.places]
            depth = self.task.config.last_rank + len(query.barred)
            floor = np.partition(scores, -depth)[-depth] if depth < len(scores) else 0
            rows = np.flatnonzero((scores >= floor) & (scores > 0))  # all that equal the last, or its ties would rank by chance
            ranked.append(Ranked(by_score(rows.tolist(), scores[rows].tolist()), scores[list(query.positives)].tolist()))
        return ranked


class Model:
    """Cosine by an encoder, exact. Documents are encoded once, into `<output>.embeddings.npy` [pool, D], which all processes read by memory map."""

    def __init__(self, task: Task) -> None:
        config = task.config
        assert config.model
        self.task = task
        self.encoder = Encoder.from_pretrained(config.model, markers=config.markers, pooling=config.pooling).to(task.device)
        self.digest = self.encoder.fingerprint()

    def prepare(self, parts: Parts) -> None:
        file, texts = beside(parts.output, ".embeddings.npy"), self.task.pool.texts
        if not file.is_file():
            parts.done["documents"].clear()
        barrier()  # everybody has looked for the file
        if world()[0] == 0 and not file.is_file():
            temporary = beside(parts.output, ".embeddings.tmp")
            np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(len(texts), self.encoder.embedding_size))
            with temporary.open("r+b") as made:
                reserve(made, temporary.stat().st_size, str(parts.output))
            temporary.replace(file)
        barrier()
        stored = np.load(file, mmap_mode="r+")
        for block, rows in parts.left("documents", len(texts), self.task.config.documents_per_block, f"encoding {len(texts):,} documents"):
            stored[rows] = self.encoder.encode_documents(texts[rows], normalize=True, progress=False)
            stored.flush()
            parts.append({"documents": block})
        barrier()
        self.embeddings = torch.from_numpy(np.load(file, mmap_mode="c"))

    def rank(self, queries: Sequence[Query]) -> list[Ranked]:
        texts, device = [query.text for query in queries], self.task.device
        vectors = self.encoder.encode_queries(texts, normalize=True, as_tensor=True, progress=False).to(device)
        depth = self.task.config.last_rank + max(len(query.barred) for query in queries)
        return [
            Ranked(by_score(rows.tolist(), scores.tolist()), (self.embeddings[list(query.positives)].to(device) @ vector).tolist())
            for query, vector, scores, rows in zip(queries, vectors, *search(vectors, self.embeddings, depth), strict=True)
        ]


class RunFile:
    """A ranking that someone else made. The order is that of its scores, as evaluation tools read it."""

    def __init__(self, task: Task) -> None:
        config = task.config
        assert config.trec
        self.task, file = task, Path(config.trec)
        self.ranking = read_run(file, Path(config.data), task.chosen, "trec")
        self.digest = file_hash(file)
        if not self.ranking:
            raise InputError(f"{file}: ranks none of the queries of split {config.split!r} of {config.data}; give the run of this split")
        if config.rescore or (config.score_margin is None and config.score_ratio is None):
            return
        for query in task.queries:
            ranked = {task.pool.rows.get(document) for document in self.ranking.get(query.name, {})}
            if ranked and (missing := [document for row, document in query.positives.items() if row not in ranked]):
                raise InputError(
                    f"{file}: query id {query.name!r} has no score for its positive {missing[0]!r}, so score_margin and score_ratio cannot be "
                    "applied; set both to null, give a deeper run, or rescore=<folder of a cross-encoder>"
                )

    def prepare(self, parts: Parts) -> None:
        pass

    def rank(self, queries: Sequence[Query]) -> list[Ranked]:
        """A text has the best score of its copies."""
        ranked = []
        for query in queries:
            scores: dict[int, float] = {}
            for document, score in self.ranking.get(query.name, {}).items():
                if (row := self.task.pool.rows.get(document)) is not None:
                    scores[row] = max(score, scores.get(row, -math.inf))
            ranked.append(Ranked(by_score(scores.keys(), scores.values()), [scores.get(row) for row in query.positives]))
        return ranked


SOURCES: dict[str, Callable[[Task], Source]] = {"bm25": Bm25, "model": Model, "run": RunFile}
