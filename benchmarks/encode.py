"""How fast are documents encoded? `Encoder.encode_documents` and `SentenceTransformer.encode`, from strings to equal
embeddings.

    python benchmarks/encode.py [--shape 125m] [--data squad] [--documents 500] [--rounds 3] [--batch-sizes 8 16 32 64
        128]

Every batch size of the competitor is tried on a fifth of them; the fastest runs against ours, A B A B, each time in a
fresh process. No time is shown before the embeddings are equal: 1e-5 at most between any two numbers in float32.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from measure.engines import OURS, Variant, open_ours, open_theirs, precision
from measure.given import DOCUMENTS, Setting, read_documents, setting
from measure.processes import fresh, stopwatch
from measure.report import Report, compare, fastest, parser, race

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}  # of numbers around 1, of which bfloat16 keeps 8 bits
COLUMNS = {
    "cpu_seconds": ("CPU s", ".2f"), "wall_seconds": ("wall s", ".2f"), "documents_per_second": ("docs/s", ".1f"),
    "load": ("load", ".1f"),
}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, shape="125m", rounds=3)
    arguments.add_argument(
        "--data", choices=DOCUMENTS, default="squad", help="real texts below --shared (default: %(default)s)"
    )
    arguments.add_argument(
        "--documents", type=int, default=500, help="squad has 1563, medquad 15809 (default: %(default)s)"
    )
    arguments.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128],
        help="of ST, to choose from (default: %(default)s)"
    )
    options = arguments.parse_args()
    with setting(
        options, options.data, lambda folder: read_documents(options.data, options.documents, folder)
    ) as given:
        report = Report(options, COLUMNS, same_embeddings(options))

        def measure(variant: Variant, number: int = options.documents) -> dict:
            row = fresh(encode, given, asdict(variant), f"{given.folder}/{variant.engine}.npy", number)
            return row | ({"documents_per_second": number / row["wall_seconds"]} if "wall_seconds" in row else {})

        rivals = [Variant(f"ST batch {size}", "st", {"batch_size": size}) for size in options.batch_sizes]
        rival = fastest(report, OURS, rivals, lambda variant: measure(variant, options.documents // 5))
        rows = race(report, [OURS, rival], options.rounds, measure)
    compare(report, rows, OURS.name, rival.name)


def encode(setting: dict, variant: dict, embeddings: str, number: int) -> dict:
    """One row; `embeddings` is the file that gets them, of the first `number` documents."""
    chosen, given = Variant(**variant), Setting(**setting)
    texts = given.texts()[:number]
    encoding = ENGINES[chosen.engine](given, **chosen.options)
    with precision(given):
        encoding(texts[:2])
        with stopwatch() as spent:
            found = encoding(texts)
    np.save(embeddings, found)
    return {"cpu_seconds": spent["cpu"], "wall_seconds": spent["wall"], "embeddings": embeddings}


def ours(setting: Setting) -> Callable[[list[str]], np.ndarray]:
    encoder = open_ours(setting)
    return lambda texts: encoder.encode_documents(texts, progress=False)


def theirs(setting: Setting, *, batch_size: int) -> Callable[[list[str]], np.ndarray]:
    model = open_theirs(setting)
    if setting.precision == "bf16":
        model.to(torch.bfloat16)
    return lambda texts: model.encode(
        texts, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True
    ).float().numpy()


ENGINES = {"ours": ours, "st": theirs}


def same_embeddings(options: Namespace) -> Callable[[dict, dict], str | None]:
    """The last embeddings of either engine are compared: every fresh process has to make them again."""
    tolerance = TOLERANCE[options.precision]

    def agree(reference: dict, row: dict) -> str | None:
        left, right = (np.load(one["embeddings"]) for one in (reference, row))
        both = min(len(left), len(right))  # fewer are encoded while choosing
        row["differs"] = float(np.abs(left[:both] - right[:both]).max())
        return (
            None if row["differs"] <= tolerance
            else f"embeddings differ by {row['differs']:.1e}, allowed {tolerance:.0e}"
        )

    return agree


if __name__ == "__main__":
    main()
