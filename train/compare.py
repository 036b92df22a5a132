"""Compare training runs on one page: `python train/compare.py runs=[runs/a,runs/b]`."""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("compare", groups=False)
def main(composed: DictConfig) -> None:
    from pathlib import Path

    from rich.console import Console

    from sgpt.cli.compose import typed
    from sgpt.evaluation.runs import CompareConfig, comparison_table, read_runs, write_comparison

    config = typed(CompareConfig, composed)
    runs = read_runs(config)
    write_comparison(runs, Path(config.output))
    console = Console(markup=False)
    console.print(comparison_table(runs))
    console.print(f"page  {config.output}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
