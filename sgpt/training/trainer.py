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
from sgpt.encoder.encoder import TOKENS_PER_PACK, Encoder
from sgpt.evaluation.evaluate import Results
from sgpt.runtime.distributed import average_gradients
from sgpt.runtime.errors import InputError
from sgpt.runtime.interrupt import Interrupted, Stop
from sgpt.runtime.progress import log_progress
from sgpt.runtime.values import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, SEED, THREADS, check_choice, check_ranges
from sgpt.training import checkpoint
from sgpt.training.checkpoint import TrainState
from sgpt.training.log import MetricsLog, free_memory_bytes, refuse_not_finite
from sgpt.training.loss import LossConfig, StepResult
from sgpt.training.optim import OptimConfig, build_optimizer, build_schedule
from sgpt.training.run_folder import RunFolder
from sgpt.training.step import contrastive_step
from sgpt.training.tuning import count_parameters, precisions, trainable_parameters

log = logging.getLogger(__name__)


@dataclass
class TrainerConfig:
    """How long, in what portions and in what precision a run trains, and how often it logs, saves and evaluates."""

    queries_per_process: int = 64
    """Queries of a batch on each process, Q.

    Queries in total are Q times the processes, and that times R, the documents of each query, are the candidates.
    """
    epochs: int = 1
    """How often every example is seen; training ends after these, or after max_steps, whichever comes first."""
    max_steps: int | None = None
    """Optimizer steps at which training ends; null trains whole epochs."""
    gradient_accumulation: int = 1
    """Batches of each process that make one optimizer step.

    It does NOT add in-batch negatives; more processes or more queries_per_process do.
    """
    tokens_per_pack: int = TOKENS_PER_PACK
    """Tokens that each process computes at a time."""
    keep_gigabytes: float | None = None
    """Gigabytes (1e9 bytes) of activations that may stay alive in each process; what does not fit is computed twice.

    So queries_per_process is limited by time alone, and the gradient is the same. Null takes half of the memory that is
    free at the start; 0 keeps none, which is GradCache.
    """
    precision: str = "fp32"
    """Precision of the computation: fp32, or bf16 by autocast."""
    seed: int = 0
    """Decides the order of examples and the dropout."""
    threads: int | None = None
    """Threads of each process on a CPU; null shares the cores among the processes."""
    log_every_steps: int = 10
    """Optimizer steps from one line of metrics.jsonl to the next."""
    save_every_steps: int = 100
    """Optimizer steps from one checkpoint to the next; the last step is always saved."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept, the newest ones."""
    evaluate_every_steps: int = 0
    """Optimizer steps from one evaluation on the dev sets to the next; 0 never evaluates on them."""

    def __post_init__(self) -> None:
        check_choice("trainer.precision", self.precision, ("fp32", "bf16"))
        check_ranges(
            self,
            "trainer.",
            queries_per_process=COUNT,
            epochs=COUNT,
            gradient_accumulation=COUNT,
            tokens_per_pack=COUNT,
            log_every_steps=COUNT,
            save_every_steps=COUNT,
            keep_checkpoints=COUNT,
            evaluate_every_steps=COUNT_OR_NONE,
            seed=SEED,
            max_steps=COUNT.or_null("for whole epochs"),
            keep_gigabytes=NOT_NEGATIVE.or_null("for half of the free memory"),
            threads=THREADS.or_null("to share the cores"),
        )

    def steps(self, batches_per_epoch: float) -> int:
        """Optimizer steps of the whole run: enough for every example of every epoch."""
        batches = batches_per_epoch * self.epochs
        if batches < self.gradient_accumulation:
            raise InputError(
                f"trainer.gradient_accumulation={self.gradient_accumulation} is more than the {batches:.1f} "
                "batches of the run; lower it"
            )
        steps = math.ceil(batches / self.gradient_accumulation)
        return min(steps, self.max_steps or steps)


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

    evaluate: results on the dev sets, called every `evaluate_every_steps` on all processes.
    Raises Interrupted, with the last step saved, after Ctrl-C, SIGTERM or SIGUSR1.
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
    keep_bytes = free_memory_bytes(encoder.device) / 2 if config.keep_gigabytes is None else config.keep_gigabytes * 1e9
    metrics = MetricsLog(run, state, steps, accelerator)
    if state.step and every(config.evaluate_every_steps, state.step) and not metrics.has_dev(state.step):
        metrics.write_dev(state, evaluate())  # interrupted after the step was saved, before it was measured

    batch_numbers = range(state.batches, steps * config.gradient_accumulation)
    batches = prefetch(lambda number: feed.batch(number, rank), batch_numbers)  # a thread prepares the next one
    encoder.train()
    with Stop() as stop, log_progress("training", steps, state.step) as work:
        while state.step < steps:
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
            norm = nn.utils.clip_grad_norm_(parameters.values(), optim.max_grad_norm or math.inf)
            learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            state.step += 1
            seconds = time.perf_counter() - started
            state.seconds += seconds
            work.done = state.step
            metrics.count(config.queries_per_process * config.gradient_accumulation, num_tokens, seconds)

            evaluates = every(config.evaluate_every_steps, state.step)
            saves = every(config.save_every_steps, state.step) or state.step == steps
            if is_logged:
                metrics.write(state, mean_loss, results, learning_rate, norm)
            elif evaluates or saves:
                refuse_not_finite(state.step, float(mean_loss), float(norm), learning_rate)
            if evaluates and (dev_results := stop.unless_requested(evaluate)) is not None:
                metrics.write_dev(state, dev_results)
                encoder.train()
            stopping = stop.requested_anywhere()
            if saves or stopping:
                # again: a step that is saved only because of a signal was not checked above
                refuse_not_finite(state.step, float(mean_loss), float(norm), learning_rate)
                checkpoint.save(run.checkpoints, parameters, optimizer, schedule, state, config.keep_checkpoints)
            if stopping:
                raise Interrupted(f"step {state.step} of {steps} is saved")
    return state


def every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def announce(encoder: Encoder, feed: Feed, config: TrainerConfig, optim: OptimConfig, accelerator: Accelerator) -> None:
    """Logs in one block what is about to be trained, and how many texts are longer than the limits."""
    steps = config.steps(feed.batches_per_epoch)
    epochs = steps * config.gradient_accumulation / feed.batches_per_epoch
    learned, total = count_parameters(encoder.trunk)
    num_examples = sum(len(source.examples) for source in feed.sources)
    num_queries = config.queries_per_process * accelerator.num_processes
    num_candidates = num_queries * (1 + feed.sources[0].num_hard_negatives)
    sample = [feed.sources[source].examples[example] for source, example, _ in feed.drawn_examples(0, 0)[:256]]
    queries = [example.query for example in sample]
    positives = [example.positive for example in sample]

    log.info("learning %s of %s parameters (%.4f %%)", f"{learned:,}", f"{total:,}", 100 * learned / total)
    log.info(
        "%s examples, %d queries a batch in total, %d candidates a query, %d steps (%.2f epochs)",
        f"{num_examples:,}", num_queries, num_candidates, steps, epochs,
    )  # fmt: skip
    log.info(
        "peak learning rate %.2e, %s, %s, %d process(es), %d thread(s) each",
        optim.learning_rate, _described_precisions(encoder, config.precision), encoder.device,
        accelerator.num_processes, torch.get_num_threads(),
    )  # fmt: skip
    log.info(
        "truncated at the limits: %.1f %% of queries, %.1f %% of documents (of %d sampled)",
        100 * encoder.truncation_share(queries, "query"),
        100 * encoder.truncation_share(positives, "document"),
        len(sample),
    )
    rows = [*encoder.token_ids(queries, "query"), *encoder.token_ids(positives, "document")]
    if padding := encoder.padding_share(rows):
        log.warning(
            "%s cannot compute texts end to end without padding: %.0f %% of what is computed is padding",
            type(encoder.trunk).__name__, 100 * padding,
        )  # fmt: skip
    if config.gradient_accumulation > 1:
        log.warning(
            "gradient_accumulation=%d adds no in-batch negatives: each query still sees %d candidates. For more, raise "
            "trainer.queries_per_process (memory does not bound it: what does not fit is computed twice) or use more "
            "processes",
            config.gradient_accumulation, num_candidates,
        )  # fmt: skip


def _described_precisions(encoder: Encoder, precision: str) -> str:
    """As in "bfloat16 trunk, float32 biases"."""
    types = precisions(encoder.trunk, precision)
    only_biases = all(name.endswith("bias") for name in trainable_parameters(encoder.trunk))
    kind = "biases" if only_biases else "learning parameters"
    weights = f"{types['frozen']} trunk, {types['trained']} {kind}"
    return weights + (", computed in bfloat16" if types["computed"] == "bf16" else "")
