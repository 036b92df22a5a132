"""Train a bi-encoder: `accelerate launch train/biencoder.py experiment=pydocs`.

From texts to a verified export, in order; the loop itself is sgpt/training/trainer.py. `--help` shows the keys.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("train")
def main(composed: DictConfig) -> None:
    from pathlib import Path

    from sgpt.cli import launch
    from sgpt.cli.compose import plain, typed
    from sgpt.data.readers import build_feed
    from sgpt.decoder.trunk import load_tokenizer, load_trunk
    from sgpt.encoder.adapter import save_adapter
    from sgpt.encoder.contract import Contract
    from sgpt.encoder.encoder import Encoder
    from sgpt.encoder.export import announce_export
    from sgpt.encoder.model_folder import announce_base, exports_in_other_formats
    from sgpt.encoder.probes import measure
    from sgpt.evaluation import evaluate
    from sgpt.evaluation.shared import evaluate_together
    from sgpt.preflight.preflight import preflight
    from sgpt.report.run import write_report
    from sgpt.runtime.files import refuse_unwritable, remove_folder
    from sgpt.runtime.progress import announce
    from sgpt.training.best import check_keep_best
    from sgpt.training.checkpoint import steps_done
    from sgpt.training.config import TrainConfig
    from sgpt.training.guide import with_guide, with_hard_batches
    from sgpt.training.record import (
        export_and_show,
        finish_run,
        origin,
        record_after,
        record_before,
        record_start,
        run_inputs,
    )
    from sgpt.training.run_folder import open_run, start_run, stated_pack
    from sgpt.training.sharding import check_shardable, copy_learned, shard_frozen
    from sgpt.training.trackers import finish_trackers, start_trackers
    from sgpt.training.trainer import check_feed, train
    from sgpt.training.tuning import trainable_parameters, tune

    config = typed(TrainConfig, composed)
    folder = Path(config.runs) / config.name
    config.trainer.tokens_per_pack = config.trainer.tokens_per_pack or stated_pack(folder)
    run = open_run(folder, plain(config), resume=config.resume)
    if run.finished:  # nothing is trained again
        export_and_show(run, config)
        return
    refuse_unwritable(run.folder, "choose places that can be read and written, by runs= and data.cache=")
    texts = ", ".join(source.path or source.name for source in config.data.source_configs())
    announce(f"{run.folder}: {config.model.path} is trained on {texts}; first both are read and tried")
    accelerator = launch.start(config, run.threads)

    # everything that can be wrong is read and checked before anything is written
    model = config.model.resolved()
    tokenizer = load_tokenizer(model.path)
    with accelerator.main_process_first():  # which downloads, reads and tokenises; the others read its cache
        for sets in (config.evaluation, config.dev):
            evaluate.check_there(sets, made=[one.path for one in config.data.source_configs() if one.name == "pydocs"])
        feed = build_feed(
            config.data,
            tokenizer,
            config.markers,
            queries_per_process=config.trainer.queries_per_process,
            processes=accelerator.num_processes,
            seed=config.trainer.seed,
        )
        test_sets = evaluate.read_sets(config.evaluation)
        dev_sets = evaluate.read_sets(config.dev, "dev")
    check_keep_best(config.trainer.keep_best, dev_sets)
    feed = with_hard_batches(feed, config.data, accelerator.device, config.loss)
    feed = with_guide(feed, config.loss, accelerator.device)
    check_feed(feed)
    config.trainer.steps(feed.batches_per_epoch)  # refuses a run that is too short for one optimizer step
    contract = Contract(config.pooling.name, config.markers, base=model.path)
    announce_base(model.path, contract)
    trunk = load_trunk(model)
    encoder = Encoder(trunk, tokenizer, contract, tokens_per_pack=config.trainer.tokens_per_pack)
    inputs = run_inputs(encoder, feed, test_sets, dev_sets)
    contract.origin = origin(config, model.path, inputs)
    run.check_same(inputs)  # a resumed run needs the data, weights and versions that it was started with

    encoder.trunk = tune(encoder.trunk, config.tuning, model.path)
    announce_export(encoder)
    if config.trainer.shard_trunk:
        check_shardable(encoder.trunk)
    else:
        encoder.to(accelerator.device)
    done = steps_done(run.checkpoints)
    expected = preflight(encoder, feed, config, accelerator, test_sets, dev_sets, done)
    if config.trainer.dry_run:
        if accelerator.is_main_process:
            expected.print(f"{run.folder} before training: nothing is written")
        accelerator.end_training()
        return
    expected.log()
    # the adapter is the difference to these
    untrained = {name: parameter.detach().clone() for name, parameter in trainable_parameters(encoder.trunk).items()}
    if accelerator.is_main_process:
        start_run(run, plain(config))
        record_start(run, config, encoder, feed, inputs, expected.seen)
        record_before(run, encoder, test_sets, bm25=config.evaluation.bm25)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, config, run)
    if config.trainer.shard_trunk:
        shard_frozen(encoder.trunk, accelerator.device)

    def evaluate_dev() -> evaluate.Results:
        return evaluate_together(encoder, dev_sets)

    state = train(encoder, feed, accelerator, run, config.trainer, config.loss, config.optim, evaluate_dev)

    if accelerator.is_main_process:
        if config.trainer.shard_trunk:  # what follows needs all of it in one process
            encoder.trunk = copy_learned(encoder.trunk, tune(load_trunk(model), config.tuning, model.path))
        # train/export.py may have made some from an earlier checkpoint, which would pass for this run's
        for made_before in (run.folder / "export", *exports_in_other_formats(run.folder)):
            remove_folder(made_before)
        adapter = run.folder / "adapter"
        save_adapter(encoder.trunk, encoder.tokenizer, contract, untrained, adapter, measured=measure(encoder))
        record_after(run, encoder, test_sets, untrained, state)
        write_report(run.folder)
        finish_trackers(accelerator, config, run, state.step)
        finish_run(run)
        export_and_show(run, config, encoder)
    accelerator.end_training()


if __name__ == "__main__":
    main()
