"""Export a run again, finished or not: `python train/export.py run=runs/pydocs output=my-model`."""

from omegaconf import DictConfig

from sgpt.door import script


@script("export", groups=False)
def main(composed: DictConfig) -> None:
    from pathlib import Path

    import yaml
    from omegaconf import OmegaConf

    from sgpt import checkpoint, outcome
    from sgpt.config import ExportConfig, TrainConfig, literal, typed
    from sgpt.contract import Contract
    from sgpt.encoder import Encoder
    from sgpt.errors import InputError
    from sgpt.export import export
    from sgpt.model import load_tokenizer, load_trunk
    from sgpt.run import Run
    from sgpt.tuning import learning, tune

    config = typed(ExportConfig, composed)
    run = Run(Path(config.run))
    if not config.run or not (run.folder / "config.yaml").is_file():
        raise InputError(f"run={config.run}: no run folder; give one that holds config.yaml, for example run=runs/pydocs")
    trained = typed(TrainConfig, OmegaConf.create(literal(yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8")))))
    newest = checkpoint.latest(run.checkpoints)
    if newest is None:
        raise InputError(f"{run.folder} has no checkpoint yet; let it train until the first one")
    contract = Contract(trained.pooling.name, trained.markers, base=trained.model.path)
    encoder = Encoder(load_trunk(trained.model), load_tokenizer(trained.model.path), contract)
    encoder.trunk = tune(encoder.trunk, trained.tuning)
    checkpoint.load_parameters(newest / "trained.safetensors", learning(encoder.trunk))
    folder = Path(config.output) if config.output else run.folder / "export"
    export(encoder, folder, card=outcome.card(run, trained))
    print(f"{newest} exported to {folder}")


if __name__ == "__main__":
    main()
