"""How long until MS MARCO trains, and with how much memory?

    python benchmarks/msmarco_start.py [--passages 1000000]

Makes a collection of its form: passages of 30 to 80 English words, a query for every 20 of them, and for each query a
positive and the 50 best of 13 mining systems out of 200 candidates, all of them scored (as published: 8.8 million
passages, half a million queries). One fresh process fills the store; another tokenises it; a third one starts from the
warm cache as every later run does: it knows the files by their bytes, opens store and tokens, and makes the first
batch. By the functions that train/biencoder.py calls. Seconds are of the work alone, without imports, by the clock and
of the processor; memory is the peak of the resident size of the process, with them.
"""

import argparse
import json
import pydoc_data.topics
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sgpt.runtime.memory import keep_freed_memory

SYSTEMS, DEPTH, CANDIDATES, BATCH = 13, 50, 200, 64
DIFFERENT = 50_000
WORDS = re.findall("[A-Za-z]+", " ".join(pydoc_data.topics.topics.values()))  # as often as English has them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--passages", type=int, default=1_000_000,
        help="size of the collection, 8841823 in MS MARCO (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", help="below which a temporary folder is made: 2 GB for a million passages (default: the system's)"
    )
    parser.add_argument("--base", default="data/nano", help="whose tokenizer (default: %(default)s)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # what a fresh process does, in --folder
    options = parser.parse_args()
    if options.step:
        keep_freed_memory()  # as sgpt/cli/command.py does for every script
        print(STEPS[options.step](Path(options.folder), options.base), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name, "marco")
        folder.mkdir()
        started = time.perf_counter()
        make_collection(folder, options.passages)
        make_queries(folder, options.passages)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(
            f"made: {options.passages} passages, {options.passages // 20} queries, {size / 1e9:.2f} GB, in "
            f"{time.perf_counter() - started:.1f} s",
            flush=True
        )
        for step in STEPS:
            subprocess.run(
                [sys.executable, __file__, "--step", step, "--folder", name, "--base", options.base], check=True
            )


def make_collection(folder: Path, passages: int) -> None:
    """DIFFERENT texts, made different again by a number at the end."""
    draw = np.random.default_rng(0)
    texts = [
        " ".join(WORDS[word] for word in draw.integers(0, len(WORDS), length))
        for length in draw.integers(30, 81, DIFFERENT)
    ]
    with (folder / "collection.tsv").open("w", encoding="utf-8") as out:
        out.writelines(f"{number}\t{texts[number % DIFFERENT]} {number}\n" for number in range(passages))
    print(f"made: {folder / 'collection.tsv'}", flush=True)


def make_queries(folder: Path, passages: int) -> None:
    draw = np.random.default_rng(1)
    names = [f"system-{number}" for number in range(SYSTEMS)]
    with (
        (folder / "queries.train.tsv").open("w") as queries,
        (folder / "msmarco-hard-negatives.jsonl").open("w") as mined,
        (folder / "cross-encoder-ms-marco-MiniLM-L-6-v2-scores.jsonl").open("w") as scores,
    ):
        for qid in range(passages // 20):
            candidates = draw.integers(0, passages, CANDIDATES)
            by_system = draw.permuted(np.tile(candidates, (SYSTEMS, 1)), axis=1)[:, :DEPTH].tolist()
            positive, *others = candidates.tolist()
            scored = dict(
                zip(map(str, others), draw.normal(-3, 5, CANDIDATES - 1).round(4).tolist(), strict=True)
            ) | {str(positive): 8.0}
            queries.write(
                f"{qid}\twhat is {' '.join(WORDS[word] for word in draw.integers(0, len(WORDS), 4))} of {qid}\n"
            )
            mined.write(
                json.dumps({"qid": qid, "pos": [positive], "neg": dict(zip(names, by_system, strict=True))}) + "\n"
            )
            scores.write(json.dumps({"qid": qid} | scored) + "\n")
    print(f"made: {folder / 'msmarco-hard-negatives.jsonl'}", flush=True)


def fill(folder: Path, base: str) -> str:
    from sgpt.data import readers

    spent = stopwatch()
    examples = readers.read_examples(data(folder).source_configs()[0], folder / "cache")
    taken = spent()
    per_query = np.mean([len(examples.hard_negatives[row]) for row in range(min(1000, len(examples)))])
    return (
        f"filled: {len(examples)} examples, about {per_query:.0f} hard negatives each, over {len(examples.texts)} "
        f"texts: {taken}"
    )


def tokenise(folder: Path, base: str) -> str:
    feed, spent = built(folder, base)
    taken = spent()
    return f"tokenised: {len(feed.sources[0].examples.texts)} texts: {taken}"


def start(folder: Path, base: str) -> str:
    feed, spent = built(folder, base)
    batch = feed.batch(0, 0)
    taken = spent()
    return (
        f"started: first batch of {len(batch.queries)} queries, {sum(map(len, (*batch.queries, *batch.documents)))} "
        f"tokens: {taken}"
    )


def built(folder: Path, base: str):
    """The feed, and a watch started before it."""
    from sgpt.data import readers
    from sgpt.decoder.trunk import load_tokenizer
    from sgpt.text.markers import MarkersConfig

    tokenizer, spent = load_tokenizer(base), stopwatch()
    return readers.build_feed(
        data(folder), tokenizer, MarkersConfig("brackets", 300, 300), queries_per_process=BATCH
    ), spent


def data(folder: Path):
    from sgpt.data.readers import DataConfig

    return DataConfig("msmarco", str(folder / "marco"), num_hard_negatives=1, cache=str(folder / "cache"))


def stopwatch() -> Callable[[], str]:
    wall, processor = time.perf_counter(), time.process_time()
    return (
        lambda: f"{time.perf_counter() - wall:.2f} s, of the processor {time.process_time() - processor:.2f} s, peak "
        f"{peak_megabytes():.0f} MB"
    )


def peak_megabytes() -> float:
    """Of the resident size of this process. Not getrusage where it can be helped: that remembers the parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


STEPS = {"fill": fill, "tokenise": tokenise, "start": start}


if __name__ == "__main__":
    main()
