"""AdamW with linear warm-up, as SGPT trained: no weight decay on biases and norms, betas .9/.999, clip 1.0."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import get_scheduler

from sgpt.runtime.errors import InputError
from sgpt.runtime.values import BELOW_ONE, MOST, NOT_NEGATIVE, POSITIVE, Range, check_choice, check_ranges

log = logging.getLogger(__name__)
# our names -> transformers', whose "constant" has no warm-up
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass
class OptimConfig:
    """AdamW, and how the learning rate rises and falls."""

    learning_rate: float = 3.2e-4
    """Learning rate at its peak, after the warm-up."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases and norm gains have none, so with tuning=bitfit it has no effect."""
    warmup_steps: float = 0.1
    """Optimizer steps in which the learning rate rises from 0 to its peak; a number below 1 is a share of all steps."""
    schedule: str = "linear"
    """How the learning rate goes on after the warm-up: linear or cosine, to 0 after the last step, or constant."""
    max_grad_norm: float = 1.0
    """Length to which a longer gradient is cut, over all learning parameters; 0 cuts none."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients, for each step."""
    beta2: float = 0.999
    """AdamW's decay of the mean of the squared gradients, for each step."""
    epsilon: float = 1e-6
    """What AdamW adds to the root of the mean squared gradient, so that it never divides by 0."""

    def __post_init__(self) -> None:
        check_choice("optim.schedule", self.schedule, SCHEDULES)
        check_ranges(
            self, "optim.", learning_rate=POSITIVE, weight_decay=NOT_NEGATIVE, warmup_steps=Range("0 or more", 0, MOST),
            max_grad_norm=NOT_NEGATIVE, beta1=BELOW_ONE, beta2=BELOW_ONE, epsilon=POSITIVE,
        )  # fmt: skip
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise InputError(
                f"optim.warmup_steps={self.warmup_steps} is neither a number of steps nor a share of them; "
                "give 100, or 0.1"
            )


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Decays matrices only: biases and norm gains are vectors."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int):
    """Stepped once an optimizer step; a share of warm-up is rounded up, as the original does."""
    is_share = config.warmup_steps < 1
    warmup = math.ceil(config.warmup_steps * steps) if is_share else int(config.warmup_steps)
    if warmup >= steps:
        log.warning(
            "optim.warmup_steps=%d, and there are %d steps: the learning rate ends at %.3g and not at "
            "optim.learning_rate=%g; set it below 1 for a share of all steps",
            warmup, steps, config.learning_rate * (steps - 1) / warmup, config.learning_rate,
        )  # fmt: skip
    return get_scheduler(SCHEDULES[config.schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
