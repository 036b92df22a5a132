"""Re-rank with a decoder as it is: `python train/rerank.py data=<BEIR folder> model=<decoder> output=<file.trec>`.

With several processes: `accelerate launch train/rerank.py …`. `--help` shows the keys.
"""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("rerank", groups=False, verbatim=("prompt", "start", "shot"))
def main(composed: DictConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from sgpt.cli import launch
    from sgpt.cli.compose import typed
    from sgpt.retrieval.rerank import RerankConfig, run_rerank

    config = typed(RerankConfig, composed)
    accelerator = launch.accelerate(precision="fp32", seed=0, threads=config.threads)
    results = run_rerank(config, accelerator.device)
    if accelerator.is_main_process:
        metrics = list(next(iter(results.values())))
        table = Table("system", *metrics, title=f"{config.data}, {config.split}, results × 100")
        for system, values in results.items():
            table.add_row(system, *(f"{100 * values[metric]:.2f}" for metric in metrics))
        console = Console(markup=False)  # a name may hold brackets
        console.print(table)
        console.print(f"run      {config.output}\nmetrics  {config.output}.json", highlight=False, soft_wrap=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
