"""Search in a corpus with a stored index (sgpt/retrieval/index.py), and again among what was found with SGPT-CE.

One decoder does both: the encoder's biases are a delta over its frozen trunk, which is on while texts are embedded and off
while the language-model head scores (`load_encoder_and_reranker`). Beside the language model that costs kilobytes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from sgpt.cross_encoder.cross_encoder import CrossEncoder, load_language_model
from sgpt.cross_encoder.prompts import PromptConfig
from sgpt.decoder.trunk import ModelConfig, load_tokenizer
from sgpt.encoder.adapter import DELTA, check_tokenizer, convert, trained_dtype
from sgpt.encoder.contract import Contract
from sgpt.encoder.delta import Delta
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.model_folder import find_model
from sgpt.retrieval.index import IndexConfig, open_index
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, check_ranges


@dataclass(frozen=True)
class Hit:
    """score: cosine; after re-ranking the query's log-probability. name: the document's id."""

    score: float
    name: str
    text: str


class Searcher:
    """An encoder and the index of one corpus; builds or opens the index when made.

    ranker: scores the best `depth` documents again, and of these the results are the best.
    """

    def __init__(
        self, encoder: Encoder, corpus: dict[str, str], folder: Path, index: IndexConfig | None = None, *, ranker: CrossEncoder | None = None, depth: int = 100
    ) -> None:  # fmt: skip
        self.encoder, self.corpus, self.names, self.ranker, self.depth = encoder, corpus, list(corpus), ranker, depth
        self.find = open_index(encoder, corpus, folder, index)

    def __call__(self, query: str, top: int = 10) -> list[Hit]:
        """The best documents, best first."""
        vector = self.encoder.encode_queries([query], normalize=True, as_tensor=True)
        scores, rows = self.find(vector, max(top, self.depth) if self.ranker else top)
        names = [self.names[row] for row in rows[0].tolist()]
        found = scores[0].tolist()
        if self.ranker is not None:
            found = self.ranker.score([query] * len(names), [self.corpus[name] for name in names]).tolist()
        hits = [Hit(score, name, self.corpus[name]) for score, name in zip(found, names, strict=True)]
        return sorted(hits, key=lambda hit: -hit.score)[:top]


def load_encoder_and_reranker(
    path: str | Path, prompt: PromptConfig | str = "G", *, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[Encoder, CrossEncoder]:  # fmt: skip
    """The encoder of a run or adapter folder of ours, and SGPT-CE with its base: one trunk in memory for both.

    Raises InputError where there is no bias delta to put on and off, as for a run with tuning=full.
    """
    model_folder = find_model(path, ("adapter",))
    folder = model_folder.folder
    if not model_folder.is_ours:
        raise InputError(f"{path} holds no adapter/, so there is no base to re-rank with; give the run's folder, or search without rerank")
    contract = Contract.load(folder)
    if not (folder / DELTA).is_file():
        raise InputError(f"{folder} holds no {DELTA}, so there is no base to re-rank with; give the run's folder, or search without rerank")
    model = load_language_model(ModelConfig(contract.base, trained_dtype(folder)))
    convert(model, dtype)  # not opened so: a base that was trained over in half precision has the values of that
    model, tokenizer = model.to(device), load_tokenizer(contract.base)
    check_tokenizer(tokenizer, folder)
    encoder = Encoder(model.base_model, tokenizer, contract, delta=Delta(model.base_model, folder))
    return encoder, CrossEncoder(model, tokenizer, prompt)


@dataclass
class SearchConfig:
    """run: run or export. query: null asks at a prompt. corpus: JSON lines of _id and text, or a BEIR folder; null takes

    what the run was trained to search. top: results shown. index: how the corpus is kept and searched.
    rerank: score the best `depth` documents again by SGPT-CE with `prompt` and the run's own base.
    """

    run: str = ""
    query: str | None = None
    corpus: str | None = None
    top: int = 10
    rerank: bool = False
    prompt: str = "G"
    depth: int = 100
    index: IndexConfig = field(default_factory=IndexConfig)

    def __post_init__(self) -> None:
        check_ranges(self, top=COUNT, depth=COUNT)
        if self.query is not None and not self.query.strip():
            raise InputError("query is empty; leave it out to be asked at a prompt")
