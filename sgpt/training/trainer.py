"""The training loop, readable from top to bottom.

The loop owns control flow: log, save and evaluate are three `if every(n, step)` lines, so their order is visible.
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

from sgpt.data.feed.prefetch import ahead
from sgpt.data.feed.sampling import Feed
from sgpt.encoder.encoder import TOKENS_PER_PACK, Encoder
from sgpt.evaluation.evaluate import Results
from sgpt.runtime.distributed import average_gradients
from sgpt.runtime.errors import InputError
from sgpt.runtime.interrupt import Interrupted, Stop
from sgpt.runtime.progress import under_way
from sgpt.runtime.values import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, SEED, THREADS, check_ranges
from sgpt.training import checkpoint
from sgpt.training.checkpoint import TrainState
from sgpt.training.log import MetricsLog, free_memory_bytes, refuse_not_finite
from sgpt.training.loss import LossConfig
from sgpt.training.optim import OptimConfig, build_optimizer, build_schedule
from sgpt.training.run_folder import Run
from sgpt.training.step import contrastive_step
from sgpt.training.tuning import count, learning

log = logging.getLogger(__name__)


@dataclass
class TrainerConfig:
    """queries_per_process: Q; queries in total are Q times processes, and that times R are the candidates of each query.

    epochs, max_steps: whichever ends first. gradient_accumulation: micro-batches a step; it does NOT add in-batch
    negatives, more processes or a larger Q do. tokens_per_pack: computed at a time. keep_gigabytes: of activations that may
    stay alive in each process; what does not fit is computed twice, so that Q is limited by time alone; null takes half of
    the memory that is free at the start, 0 keeps none (GradCache). The gradient is the same. precision: fp32 or bf16
    (autocast). evaluate_every_steps: 0 evaluates before and after only. threads: of each process on a CPU; null shares the cores.
    """

    queries_per_process: int = 64
    epochs: int = 1
    max_steps: int | None = None
    gradient_accumulation: int = 1
    tokens_per_pack: int = TOKENS_PER_PACK
    keep_gigabytes: float | None = None
    precision: str = "fp32"
    seed: int = 0
    threads: int | None = None
    log_every_steps: int = 10
    save_every_steps: int = 100
    keep_checkpoints: int = 2
    evaluate_every_steps: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"trainer.precision={self.precision!r} is unknown; choose fp32 or bf16")
        check_ranges(
            self, "trainer.", queries_per_process=COUNT, epochs=COUNT, gradient_accumulation=COUNT, tokens_per_pack=COUNT,
            log_every_steps=COUNT, save_every_steps=COUNT, keep_checkpoints=COUNT, evaluate_every_steps=COUNT_OR_NONE, seed=SEED,
            max_steps=COUNT.or_null("for whole epochs"), keep_gigabytes=NOT_NEGATIVE.or_null("for half of the free memory"),
            threads=THREADS.or_null("to share the cores"),
        )  # fmt: skip

    def steps(self, batches_per_epoch: float) -> int:
        """Optimizer steps of the whole run: enough for every example of every epoch."""
        if batches_per_epoch * self.epochs < self.gradient_accumulation:
            raise InputError(
                f"trainer.gradient_accumulation={self.gradient_accumulation} is more than the {batches_per_epoch * self.epochs:.1f} "
                "batches of the run; lower it"
            )
        steps = math.ceil(batches_per_epoch * self.epochs / self.gradient_accumulation)
        return min(steps, self.max_steps or steps)


def check(feed: Feed) -> None:
    """InputError when a batch could teach nothing. Known before anything is written."""
    if feed.queries_in_total * (1 + min(source.num_hard_negatives for source in feed.sources)) < 2:
        raise InputError(
            "a batch has one query and no hard negative, so there is no negative at all and the loss would be 0; "
            "raise trainer.queries_per_process or data.num_hard_negatives"
        )


def train(
    encoder: Encoder,
    feed: Feed,
    accelerator: Accelerator,
    run: Run,
    config: TrainerConfig,
    loss: LossConfig,
    optim: OptimConfig,
    evaluate: Callable[[], Results],
) -> TrainState:
    """Trains what `tuning` left learning, from the newest checkpoint of the run when there is one.

    evaluate: results on the dev sets, called every `evaluate_every_steps` on all processes.
    Raises Interrupted, with the last step saved, after Ctrl-C or SIGTERM.
    """
    check(feed)
    rank, processes, steps = accelerator.process_index, accelerator.num_processes, config.steps(feed.batches_per_epoch)
    parameters = learning(encoder.trunk)
    optimizer = build_optimizer(parameters, optim)
    schedule = build_schedule(optimizer, optim, steps)

    torch.manual_seed(config.seed * 1_000_003 + rank)  # dropout differs by process
    state = TrainState(processes=processes)
    if newest := checkpoint.latest(run.checkpoints):
        state = checkpoint.load(newest, parameters, optimizer, schedule)
        log.info("resumed from %s", newest)
    keep_bytes = free_memory_bytes(encoder.device) / 2 if config.keep_gigabytes is None else config.keep_gigabytes * 1e9
    metrics = MetricsLog(run, state, steps, accelerator)
    if state.step and every(config.evaluate_every_steps, state.step) and not metrics.has_dev(state.step):  # interrupted before it was measured
        metrics.write_dev(state, evaluate())

    coming = ahead(lambda number: feed.batch(number, rank), range(state.batches, steps * config.gradient_accumulation))
    encoder.train()
    with Stop() as stop, under_way("training", steps) as work:
        while state.step < steps:
            started, num_tokens, outcomes = time.perf_counter(), 0, []
            is_logged = every(config.log_every_steps, state.step + 1) or state.step + 1 == steps
            mean_loss = torch.zeros((), device=encoder.device)
            for batch in islice(coming, config.gradient_accumulation):
                with accelerator.autocast():
                    outcome = contrastive_step(encoder, batch, loss, keep_bytes=keep_bytes, weight=1 / config.gradient_accumulation)
                state.batches += 1
                num_tokens += batch.num_tokens
                mean_loss += outcome.loss / config.gradient_accumulation
                if is_logged:  # else the embeddings of all micro-batches would stay in memory
                    outcomes.append(outcome)
            average_gradients(parameters.values())
            norm = nn.utils.clip_grad_norm_(parameters.values(), optim.max_grad_norm or math.inf)
            learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            state.step += 1
            state.seconds += time.perf_counter() - started
            work.done = state.step
            metrics.count(config.queries_per_process * config.gradient_accumulation, num_tokens, time.perf_counter() - started)

            if is_logged:
                metrics.write(state, mean_loss, outcomes, learning_rate, norm)
            evaluates = every(config.evaluate_every_steps, state.step)
            saves = every(config.save_every_steps, state.step) or state.step == steps
            if (evaluates or saves) and not is_logged:
                refuse_not_finite(state.step, float(mean_loss), float(norm), learning_rate)
            if evaluates and (results := stop.unless_asked(evaluate)) is not None:
                metrics.write_dev(state, results)
                encoder.train()
            stopping = stop.agreed()
            if saves or stopping:
                refuse_not_finite(state.step, float(mean_loss), float(norm), learning_rate)  # also of a step that only a signal saves
                checkpoint.save(run.checkpoints, parameters, optimizer, schedule, state, config.keep_checkpoints)
            if stopping:
                raise Interrupted(f"step {state.step} of {steps} is saved")
    return state


def every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def announce(encoder: Encoder, feed: Feed, config: TrainerConfig, optim: OptimConfig, accelerator: Accelerator) -> None:
    """One block: what is about to happen, and what part of the texts the limits cut."""
    steps = config.steps(feed.batches_per_epoch)
    learned, total = count(encoder.trunk)
    queries = config.queries_per_process * accelerator.num_processes
    r = 1 + feed.sources[0].num_hard_negatives
    sample = [feed.sources[source].examples[example] for source, example, _ in feed.rows(0, 0)[:256]]
    cut = {
        "queries": encoder.truncation_share([example.query for example in sample], "query"),
        "documents": encoder.truncation_share([example.positive for example in sample], "document"),
    }
    log.info("learning %s of %s parameters (%.4f %%)", f"{learned:,}", f"{total:,}", 100 * learned / total)
    log.info("%s examples, %d queries a batch in total, %d candidates a query, %d steps (%.2f epochs)",
             f"{sum(len(source.examples) for source in feed.sources):,}", queries, queries * r, steps,
             steps * config.gradient_accumulation / feed.batches_per_epoch)
    log.info("peak learning rate %.2e, %s, %s, %d process(es), %d thread(s) each", optim.learning_rate, _precision(encoder, config), encoder.device,
             accelerator.num_processes, torch.get_num_threads())
    log.info("truncated at the limits: %.1f %% of queries, %.1f %% of documents (of %d sampled)", 100 * cut["queries"], 100 * cut["documents"], len(sample))
    rows = [*encoder.token_ids([example.query for example in sample], "query"), *encoder.token_ids([example.positive for example in sample], "document")]
    if padding := encoder.padding_share(rows):
        log.warning("%s cannot be told where texts end, so they are padded: %.0f %% of what is computed is padding",
                    type(encoder.trunk).__name__, 100 * padding)
    if config.gradient_accumulation > 1:
        log.warning("gradient_accumulation=%d adds no in-batch negatives: each query still sees %d candidates. For more, raise trainer."
                    "queries_per_process (memory does not bound it: what does not fit is computed twice) or use more processes",
                    config.gradient_accumulation, queries * r)


def _precision(encoder: Encoder, config: TrainerConfig) -> str:
    """What the trunk's weights, what learns and the computation are in, for example "bfloat16 trunk, float32 biases"."""
    trained = learning(encoder.trunk)
    half = {parameter.dtype for parameter in encoder.trunk.parameters()} - {torch.float32}
    trunk = _name(half.pop()) if half else "float32"
    what = "biases" if all(name.endswith("bias") for name in trained) else "learning parameters"
    weights = f"{trunk} trunk, {_name(next(iter(trained.values())).dtype)} {what}"
    return weights + (", computed in bfloat16" if config.precision == "bf16" and trunk != "bfloat16" else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
