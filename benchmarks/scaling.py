"""Is a batch limited by nothing but time? Ours at growing batches within one keep budget: seconds a pair, and peak
memory.

    python benchmarks/scaling.py [--shape small] [--batches 64 256 1024 4096 16384] [--keep-gigabytes 0.5] [--rounds 1]

A pair's time should be flat but for two things, both shown: what no longer fits the budget is computed twice
("positions", from 1 to 2 for each token), and the scores grow with the square of the batch ("scores", timed alone in
the same process). Memory should be flat but for the embeddings and a bounded part of the scores. Nothing is compared
with another engine here.
"""

from dataclasses import asdict, replace

from measure.engines import Variant
from measure.given import read_texts, setting
from measure.processes import fresh
from measure.report import Report, parser, race
from measure.train import train

COLUMNS = {
    "cpu_ms_a_pair": ("CPU ms/pair", ".2f"), "scores_ms_a_pair": ("of it scores", ".3f"),
    "rest_ms_a_pair": ("rest", ".2f"),
    "computed": ("positions", ".2f"), "peak_mb": ("peak +MB", ".0f"), "wall_seconds": ("wall s/step", ".1f"),
    "load": ("load", ".1f"),
}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, shape="small", rounds=1)
    arguments.add_argument(
        "--batches", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384],
        help="examples a step (default: %(default)s)"
    )
    arguments.add_argument(
        "--keep-gigabytes", type=float, default=0.5, help="of activations that stay alive (default: %(default)s)"
    )
    arguments.add_argument(
        "--pairs", type=int, default=1024,
        help="a process takes as many steps as this many pairs need, one at least (default: %(default)s)"
    )
    options = arguments.parse_args()
    with setting(
        options, "pairs", lambda folder: read_texts("pairs", max(*options.batches, options.pairs), folder)
    ) as given:
        report = Report(options, COLUMNS)

        def measure(variant: Variant) -> dict:
            batch = batches[variant.name]
            row = fresh(train, replace(given, batch=batch), asdict(variant), max(1, options.pairs // batch), "scores")
            return row if "failed" in row else row | per_pair(row, batch)

        batches = {f"batch {batch}": batch for batch in options.batches}
        race(
            report, [Variant(name, "ours", {"keep_gigabytes": options.keep_gigabytes}) for name in batches],
            options.rounds, measure
        )


def per_pair(row: dict, batch: int) -> dict[str, float]:
    """Milliseconds; the rest is what the scores leave."""
    whole, scores = (1000 * row[key] / batch for key in ("cpu_seconds", "scores_seconds"))
    return {"cpu_ms_a_pair": whole, "scores_ms_a_pair": scores, "rest_ms_a_pair": whole - scores}


if __name__ == "__main__":
    main()
