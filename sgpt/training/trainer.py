"""The training loop, readable from top to bottom.

The loop owns control flow: `every` says whether a step is logged, evaluated on the dev sets and saved, which happens in
that order.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import Accelerator
from torch import nn

from sgpt.data.feed.prefetch import prefetch
from sgpt.data.feed.sampling import Feed
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import Results
from sgpt.runtime.distributed import average_gradients
from sgpt.runtime.errors import InputError
from sgpt.runtime.interrupt import Interrupted, Stop
from sgpt.runtime.progress import log_progress
from sgpt.runtime.values import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, SEED, THREADS, check_choice, check_ranges
from sgpt.training import checkpoint
from sgpt.training.bad_batch import BAD_BATCH, refuse_bad_batch
from sgpt.training.best import is_out_of_patience, note_evaluation, take_best
from sgpt.training.checkpoint import TrainState
from sgpt.training.health import gradient_norms
from sgpt.training.log import MetricsLog, free_memory_bytes
from sgpt.training.loss import LossConfig, StepResult
from sgpt.training.optim import OptimConfig, build_optimizer, build_schedule
from sgpt.training.run_folder import RunFolder
from sgpt.training.step import contrastive_step
from sgpt.training.tuning import trainable_parameters

log = logging.getLogger(__name__)


@dataclass
class TrainerConfig:
    """How long, in what portions and in what precision a run trains, and how often it logs, saves and evaluates."""

    queries_per_process: int = 64
    """Queries of a batch on each process, Q.

    Queries in total are Q times the processes, and that times R, the documents of each query, are the candidates.
    """
    epochs: int = 1
    """How many times as many examples as there are are drawn; max_steps may end training before.

    Each is then seen so often, but for sources with weights, of which a small one is seen more often.
    """
    max_steps: int | None = None
    """Optimizer steps at which training ends; null trains whole epochs."""
    gradient_accumulation: int = 1
    """Batches of each process that make one optimizer step.

    It does NOT add in-batch negatives; more processes or more queries_per_process do.
    """
    tokens_per_pack: int | None = None
    """Tokens that each process computes at a time; null takes 2,048 on a CPU, and on a GPU as many as keep it busy."""
    keep_gigabytes: float | None = None
    """Gigabytes (1e9 bytes) of activations that may stay alive in each process; what does not fit is computed twice.

    So queries_per_process is limited by time alone, and the gradient is the same. Null takes half of the memory that is
    free at the start; 0 keeps none, which is GradCache. Those of one pack are alive in any case: lower tokens_per_pack.
    """
    shard_trunk: bool = False
    """Whether the processes share out the frozen weights by FSDP2, for a trunk that does not fit one GPU.

    What learns stays whole in each. Scores before and after training are computed on the CPU then.
    """
    precision: str = "fp32"
    """Precision of the computation: fp32, or bf16 by autocast."""
    deterministic: bool = True
    """Whether a GPU gives the same bits each time, as resuming promises; a CPU does in any case.

    False where a family computes something for which torch has no such algorithm: it is refused before training.
    """
    seed: int = 0
    """Decides the order of examples and the dropout."""
    threads: int | None = None
    """Threads of each process on its processor; null shares the cores among the processes."""
    log_every_steps: int = 10
    """Optimizer steps from one line of metrics.jsonl to the next."""
    save_every_steps: int = 100
    """Optimizer steps from one checkpoint to the next; the last step is always saved."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept, the newest ones; the best is kept besides."""
    evaluate_every_steps: int = 0
    """Optimizer steps from one evaluation on the dev sets to the next; 0 never evaluates on them."""
    dry_run: bool = False
    """Whether to stop before training, with a table of what the run will do, take and may suffer from."""
    keep_best: str | None = "mean"
    """What decides on the step that adapter and export are made from, where dev sets are scored while training.

    A value of theirs, <set>/<metric>, the highest of which is the best; mean is that of the sets' main metrics, nDCG@10
    or Spearman. The last step is then scored as well. null takes the last step, whatever the dev sets say.
    """
    patience: int | None = None
    """Evaluations in a row without a better value after which training stops; null never stops early."""

    def __post_init__(self) -> None:
        check_choice("trainer.precision", self.precision, ("fp32", "bf16"))
        check_ranges(
            self,
            "trainer.",
            queries_per_process=COUNT,
            epochs=COUNT,
            gradient_accumulation=COUNT,
            tokens_per_pack=COUNT.or_null("for what suits the device"),
            log_every_steps=COUNT,
            save_every_steps=COUNT,
            keep_checkpoints=COUNT,
            evaluate_every_steps=COUNT_OR_NONE,
            seed=SEED,
            max_steps=COUNT.or_null("for whole epochs"),
            keep_gigabytes=NOT_NEGATIVE.or_null("for half of the free memory"),
            threads=THREADS.or_null("to share the cores"),
            patience=COUNT.or_null("to train all steps"),
        )
        if self.shard_trunk and self.evaluate_every_steps:
            raise InputError(
                "trainer.shard_trunk=true: dev sets are scored by a whole trunk; set trainer.evaluate_every_steps=0, "
                "and score them after training by train/evaluate.py"
            )
        is_compared = self.evaluate_every_steps > 0 and self.keep_best is not None
        if self.patience is not None and not is_compared:
            raise InputError(
                f"trainer.patience={self.patience} has no effect without evaluations that are compared; set "
                "trainer.evaluate_every_steps and trainer.keep_best, or patience=null"
            )
        if self.keep_best not in (None, "mean") and not is_compared:
            raise InputError(
                f"trainer.keep_best={self.keep_best!r} has no effect without evaluations; name a dev set and set "
                "trainer.evaluate_every_steps, or keep_best=mean"
            )

    def steps(self, batches_per_epoch: float) -> int:
        """Optimizer steps of the whole run: enough for every example of every epoch."""
        batches = batches_per_epoch * self.epochs
        if batches < self.gradient_accumulation:
            lower = "trainer.gradient_accumulation or " if self.gradient_accumulation > 1 else ""
            raise InputError(
                f"the run has {batches:.1f} batches, less than the {self.gradient_accumulation} of one optimizer step "
                f"(trainer.gradient_accumulation); lower {lower}trainer.queries_per_process, or give more data"
            )
        steps = math.ceil(batches / self.gradient_accumulation)
        return min(steps, self.max_steps or steps)

    def keep_bytes(self, device: torch.device) -> float:
        """Of activations, on each process; what keep_gigabytes says, or half of what is free now."""
        return free_memory_bytes(device) / 2 if self.keep_gigabytes is None else self.keep_gigabytes * 1e9

    def evaluates_after(self, step: int, steps: int) -> bool:
        """Whether the dev sets are scored after this step of so many."""
        is_compared = self.evaluate_every_steps > 0 and self.keep_best is not None
        return every(self.evaluate_every_steps, step) or (is_compared and step == steps)


def check_feed(feed: Feed) -> None:
    """InputError when a batch holds no negative. Called before anything is written."""
    fewest_hard_negatives = min(source.num_hard_negatives for source in feed.sources)
    if feed.queries_in_total * (1 + fewest_hard_negatives) < 2:
        raise InputError(
            "a batch has one query and no hard negative, so there is no negative at all and the loss would be 0; "
            "raise trainer.queries_per_process or data.num_hard_negatives"
        )


def train(
    encoder: Encoder,
    feed: Feed,
    accelerator: Accelerator,
    run: RunFolder,
    config: TrainerConfig,
    loss: LossConfig,
    optim: OptimConfig,
    evaluate: Callable[[], Results],
) -> TrainState:
    """Trains the parameters that `tune` left learning, from the newest checkpoint of the run when there is one.

    evaluate: results on the dev sets, the same on all processes, called every `evaluate_every_steps` on all of them.
    In the end the parameters are those of the best step by `keep_best`, which the state names, else of the last.
    Raises Interrupted, with the last step saved, after Ctrl-C, SIGTERM or SIGUSR1; InputError where a gradient is no
    number.
    """
    check_feed(feed)
    rank, processes = accelerator.process_index, accelerator.num_processes
    steps = config.steps(feed.batches_per_epoch)
    parameters = trainable_parameters(encoder.trunk)
    optimizer = build_optimizer(parameters, optim)
    schedule = build_schedule(optimizer, optim, steps)

    torch.manual_seed(config.seed * 1_000_003 + rank)  # dropout differs by process
    state = TrainState(processes=processes)
    if newest := checkpoint.newest_undamaged(run.checkpoints):
        state = checkpoint.load(newest, parameters, optimizer, schedule)
        log.info("resumed from %s", newest)
    keep_bytes = config.keep_bytes(encoder.device)
    metrics = MetricsLog(run, state, steps, accelerator)
    if accelerator.is_main_process:
        (run.folder / BAD_BATCH).unlink(missing_ok=True)  # of a start before

    def save() -> None:
        checkpoint.save(run.checkpoints, parameters, optimizer, schedule, state, config.keep_checkpoints)

    if state.step > state.evaluated_step and config.evaluates_after(state.step, steps):
        dev_results = evaluate()  # interrupted after the step was saved, before it was measured
        note_evaluation(state, dev_results, config.keep_best)
        metrics.write_dev(state, dev_results)
        save()

    batch_numbers = range(state.batches, steps * config.gradient_accumulation)
    batches = prefetch(lambda number: feed.batch(number, rank), batch_numbers)  # a thread prepares the next one
    encoder.train()
    with Stop() as stop, log_progress("training", steps, state.step) as work:
        while state.step < steps and not is_out_of_patience(state, config.patience):
            started = time.perf_counter()
            is_logged = every(config.log_every_steps, state.step + 1) or state.step + 1 == steps
            num_tokens = 0
            mean_loss = torch.zeros((), device=encoder.device)  # stays there: reading it would wait for the GPU
            results: list[StepResult] = []
            for batch in islice(batches, config.gradient_accumulation):
                loss_weight = 1 / config.gradient_accumulation
                with accelerator.autocast():
                    result = contrastive_step(encoder, batch, loss, keep_bytes=keep_bytes, weight=loss_weight)
                state.batches += 1
                num_tokens += batch.num_tokens
                mean_loss += result.loss / config.gradient_accumulation
                if is_logged:  # else the embeddings of all micro-batches would stay in memory
                    results.append(result)
            average_gradients(parameters.values())
            group_norms = gradient_norms(parameters) if is_logged else {}
            norm = nn.utils.clip_grad_norm_(parameters.values(), optim.max_grad_norm or math.inf)
            learning_rate = schedule.get_last_lr()[0]
            # The same on all processes: whatever is no number, loss or gradient, on any of them makes it none. Reading
            # it waits for a GPU, as sorting out the negatives has done in this step before.
            if not norm.isfinite():
                numbers = range(state.batches - config.gradient_accumulation, state.batches)
                with accelerator.autocast():
                    refuse_bad_batch(
                        run, encoder, feed, numbers,
                        step=state.step + 1, loss=mean_loss, norm=norm, learning_rate=optim.learning_rate,
                    )  # fmt: skip
            judges = loss.false_negative_margin is not None or loss.guide is not None
            if judges and state.step == 0 and norm == 0:
                raise InputError(_no_candidate(loss))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            state.step += 1
            seconds = time.perf_counter() - started
            state.seconds += seconds
            work.done = state.step
            metrics.count(config.queries_per_process * config.gradient_accumulation, num_tokens, seconds)

            is_best = False
            if is_logged:
                metrics.write(state, mean_loss, results, learning_rate, norm, group_norms)
            evaluates = config.evaluates_after(state.step, steps)
            if evaluates and (dev_results := stop.unless_requested(evaluate)) is not None:
                is_best = note_evaluation(state, dev_results, config.keep_best)
                metrics.write_dev(state, dev_results)
                encoder.train()
            is_last = state.step == steps or is_out_of_patience(state, config.patience)
            stopping = stop.requested_anywhere()
            if every(config.save_every_steps, state.step) or is_best or is_last or stopping:
                save()
            if stopping:
                raise Interrupted(f"step {state.step} of {steps} is saved")
    if state.step < steps:
        log.info(
            "stopped after step %d of %d: the last %d evaluations were not better (trainer.patience)",
            state.step, steps, state.evaluations_without_better,
        )  # fmt: skip
    take_best(run, parameters, state)
    return state


def _no_candidate(loss: LossConfig) -> str:
    """Of a first gradient that is exactly 0, where something judges which candidates are negatives."""
    judges = {"false_negative_margin": loss.false_negative_margin, "guide": loss.guide}
    stated = " and ".join(f"loss.{key}={value}" for key, value in judges.items() if value is not None)
    return (
        f"the first step would learn nothing, its gradient is 0: {stated} may leave out every candidate (a margin is a "
        "difference of cosines); lower the margin, and set name=<another name>"
    )


def every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
