"""Search in a corpus with a stored index (sgpt/retrieval/index.py), and re-ranking of the results by SGPT-CE.

One decoder does both (`load_encoder_and_reranker`): the encoder's biases are a delta over a frozen trunk. The delta is
on while texts are embedded, and off while the language-model head scores. It costs kilobytes more than the language
model.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sgpt.cross_encoder.cross_encoder import CrossEncoder, load_language_model
from sgpt.cross_encoder.prompts import PromptConfig
from sgpt.encoder.adapter import read_delta
from sgpt.encoder.delta import why_no_bias_delta
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.model_folder import find_model, run_of
from sgpt.retrieval.index import IndexConfig, open_index
from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, check_ranges, check_unused


@dataclass(frozen=True)
class Hit:
    """One result. score: cosine; after re-ranking the query's log-probability."""

    score: float
    document_id: str
    text: str


class Searcher:
    """An encoder and the index of one corpus; opens the index when made, and builds what is missing of it.

    reranker: scores the best `depth` documents again; the results are the best of these by its scores.
    """

    def __init__(
        self, encoder: Encoder, corpus: dict[str, str], folder: Path, index: IndexConfig | None = None, *,
        reranker: CrossEncoder | None = None, depth: int = 100,
    ) -> None:  # fmt: skip
        self.encoder, self.corpus = encoder, corpus
        self.document_ids = list(corpus)  # row of the index -> id
        self.reranker, self.depth = reranker, depth
        self.search = open_index(encoder, corpus, folder, index)

    def __call__(self, query: str, top: int = 10) -> list[Hit]:
        """The `top` best documents, best first."""
        embedding = self.encoder.encode_queries([query], normalize=True, as_tensor=True)  # [1, D]
        depth = max(top, self.depth) if self.reranker else top
        cosines, rows = self.search(embedding, depth)  # [1, depth] each
        ids = [self.document_ids[row] for row in rows[0].tolist()]
        texts = [self.corpus[document] for document in ids]
        scores = cosines[0].tolist()
        if self.reranker is not None:
            scores = self.reranker.score([query] * len(ids), texts).tolist()
        hits = [Hit(score, document, text) for score, document, text in zip(scores, ids, texts, strict=True)]
        return sorted(hits, key=lambda hit: -hit.score)[:top]


def index_folder(model: str, corpus: Path, dtype: str = "float32") -> Path:
    """Where the index of a corpus lies: in the model's own folder when that is a run, export or adapter of ours.

    Of a run's export or adapter it is the run's, as an export that is made again replaces all of its folder. Else it
    lies in runs/search/, as nothing is written into a base, and a hub id has no folder. Its name is that of the
    corpus' folder, of a file both names, with the dtype of the model where it is not float32.
    """
    is_ours = Path(model).is_dir() and find_model(model).is_ours
    folder = run_of(Path(model)) if is_ours else Path("runs/search") / Path(os.path.abspath(model)).name
    whole = Path(os.path.abspath(corpus))  # "." and ".." are no names
    names = [whole.parent.name, whole.name] if whole.is_file() else [whole.name]
    return folder / "index" / "-".join([*names, *([dtype] if dtype != "float32" else [])])


def load_encoder_and_reranker(
    path: str | Path, prompt: PromptConfig | str = "G", *, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[Encoder, CrossEncoder]:  # fmt: skip
    """The encoder of a run or adapter folder of ours, and SGPT-CE with its base: one trunk in memory for both.

    Of a run its adapter is read, not its export, in whose weights the biases are merged: the re-ranker needs the base.

    Raises InputError where there is no bias delta to put on and off, as for a run with tuning=full.
    """
    remedy = "so there is no base to re-rank with; give the run's folder, or search without rerank"
    model_folder = find_model(path, ("adapter",))
    folder = model_folder.folder
    if not model_folder.is_ours:
        raise InputError(f"{path} holds no adapter/, {remedy}")
    without = "leave out rerank=true"
    if problem := why_no_bias_delta(folder):
        raise InputError(f"{problem}, so encoder and re-ranker cannot share one trunk; {without}")
    stated = read_delta(folder)
    if stated["layers"]:
        raise InputError(
            f"{folder}: trained over the first {stated['layers']} blocks of {stated['base']} (model.layers), which "
            f"are no language model that could re-rank; {without}"
        )
    encoder, model = Encoder.over_base(folder, dtype=dtype, device=device, load=load_language_model)
    return encoder, CrossEncoder(model, encoder.tokenizer, prompt)


@dataclass
class SearchConfig:
    """Keys of train/search.py."""

    run: str = ""
    """Folder of a run, export, adapter, sentence-transformers model or base, or a hub id of one of the last two."""
    query: str | None = None
    """What to search for; null asks at a prompt."""
    corpus: str | None = None
    """JSON lines of _id and text, or a BEIR folder; null takes data/raw/pydocs/stdlib, whatever the run was trained on.
    """
    top: int = 10
    """Results shown for each query."""
    rerank: bool = False
    """Score the best `depth` documents again, by SGPT-CE with the run's own base."""
    prompt: str = "G"
    """Of rerank=true: a name of the paper's prompts, or a text with {document} in it."""
    depth: int = 100
    """Of rerank=true: documents scored again for each query."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """How the corpus is kept and searched."""

    def __post_init__(self) -> None:
        check_ranges(self, top=COUNT, depth=COUNT)
        if not self.rerank:
            check_unused(self, ("prompt", "depth"), "rerank=true; set that, or leave it out")
        if self.query is not None and not self.query.strip():
            raise InputError("query is empty; leave it out to be asked at a prompt")
