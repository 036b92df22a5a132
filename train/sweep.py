"""Search the best configuration with Optuna: `python train/sweep.py`, as often as there are to be workers.

A trial is a run of train/biencoder.py, scored on its dev sets; what is tried stands in configs/sweep.yaml.
"""

import sys

from omegaconf import DictConfig

from sgpt.cli.command import script


@script("sweep", groups=False)
def main(composed: DictConfig) -> None:
    from sgpt.cli.compose import compose_training, plain, typed
    from sgpt.sweeps.process import check_in_fork
    from sgpt.sweeps.space import check_values, drawn_overrides, example_values
    from sgpt.sweeps.study import StudyConfig, check_training, run_study, scored_trials
    from sgpt.sweeps.study_report import study_table, write_experiment, write_study_page
    from sgpt.sweeps.table import make_console

    config = typed(StudyConfig, composed)
    check_training(compose_training([*config.overrides, *drawn_overrides(example_values(config.space))]))

    def check_space_by_training() -> None:
        from sgpt.training.config import TrainConfig

        check_values(config.space, lambda drawn: typed(TrainConfig, compose_training([*config.overrides, *drawn])))

    check_in_fork(check_space_by_training)  # TrainConfig imports torch, whose memory is the trials'
    study = run_study(config)

    from sgpt.training.config import TrainConfig  # now that no trial wants the memory

    console = make_console()
    console.print(study_table(study, config))
    if best := scored_trials(study)[:1]:
        recipe = typed(TrainConfig, compose_training([*config.overrides, *drawn_overrides(best[0].params)]))
        experiment = write_experiment(study, config, plain(recipe))
        console.print(f"best configuration  {experiment}   (its first lines say how to start it)", soft_wrap=True)
    console.print(f"plots  {write_study_page(study, config)}", soft_wrap=True)
    if not best:
        sys.stdout.flush()
        print(
            f"error: no trial has a score; why: {config.folder}/<trial>.log. Put it right and raise trials=…, or give "
            "the study another name=…",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
