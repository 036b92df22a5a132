"""Export a run again, finished or not: `python train/export.py run=runs/pydocs output=my-model`."""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("export", groups=False)
def main(composed: DictConfig) -> None:
    from pathlib import Path

    from omegaconf import OmegaConf

    from sgpt.cli.compose import literal, typed
    from sgpt.encoder.export import ExportConfig, export
    from sgpt.runtime.errors import InputError
    from sgpt.training import record as outcome
    from sgpt.training.config import TrainConfig
    from sgpt.training.run_folder import RunFolder, read_config

    config = typed(ExportConfig, composed)
    run = RunFolder(Path(config.run))
    if not config.run or not (run.folder / "config.yaml").is_file():
        raise InputError(
            f"run={config.run}: no run folder; give one that holds config.yaml, for example run=runs/pydocs"
        )
    trained = typed(TrainConfig, OmegaConf.create(literal(read_config(run.folder))))
    encoder, newest = outcome.reopen(run, trained)
    folder = Path(config.output) if config.output else run.folder / "export"
    if run.finished and not config.output:
        outcome.write_export(run, trained, encoder)
    else:
        export(encoder, folder, card=outcome.card(run, trained), adapter=run.folder / "adapter")
    print(f"{newest} exported to {folder}")


if __name__ == "__main__":
    main()
