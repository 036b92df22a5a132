"""Train a bi-encoder: `accelerate launch train/biencoder.py experiment=pydocs`.

From texts to a proven export, in order; the loop itself is sgpt/trainer.py. `--help` shows the keys.
"""

from omegaconf import DictConfig

from sgpt.door import script


@script("train")
def main(composed: DictConfig) -> None:
    from pathlib import Path

    from sgpt import evaluate, launch, outcome
    from sgpt.adapter import save_adapter
    from sgpt.config import TrainConfig, plain, typed
    from sgpt.contract import Contract
    from sgpt.data.readers import read_examples
    from sgpt.encoder import Encoder
    from sgpt.export import export
    from sgpt.model import load_tokenizer, load_trunk
    from sgpt.report import write_report
    from sgpt.run import begin, claim
    from sgpt.trainer import plan, train
    from sgpt.tuning import learning, tune

    config = typed(TrainConfig, composed)
    run = claim(Path(config.runs) / config.name, plain(config), resume=config.resume)
    if run.finished:
        outcome.show(run)
        return
    accelerator = launch.start(config)

    # everything that can be wrong is read and checked before anything is written
    with accelerator.main_process_first():  # one process harvests or downloads, the others find it done
        examples = read_examples(config.data)
    plan(examples, config.trainer, accelerator.num_processes)
    sets, dev = evaluate.read_sets(config.evaluation), evaluate.read_sets(config.dev)
    contract = Contract(config.pooling.name, config.markers, base=config.model.path)
    encoder = Encoder(load_trunk(config.model), load_tokenizer(config.model.path), contract, tokens_per_pack=config.trainer.tokens_per_pack)
    encoder.trunk = tune(encoder.trunk, config.tuning)
    encoder.to(accelerator.device)
    base = {name: parameter.detach().clone() for name, parameter in learning(encoder.trunk).items()}
    if accelerator.is_main_process:
        begin(run, plain(config))
        outcome.record_start(run, config, encoder, examples)
        outcome.record_before(run, encoder, sets, bm25=config.evaluation.bm25)
    accelerator.wait_for_everyone()
    launch.start_trackers(accelerator, config)

    state = train(encoder, examples, accelerator, run, config.trainer, config.loss, config.optim, lambda: evaluate.evaluate(encoder, dev))

    if accelerator.is_main_process:
        save_adapter(encoder, base, run.folder / "adapter")
        verified = export(encoder, run.folder / "export", card=outcome.card(run, config))
        outcome.record_after(run, encoder, sets, base, state, verified=verified)
        write_report(run.folder)
        outcome.finish(run)
        outcome.show(run)
    accelerator.end_training()


if __name__ == "__main__":
    main()
