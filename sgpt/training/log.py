"""What training logs: `metrics.jsonl` and the console, with the memory that is free or was used."""

import json
import logging
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from sgpt.evaluation.evaluate import Results
from sgpt.runtime.distributed import gather
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import write_whole
from sgpt.runtime.progress import clock, note_line_written
from sgpt.training.checkpoint import TrainState
from sgpt.training.health import batch_statistics, collapse_alarm
from sgpt.training.loss import StepResult
from sgpt.training.run_folder import RunFolder

log = logging.getLogger(__name__)


class MetricsLog:
    """`metrics.jsonl` and the console; on resuming, lines written after the checkpoint are dropped.

    queries, tokens, seconds: of this process, since the last line.
    """

    def __init__(self, run: RunFolder, state: TrainState, steps: int, accelerator: Accelerator) -> None:
        self.file = run.folder / "metrics.jsonl"
        self.steps = steps
        self.accelerator = accelerator
        self.queries, self.tokens, self.seconds = 0, 0, 0.0
        self.has_alarm = False
        if accelerator.is_main_process:
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if self.file.is_file() else []
            whole = [line for line in lines if line.endswith("\n")]  # a killed process may leave half of the last line
            kept = []
            for number, text in enumerate(whole, start=1):
                line = _parsed(text, self.file, number)
                # an evaluation that the checkpoint does not know is done again
                last = state.evaluated_step if "dev" in line else state.step
                if line["step"] <= last:
                    kept.append(text)
                    self.has_alarm |= "alarm" in line
            write_whole(self.file, "".join(kept))

    def count(self, queries: int, tokens: int, seconds: float) -> None:
        """Adds what a step of this process took."""
        self.queries += queries
        self.tokens += tokens
        self.seconds += seconds

    def write(
        self, state: TrainState, loss: Tensor, results: Sequence[StepResult], learning_rate: float, norm: Tensor,
        group_norms: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """The line of a step: its mean loss [] on this process, and the results of its micro-batches.

        norm, group_norms: of the whole gradient and of groups of layers (`gradient_norms`). All processes call it.
        """
        loss = gather(loss.float()[None]).mean().item()
        own_counts = [
            self.queries,
            self.tokens,
            sum(result.tokens for result in results),
            sum(result.positions for result in results),
            sum(result.kept_tokens for result in results),
        ]
        counts = gather(torch.tensor(own_counts, device=norm.device)).view(-1, len(own_counts)).sum(0)
        queries, tokens, computed, positions, kept = counts.tolist()
        line = {
            "step": state.step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": float(norm),
            "grad_norms": {group: float(value) for group, value in group_norms.items()},
            "queries_per_second": queries / self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "padding_share": 1 - computed / max(1, positions),
            "kept_share": kept / max(1, computed),
            **batch_statistics(*results),
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "seconds": state.seconds,
        }
        self.queries, self.tokens, self.seconds = 0, 0, 0.0
        alarm = collapse_alarm(line["uniformity"], state.step, self.steps)
        if alarm and not self.has_alarm:
            self.has_alarm = True
            line["alarm"] = alarm
            log.warning("%s", alarm)
        self._append(line)
        left = state.seconds / state.step * (self.steps - state.step)
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  grad %.3f  %.1f queries/s  %.0f tokens/s  padding %.0f %%  "
            "cos+ %.2f  cos- %.2f  %.1f GB  %s left",
            state.step, self.steps, loss, learning_rate, line["grad_norm"],
            line["queries_per_second"], line["tokens_per_second"], 100 * line["padding_share"],
            line["positive_cosine"], line["hardest_negative_cosine"] or math.nan,
            line["peak_memory_bytes"] / 1e9, clock(left),
        )  # fmt: skip
        note_line_written()

    def write_dev(self, state: TrainState, results: Results) -> None:
        """The line of an evaluation on the dev sets."""
        self._append({"step": state.step, "dev": results})
        log.info("step %d/%d  dev %s", state.step, self.steps, json.dumps(results))
        note_line_written()

    def _append(self, line: dict) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        # trackers take numbers under names, and the step apart
        flat = {key: value for key, value in line.items() if key != "step" and not isinstance(value, dict | str)}
        for name, metrics in (line.get("dev", {}) | {"grad_norms": line.get("grad_norms", {})}).items():
            flat |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        self.accelerator.log(flat, step=line["step"])


def _parsed(text: str, file: Path, number: int) -> dict:
    try:
        line = json.loads(text)
        return line | {"step": int(line["step"])}
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{file}, line {number}: not a line of this log ({text.strip()[:40]!r}); delete the line and resume"
        ) from None


def free_memory_bytes(device: torch.device) -> int:
    """Of its GPU, else this process' share of the machine's memory; what is free now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch for tensors
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process since it began: allocated on its GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage begins with the peak of the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
