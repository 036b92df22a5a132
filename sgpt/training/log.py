"""`metrics.jsonl` and the console while training, and the memory that is free and was used."""

import json
import logging
import math
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from sgpt.evaluation.evaluate import Results
from sgpt.runtime.distributed import from_main, gather
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import clock, said
from sgpt.training.checkpoint import TrainState
from sgpt.training.loss import Outcome, health
from sgpt.training.run_folder import Run

log = logging.getLogger(__name__)


class MetricsLog:
    """`metrics.jsonl` and the console; on resuming, lines written after the checkpoint are dropped."""

    def __init__(self, run: Run, state: TrainState, steps: int, accelerator: Accelerator) -> None:
        self.file, self.steps, self.accelerator = run.folder / "metrics.jsonl", steps, accelerator
        self.queries, self.tokens, self.seconds = 0, 0, 0.0
        if accelerator.is_main_process:
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if self.file.is_file() else []
            whole = [line for line in lines if line.endswith("\n")]  # a kill tears the last
            kept = [line for number, line in enumerate(whole, start=1) if _step_of(line, self.file, number) <= state.step]
            self.file.write_text("".join(kept), encoding="utf-8")

    def has_dev(self, step: int) -> bool:
        """All processes call it."""
        lines = from_main(lambda: self.file.read_text(encoding="utf-8").splitlines())
        return any("dev" in line and line["step"] == step for line in map(json.loads, lines))

    def count(self, queries: int, tokens: int, seconds: float) -> None:
        self.queries, self.tokens, self.seconds = self.queries + queries, self.tokens + tokens, self.seconds + seconds

    def write(self, state: TrainState, loss: torch.Tensor, outcomes: Sequence[Outcome], learning_rate: float, norm: torch.Tensor) -> None:
        """All processes call it, with the mean loss and the outcomes of the step's micro-batches. InputError when the loss is no number any more."""
        loss = gather(loss.float()[None]).mean().item()
        texts = [(outcome.tokens, outcome.positions, outcome.kept_tokens) for outcome in outcomes]
        counts = torch.tensor([self.queries, self.tokens, *map(sum, zip(*texts, strict=True))], device=norm.device)
        queries, tokens, computed, positions, kept = gather(counts).view(-1, 5).sum(0).tolist()
        line = {
            "step": state.step, "loss": loss, "learning_rate": learning_rate, "grad_norm": float(norm),
            "queries_per_second": queries / self.seconds, "tokens_per_second": tokens / self.seconds,
            "padding_share": 1 - computed / max(1, positions), "kept_share": kept / max(1, computed), **health(*outcomes),
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device), "seconds": state.seconds,
        }
        self.queries, self.tokens, self.seconds = 0, 0, 0.0
        refuse_not_finite(state.step, loss, line["grad_norm"], learning_rate)
        self._append(line)
        left = state.seconds / state.step * (self.steps - state.step)
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  grad %.3f  %.1f queries/s  %.0f tokens/s  padding %.0f %%  cos+ %.2f  cos- %.2f  %.1f GB  %s left",
            state.step, self.steps, loss, learning_rate, line["grad_norm"], line["queries_per_second"], line["tokens_per_second"],
            100 * line["padding_share"], line["positive_cosine"], line["hardest_negative_cosine"] or math.nan, line["peak_memory_bytes"] / 1e9, clock(left),
        )
        said()

    def write_dev(self, state: TrainState, results: Results) -> None:
        self._append({"step": state.step, "dev": results})
        log.info("step %d/%d  dev %s", state.step, self.steps, json.dumps(results))
        said()

    def _append(self, line: dict) -> None:
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            flat = {k: v for k, v in line.items() if not isinstance(v, dict)} | {
                f"{name}/{metric}": value for name, metrics in line.get("dev", {}).items() for metric, value in metrics.items()
            }
            self.accelerator.log(flat, step=line["step"])


def _step_of(line: str, file: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{file}, line {number}: no line of this log ({line.strip()[:40]!r}); delete the line and resume") from None


def refuse_not_finite(step: int, loss: float, norm: float, learning_rate: float) -> None:
    """On all processes alike: the gradients, and with them the norm, are the same."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise InputError(
            f"step {step}: the loss is {loss}, the gradient norm {norm}; lower optim.learning_rate={learning_rate:.2g} "
            "or use trainer.precision=fp32. Nothing of this step is saved, and earlier checkpoints are untouched"
        )


def free_memory_bytes(device: torch.device) -> int:
    """This process' share of what is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process since it began: allocated on its GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
