"""Re-ranking of any first stage by SGPT-CE: BM25, a bi-encoder, or a run that someone else made.

Pairs of query and document are sorted by document, so that a document is computed once for all its queries. They are
cut into blocks of documents, which are shared out over processes and survive a kill (sgpt/runtime/jobs.py).
`run_rerank` is what train/rerank.py calls, `rerank` the part that evaluation calls, too.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgpt.cross_encoder.cross_encoder import CrossEncoder, ScoreConfig
from sgpt.cross_encoder.prompts import PromptConfig, build_prompt
from sgpt.data.formats.beir import RetrievalSet, fewer_queries, read_retrieval
from sgpt.data.formats.trec import Run, check_ids, cut, ids_of, read_run, write_run
from sgpt.data.test_sets.beir_sets import BEIR_SETS
from sgpt.decoder.quantised import held_weights
from sgpt.decoder.trunk import DTYPES
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.bm25 import bm25_run
from sgpt.retrieval.dense import DEPTH, retrieve
from sgpt.retrieval.fusion import reordered
from sgpt.retrieval.metrics import SHALLOW, perfect_rerank, ranking
from sgpt.runtime.distributed import from_main
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole
from sgpt.runtime.jobs import Blocks, Job, own_share, sibling
from sgpt.runtime.progress import announce
from sgpt.runtime.provenance import Inputs, content_hash, tokenizer_hash, weights_hash
from sgpt.runtime.values import COUNT, THREADS, check_choice, check_path_of_choice, check_ranges

log = logging.getLogger(__name__)
PATH_OF_FIRST = {"bm25": None, "encoder": "encoder", "run": "trec"}  # first stage -> the key of its path, if any
FIRST_STAGE_FILE = ".first.json"  # next to the output while it is being written: an encoder's run
Triple = tuple[str, str, float]  # query id, document id, score


@dataclass
class RerankConfig:
    """Keys of train/rerank.py."""

    data: str = ""
    """A BEIR folder; one that is called like a set of BEIR follows the rules of that set."""
    split: str = "test"
    """The qrels of `data` to read."""
    model: str = "data/nano"
    """The decoder with its language-model head: a folder or a hub id."""
    dtype: str = "float32"
    """Of the decoder's weights and of what it computes: float32, bfloat16 or float16.

    int8 and nf4 hold the weights of its linear layers in fewer bytes, and compute in float32.
    """
    output: str = ""
    """A new file for the TREC run; its metrics go to <output>.json."""
    limit: int | None = None
    """Only the first queries, for trying things out; null for all."""
    first: str = "bm25"
    """The first stage: bm25; encoder, which needs `encoder`; or run, which needs `trec`."""
    encoder: str | None = None
    """Of first=encoder: a run, export, adapter, base or sentence-transformers folder."""
    trec: str | None = None
    """Of first=run: a TREC run, or JSON of query id -> document id -> score."""
    depth: int = 100
    """Documents scored for each query, the best of the first stage."""
    prompt: str = "G"
    """A name of the paper's prompts, or a text with {document} in it; sgpt/cross_encoder/prompts.py has them."""
    shots: list[list[str]] = field(default_factory=list)
    """Examples of document and query, for prompts that take them."""
    start: str = ""
    """Of a prompt of your own: the text before everything else."""
    shot: str | None = None
    """Of a prompt of your own: one example, with {document} and {query} in it."""
    answers: list[str] = field(default_factory=list)
    """Of a prompt of your own that asks about {query}: its answers; the probability of the first is the score."""
    mean: bool = False
    """The mean log-probability of the query's tokens is the score, instead of their sum."""
    prior: bool = False
    """The score of an empty document is subtracted."""
    posterior: bool = False
    """Scores become log-probabilities of the documents among the candidates of their query."""
    tokens_per_pack: int | None = None
    """Tokens computed at a time, per process: the memory that activations take. null is 4,096 on a CPU, and what suits
    a GPU.
    """
    documents_per_block: int = 128
    """Documents, with all queries that they are scored for, in a block: what a killed job loses at most, per process.
    """
    threads: int | None = None
    """Threads of each process on a CPU; null shares out the cores."""
    resume: bool = False
    """Continue a killed job of the same configuration and data, by any number of processes."""

    def __post_init__(self) -> None:
        check_path_of_choice(self, "first", PATH_OF_FIRST)
        check_choice("dtype", self.dtype, DTYPES)
        check_ranges(
            self, depth=COUNT, limit=COUNT.or_null("for all queries"),
            tokens_per_pack=COUNT.or_null("for what suits the device"), documents_per_block=COUNT,
            threads=THREADS.or_null("to share the cores"),
        )  # fmt: skip
        if self.posterior and (self.mean or self.answers):
            raise InputError(
                "posterior=true needs the probability of the whole query, which mean=true and answers do not give; "
                "set posterior=false, or leave out mean and answers"
            )
        build_prompt(self.prompt_config)

    @property
    def prompt_config(self) -> PromptConfig:
        return PromptConfig(self.prompt, self.shots, self.start, self.shot, self.answers)


@dataclass(frozen=True)
class DocumentWithQueries:
    """One document and the queries that it is scored for, by id."""

    document: str
    queries: tuple[str, ...]


def run_rerank(config: RerankConfig, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Writes the re-ranked TREC run and its metrics, or resumes a killed job that did not come to its end.

    Returns system -> metric -> value on the main process, {} on the others.
    """
    if not config.data or not config.output:
        raise InputError("set data=<BEIR folder> and output=<file.trec>")
    output = Path(config.output)
    if not output.name or output.is_dir():
        example = output / "run.trec"
        raise InputError(f"output={config.output} is a folder; name a new file in it, for example {example}")
    first = config.encoder or config.trec or config.first
    announce(f"{output}: what {first} ranks for the queries of {config.data} is scored by {config.model}, on {device}")
    config = replace(config)  # whose pack may be stated below
    with Job(config, "results", scratch=(FIRST_STAGE_FILE,)) as job:
        return _run_rerank(config, job, device)


def _run_rerank(config: RerankConfig, job: Job, device: torch.device | str) -> dict[str, Any]:
    dataset = fewer_queries(read_reranking_set(config), config.limit)
    first = from_main(lambda: _first_stage_of(job, config, dataset, device))
    scoring = ScoreConfig(config.mean, config.prior)
    reranker = CrossEncoder.from_pretrained(
        config.model, config.prompt_config, dtype=config.dtype, scoring=scoring, tokens_per_pack=config.tokens_per_pack
    )
    reranker.model.to(device)
    config.tokens_per_pack = reranker.pack_size  # a resumed job rounds as it did
    refuse_unscorable(reranker, dataset, first)  # before anything is written
    check_ids(job.output, ids_of(first))
    keep = {FIRST_STAGE_FILE: json.dumps(first)} if config.first == "encoder" else {}
    if not job.start(reranking_inputs(config, dataset, first, reranker), keep):
        return job.results
    pairs = sum(map(len, cut(first, config.depth).values()))
    log.info("%s: %s pairs of %s by %s, on %s", job.output, f"{pairs:,}", dataset.name, config.model, device)
    run = rerank(
        reranker, dataset, first, config.depth,
        posterior=config.posterior, blocks=job.blocks, documents_per_block=config.documents_per_block,
    )  # fmt: skip

    def write() -> dict[str, Any]:
        results = metrics(dataset, config.first, first, run, config.depth)
        write_run(job.output, run, f"sgpt-ce-{Path(config.model).name}")
        write_whole(sibling(job.output, ".json"), json.dumps({dataset.name: results}, indent=2) + "\n")
        return results

    return job.finish(write)


def _first_stage_of(job: Job, config: RerankConfig, dataset: RetrievalSet, device: torch.device | str) -> Run:
    """The first stage's run, of as many documents as the deepest metric counts, also where fewer are re-ranked.

    A killed job of an encoder kept it: the corpus is not encoded again, and another machine, which rounds otherwise,
    brings in no other document.
    """
    kept = sibling(job.output, FIRST_STAGE_FILE)
    if job.resumed and kept.is_file():
        try:
            return json.loads(kept.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(
                f"{kept} is damaged, so {job.output} cannot be resumed; set output=<another path>"
            ) from None
    return cut(first_stage(config, dataset, device), _kept(config))


def read_reranking_set(config: RerankConfig) -> RetrievalSet:
    """The queries, judgements and documents, by BEIR's rules where the folder is called like one of its sets."""
    folder = Path(config.data)
    rules = BEIR_SETS.get(folder.absolute().name)
    skip_empty = rules is not None and config.first != "run"  # somebody's run may rank documents without a text
    skip_own_id = rules is not None and rules.skip_own_id
    return read_retrieval(folder, config.split, skip_empty=skip_empty, skip_own_id=skip_own_id)


def first_stage(config: RerankConfig, dataset: RetrievalSet, device: torch.device | str) -> Run:
    """The run that is re-ranked: of BM25, of an encoder, or read from a file."""
    if config.first == "bm25":
        return bm25_run(dataset, _kept(config))
    if config.first == "encoder":
        return retrieve(Encoder.from_pretrained(config.encoder or "").to(device), dataset, _kept(config))
    run = read_run(Path(config.trec or ""), Path(config.data), dataset, "trec")
    if not run:
        raise InputError(
            f"{config.trec}: ranks none of the queries of split {config.split!r} of {config.data}; "
            "give the run of this split"
        )
    missing = len(dataset.queries.keys() - run.keys())
    if missing:
        message = "%s: %d of %d queries are not in it and count as without results"
        log.warning(message, config.trec, missing, len(dataset.queries))
    first: Run = {}
    for query in dataset.queries:
        if query in run:
            own = query if dataset.skip_own_id else None  # in some sets of BEIR a query is a document, too
            first[query] = {document: score for document, score in run[query].items() if document != own}
    return first


def _kept(config: RerankConfig) -> int:
    """Documents of each query that the first stage keeps."""
    return max(config.depth, DEPTH)


def metrics(dataset: RetrievalSet, name: str, first: Run, run: Run, depth: int) -> dict[str, dict[str, float]]:
    """System -> metric -> value of four systems.

    The first stage; re-ranked at `depth` and, from the same scores, at 10 (as in the paper); and a perfect re-ranker.
    """
    top = min(SHALLOW, depth)
    reranked = {f"{name} → CE, {limit}": reordered(first, run, limit) for limit in (top, depth)}
    systems = {name: first, **reranked, f"perfect, {depth}": perfect_rerank(dataset.qrels, first, depth)}
    return {system: ranking(dataset.qrels, ranks) for system, ranks in systems.items()}


def rerank(
    reranker: CrossEncoder, dataset: RetrievalSet, first: Run, depth: int = 100, *, posterior: bool = False,
    blocks: Blocks | None = None, documents_per_block: int = 128,
) -> Run:  # fmt: skip
    """The best `depth` documents of each query of `first`, by the scores of `reranker`.

    posterior: log-probability of the document among its query's candidates, given the query and that all were equally
    likely before; it orders them as before and can be compared between queries. blocks: where finished blocks are kept,
    shared by all processes; the run is then returned on all of them.
    Raises InputError for ids that are not in `dataset`, and for queries that cannot be scored.
    """
    documents = queries_by_document(dataset, cut(first, depth))
    refuse_unscorable(reranker, dataset, first)
    scores: dict[str, dict[str, float]] = {query: {} for query in first}
    for triples in _scored_blocks(reranker, dataset, documents, blocks, documents_per_block):
        for query, document, score in triples:
            scores[query][document] = score
    return {query: _posterior(of_query) for query, of_query in scores.items()} if posterior else scores


def queries_by_document(dataset: RetrievalSet, run: Run) -> list[DocumentWithQueries]:
    """The run turned around: documents with the queries that they are scored for, the longest document first.

    So the largest work is done first, and texts of like lengths are packed together.
    """
    queries_of: dict[str, list[str]] = {}
    for query, documents in run.items():
        if query not in dataset.queries:
            raise InputError(
                f"the run ranks documents for query id {query!r}, which {dataset.name} does not have; "
                "it belongs to another set or split"
            )
        for document in documents:
            if document not in dataset.corpus:
                raise InputError(
                    f"the run ranks document id {document!r} for query {query!r}, "
                    f"and {dataset.name} has no such document; is it of another set?"
                )
            queries_of.setdefault(document, []).append(query)
    longest_first = sorted(queries_of, key=lambda document: (-len(dataset.corpus[document]), document))
    return [DocumentWithQueries(document, tuple(queries_of[document])) for document in longest_first]


def refuse_unscorable(reranker: CrossEncoder, dataset: RetrievalSet, run: Run) -> None:
    """InputError for an empty query, and for one that does not fit the model: now, and not when its block comes."""
    queries = {query: dataset.queries[query] for query, documents in run.items() if documents}
    for query, text in queries.items():
        if not text.strip():
            raise InputError(
                f"query id {query!r} of {dataset.name} is empty: it has no token whose probability could be a score; "
                "take it out of the qrels"
            )
    reranker.scored_texts(list(queries.values()), [""] * len(queries))  # for its errors: a document can be cut to fit


def _scored_blocks(
    reranker: CrossEncoder, dataset: RetrievalSet, documents: list[DocumentWithQueries], blocks: Blocks | None,
    size: int,
) -> Iterator[list[Triple]]:  # fmt: skip
    """The scores of all pairs, a list for each block of `size` documents."""
    title = f"re-ranking {sum(len(document.queries) for document in documents):,} pairs"
    number = math.ceil(len(documents) / size)
    if blocks is None:  # in blocks all the same: the token ids of one block's pairs exist at a time, not those of all
        for _, items in own_share(range(number), size, title, alone=True):
            yield _scores(reranker, dataset, documents[items])
        return
    for block, items in blocks.remaining("block", len(documents), size, title):
        blocks.append({"block": block, "scores": _scores(reranker, dataset, documents[items])})
    done = blocks.of_all_processes()
    for block in range(number):
        yield done.read(block)["scores"]


def _scores(reranker: CrossEncoder, dataset: RetrievalSet, documents: list[DocumentWithQueries]) -> list[Triple]:
    pairs = [(query, item.document) for item in documents for query in item.queries]  # ids
    query_texts = [dataset.queries[query] for query, _ in pairs]
    document_texts = [dataset.corpus[document] for _, document in pairs]
    scores = reranker.score(query_texts, document_texts, progress=False)
    return [(query, document, score) for (query, document), score in zip(pairs, scores.tolist(), strict=True)]


def _posterior(scores: dict[str, float]) -> dict[str, float]:
    """Of one query, by document: score - log of the sum of exp(score), so that their exponentials sum to 1."""
    if not scores:
        return {}
    total = float(np.logaddexp.reduce(list(scores.values())))
    return {document: score - total for document, score in scores.items()}


def reranking_inputs(config: RerankConfig, dataset: RetrievalSet, first: Run, reranker: CrossEncoder) -> Inputs:
    """Everything that decides the scores, but for the configuration."""
    ranked = sorted({document for documents in first.values() for document in documents})
    return {
        f"queries of {config.data}": content_hash(dataset.queries),
        f"judgements of {config.data}": content_hash(dataset.qrels),
        f"documents of {config.data}": content_hash((document, dataset.corpus[document]) for document in ranked),
        f"first stage {config.encoder or config.trec or config.first}": content_hash(first),
        f"model {config.model}": weights_hash(held_weights(reranker.model)),
        f"tokenizer of {config.model}": tokenizer_hash(reranker.tokenizer),
    }
