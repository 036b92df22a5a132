"""Evaluate on MTEB: `python train/evaluate_mteb.py model=runs/pydocs tasks=[STSBenchmark,SciFact]`. `--help` shows the
keys.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("evaluate_mteb", groups=False, verbatim=("prompt",))
def main(composed: DictConfig) -> None:
    from pathlib import Path

    from rich.console import Console

    from sgpt.cli.compose import typed
    from sgpt.cross_encoder.cross_encoder import CrossEncoder
    from sgpt.encoder.encoder import Encoder
    from sgpt.evaluation.evaluate import metrics_table
    from sgpt.evaluation.mteb import MtebConfig, MtebEncoder, MtebReranker, name_of, read_tasks, run
    from sgpt.runtime.device import default_device
    from sgpt.runtime.errors import InputError
    from sgpt.runtime.progress import announce

    config = typed(MtebConfig, composed)
    if not config.model or not config.tasks:
        raise InputError(
            "set model=<folder or hub id> and tasks=[<task or benchmark of mteb>,…], for example "
            "tasks=[STSBenchmark,SciFact]"
        )
    device = default_device()
    announce(f"{config.model} is evaluated on {', '.join(config.tasks)} of MTEB, on {device}")
    tasks, name = read_tasks(config.tasks), config.name or name_of(config.model)
    if config.prompt:
        reranker = CrossEncoder.from_pretrained(config.model, config.prompt)
        reranker.model.to(device)
        model = MtebReranker(reranker, name)
    else:
        model = MtebEncoder(
            Encoder.from_pretrained(config.model, markers=config.markers, pooling=config.pooling).to(device), name
        )
    results = run(model, tasks, Path(config.output))
    Console(markup=False).print(metrics_table({name: results}, "MTEB, main scores × 100"))
    Console(markup=False).print(f"results  {config.output}/results", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
