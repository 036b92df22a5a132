"""What do fewer dimensions and fewer bits of the stored embeddings cost in nDCG@10?

    python benchmarks/smaller_vectors.py --model runs/<name> --sets <BEIR folders> [--dimensions 64 128 256]

Corpus and queries are embedded once. Then each size and precision of sgpt/retrieval/smaller.py is fitted on the corpus
and stored, and float32 queries rank its stored values, in Markdown. --queries and --around take the first queries, and
so many documents around their judged ones.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from int8_encoding import part

from sgpt.data.formats.beir import RetrievalSet, read_retrieval
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.dense import DEPTH, as_results, search
from sgpt.retrieval.metrics import ranking
from sgpt.retrieval.smaller import PRECISIONS, REDUCTIONS, SizeConfig, Sizing
from sgpt.runtime.memory import keep_freed_memory


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", required=True, help="run, export, adapter or sentence-transformers folder")
    arguments.add_argument("--sets", nargs="+", type=Path, required=True, help="BEIR folders")
    arguments.add_argument("--split", default="test", help="(default: %(default)s)")
    arguments.add_argument("--dimensions", type=int, nargs="+", default=[64, 128, 256], help="(default: %(default)s)")
    arguments.add_argument("--dtype", default="float32", help="of the model's weights (default: %(default)s)")
    arguments.add_argument("--queries", type=int, help="of each set, the first so many")
    arguments.add_argument("--around", type=int, help="documents of each set beside the judged ones")
    options = arguments.parse_args()
    keep_freed_memory()
    encoder = Encoder.from_pretrained(options.model, dtype=options.dtype)
    sizes = [(None, None), *((reduce, number) for reduce in REDUCTIONS for number in options.dimensions)]
    print(f"| set | dimensions | {' | '.join(PRECISIONS)} |\n|---|---|{'---|' * len(PRECISIONS)}")
    for folder in options.sets:
        dataset = part(read_retrieval(folder, options.split), options.queries, options.around)
        queries = encoder.encode_queries(list(dataset.queries.values()), normalize=True)
        documents = encoder.encode_documents(list(dataset.corpus.values()), normalize=True)
        for reduce, number in sizes:
            cells = []
            for precision in PRECISIONS:
                cells.append(f"{score(dataset, queries, documents, SizeConfig(reduce, number, precision)):.2f}")
            said = f"{number} by {reduce}" if reduce else f"all {encoder.embedding_size}"
            print(f"| {dataset.name} | {said} | {' | '.join(cells)} |", flush=True)


def score(dataset: RetrievalSet, queries: np.ndarray, documents: np.ndarray, size: SizeConfig) -> float:
    """nDCG@10 × 100 of the stored documents."""
    sizing = Sizing.fit(size, True, lambda: [documents])
    stored = torch.from_numpy(sizing.decode(sizing.encode(documents)))
    scores, rows = search(torch.from_numpy(sizing.project(queries)), stored, DEPTH + dataset.skip_own_id)
    return 100 * ranking(dataset.qrels, as_results(dataset, scores, rows, DEPTH))["ndcg@10"]


if __name__ == "__main__":
    main()
