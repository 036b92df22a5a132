"""The whole of mining: read, resume what a killed job left, mine block by block, write.

Documents are encoded and queries mined in blocks that are always cut alike. A text's embedding differs in its last bits
with the texts computed together with it, so this is what makes any number of processes (of as many threads each) write
the same file.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgpt.data.formats.jsonl import write_rows
from sgpt.mining.config import MineConfig
from sgpt.mining.rankers import RANKERS, SCRATCH, Ranker
from sgpt.mining.report import COUNTS, write_page
from sgpt.mining.rules import load_rescorer, mine_block
from sgpt.mining.task import Task, read_task
from sgpt.runtime.errors import InputError
from sgpt.runtime.jobs import Blocks, Job
from sgpt.runtime.progress import announce
from sgpt.runtime.provenance import Inputs, content_hash, file_hash

log = logging.getLogger(__name__)
SAMPLES = 10  # rows on the page
QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95}


def mine(config: MineConfig, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Mines, or resumes a killed job, and returns the statistics; {} on all but the main process."""
    if not config.data or not config.output:
        raise InputError("set data=<BEIR folder or file of pairs> and output=<file.jsonl or file.jsonl.gz>")
    if not config.output.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"output={config.output}: rows are written as JSON lines; end the name in .jsonl or .jsonl.gz")
    ranker = config.model or config.trec or config.source
    announce(f"{config.output}: hard negatives are mined for the queries of {config.data}, ranked by {ranker}")
    with Job(config, "statistics", scratch=SCRATCH) as job:
        return _mine(config, job, device)


def _mine(config: MineConfig, job: Job, device: torch.device | str) -> dict[str, Any]:
    task = read_task(config, device)
    ranker = RANKERS[config.source](task)
    rescore = None
    if config.rescore:
        rescore = load_rescorer(config.rescore, task.device, [query.text for query in task.queries])
    if not job.start(mining_inputs(task, ranker)):
        return job.results
    blocks = job.blocks
    ranker.prepare(blocks)
    queries, size = len(task.queries), config.queries_per_block
    done = len(blocks.done["block"])
    log.info("%s: %s queries in blocks of %d, %d blocks done", job.output, f"{queries:,}", size, done)
    for block, items in blocks.remaining("block", queries, size, f"mining for {queries:,} queries"):
        rows, counts = mine_block(task.queries[items], task, ranker, rescore)
        blocks.append({"block": block, "counts": counts, "rows": rows})
    return job.finish(lambda: write_output(task, Blocks(job.output)))  # read anew: now with those of all processes


def mining_inputs(task: Task, ranker: Ranker) -> Inputs:
    """Everything that decides the rows, but for the configuration."""
    dataset, config = task.dataset, task.config
    inputs: dict[str, str | int] = {
        f"corpus of {config.data}": content_hash(dataset.corpus),
        f"queries of {config.data}": content_hash(dataset.queries),
        f"judgements of {config.data}": content_hash(dataset.qrels),
        f"source {config.source}": ranker.digest,
    }
    if config.rescore:
        model = Path(config.rescore)  # a GGUF file, or a folder
        for file in [model] if model.is_file() else sorted(model.rglob("*")):
            if file.is_file():
                inputs[f"rescore {file}"] = file_hash(file)
    return inputs


def write_output(task: Task, blocks: Blocks) -> dict[str, Any]:
    """Writes the rows in the order of the queries, and the report; returns the statistics. blocks: all of them."""
    config = task.config
    output = Path(config.output)
    numbers = range(math.ceil(len(task.queries) / config.queries_per_block))
    counts = _counts_before_mining(task)
    for block in numbers:
        counts.update(blocks.read(block)["counts"])
    scores: dict[str, list[float]] = {"positive": [], "negative": []}
    samples: list[dict] = []
    sampled = set(np.linspace(0, max(counts["rows"] - 1, 0), SAMPLES).astype(int).tolist())

    def rows() -> Iterator[dict]:
        """Looks at the rows on their way into the file: those of a whole corpus are never in memory."""
        number = 0
        for block in numbers:
            for row in blocks.read(block)["rows"]:
                for side, values in scores.items():
                    values += [value for value in row["scores"][side] if value is not None]
                if number in sampled:
                    samples.append(row)
                number += 1
                yield row

    write_rows(output, rows())
    statistics: dict[str, Any] = {"counts": {key: counts[key] for key in COUNTS}, "scores": {}}
    for side, values in scores.items():
        if values:
            quantiles = np.quantile(values, list(QUANTILES.values())).tolist()
            statistics["scores"][side] = dict(zip(QUANTILES, quantiles, strict=True))
    if counts["none"]:
        _warn_of_queries_without_negatives(task, counts["none"])
    write_page(config, statistics, scores, samples)
    return statistics


def _counts_before_mining(task: Task) -> Counter:
    """What was left out when the queries and the documents were read."""
    pool = task.pool
    judged, documents = len(list(task.dataset.qrels)[: task.config.limit]), len(task.dataset.corpus)
    return Counter(
        queries=judged, unusable=judged - len(task.queries),
        documents=documents, blank=documents - len(pool.rows), copies=len(pool.rows) - len(pool.texts),
    )  # fmt: skip


def _warn_of_queries_without_negatives(task: Task, number: int) -> None:
    are_most = 2 * number > len(task.queries)
    same_language = "check that queries and documents are in the same language"
    remedy = same_language if are_most else "the counts say which rule left their candidates out"
    is_kept = task.config.on_few == "keep"
    fate = "their rows are written without any (on_few=keep)" if is_kept else "they are left out (on_few=drop)"
    message = "%s: %d of %d queries have no hard negative; %s. %s"
    log.warning(message, task.config.output, number, len(task.queries), fate, remedy[0].upper() + remedy[1:])
