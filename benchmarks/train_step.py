"""How fast is a training step? Ours and sentence-transformers, tuned, from raw text to updated biases, on the same
batches.

    python benchmarks/train_step.py [--shape 125m] [--data nli] [--rounds 3] [--steps 4] [--competitors mnrl cached-32
        …]

When there are more than two --competitors, each is tried for one step; the plain loss and the fastest then run against
ours, A B C A B C, each time in a fresh process. Loss and gradient norm must agree before any time is shown. "floor" is
the share of our time that the bare matrix products of the step take, timed in our process after it: 1 would be no
overhead at all. "positions" are those that went through the trunk, padding and recomputation included, for each token
of the texts.
"""

from dataclasses import asdict

from measure.engines import COMPETITORS, OURS, Variant
from measure.given import read_texts, setting
from measure.processes import fresh
from measure.report import Report, compare, fastest, race, same_losses, training_parser
from measure.train import UNTIMED, train

COLUMNS = {
    "cpu_seconds": ("CPU s/step", ".2f"), "wall_seconds": ("wall s/step", ".2f"),
    "pairs_per_second": ("pairs/s", ".1f"), "tokens": ("tokens", ",d"),
    "computed": ("positions", ".2f"), "peak_mb": ("peak +MB", ".0f"), "floor": ("floor", ".2f"),
    "load": ("load", ".1f"),
}  # fmt: skip
DEFAULT_COMPETITORS = ["mnrl", "cached-16", "cached-32", "cached-64", "cached-512t", "cached-1024t", "cached-2048t"]


def main() -> None:
    options = training_parser(
        __doc__, shape="125m", rounds=3, steps=4, batch=64, competitors=DEFAULT_COMPETITORS
    ).parse_args()
    number = max(options.steps * options.batch, UNTIMED)
    with setting(
        options, options.data, lambda folder: read_texts(options.data, number, folder), batch=options.batch
    ) as given:
        report = Report(options, COLUMNS, same_losses(options.precision))

        def measure(variant: Variant, steps: int = options.steps) -> dict:
            row = fresh(train, given, asdict(variant), steps, "products" if variant == OURS else None)
            return row | ({"floor": row["products_seconds"] / row["cpu_seconds"]} if "products_seconds" in row else {})

        rivals = [COMPETITORS[name] for name in options.competitors]
        if len(rivals) > 2:
            chosen = fastest(report, OURS, rivals, lambda variant: measure(variant, 1))
            rivals = [rival for rival in rivals if rival in (COMPETITORS["mnrl"], chosen)]
        rows = race(report, [OURS, *rivals], options.rounds, measure)
    for rival in list(rows)[1:]:
        compare(report, rows, OURS.name, rival)
    report.verdict("bare matrix products / ours, CPU seconds", [row["floor"] for row in rows[OURS.name]], against=None)


if __name__ == "__main__":
    main()
