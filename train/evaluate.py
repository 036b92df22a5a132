"""Evaluate any model: `python train/evaluate.py model=runs/pydocs retrieval=[<folder or BEIR name>] sts=[<file>]`.

`--help` shows the keys.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("evaluate", groups=False, verbatim=("prompt",))
def main(composed: DictConfig) -> None:
    import sys

    from rich.console import Console

    from sgpt.cli.compose import typed
    from sgpt.encoder.encoder import Encoder
    from sgpt.evaluation.systems import (
        EvaluateConfig,
        check_request,
        find_sets,
        load_reranker,
        read_retrieval_sets,
        score_all,
        scored_splits,
    )
    from sgpt.evaluation.table import beir_averages, systems_table
    from sgpt.runtime.device import default_device
    from sgpt.runtime.progress import announce

    config = typed(EvaluateConfig, composed)
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False)
    # cheap refusals first, then the models, then every corpus; only then is anything scored
    check_request(config)
    device = default_device()
    named = [*config.retrieval, *config.sts, *([config.useb] if config.useb else [])]
    announce(f"{config.model} is evaluated on {', '.join(named)}, on {device}; first all are opened")
    sets = find_sets(config)
    encoder = Encoder.from_pretrained(
        config.model, markers=config.markers, pooling=config.pooling, dtype=config.dtype
    ).to(device)
    rerank = load_reranker(config, device)
    retrieval = read_retrieval_sets(sets.retrieval, config, console.print)

    results = score_all(encoder, sets, retrieval, config, rerank)
    title = f"{scored_splits(sets, config)}, results × 100, differences with 95 % intervals"
    console.print(systems_table(results | beir_averages(results), title))


if __name__ == "__main__":
    main()
