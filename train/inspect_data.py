"""Look at training data before spending compute on it: `python train/inspect_data.py experiment=pydocs`, with
training's overrides.

On several processes a batch is as large as all of theirs: set trainer.queries_per_process to the queries in total.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("inspect_data")
def main(composed: DictConfig) -> None:
    from pathlib import Path

    from rich.console import Console

    from sgpt.cli.compose import plain, typed
    from sgpt.data.readers import build_feed
    from sgpt.decoder.trunk import load_tokenizer
    from sgpt.inspection import inspect as inspection
    from sgpt.inspection.inspect import InspectConfig
    from sgpt.inspection.page import check_output, write_inspection
    from sgpt.runtime.progress import announce
    from sgpt.training.guide import with_hard_batches

    config = typed(InspectConfig, composed)
    page = check_output(Path(config.output or f"{config.runs}/{config.name}.inspection.html"))
    texts = ", ".join(source.path or source.name for source in config.data.source_configs())
    announce(f"{page}: {texts} is read and looked at, as {config.model.path} will see it")
    tokenizer = load_tokenizer(config.model.resolved().path)
    feed = build_feed(
        config.data,
        tokenizer,
        config.markers,
        queries_per_process=config.trainer.queries_per_process,
        seed=config.trainer.seed,
    )
    feed = with_hard_batches(feed, config.data, loss=config.loss)
    steps = config.trainer.steps(feed.batches_per_epoch)
    result = inspection.inspect_feed(
        feed,
        tokenizer,
        num_examples=config.examples,
        num_batches=config.batches,
        steps=steps,
        batches_per_step=config.trainer.gradient_accumulation,
    )
    inspection.print_inspection(result, Console())
    write_inspection(result, page, config.name, plain(config))
    print(f"page  {page}")


if __name__ == "__main__":
    main()
