"""Learning rates step by step, against their formulas written out."""

import math

import pytest
import torch
from torch import nn

from sgpt.runtime.errors import InputError
from sgpt.training.optim import SCHEDULES, OptimConfig, build_optimizer, build_schedule

PEAK, WARMUP, STEPS = 0.5, 4, 20
AFTER = {  # share of the peak, when so much of the steps after the warm-up is over
    "linear": lambda over: 1 - over,
    "cosine": lambda over: (1 + math.cos(math.pi * over)) / 2,
    "constant": lambda over: 1,
}


def learning_rates(config: OptimConfig, steps: int) -> list[float]:
    optimizer = build_optimizer({"bias": nn.Parameter(torch.zeros(3))}, config)
    schedule = build_schedule(optimizer, config, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [WARMUP, WARMUP / STEPS])
@pytest.mark.parametrize("schedule", AFTER)
def test_the_learning_rate_rises_to_its_peak_and_goes_on_as_the_schedule_says(schedule, warmup, caplog):
    rates = learning_rates(OptimConfig(learning_rate=PEAK, warmup_steps=warmup, schedule=schedule), STEPS)
    rising = [PEAK * step / WARMUP for step in range(WARMUP)]
    after = [PEAK * AFTER[schedule]((step - WARMUP) / (STEPS - WARMUP)) for step in range(WARMUP, STEPS)]
    assert rates == pytest.approx([*rising, *after])
    assert not caplog.messages


def test_every_schedule_is_tested():
    assert AFTER.keys() == SCHEDULES.keys()


def test_a_warm_up_as_long_as_the_run_says_where_the_learning_rate_ends(caplog):
    rates = learning_rates(OptimConfig(learning_rate=PEAK, warmup_steps=1000), STEPS)
    assert rates[-1] == pytest.approx(PEAK * 19 / 1000)
    assert caplog.messages == [
        "optim.warmup_steps=1000, and there are 20 steps: the learning rate ends at 0.0095 and not at "
        "optim.learning_rate=0.5; set it below 1 for a share of all steps"
    ]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(InputError, match="'cosine_with_restarts' is unknown; choose linear, cosine or constant"):
        OptimConfig(schedule="cosine_with_restarts")
