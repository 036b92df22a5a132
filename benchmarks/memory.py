"""How much memory does a training step take, and what does a smaller one cost in time?

    python benchmarks/memory.py [--shape small] [--data nli] [--batch 256] [--rounds 2] [--competitors mnrl cached-32 …]

Ours keeps all activations, some (--middle of what all of them take) or none, in packs of --packs tokens;
sentence-transformers keeps all with its plain loss and a mini-batch's with its cached one. Every point is a fresh
process: the peak of its resident size during the steps, over what it held before them. The gradient is the same
everywhere, which is checked before anything is shown.
"""

import statistics
from dataclasses import asdict

from measure.engines import COMPETITORS, OURS, Variant
from measure.given import read_texts, setting
from measure.processes import MB, fresh
from measure.report import Report, race, same_losses, training_parser
from measure.train import UNTIMED, train

COLUMNS = {
    "peak_mb": ("peak +MB", ".0f"), "cpu_seconds": ("CPU s/step", ".2f"), "wall_seconds": ("wall s/step", ".2f"),
    "pairs_per_second": ("pairs/s", ".1f"), "computed": ("positions", ".2f"), "before_mb": ("before MB", ".0f"),
    "load": ("load", ".1f"),
}  # fmt: skip
DEFAULT_COMPETITORS = ["mnrl", "cached-16", "cached-32", "cached-64", "cached-1024t"]


def main() -> None:
    arguments = training_parser(__doc__, shape="small", rounds=2, steps=2, batch=256, competitors=DEFAULT_COMPETITORS)
    arguments.add_argument(
        "--middle", type=float, default=0.5,
        help="keep budget of ours between all and nothing, as a share of all (default: %(default)s)"
    )
    arguments.add_argument(
        "--packs", type=int, nargs="+", default=[4096, 1024],
        help="tokens computed at a time when nothing is kept (default: %(default)s)"
    )
    options = arguments.parse_args()
    number = max(options.steps * options.batch, UNTIMED)
    with setting(
        options, options.data, lambda folder: read_texts(options.data, number, folder), batch=options.batch
    ) as given:
        report = Report(options, COLUMNS, same_losses(options.precision))

        def measure(variant: Variant) -> dict:
            return fresh(train, given, asdict(variant), options.steps)

        first = race(report, [OURS], 1, measure, "for the middle: ")[OURS.name][0]
        middle = round(first["peak_mb"] * MB * options.middle / 1e9, 3)
        kept = [
            Variant("ours, keeping all", "ours"),
            Variant(f"ours, keeping {middle} GB", "ours", {"keep_gigabytes": middle}),
            *[
                Variant(f"ours, nothing, packs of {size}", "ours", {"keep_gigabytes": 0, "tokens_per_pack": size})
                for size in options.packs
            ],
        ]  # fmt: skip
        rivals = [COMPETITORS[name] for name in options.competitors]
        rows = race(report, [*kept, *rivals], options.rounds, measure)
    table(report, rows, next(variant.name for variant in (*rivals, *kept) if variant.name in rows))


def table(report: Report, rows: dict[str, list[dict]], base: str) -> None:
    """Medians over the rounds, against those of `base`: what a budget of memory buys."""
    middle = {
        name: {key: statistics.median(row[key] for row in found) for key in ("peak_mb", "cpu_seconds")} for name,
        found in rows.items()
    }
    print(f"\nmemory and CPU time beside {base}, medians; below 1 is less")
    for name, values in sorted(middle.items(), key=lambda item: item[1]["peak_mb"]):
        memory, seconds = (values[key] / middle[base][key] for key in ("peak_mb", "cpu_seconds"))
        print(
            f"{name:32s}{values['peak_mb']:9.0f} MB {memory:7.2f}   {values['cpu_seconds']:8.2f} s {seconds:7.2f}   "
            f"memory × time {memory * seconds:6.3f}"
        )
        report.note({"what": f"{name} beside {base}", "memory": memory, "cpu_seconds": seconds})


if __name__ == "__main__":
    main()
