"""Frozen models that judge training texts: which in-batch candidates are false negatives, and which queries are near.

`loss.guide` and `data.grouping_model`. Both embed every different text of the sources once, before training, into the
data cache (sgpt/data/feed/embeddings.py); a second start reads it, and a step costs nothing but the guide's scores.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sgpt.data.feed.embeddings import Embeddings, embeddings
from sgpt.data.feed.grouping import Walk, nearness, walk
from sgpt.data.feed.sampling import Feed, Source
from sgpt.data.feed.store import key_of, whole_column
from sgpt.data.readers import DataConfig
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.model_folder import find_model
from sgpt.runtime.distributed import barrier, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import make_once
from sgpt.runtime.progress import Advance
from sgpt.runtime.provenance import computing_versions
from sgpt.text.markers import ROLES, Role
from sgpt.training.loss import LossConfig

log = logging.getLogger(__name__)


def with_guide(feed: Feed, config: LossConfig, device: torch.device | str = "cpu") -> Feed:
    """With `loss.guide`, batches bring the guide's embeddings of their queries and documents.

    All processes call it, and wait for each other.
    """
    if not config.guide:
        return feed
    encoder, key = _frozen(config.guide, "loss.guide", device)
    sources, texts = [], 0
    for source in feed.sources:
        guide = {side: _embedded(source, side, encoder, key) for side in ROLES}
        texts += sum(map(len, guide.values()))
        sources.append(replace(source, guide=guide))
    rule = f"in-batch candidates with a cosine above the positive's minus {config.guide_margin:g} are no negatives"
    log.info("loss.guide=%s embedded %s texts; %s", config.guide, f"{texts:,}", rule)
    return replace(feed, sources=sources)


def with_hard_batches(
    feed: Feed, config: DataConfig, device: torch.device | str = "cpu", loss: LossConfig | None = None
) -> Feed:
    """With `data.batches=hard`, batches are runs of near queries. All processes call it, and wait for each other.

    loss: that trains on them, None where nothing does; the log says what it may want besides.
    """
    if not config.grouping_model:
        return feed
    encoder, key = _frozen(config.grouping_model, "data.grouping_model", device)
    sources = []
    for source in feed.sources:
        of_queries, queries = _embedded(source, "query", encoder, key), whole_column("query", source.examples.queries)
        walked = _walk(source, of_queries, queries, key)
        near, random = nearness(of_queries, queries, walked, feed.queries_in_total)
        log.info(
            "%s: mean cosine of two queries of a batch %.3f; in random batches %.3f", source.name, near, random
        )  # fmt: skip
        sources.append(replace(source, walk=Walk(walked)))
    if loss is not None and loss.guide is None and loss.false_negative_margin is None:
        log.info(
            "data.batches=hard makes more in-batch candidates false negatives: "
            "set loss.false_negative_margin or loss.guide=<folder of a model> with it"
        )
    return replace(feed, sources=sources)


def _walk(source: Source, of_queries: Embeddings, queries: np.ndarray, key: str) -> np.ndarray:
    """The walk from the cache, where one process puts it: the others must not differ in the last bit of a cosine."""
    if source.examples.folder is None:
        return walk(of_queries, queries)
    file = source.examples.folder / f"walk-{key_of(key)}.npy"
    if world()[0] == 0:
        make_once(file, file.is_file, lambda: _save(file, walk(of_queries, queries)))
    barrier()  # the main process has written it
    return np.load(file)


def _save(file: Path, walked: np.ndarray) -> None:
    temporary = file.with_name(f".{file.name}.tmp.npy")
    np.save(temporary, walked)
    temporary.replace(file)


def _embedded(source: Source, side: Role, encoder: Encoder, key: str) -> Embeddings:
    """The embeddings of one side of a source. A symmetric source's documents are queries to the model, too."""
    role: Role = "query" if source.symmetric else side

    def embed(texts: list[str], advance: Advance) -> np.ndarray:
        return encoder.encode(texts, role=role, normalize=True, progress=advance)

    return embeddings(source.examples, side, embed, key_of(key, side, role))


def _frozen(path: str, key: str, device: torch.device | str) -> tuple[Encoder, str]:
    """The model, and the key of its embeddings: of weights, tokenizer, contract and the versions that compute."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"{key}={path}: no such folder; give a run, an export or a sentence-transformers folder, "
            "downloaded if it is from the hub"
        )
    if find_model(folder).kind == "base":
        raise InputError(
            f"{key}={path}: a base model that was not trained on pairs cannot judge which texts are similar; "
            "give a run, an export or a sentence-transformers folder"
        )
    try:
        encoder = Encoder.from_pretrained(folder)
    except InputError as error:
        raise InputError(f"{key}={path}: {error}") from error
    return encoder.to(device), key_of(encoder.fingerprint(), computing_versions())
