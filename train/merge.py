"""Merge tuned models of one base: `python train/merge.py models=[runs/a,runs/b] weights=[0.5,0.5] output=runs/a-and-b`.

With `curve=true retrieval=[…] sts=[…]` the result is scored in strengths between the base and itself.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("merge", groups=False)
def main(composed: DictConfig) -> None:
    from pathlib import Path

    from rich.console import Console

    from sgpt.cli.compose import typed
    from sgpt.encoder.merge import bias_change, merge, merged_encoder
    from sgpt.evaluation.strength import (
        MergeConfig,
        check_merge,
        curve_table,
        general_sets,
        read_curve_sets,
        strength_curve,
        write_curve,
    )
    from sgpt.report.merging import draw_bias_change
    from sgpt.runtime.device import default_device
    from sgpt.runtime.progress import announce

    config = typed(MergeConfig, composed)
    check_merge(config)
    announce(f"{config.output}: one adapter is made of {', '.join(config.models)}")
    sets = read_curve_sets(config)  # what cannot be read stops it before anything is written
    folder = Path(config.output)
    weights = config.weights or [1 / len(config.models)] * len(config.models)
    values = merge(config.models, weights, folder)
    draw_bias_change(bias_change(values), folder / "bias_change.png")
    console = Console(markup=False)
    sums = " + ".join(f"{weight:g} · {model}" for model, weight in zip(config.models, weights, strict=True))
    console.print(f"{folder}: base + {sums}", highlight=False, soft_wrap=True)
    if config.curve:
        encoder = merged_encoder(folder, default_device())
        curve, general = strength_curve(encoder, "merged", sets, config.steps), general_sets(config, sets)
        write_curve(curve, general, folder)
        console.print(curve_table(curve, general))


if __name__ == "__main__":
    main()
