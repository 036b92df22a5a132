"""The whole: read, go on with what is there, mine block by block, write.

Blocks of documents to encode and of queries to mine, not single ones: a text's embedding differs in its last bits with the texts
beside it, and so any number of processes (of as many threads each) writes the same file.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgpt.data.formats.jsonl import write_rows
from sgpt.mining.config import MineConfig
from sgpt.mining.rankers import SOURCES, Source
from sgpt.mining.report import COUNTS, write_page
from sgpt.mining.rules import cross_encoder, mine_block
from sgpt.mining.task import Task, read_task
from sgpt.runtime.distributed import barrier, world
from sgpt.runtime.errors import InputError
from sgpt.runtime.jobs import Parts, begin, beside, read_manifest, remove_parts, sole_writer, write_manifest
from sgpt.runtime.provenance import Inputs, content_hash, file_hash, recorded_threads, threads

log = logging.getLogger(__name__)
SAMPLES = 10  # rows on the page


def mine(config: MineConfig, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Mines, or goes on with it, and returns the statistics; {} on all but the main process."""
    if not config.data or not config.output:
        raise InputError("set data=<BEIR folder or file of pairs> and output=<file.jsonl or file.jsonl.gz>")
    if not config.output.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"output={config.output} is no name of JSON lines; let it end in .jsonl or .jsonl.gz")
    with sole_writer(Path(config.output)):
        manifest = read_manifest(config)
        with threads(config.threads or recorded_threads(manifest)):
            return _mine(config, manifest, device)


def _mine(config: MineConfig, manifest: dict, device: torch.device | str) -> dict[str, Any]:
    main, output, resumed = world()[0] == 0, Path(config.output), bool(manifest)
    task = read_task(config, device)
    source = SOURCES[config.source](task)
    rescore = cross_encoder(config.rescore, task.device, [query.text for query in task.queries]) if config.rescore else None
    manifest = begin(config, manifest, inputs_of(task, source))
    barrier()  # everybody has read the manifest
    if "finished" in manifest:
        _remove_leftovers(output)  # of a run that was killed while it removed them
        return manifest["statistics"] if main else {}
    if main and not resumed:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)  # of a manifest that somebody removed
        write_manifest(output, manifest)
    barrier()
    parts = Parts(output)
    barrier()  # everybody has read the parts, now they may grow
    source.prepare(parts)
    log.info("%s: %s queries in blocks of %d, %d blocks done", output, f"{len(task.queries):,}", config.queries_per_block, len(parts.done["block"]))
    for block, chosen in parts.left("block", len(task.queries), config.queries_per_block, f"mining for {len(task.queries):,} queries"):
        rows, counts = mine_block(task.queries[chosen], task, source, rescore)
        parts.append({"block": block, "counts": counts, "rows": rows})
    barrier()
    statistics = finish(task, manifest) if main else {}
    barrier()
    return statistics


def inputs_of(task: Task, source: Source) -> Inputs:
    """Everything that decides the rows, but for the configuration."""
    chosen, inputs = task.chosen, {}
    for name, table in (("corpus", chosen.corpus), ("queries", chosen.queries), ("judgements", chosen.qrels)):
        inputs[f"{name} of {task.config.data}"] = content_hash(table)
    inputs[f"source {task.config.source}"] = source.digest
    for file in sorted(Path(task.config.rescore).rglob("*")) if task.config.rescore else ():
        if file.is_file():
            inputs[f"rescore {file}"] = file_hash(file)
    return inputs


def finish(task: Task, manifest: dict) -> dict[str, Any]:
    """Writes the rows in the order of the queries, the report, and last of all that it is finished."""
    config, output, pool = task.config, Path(task.config.output), task.pool
    parts, blocks = Parts(output), range(math.ceil(len(task.queries) / config.queries_per_block))
    counts = Counter(queries=len(list(task.chosen.qrels)[: config.limit]), documents=len(task.chosen.corpus), copies=len(pool.rows) - len(pool.texts))
    counts.update(unusable=counts["queries"] - len(task.queries), blank=counts["documents"] - len(pool.rows))
    for block in blocks:
        counts.update(parts.read(block)["counts"])
    scores: dict[str, list[float]] = {"positive": [], "negative": []}
    samples: list[dict] = []
    shown = set(np.linspace(0, max(counts["rows"] - 1, 0), SAMPLES).astype(int).tolist())

    def rows() -> Iterator[dict]:
        """On their way into the file they are looked at: a whole corpus of rows is never in memory."""
        for number, row in enumerate(row for block in blocks for row in parts.read(block)["rows"]):
            for side, values in scores.items():
                values += [value for value in row["scores"][side] if value is not None]
            if number in shown:
                samples.append(row)
            yield row

    write_rows(output, rows())
    spread = {side: np.quantile(values, [0.05, 0.5, 0.95]).tolist() for side, values in scores.items() if values}
    statistics = {
        "counts": {key: counts[key] for key in COUNTS},
        "scores": {side: dict(zip(("5 %", "median", "95 %"), quantiles, strict=True)) for side, quantiles in spread.items()},
    }
    if counts["none"]:
        remedy = "see the counts for the rule that left them out" if 2 * counts["none"] <= len(task.queries) else "are queries and documents of one language?"
        kept = "their rows are written without" if config.on_few == "keep" else "they are left out"
        log.warning("%s: no negative was found for %d of %d queries, and %s; %s", output, counts["none"], len(task.queries), kept, remedy)
    write_page(config, statistics, scores, samples)
    write_manifest(output, {**manifest, "statistics": statistics, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    _remove_leftovers(output)
    return statistics


def _remove_leftovers(output: Path) -> None:
    remove_parts(output)
    for ending in (".embeddings.npy", ".embeddings.tmp"):
        beside(output, ending).unlink(missing_ok=True)
