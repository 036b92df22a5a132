"""Export a run again, finished or not: `python train/export.py run=runs/pydocs formats=[onnx,openvino]`."""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("export", groups=False)
def main(composed: DictConfig) -> None:
    from pathlib import Path

    from omegaconf import OmegaConf

    from sgpt.cli.compose import literal, typed
    from sgpt.encoder.export import DEFAULT, ExportConfig, folder_of, repository_of
    from sgpt.encoder.hub import files_to_push, listing, push
    from sgpt.runtime.errors import InputError
    from sgpt.runtime.progress import announce
    from sgpt.training.config import TrainConfig
    from sgpt.training.record import export_as, reopen, write_export
    from sgpt.training.run_folder import RunFolder, read_config

    config = typed(ExportConfig, composed)
    run = RunFolder(Path(config.run))
    if not config.run or not (run.folder / "config.yaml").is_file():
        raise InputError(
            f"run={config.run}: no run folder; give one that holds config.yaml, for example run=runs/pydocs"
        )
    folders = {form: folder_of(form, Path(config.output or run.folder / "export")) for form in config.formats}
    announce(f"{run.folder}: its best or newest checkpoint is exported to {', '.join(map(str, folders.values()))}")
    trained = typed(TrainConfig, OmegaConf.create(literal(read_config(run.folder))))
    encoder, checkpoint = reopen(run, trained)
    refused: list[str] = []
    for form, folder in folders.items():
        try:
            if run.finished and not config.output and form == DEFAULT and not config.examples:
                write_export(run, trained, encoder)  # which the manifest knows
            else:
                export_as(run, trained, encoder, form, folder, config.examples)
            print(f"{checkpoint} exported to {folder}")
        except InputError as error:  # the other formats may well be possible
            refused.append(str(error))
    if refused:
        raise InputError("; ".join(refused))
    if config.push_to_hub is None:
        return
    for form, folder in folders.items():
        repository = repository_of(form, config.push_to_hub)
        print(listing(repository, files_to_push(folder)))
        if config.dry_run:
            print("nothing was uploaded; dry_run=false uploads it, and deletes what else an earlier export left there")
        else:
            print(f"uploaded to {push(folder, repository)}")


if __name__ == "__main__":
    main()
