"""What the search page asks for: one query, answered by the base, the tuned model and the re-ranker side by side."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sgpt.retrieval.stored import Search
from sgpt.serving.batching import Batcher
from sgpt.serving.models import ServedModel, TextRow

InThread = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class PageSystem:
    """The served model in a strength, and its index."""

    title: str
    search: Search
    strength: float | None


@dataclass(frozen=True)
class IndexQuery:
    """A look-up in the index of a system, by its title. embedding: [D]."""

    system: str
    embedding: np.ndarray
    depth: int


class SearchPage:
    """The systems that the page shows, from the least to the most. The re-ranker scores what the last one found."""

    def __init__(self, model: ServedModel, corpus: dict[str, str], systems: Sequence[PageSystem], depth: int) -> None:
        self.model, self.depth = model, depth
        self.document_ids, self.texts = list(corpus), list(corpus.values())
        self.systems = {system.title: system for system in systems}

    def search(self, queries: Sequence[IndexQuery]) -> list[list[tuple[float, int]]]:
        """(cosine, row of the corpus) of the best documents of each, best first."""
        results = []
        for query in queries:
            embedding = torch.nn.functional.normalize(torch.from_numpy(query.embedding)[None], dim=1)  # [1, D]
            cosines, rows = self.systems[query.system].search(embedding, query.depth)  # [1, depth] each
            results.append(list(zip(cosines[0].tolist(), rows[0].tolist(), strict=True)))
        return results

    def prepare(self, query: str) -> tuple[dict[str, TextRow], bool]:
        """By the title of each system the query as it reads it, and whether it was cut, which is the same for all."""
        rows: dict[str, TextRow] = {}
        truncated: list[int] = []
        for system in self.systems.values():
            [rows[system.title]], truncated = self.model.prepare([query], "query", None, system.strength, "query")
        return rows, bool(truncated)

    async def answer(
        self, query: str, rows: Mapping[str, TextRow], top: int, batcher: Batcher, in_thread: InThread
    ) -> dict[str, Any]:
        """Of each system its title, what its scores are, and the best `top` documents.

        rows: of `prepare`. `truncated` of a document says whether the re-ranker has read its end alone.
        """
        answered: list[dict[str, Any]] = []
        found: list[tuple[float, int]] = []
        for system in self.systems.values():
            row = rows[system.title]
            [embedding] = await batcher.submit("embed", [row], [len(row.ids)])
            wanted = max(top, self.depth) if self.model.reranker else top
            [found] = await batcher.submit("search", [IndexQuery(system.title, embedding, wanted)], [1])
            answered.append(self._shown(system.title, "cosine", found[:top]))
        if self.model.reranker is not None:
            numbers = [number for _, number in found]
            texts, cut = await in_thread(self.model.prepare_rerank, query, [self.texts[number] for number in numbers])
            scores = await batcher.submit("rerank", texts, [len(text.read) for text in texts])
            again = sorted(zip(scores, numbers, strict=True), key=lambda hit: -hit[0])
            shown = self._shown("re-ranked", "log-probability", again[:top])
            cut_ids = {self.document_ids[numbers[index]] for index in cut}
            for hit in shown["hits"]:
                hit["truncated"] = hit["id"] in cut_ids
            answered.append(shown)
        return {"query": query, "documents": len(self.texts), "systems": answered}

    def _shown(self, title: str, score: str, hits: Sequence[tuple[float, int]]) -> dict[str, Any]:
        listed = []
        for number, row in hits:
            listed.append({"id": self.document_ids[row], "text": self.texts[row], "score": number})
        return {"title": title, "score": score, "hits": listed}
