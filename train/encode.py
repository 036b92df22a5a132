"""Encode a corpus for a database: `python train/encode.py model=<folder> texts=<BEIR folder or file> output=<folder>`.

With several processes: `accelerate launch train/encode.py …`. `--help` shows the keys.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("encode", groups=False)
def main(composed: DictConfig) -> None:
    from rich.console import Console

    from sgpt.cli import launch
    from sgpt.cli.compose import typed
    from sgpt.retrieval.encode import EncodeConfig, encode_texts

    config = typed(EncodeConfig, composed)
    accelerator = launch.accelerate(precision="fp32", seed=0, threads=config.threads)
    encoded = encode_texts(config, accelerator.device)
    if accelerator.is_main_process:
        size = f"{encoded['dimensions']} dimensions of {config.precision}"
        line = f"vectors  {config.output}: {encoded['texts']:,} texts, {size}, {len(encoded['files'])} file(s)"
        Console(markup=False).print(line, highlight=False, soft_wrap=True)  # a name may hold brackets
    accelerator.end_training()


if __name__ == "__main__":
    main()
