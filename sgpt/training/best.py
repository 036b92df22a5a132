"""The best step by the dev sets: which one it is, when to stop waiting for a better one, and its weights at the end.

All of it is in the checkpoint's state (TrainState), so that a resumed run decides as the uninterrupted one.
"""

import logging
from collections.abc import Mapping

from torch import nn

from sgpt.data.formats.beir import RetrievalSet
from sgpt.encoder.adapter import TRAINED
from sgpt.evaluation.evaluate import Results, Sets
from sgpt.retrieval.metrics import CORRELATIONS, RANKING_METRICS, main_metric
from sgpt.runtime.distributed import on_all
from sgpt.runtime.errors import InputError
from sgpt.training import checkpoint
from sgpt.training.checkpoint import TrainState
from sgpt.training.run_folder import RunFolder

log = logging.getLogger(__name__)
MEAN = "mean"  # of the main metrics of all dev sets


def check_keep_best(keep_best: str | None, sets: Sets) -> None:
    """InputError where no dev set gives this value, with those that can be chosen."""
    if keep_best in (None, MEAN):
        return
    known = []
    for dataset in (*sets.retrieval, *sets.sts):
        metrics = RANKING_METRICS if isinstance(dataset, RetrievalSet) else CORRELATIONS
        known += [f"{dataset.name}/{metric}" for metric in metrics]
    if keep_best not in known:
        raise InputError(
            f"trainer.keep_best={keep_best!r} is no metric of the dev sets; choose {MEAN} or one of {', '.join(known)}"
        )


def dev_value(results: Results, keep_best: str) -> float:
    """What decides between two evaluations, the higher the better."""
    if keep_best != MEAN:
        name, _, metric = keep_best.rpartition("/")
        return results[name][metric]
    values = [main_metric(metrics)[1] for metrics in results.values()]
    return sum(values) / len(values)


def note_evaluation(state: TrainState, results: Results, keep_best: str | None) -> bool:
    """Notes in the state that the dev sets were scored after its step; whether it is the best one so far.

    Of equal ones the first is. With keep_best=null nothing is compared.
    """
    state.evaluated_step = state.step
    if keep_best is None:
        return False
    value = dev_value(results, keep_best)
    if state.best_value is not None and not value > state.best_value:
        state.evaluations_without_better += 1
        return False
    state.best_step, state.best_value, state.evaluations_without_better = state.step, value, 0
    return True


def is_out_of_patience(state: TrainState, patience: int | None) -> bool:
    return patience is not None and state.evaluations_without_better >= patience


def take_best(run: RunFolder, parameters: Mapping[str, nn.Parameter], state: TrainState) -> None:
    """Puts the weights of the best step into the parameters, at the end of a run; all processes call it.

    Nothing is done where none was noted. Where its checkpoint is gone, a warning says so, the last step's weights stay,
    and the state names no best step any more.
    """
    if not state.best_step:
        return
    folder = run.checkpoints / f"step-{state.best_step}"
    if not on_all(folder.is_dir):
        log.warning("%s, the best step, is gone: the weights of step %d are kept instead", folder, state.step)
        state.best_step, state.best_value = 0, None
        return
    on_all(lambda: checkpoint.load_parameters(folder / TRAINED, parameters))
    log.info(
        "adapter and export are made from step %d of %d, the best on the dev sets (%.4f)",
        state.best_step, state.step, state.best_value,
    )  # fmt: skip
