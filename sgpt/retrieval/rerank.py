"""Re-ranking of any first stage by SGPT-CE: BM25, a bi-encoder, or a run that someone else made.

A pair is scored once: pairs are sorted by document, so that a document is computed once for all queries that meet it, and cut into
blocks of documents, which are shared out over processes and survive a kill (sgpt/runtime/jobs.py).
"""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgpt.cross_encoder.cross_encoder import TOKENS_PER_PACK, CrossEncoder, ScoreConfig
from sgpt.cross_encoder.prompts import PromptConfig, build_prompt
from sgpt.data.formats.beir import RetrievalSet, fewer_queries, read_retrieval
from sgpt.data.formats.trec import Run, check_ids, cut, read_run, write_run
from sgpt.data.test_sets.beir_sets import BEIR_SETS
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.bm25 import bm25_run
from sgpt.retrieval.dense import retrieve
from sgpt.retrieval.fusion import reordered
from sgpt.retrieval.metrics import SHALLOW, perfect, ranking
from sgpt.runtime.distributed import barrier, from_main, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole
from sgpt.runtime.jobs import Parts, begin, beside, read_manifest, remove_parts, sole_writer, write_manifest
from sgpt.runtime.progress import progress_bar
from sgpt.runtime.provenance import Inputs, content_hash, recorded_threads, threads, tokenizer_hash, weights_hash
from sgpt.runtime.values import COUNT, THREADS, check_choice, check_ranges

log = logging.getLogger(__name__)
FIRST = {"bm25": None, "encoder": "encoder", "run": "trec"}  # first stage -> the key that it reads


@dataclass
class RerankConfig:
    """data, split: BEIR folder and its qrels; one that is called like a set of BEIR follows its rules. model, dtype: the decoder.

    output: a TREC run, a new file; metrics go to <output>.json.
    first: bm25; encoder, with encoder=<run, export, adapter, base or sentence-transformers folder>; or run, with trec=<TREC run, or
    JSON of query id -> document id -> score>. depth: documents scored for each query. prompt, shots, start, shot, answers: as
    in sgpt/cross_encoder/prompts.py. mean, prior: as in sgpt/cross_encoder/cross_encoder.py. posterior: as `rerank` says. limit: the first queries only.
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
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check_ranges(
            self, depth=COUNT, limit=COUNT.or_null("for all queries"), tokens_per_pack=COUNT, documents_per_block=COUNT,
            threads=THREADS.or_null("to share the cores"),
        )  # fmt: skip
        if self.posterior and (self.mean or self.answers):
            raise InputError("posterior=true makes probabilities of the query's, which a mean over its tokens and an answer are not; set one of them")
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
    output = Path(config.output)
    if not output.name or output.is_dir():
        raise InputError(f"output={config.output} is a folder; name a new file in it, for example {output / 'run.trec'}")
    with sole_writer(output):
        manifest = read_manifest(config)
        with threads(config.threads or recorded_threads(manifest)):
            return _run_rerank(config, manifest, device)


def _run_rerank(config: RerankConfig, manifest: dict, device: torch.device | str) -> dict[str, Any]:
    main, output, resumed = world()[0] == 0, Path(config.output), bool(manifest)
    chosen = fewer_queries(read_set(config), config.limit)
    kept = beside(output, ".first.json")
    first = from_main(lambda: _kept_first_stage(kept) if resumed and kept.is_file() else cut(first_stage(config, chosen, device), config.depth))
    ranker = CrossEncoder.from_pretrained(
        config.model, config.prompt_config, dtype=config.dtype, scoring=ScoreConfig(config.mean, config.prior), tokens_per_pack=config.tokens_per_pack
    )
    ranker.model.to(device)
    refuse_unscorable(ranker, chosen, first)  # before anything is written
    check_ids(output, first)
    manifest = begin(config, manifest, inputs_of(config, chosen, first, ranker))
    barrier()  # everybody has read the manifest
    if "finished" in manifest:
        _remove_work(output)  # of a run that was killed while it removed them
        return manifest["results"] if main else {}
    if main and not resumed:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_work(output)  # of a manifest that somebody removed
        if config.first == "encoder":
            write_whole(kept, json.dumps(first))
        write_manifest(output, manifest)
    barrier()
    parts = Parts(output)
    barrier()  # everybody has read the parts, now they may grow
    log.info("%s: %s pairs of %s by %s, on %s", output, f"{sum(map(len, first.values())):,}", chosen.name, config.model, device)
    run = rerank(ranker, chosen, first, config.depth, posterior=config.posterior, parts=parts, documents_per_block=config.documents_per_block)
    barrier()  # everybody has read the scores, now the parts may go
    results: dict[str, Any] = {}
    if main:
        results = metrics(chosen, config.first, first, run, config.depth)
        write_run(output, run, f"sgpt-ce-{Path(config.model).name}")
        write_whole(beside(output, ".json"), json.dumps({chosen.name: results}, indent=2) + "\n")
        write_manifest(output, {**manifest, "results": results, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        _remove_work(output)
    barrier()
    return results


def _kept_first_stage(file: Path) -> Run:
    """Of an encoder: a killed run does not encode the corpus again, and another machine, which rounds otherwise, brings in no other document."""
    return json.loads(file.read_text(encoding="utf-8"))


def _remove_work(output: Path) -> None:
    remove_parts(output)
    beside(output, ".first.json").unlink(missing_ok=True)


def read_set(config: RerankConfig) -> RetrievalSet:
    """By BEIR's rules where the folder is called like one of its sets; a run that somebody made may rank documents without a text."""
    folder = Path(config.data)
    rules = BEIR_SETS.get(folder.absolute().name)
    return read_retrieval(folder, config.split, skip_empty=bool(rules) and config.first != "run", skip_own_id=bool(rules) and rules.skip_own_id)


def first_stage(config: RerankConfig, chosen: RetrievalSet, device: torch.device | str) -> Run:
    if config.first == "bm25":
        return bm25_run(chosen, config.depth)
    if config.first == "run":
        run = read_run(Path(config.trec or ""), Path(config.data), chosen, "trec")
        if not run:
            raise InputError(f"{config.trec}: ranks none of the queries of split {config.split!r} of {config.data}; give the run of this split")
        if missing := len(chosen.queries.keys() - run.keys()):
            log.warning("%s: %d of %d queries are not in it and count as without results", config.trec, missing, len(chosen.queries))
        own = {query: {query} if chosen.skip_own_id else set() for query in chosen.queries}
        return {query: {name: score for name, score in run[query].items() if name not in own[query]} for query in chosen.queries if query in run}
    return retrieve(Encoder.from_pretrained(config.encoder or "").to(device), chosen, config.depth)


def metrics(chosen: RetrievalSet, name: str, first: Run, run: Run, depth: int) -> dict[str, dict[str, float]]:
    """The first stage, re-ranked at `depth` and, from the same scores, at 10 (as in the paper), and what no re-ranker could pass."""
    top = min(SHALLOW, depth)
    reranked = {f"{name} → CE, {top}": reordered(first, run, top), f"{name} → CE, {depth}": run}
    systems = {name: first, **reranked, f"perfect, {depth}": perfect(chosen.qrels, first, depth)}
    return {system: ranking(chosen.qrels, ranks) for system, ranks in systems.items()}


def rerank(
    ranker: CrossEncoder, chosen: RetrievalSet, first: Run, depth: int = 100, *, posterior: bool = False,
    parts: Parts | None = None, documents_per_block: int = 128,
) -> Run:  # fmt: skip
    """The best `depth` documents of each query of `first`, by the scores of `ranker`.

    posterior: log-probability of the document among its query's candidates, given the query and that all were equally likely before;
    it orders them as before and can be compared between queries. parts: where finished blocks are kept, shared by all processes; the
    run is then returned on all of them. Raises InputError for ids that are not in `chosen`, and for queries that cannot be scored.
    """
    work = pairs_by_document(chosen, cut(first, depth))
    refuse_unscorable(ranker, chosen, first)
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


def refuse_unscorable(ranker: CrossEncoder, chosen: RetrievalSet, run: Run) -> None:
    """InputError for an empty query, and for one that does not fit the model: now, and not when its block comes."""
    queries = {query: chosen.queries[query] for query, documents in run.items() if documents}
    if empty := next((query for query, text in queries.items() if not text.strip()), None):
        raise InputError(f"query id {empty!r} of {chosen.name} is empty: it has no token whose probability could be a score; take it out of the qrels")
    ranker.texts(list(queries.values()), [""] * len(queries))


def _scored_blocks(ranker: CrossEncoder, chosen: RetrievalSet, work: list[Pairs], parts: Parts | None, size: int) -> Iterator[list[tuple[str, str, float]]]:
    """Triples of query id, document id and score, block by block."""
    title = f"re-ranking {sum(len(pairs.queries) for pairs in work):,} pairs"
    if parts is None:
        with progress_bar(title, len(work)) as advance:
            for start in range(0, len(work), size):  # token ids of a block's pairs exist at a time, not those of all
                yield _scores(ranker, chosen, work[start : start + size])
                advance(size)
        return
    for block, items in parts.left("block", len(work), size, title):
        parts.append({"block": block, "scores": _scores(ranker, chosen, work[items])})
    barrier()
    done = Parts(parts.output)
    for block in range(math.ceil(len(work) / size)):
        yield done.read(block)["scores"]


def _scores(ranker: CrossEncoder, chosen: RetrievalSet, work: list[Pairs]) -> list[tuple[str, str, float]]:
    pairs = [(query, item.document) for item in work for query in item.queries]
    scores = ranker.score([chosen.queries[query] for query, _ in pairs], [chosen.corpus[document] for _, document in pairs], progress=False)
    return [(query, document, score) for (query, document), score in zip(pairs, scores.tolist(), strict=True)]


def _posterior(scores: dict[str, float]) -> dict[str, float]:
    if not scores:
        return {}
    total = float(np.logaddexp.reduce(list(scores.values())))
    return {document: score - total for document, score in scores.items()}


def inputs_of(config: RerankConfig, chosen: RetrievalSet, first: Run, ranker: CrossEncoder) -> Inputs:
    """Everything that decides the scores, but for the configuration."""
    ranked = sorted({document for documents in first.values() for document in documents})
    return {
        f"queries of {config.data}": content_hash(chosen.queries),
        f"judgements of {config.data}": content_hash(chosen.qrels),
        f"documents of {config.data}": content_hash((document, chosen.corpus[document]) for document in ranked),
        f"first stage {config.encoder or config.trec or config.first}": content_hash(first),
        f"model {config.model}": weights_hash(dict(ranker.model.named_parameters())),
        f"tokenizer of {config.model}": tokenizer_hash(ranker.tokenizer),
    }
