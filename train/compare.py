"""Compare training runs on one page: `python train/compare.py runs=[runs/a,runs/b]`."""

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("compare", groups=False)
def main(composed: DictConfig) -> None:
    from pathlib import Path

    from sgpt.cli.compose import typed
    from sgpt.evaluation.runs import CompareConfig, comparison_table, read_runs, write_comparison
    from sgpt.runtime.progress import announce
    from sgpt.sweeps.table import make_console

    config = typed(CompareConfig, composed)
    announce(f"{len(config.runs)} runs are compared: {', '.join(config.runs)}")
    runs = read_runs(config)
    write_comparison(runs, Path(config.output))
    console = make_console()
    console.print(comparison_table(runs))
    console.print(f"page  {config.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
