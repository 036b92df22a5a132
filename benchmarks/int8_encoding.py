"""How fast does an int8 trunk encode, beside sentence-transformers in float32 and its int8 backends, and what is lost?

    python benchmarks/int8_encoding.py [--shape smollm2] [--data squad] [--documents 500] [--rounds 3]
    python benchmarks/int8_encoding.py --model runs/<name> --sets data/raw/pydocs/pydocs_test ../shared/data/scifact

Every engine takes documents as strings and gives embeddings, in fresh processes of --threads threads, one after the
other in each round. Those of sentence-transformers get their best batch size first, on a fifth of the documents. How
its int8 backends are run is in measure/backends.py. "cosine" is the mean with float32's embeddings of the same model.

--sets: nDCG@10 of --model in float32 and in int8 on BEIR folders, and nothing else; --queries and --around take the
first queries and so many documents around their judged ones.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from measure.backends import BACKENDS, backend
from measure.engines import Variant, open_ours, open_theirs
from measure.given import DOCUMENTS, Setting, read_documents, setting
from measure.processes import fresh, stopwatch
from measure.report import Report, parser, race
from transformers.utils import logging

from sgpt.data.formats.beir import RetrievalSet, fewer_queries, read_retrieval
from sgpt.decoder.trunk import load_tokenizer
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.dense import retrieve
from sgpt.retrieval.metrics import ranking
from sgpt.runtime.memory import keep_freed_memory
from sgpt.text.markers import frames
from sgpt.text.tokens import marked

COLUMNS = {
    "cpu_seconds": ("CPU s", ".2f"), "wall_seconds": ("wall s", ".2f"), "tokens_per_second": ("tokens/CPU s", ".0f"),
    "cosine": ("cosine", ".4f"), "load": ("load", ".1f"),
}  # fmt: skip
OURS = [Variant("ours int8", "ours", {"dtype": "int8"}), Variant("ours float32", "ours", {"dtype": "float32"})]
RIVALS = ("st", *BACKENDS)


def main() -> None:
    arguments = parser(__doc__, shape="smollm2", rounds=3)
    arguments.add_argument("--model", help="of --sets: a run, export or adapter")
    arguments.add_argument("--data", choices=DOCUMENTS, default="squad", help="(default: %(default)s)")
    arguments.add_argument("--documents", type=int, default=500, help="(default: %(default)s)")
    arguments.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS, help="(default: %(default)s)")
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32], help="(default: %(default)s)")
    arguments.add_argument("--sets", nargs="+", type=Path, help="BEIR folders: quality instead of speed")
    arguments.add_argument("--split", default="test", help="of --sets (default: %(default)s)")
    arguments.add_argument("--queries", type=int, help="of each set, the first so many")
    arguments.add_argument("--around", type=int, help="documents of each set beside the relevant ones")
    options = arguments.parse_args()
    if options.sets:
        print_quality(options)
    else:
        print_speed(options)


# --- speed ---


def print_speed(options: argparse.Namespace) -> None:
    with setting(
        options, options.data, lambda folder: read_documents(options.data, options.documents, folder)
    ) as given:
        report = Report(options, COLUMNS)
        reference = Path(given.folder, "reference.npy")

        def measure(variant: Variant, number: int = options.documents) -> dict:
            return fresh(encode, given, asdict(variant), str(reference), number)

        measure(OURS[1])  # writes the reference
        best = [_best_batch_size(report, name, options, measure) for name in options.rivals]
        variants = [*OURS, *best]
        rows = race(report, variants, options.rounds, measure)
    print_table(rows)
    for variant in variants[1:]:
        ratios = [other["cpu_seconds"] / one["cpu_seconds"] for one, other in
                  zip(rows[OURS[0].name], rows[variant.name], strict=True)]  # fmt: skip
        report.verdict(f"{variant.name} / {OURS[0].name}, CPU seconds", ratios)


def _best_batch_size(
    report: Report, engine: str, options: argparse.Namespace, measure: Callable[[Variant, int], dict]
) -> Variant:
    """By CPU seconds on a fifth of the documents."""
    variants = [Variant(f"{engine} batch {size}", engine, {"batch_size": size}) for size in options.batch_sizes]
    if len(variants) == 1:
        return variants[0]
    number = max(1, options.documents // 5)
    rows = race(report, variants, 1, lambda variant: measure(variant, number), "choosing: ")
    return min(variants, key=lambda variant: rows[variant.name][0]["cpu_seconds"])


def encode(setting: dict, variant: dict, reference: str, number: int) -> dict:
    """One row, of the first `number` documents. The first row is the reference of the others."""
    chosen, given = Variant(**variant), Setting(**setting)
    texts = given.texts()[:number]
    encoding = engine(given, chosen)
    encoding(texts[:2])
    with stopwatch() as spent:
        embeddings = encoding(texts)
    if not Path(reference).is_file():
        np.save(reference, embeddings)
    expected = np.load(reference)[:number]
    lengths = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((embeddings * expected).sum(1) / lengths).mean())
    tokens = num_tokens(given, texts)
    return {
        "cpu_seconds": spent["cpu"], "wall_seconds": spent["wall"], "cosine": cosine, "tokens": tokens,
        "tokens_per_second": tokens / spent["cpu"],
    }  # fmt: skip


def engine(given: Setting, chosen: Variant) -> Callable[[list[str]], np.ndarray]:
    if chosen.engine == "ours":
        encoder = open_ours(given, chosen.options["dtype"])
        return lambda texts: encoder.encode_documents(texts, progress=False)
    if chosen.engine == "st":
        model = open_theirs(given)
        return lambda texts: model.encode(texts, show_progress_bar=False, **chosen.options)
    return backend(given, chosen.engine, **chosen.options)


def num_tokens(given: Setting, texts: list[str]) -> int:
    """As every engine has them."""
    tokenizer = load_tokenizer(given.model)
    return sum(map(len, marked(texts, tokenizer, frames(given.markers, tokenizer)["document"])))


def print_table(rows: dict[str, list[dict]]) -> None:
    """Markdown, medians of the rounds."""
    print("\n| engine | CPU s | tokens a CPU second | times as fast as sentence-transformers | mean cosine |")
    print("|---|---|---|---|---|")
    seconds = {name: float(np.median([row["cpu_seconds"] for row in of_name])) for name, of_name in rows.items()}
    slowest = next((value for name, value in seconds.items() if name.startswith("st ")), None)
    for name, of_name in rows.items():
        ratio = f"{slowest / seconds[name]:.2f}" if slowest else ""
        tokens = of_name[0]["tokens"] / seconds[name]
        print(f"| {name} | {seconds[name]:.2f} | {tokens:.0f} | {ratio} | {of_name[0]['cosine']:.4f} |")
    print()


# --- quality ---


def print_quality(options: argparse.Namespace) -> None:
    keep_freed_memory()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    encoders = {dtype: Encoder.from_pretrained(options.model, dtype=dtype) for dtype in ("float32", "int8")}
    print("| set | documents | queries | nDCG@10 × 100, float32 | int8 | difference |\n|---|---|---|---|---|---|")
    for folder in options.sets:
        dataset = part(read_retrieval(folder, options.split), options.queries, options.around)
        scores = []
        for encoder in encoders.values():
            scores.append(100 * ranking(dataset.qrels, retrieve(encoder, dataset))["ndcg@10"])
        print(
            f"| {dataset.name} | {len(dataset.corpus):,} | {len(dataset.qrels):,} | {scores[0]:.2f} | {scores[1]:.2f} "
            f"| {scores[1] - scores[0]:+.2f} |", flush=True
        )  # fmt: skip


def part(dataset: RetrievalSet, queries: int | None, around: int | None) -> RetrievalSet:
    """The first queries, and of the corpus their judged documents and `around` others; all of them if None."""
    few = fewer_queries(dataset, queries)
    if around is None:
        return few
    judged = {document for documents in few.qrels.values() for document in documents}
    others = islice((document for document in few.corpus if document not in judged), around)
    kept = judged | set(others)
    return replace(few, corpus={document: text for document, text in few.corpus.items() if document in kept})


if __name__ == "__main__":
    main()
