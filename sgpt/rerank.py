"""Re-ranking of any first stage by SGPT-CE: BM25, a bi-encoder, or a run that someone else made.

A pair is scored once: pairs are sorted by document, so that a document is computed once for all queries that meet it, and cut into
blocks of documents, which are shared out over processes and survive a kill (sgpt/parts.py).
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgpt.adapter import base_hash
from sgpt.cross_encoder import TOKENS_PER_PACK, CrossEncoder, ScoreConfig
from sgpt.data.beir import RetrievalSet, read_retrieval
from sgpt.data.trec import read_run, write_run
from sgpt.distributed import barrier, world
from sgpt.encoder import Encoder
from sgpt.errors import InputError
from sgpt.evaluate import bm25_run, retrieve
from sgpt.files import write_whole
from sgpt.metrics import Run, cut, perfect, ranking
from sgpt.parts import Parts, beside, read_manifest, remove_parts, write_manifest
from sgpt.prompts import PromptConfig, build_prompt
from sgpt.run import environment

FIRST = {"bm25": None, "encoder": "encoder", "run": "trec"}  # first stage -> the key that it reads


@dataclass
class RerankConfig:
    """data, split: BEIR folder and its qrels. model, dtype: the decoder. output: a TREC run, a new file; metrics go to <output>.json.

    first: bm25; encoder, with encoder=<run, export, adapter, base or sentence-transformers folder>; or run, with trec=<TREC run, or
    JSON of query id -> document id -> score>. depth: documents scored for each query. prompt, shots, start, shot, answers: as
    in sgpt/prompts.py. mean, prior: as in sgpt/cross_encoder.py. posterior: as `rerank` says. limit: the first queries only.
    documents_per_block: with every query that meets them; what a killed run loses at most, per process. threads: per process on a
    CPU. resume: go on with a killed run of the same configuration and data, by any number of processes.
    """

    data: str = ""
    split: str = "test"
    model: str = "data/nano"
    dtype: str = "float32"
    output: str = ""
    limit: int | None = None
    first: str = "bm25"
    encoder: str | None = None
    trec: str | None = None
    depth: int = 100
    prompt: str = "G"
    shots: list[list[str]] = field(default_factory=list)
    start: str = ""
    shot: str | None = None
    answers: list[str] = field(default_factory=list)
    mean: bool = False
    prior: bool = False
    posterior: bool = False
    tokens_per_pack: int = TOKENS_PER_PACK
    documents_per_block: int = 128
    threads: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.first not in FIRST:
            raise InputError(f"first={self.first!r} is unknown; choose one of {', '.join(FIRST)}")
        for first, key in FIRST.items():
            if key and (self.first == first) != bool(getattr(self, key)):
                problem = f"needs {key}=<path>" if self.first == first else f"does not read {key}={getattr(self, key)}; set first={first}, or leave it out"
                raise InputError(f"first={self.first} {problem}")
        for key in ("depth", "limit", "tokens_per_pack", "documents_per_block", "threads"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise InputError(f"{key}={getattr(self, key)} must be 1 or more")
        build_prompt(self.prompt_config)

    @property
    def prompt_config(self) -> PromptConfig:
        return PromptConfig(self.prompt, self.shots, self.start, self.shot, self.answers)


@dataclass(frozen=True)
class Pairs:
    """One document and the queries that meet it, by id."""

    document: str
    queries: tuple[str, ...]


def run_rerank(config: RerankConfig, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Re-ranks, or goes on with it: the TREC run, and system -> metrics, which is returned; {} on all but the main process."""
    if not config.data or not config.output:
        raise InputError("set data=<BEIR folder> and output=<file.trec>")
    main, output = world()[0] == 0, Path(config.output)
    manifest = read_manifest(config)
    chosen = fewer_queries(read_retrieval(Path(config.data), config.split), config.limit)
    first = cut(first_stage(config, chosen, device), config.depth)
    ranker = CrossEncoder.from_pretrained(
        config.model, config.prompt_config, dtype=config.dtype, scoring=ScoreConfig(config.mean, config.prior), tokens_per_pack=config.tokens_per_pack
    )
    ranker.model.to(device)
    identity = _fingerprint(chosen, first, ranker, config.dtype)
    if manifest and manifest["fingerprint"] != identity:
        raise InputError(f"{output} was begun with other texts, judgements, first-stage scores or weights than are there now; choose another output=<file>")
    barrier()  # everybody has read the manifest
    if "finished" in manifest:
        remove_parts(output)  # of a run that was killed while it removed them
        return manifest["results"] if main else {}
    if main and not manifest:
        manifest = {"config": asdict(config), "fingerprint": identity, "environment": environment()}
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(output)  # of a manifest that somebody removed
        write_manifest(output, manifest)
    barrier()
    parts = Parts(output)
    barrier()  # everybody has read the parts, now they may grow
    run = rerank(ranker, chosen, first, config.depth, posterior=config.posterior, parts=parts, documents_per_block=config.documents_per_block)
    results: dict[str, Any] = {}
    if main:
        results = metrics(chosen, config.first, first, run, config.depth)
        write_run(output, run, f"sgpt-ce-{Path(config.model).name}")
        write_whole(beside(output, ".json"), json.dumps({chosen.name: results}, indent=2) + "\n")
        write_manifest(output, {**manifest, "results": results, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        remove_parts(output)
    barrier()
    return results


def first_stage(config: RerankConfig, chosen: RetrievalSet, device: torch.device | str) -> Run:
    if config.first == "bm25":
        return bm25_run(chosen, config.depth)
    if config.first == "run":
        run = read_run(Path(config.trec or ""), Path(config.data), chosen, "trec")
        return {query: run[query] for query in chosen.queries if query in run}
    return retrieve(Encoder.from_pretrained(config.encoder or "").to(device), chosen, config.depth)


def metrics(chosen: RetrievalSet, name: str, first: Run, run: Run, depth: int) -> dict[str, dict[str, float]]:
    """The first stage, re-ranked at `depth` and, from the same scores, at 10 (as in the paper), and what no re-ranker could pass."""
    shallow = {query: {document: run[query][document] for document in documents} for query, documents in cut(first, 10).items()}
    systems = {name: first, f"{name} → CE, 10": shallow, f"{name} → CE, {depth}": run, f"perfect, {depth}": perfect(chosen.qrels, first, depth)}
    return {system: ranking(chosen.qrels, ranks) for system, ranks in systems.items()}


def fewer_queries(chosen: RetrievalSet, limit: int | None) -> RetrievalSet:
    names = list(chosen.queries)[:limit]
    return replace(chosen, queries={name: chosen.queries[name] for name in names}, qrels={name: chosen.qrels[name] for name in names})


def rerank(
    ranker: CrossEncoder, chosen: RetrievalSet, first: Run, depth: int = 100, *, posterior: bool = False,
    parts: Parts | None = None, documents_per_block: int = 128,
) -> Run:  # fmt: skip
    """The best `depth` documents of each query of `first`, by the scores of `ranker`.

    posterior: log-probability of the document among its query's candidates, given the query and that all were equally likely before;
    it orders them as before and can be compared between queries. parts: where finished blocks are kept, shared by all processes; the
    run is then returned on all of them. Raises InputError for ids that are not in `chosen`.
    """
    work = pairs_by_document(chosen, cut(first, depth))
    scores: dict[str, dict[str, float]] = {query: {} for query in first}
    for block in _scored_blocks(ranker, chosen, work, parts, documents_per_block):
        for query, document, score in block:
            scores[query][document] = score
    return {query: _posterior(found) for query, found in scores.items()} if posterior else scores


def pairs_by_document(chosen: RetrievalSet, run: Run) -> list[Pairs]:
    """Longest document first: the largest work is done first, and what is packed together is alike."""
    met: dict[str, list[str]] = {}
    for query, documents in run.items():
        if query not in chosen.queries:
            raise InputError(f"the run ranks documents for query id {query!r}, which {chosen.name} does not have; it belongs to another set or split")
        for document in documents:
            if document not in chosen.corpus:
                raise InputError(f"the run ranks document id {document!r} for query {query!r}, and {chosen.name} has no such document; is it of another set?")
            met.setdefault(document, []).append(query)
    return [Pairs(document, tuple(met[document])) for document in sorted(met, key=lambda name: (-len(chosen.corpus[name]), name))]


def _scored_blocks(ranker: CrossEncoder, chosen: RetrievalSet, work: list[Pairs], parts: Parts | None, size: int) -> Iterator[list[tuple[str, str, float]]]:
    """Triples of query id, document id and score, block by block."""
    if parts is None:
        yield _scores(ranker, chosen, work, progress=None)
        return
    title = f"re-ranking {sum(len(pairs.queries) for pairs in work):,} pairs"
    for block, items in parts.left("block", len(work), size, title):
        parts.append({"block": block, "scores": _scores(ranker, chosen, work[items], progress=False)})
    barrier()
    done = Parts(parts.output)
    for block in range(math.ceil(len(work) / size)):
        yield done.read(block)["scores"]


def _scores(ranker: CrossEncoder, chosen: RetrievalSet, work: list[Pairs], progress: bool | None) -> list[tuple[str, str, float]]:
    pairs = [(query, item.document) for item in work for query in item.queries]
    scores = ranker.score([chosen.queries[query] for query, _ in pairs], [chosen.corpus[document] for _, document in pairs], progress=progress)
    return [(query, document, score) for (query, document), score in zip(pairs, scores.tolist(), strict=True)]


def _posterior(scores: dict[str, float]) -> dict[str, float]:
    if not scores:
        return {}
    total = float(np.logaddexp.reduce(list(scores.values())))
    return {document: score - total for document, score in scores.items()}


def _fingerprint(chosen: RetrievalSet, first: Run, ranker: CrossEncoder, dtype: str) -> str:
    """Changes with every text, judgement, first-stage document and with the weights; the configuration is compared apart."""
    digest = hashlib.sha256(base_hash(dict(ranker.model.named_parameters()), dtype).encode())
    digest.update(json.dumps([chosen.queries, chosen.qrels, {query: sorted(documents) for query, documents in first.items()}]).encode())
    for document in sorted({document for documents in first.values() for document in documents}):
        digest.update(f"{document}\x1f{chosen.corpus[document]}\x1e".encode())
    return digest.hexdigest()
