"""Train a bi-encoder: `accelerate launch train/biencoder.py experiment=pydocs`.

From texts to a proven export, in order; the loop itself is sgpt/training/trainer.py. `--help` shows the keys.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("train")
def main(composed: DictConfig) -> None:
    import logging
    from pathlib import Path

    from sgpt.cli import launch
    from sgpt.cli.compose import plain, typed
    from sgpt.data.readers import build_feed
    from sgpt.decoder.trunk import load_tokenizer, load_trunk
    from sgpt.encoder.adapter import save_adapter
    from sgpt.encoder.contract import Contract
    from sgpt.encoder.encoder import Encoder
    from sgpt.evaluation import evaluate
    from sgpt.report.run import write_report
    from sgpt.runtime.files import remove_folder
    from sgpt.training import record as outcome
    from sgpt.training.config import TrainConfig
    from sgpt.training.guide import grouped, guided
    from sgpt.training.run_folder import begin, claim
    from sgpt.training.trackers import start_trackers
    from sgpt.training.trainer import announce, check, train
    from sgpt.training.tuning import learning, tune

    log = logging.getLogger("sgpt.train")
    config = typed(TrainConfig, composed)
    run = claim(Path(config.runs) / config.name, plain(config), resume=config.resume)
    if run.finished:
        outcome.complete(run, config)
        return
    accelerator = launch.start(config, run.threads)

    # everything that can be wrong is read and checked before anything is written
    tokenizer = load_tokenizer(config.model.path)
    with accelerator.main_process_first():  # one process harvests, downloads, reads and tokenises, the others find it done
        feed = build_feed(config.data, tokenizer, config.markers, queries_per_process=config.trainer.queries_per_process,
                          processes=accelerator.num_processes, seed=config.trainer.seed)
        sets, dev = evaluate.read_sets(config.evaluation), evaluate.read_sets(config.dev)
    feed = guided(grouped(feed, config.data, accelerator.device), config.loss, accelerator.device)
    check(feed)
    config.trainer.steps(feed.batches_per_epoch)
    contract = Contract(config.pooling.name, config.markers, base=config.model.path)
    encoder = Encoder(load_trunk(config.model), tokenizer, contract, tokens_per_pack=config.trainer.tokens_per_pack)
    inputs = outcome.inputs_of(encoder, feed, sets, dev)
    run.check_same(inputs)
    encoder.trunk = tune(encoder.trunk, config.tuning)
    encoder.to(accelerator.device)
    log.info("%s: %s is trained on %s", run.folder, config.model.path, config.data.path or config.data.name)
    announce(encoder, feed, config.trainer, config.optim, accelerator)
    base = {name: parameter.detach().clone() for name, parameter in learning(encoder.trunk).items()}
    if accelerator.is_main_process:
        begin(run, plain(config))
        outcome.record_start(run, config, encoder, feed, inputs)
        outcome.record_before(run, encoder, sets, bm25=config.evaluation.bm25)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, config)

    state = train(encoder, feed, accelerator, run, config.trainer, config.loss, config.optim, lambda: evaluate.evaluate(encoder, dev))

    if accelerator.is_main_process:
        remove_folder(run.folder / "export")  # of an earlier checkpoint, where somebody looked in between
        save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, base, run.folder / "adapter")
        outcome.record_after(run, encoder, sets, base, state)
        write_report(run.folder)
        outcome.finish(run)
        outcome.complete(run, config, encoder)
    accelerator.end_training()


if __name__ == "__main__":
    main()
