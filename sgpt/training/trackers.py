"""Trackers of experiments, by Accelerate."""

import os
from dataclasses import asdict

from accelerate import Accelerator

from sgpt.training.config import TrainConfig


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """To be called once the run folder exists: trackers write into it."""
    if not config.logging.tracker:
        return
    os.environ.setdefault("WANDB_MODE", config.logging.mode)
    options = {"name": config.name, "dir": f"{config.runs}/{config.name}"}
    accelerator.init_trackers(config.logging.project, config=_flat(asdict(config)), init_kwargs={"wandb": options})


def _flat(tree: dict, prefix: str = "") -> dict[str, str | int | float | bool]:
    """The tree's numbers and texts under dotted names, as trackers take them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
