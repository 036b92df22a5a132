"""One row of training, for a fresh process: some optimizer steps, their time, memory, losses and gradient norms."""

from collections.abc import Sequence

from torch import nn

from measure.engines import BESIDE, ENGINES, Variant, count_positions, precision
from measure.given import Setting
from measure.processes import MB, peak_bytes, settle, stopwatch
from sgpt.data.feed.collate import collate
from sgpt.data.feed.example import Example
from sgpt.decoder.trunk import load_tokenizer
from sgpt.text.markers import frames
from sgpt.training.optim import OptimConfig, build_optimizer
from sgpt.training.tuning import trainable_parameters

UNTIMED = 64  # examples at most of the untimed step; a large batch needs no second one to be warm


def train(setting: dict, variant: dict, steps: int, beside: str | None = None) -> dict:
    """One row: `steps` optimizer steps. beside: a row of BESIDE, timed in this process on the same batches."""
    chosen, given = Variant(**variant), Setting(**setting)
    texts = given.examples()
    model, step = ENGINES[chosen.engine](given, **chosen.options)
    parameters = trainable_parameters(model)
    optimizer = build_optimizer(parameters, OptimConfig())
    positions = count_positions(model)

    def take(batch: Sequence[Example]) -> tuple[float, float]:
        with precision(given):
            loss = step(batch)
        norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss), float(norm)

    take(texts[:2])  # imports, and what the kernels keep for themselves
    before = settle()
    checked = [take(texts[: min(given.batch, UNTIMED)])]
    batches = [texts[start : start + given.batch] for start in range(0, steps * given.batch, given.batch)]
    positions.clear()
    with stopwatch() as spent:
        checked += [take(batch) for batch in batches]
    row = {
        "cpu_seconds": spent["cpu"] / steps, "wall_seconds": spent["wall"] / steps,
        "pairs_per_second": given.batch * steps / spent["wall"],
        "peak_mb": (peak_bytes() - before) / MB, "before_mb": before / MB,
        "losses": [loss for loss, _ in checked], "gradient_norms": [norm for _, norm in checked],
    }  # fmt: skip
    tokenizer = load_tokenizer(given.model)
    collated = [collate(batch, tokenizer, frames(given.markers, tokenizer)) for batch in batches]
    tokens = sum(batch.num_tokens for batch in collated)
    row |= {"tokens": tokens // steps, "computed": sum(positions) / tokens}
    return row | ({f"{beside}_seconds": BESIDE[beside](model, collated) / steps} if beside else {})
