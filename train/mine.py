"""Mine hard negatives: `python train/mine.py data=<BEIR folder> output=rows.jsonl`. The rules are in sgpt/mining/.

With several processes: `accelerate launch train/mine.py …`.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("mine", groups=False)
def main(composed: DictConfig) -> None:
    from rich.console import Console

    from sgpt.cli import launch
    from sgpt.cli.compose import typed
    from sgpt.mining.config import MineConfig
    from sgpt.mining.mine import mine
    from sgpt.mining.report import page_of, table

    config = typed(MineConfig, composed)
    accelerator = launch.accelerate(precision="fp32", seed=config.seed, threads=config.threads)
    statistics = mine(config, accelerator.device)
    if accelerator.is_main_process:
        console = Console(markup=False)  # a name may hold brackets
        console.print(table(config, statistics))
        few, most = statistics["counts"]["few"], config.negatives_per_query
        if few and config.on_few == "keep":
            console.print(
                f"{few:,} rows have fewer than {most} negatives; "
                f"training with data.num_hard_negatives={most} refuses them; lower it, or set on_few=drop"
            )
        console.print(f"rows    {config.output}\nreport  {page_of(config)}", highlight=False, soft_wrap=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
