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
from sgpt.runtime.embed import EmbeddingsFile, embed_blocks
from sgpt.runtime.errors import InputError
from sgpt.runtime.jobs import Blocks
from sgpt.runtime.progress import Advance
from sgpt.runtime.provenance import file_hash

EMBEDDINGS = ".embeddings.npy"
SCRATCH = (EMBEDDINGS, ".embeddings.tmp")  # endings of files next to the output, removed when it is written


class Candidate(NamedTuple):
    """A document of the pool, by its row, and its score: higher is nearer to the query."""

    row: int
    score: float


class Ranking(NamedTuple):
    """What a ranker returns for one query.

    candidates: best first, barred rows among them. positives: a score for each of the query's positives, in their
    order; None where the ranker has none, which score_margin and score_ratio cannot do with.
    """

    candidates: list[Candidate]
    positives: list[float | None]


class Ranker(Protocol):
    """What a class in RANKERS implements: it ranks the texts of `task.pool` for queries, by row.

    Made on every process by RANKERS[source](task), before anything is written: InputError where it cannot rank, or
    lacks scores of positives that score_margin or score_ratio need (as in `RunFile`).
    """

    digest: str
    """A hash or version, equal on all processes, that changes with anything that decides the scores: a job is resumed
    with the same one only.
    """

    def prepare(self, blocks: Blocks) -> None:
        """Work on the whole pool, once before any `rank`; all processes call it together, also when a job resumes.

        blocks: keeps what is finished, as lines of a kind of its own in BLOCK_KINDS (sgpt/runtime/jobs.py). Files next
        to the output are to be named in SCRATCH.
        """

    def rank(self, queries: Sequence[Query]) -> list[Ranking]:
        """A Ranking for each query (one or more), in their order.

        Candidates: each row of the pool at most once, sorted by `by_score`; finite scores, higher is nearer. At least
        the best last_rank + len(query.barred) rows where so many have a score, as barred ones are taken out later.
        """


def by_score(rows: Iterable[int], scores: Iterable[float]) -> list[Candidate]:
    """Candidates, best first, equal scores in the order of the corpus."""
    candidates = [Candidate(row, score) for row, score in zip(rows, scores, strict=True)]
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.row))


class Bm25:
    """As `sgpt.retrieval.bm25.bm25_run` scores. A document without any of the query's words is no candidate."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.digest = f"bm25s {importlib.metadata.version('bm25s')}"

    def prepare(self, blocks: Blocks) -> None:
        self.index = bm25_index(list(self.task.dataset.corpus.values()))

    def rank(self, queries: Sequence[Query]) -> list[Ranking]:
        rankings = []
        no_scores = np.zeros(len(self.task.dataset.corpus))
        words_of_queries = bm25_words([query.text for query in queries])
        for query, words in zip(queries, words_of_queries, strict=True):
            of_corpus = self.index.get_scores(words) if words else no_scores  # [documents]
            scores = of_corpus[self.task.pool.positions]  # [pool]
            depth = self.task.config.last_rank + len(query.barred)
            floor = np.partition(scores, -depth)[-depth] if depth < len(scores) else 0
            # All that equal the last one, or its ties would rank by chance.
            rows = np.flatnonzero((scores >= floor) & (scores > 0))
            candidates = by_score(rows.tolist(), scores[rows].tolist())
            rankings.append(Ranking(candidates, scores[list(query.positives)].tolist()))
        return rankings


class Model:
    """Cosine by an encoder, exact.

    Documents are encoded once, into `<output>.embeddings.npy` [pool, D], which all processes read by memory map.
    """

    def __init__(self, task: Task) -> None:
        config = task.config
        assert config.model
        self.task = task
        encoder = Encoder.from_pretrained(config.model, markers=config.markers, pooling=config.pooling)
        self.encoder = encoder.to(task.device)
        self.digest = self.encoder.fingerprint()

    def prepare(self, blocks: Blocks) -> None:
        texts, size = self.task.pool.texts, self.task.config.documents_per_block
        shape = len(texts), self.encoder.embedding_size

        def create(path: Path) -> None:
            EmbeddingsFile.create(path, shape, owner=blocks.output)

        file = EmbeddingsFile(blocks.shared_file("documents", EMBEDDINGS, create))

        def embed(rows: slice, advance: Advance) -> np.ndarray:
            return self.encoder.encode_documents(texts[rows], normalize=True, progress=advance)

        def save(block: int, rows: slice, embeddings: np.ndarray) -> None:
            file.write(rows, embeddings)
            blocks.append({"documents": block})

        missing = blocks.missing("documents", len(texts), size)
        embed_blocks(embed, save, missing, size, f"encoding {len(texts):,} documents")
        self.embeddings = torch.from_numpy(file.open())

    def rank(self, queries: Sequence[Query]) -> list[Ranking]:
        device = self.task.device
        texts = [query.text for query in queries]
        vectors = self.encoder.encode_queries(texts, normalize=True, as_tensor=True, progress=False)  # [Q, D]
        vectors = vectors.to(device)
        depth = self.task.config.last_rank + max(len(query.barred) for query in queries)
        scores, rows = search(vectors, self.embeddings, depth)  # [Q, depth] each
        rankings = []
        for query, vector, of_query, best in zip(queries, vectors, scores.tolist(), rows.tolist(), strict=True):
            positives = self.embeddings[list(query.positives)].to(device) @ vector
            rankings.append(Ranking(by_score(best, of_query), positives.tolist()))
        return rankings


class RunFile:
    """A run file, of TREC or JSON, made by any other system. Sorted by its scores, as evaluation tools do; its ranks
    are not read.
    """

    def __init__(self, task: Task) -> None:
        config = task.config
        assert config.trec
        self.task = task
        file = Path(config.trec)
        self.run = read_run(file, Path(config.data), task.dataset, "trec")
        self.digest = file_hash(file)
        if not self.run:
            raise InputError(
                f"{file}: ranks none of the queries of split {config.split!r} of {config.data}; "
                "give the run of this split"
            )
        needs_scores_of_positives = config.score_margin is not None or config.score_ratio is not None
        if needs_scores_of_positives and not config.rescore:  # which would score them itself
            self._refuse_missing_positives(file)

    def _refuse_missing_positives(self, file: Path) -> None:
        for query in self.task.queries:
            ranked = {self.task.pool.rows.get(document) for document in self.run.get(query.id, {})}
            missing = [document for row, document in query.positives.items() if row not in ranked]
            if ranked and missing:
                raise InputError(
                    f"{file}: query id {query.id!r} has no score for its positive {missing[0]!r}, "
                    "and score_margin and score_ratio need one; give a run that ranks all positives, "
                    "set both keys to null, or set rescore=<folder of a cross-encoder>, which scores them"
                )

    def prepare(self, blocks: Blocks) -> None:
        pass

    def rank(self, queries: Sequence[Query]) -> list[Ranking]:
        """As the file does; a text has the best score of its copies."""
        rankings = []
        for query in queries:
            scores: dict[int, float] = {}
            for document, score in self.run.get(query.id, {}).items():
                row = self.task.pool.rows.get(document)
                if row is not None:  # None for a blank document
                    scores[row] = max(score, scores.get(row, -math.inf))
            candidates = by_score(scores.keys(), scores.values())
            rankings.append(Ranking(candidates, [scores.get(row) for row in query.positives]))
        return rankings


RANKERS: dict[str, Callable[[Task], Ranker]] = {"bm25": Bm25, "model": Model, "run": RunFile}
