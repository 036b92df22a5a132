"""Said before anything is written: what a run will do, how much memory and time it takes, and what looks wrong.

What cannot be trained is refused. Weights and random states stay as they are. trainer.dry_run=true ends a run here.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from sgpt.data.feed.sampling import Feed
from sgpt.decoder.families import position_limit
from sgpt.decoder.packing import TOKENS_ON_GPU
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import Sets
from sgpt.preflight.forecast import FirstBatches, Forecast, forecast
from sgpt.preflight.traps import SampledTexts, test_sets_in_training, trap_warnings
from sgpt.runtime.distributed import world
from sgpt.runtime.errors import InputError
from sgpt.runtime.progress import clock, log_progress
from sgpt.text.markers import ROLES, Role
from sgpt.text.special_tokens import describe_frame
from sgpt.training.config import TrainConfig
from sgpt.training.trainer import TrainerConfig
from sgpt.training.tuning import count_parameters, precisions, trainable_parameters

log = logging.getLogger(__name__)
MEASURED = 64  # texts of a test set, by whose lengths the time of its evaluation is known


@dataclass(frozen=True)
class Preflight:
    """What will happen and what was measured for it.

    table: label -> a line. seen: of the warnings those of test sets whose queries or pairs are trained on. tokens: of
    all steps and processes, equal texts of a batch once.
    """

    table: Mapping[str, str]
    warnings: Sequence[str]
    seen: Sequence[str]
    steps: int
    tokens: float
    first: FirstBatches
    forecast: Forecast

    def log(self) -> None:
        width = max(map(len, self.table)) + 2
        for label, line in self.table.items():
            log.info("%s", f"{label:<{width}}{line}")
        for warning in self.warnings:
            log.warning("warning: %s", warning)

    def print(self, title: str) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, show_header=False)
        for label, line in self.table.items():
            table.add_row(label, Text(line))
        console = Console(markup=False, highlight=False)
        console.print(table)
        for warning in self.warnings:
            console.print(f"warning: {warning}", soft_wrap=True)


def preflight(
    encoder: Encoder, feed: Feed, config: TrainConfig, accelerator: Accelerator, test_sets: Sets, dev_sets: Sets,
    steps_done: int = 0,
) -> Preflight:  # fmt: skip
    """All processes call it, with the tuned encoder on its device; the warnings are the main process's.

    steps_done: of a run that is resumed; the time is that of the others.
    InputError, on all, for what cannot be trained.
    """
    trainer, processes = config.trainer, accelerator.num_processes
    steps = trainer.steps(feed.batches_per_epoch)
    num_batches = steps * trainer.gradient_accumulation
    with log_progress("trying a part of the first batch"):
        _refuse(encoder, feed)
        first = FirstBatches.of(encoder, feed, config, accelerator, num_batches)
        if not first.negatives:
            raise InputError(
                "no query of the first batches has a negative: their documents are all alike, or answer every query; "
                "python train/inspect_data.py shows them"
            )
        expected = forecast(encoder, first, config, accelerator, num_batches)
        sampled = SampledTexts.of(feed, encoder.tokenizer)
        tokens = first.tokens * num_batches * processes
        device, threads = accelerator.device.type, torch.get_num_threads()
        table = {
            "learning": _learning(encoder, config),
            "computed on": f"{device}, {processes} process(es), {threads} thread(s) each",
            "steps": _steps(feed, trainer, steps, steps_done, tokens),
            "negatives": f"{first.negatives:.1f} a query of {_queries_and_candidates(feed)}",
            "texts": _texts(encoder, feed, sampled),
            "padding": f"{100 * first.padding_share:.0f} % of what is computed",
        }
        if trainer.shard_trunk:
            table["memory and time"] = "not known: until training the trunk is whole and on the CPU"
        else:
            table["memory"] = _memory(expected)
            table["time"] = _time(encoder, trainer, expected, steps, steps_done, tokens, test_sets, dev_sets)
        told: list[str] = []
        seen: list[str] = []
        if accelerator.is_main_process:
            told += trap_warnings(encoder, feed, sampled)
            for said, is_seen in test_sets_in_training(feed, {"test": test_sets, "dev": dev_sets}):
                told.append(said)
                seen += [said] if is_seen else []
    if (dev_sets.retrieval or dev_sets.sts) and not trainer.evaluate_every_steps:
        told.append(
            "dev sets are named and never scored, so adapter and export are made from the last step; set "
            "trainer.evaluate_every_steps"
        )
    if first.padding_share:
        told.append(f"{type(encoder.trunk).__name__} cannot compute texts end to end without padding")
    if trainer.gradient_accumulation > 1:
        told.append(
            f"gradient_accumulation={trainer.gradient_accumulation} adds no in-batch negatives; for more, raise "
            "trainer.queries_per_process (memory does not bound it: what does not fit is computed twice) or use more "
            "processes"
        )
    if expected.added_bytes > expected.free_bytes and not trainer.shard_trunk:
        told.append(
            f"training takes {_gigabytes(expected.added_bytes)} more than the process has now, and "
            f"{_gigabytes(expected.free_bytes)} are free; lower trainer.tokens_per_pack or trainer.keep_gigabytes"
        )
    return Preflight(table, told, seen, steps, tokens, first, expected)


def _refuse(encoder: Encoder, feed: Feed) -> None:
    """InputError where nothing learns, a pack is too large for a GPU, or texts of a source may have more tokens than
    the base has positions.
    """
    trunk = encoder.trunk
    if encoder.device.type == "cuda" and encoder.pack_size > TOKENS_ON_GPU and _learns_bias_of_layer_norm(trunk):
        raise InputError(
            f"trainer.tokens_per_pack={encoder.pack_size}: beyond {TOKENS_ON_GPU:,} torch's layer norm has no gradient "
            "for a bias alone on a GPU (pytorch#193016); lower it"
        )
    if not trainable_parameters(trunk):
        raise InputError(f"no parameter of {type(trunk).__name__} learns; choose another tuning")
    limit = position_limit(trunk)
    for source in feed.sources:
        for role in ROLES:
            longest = source.frames[role].length
            if limit is not None and longest > limit:
                raise InputError(
                    f"{source.name}: a {role} may have {longest} tokens, and {type(trunk).__name__} has {limit} "
                    f"positions; lower {role}_max_tokens of this source to {limit} or less"
                )


def _learns_bias_of_layer_norm(trunk: nn.Module) -> bool:
    """And not its gain."""
    norms = [module for module in trunk.modules() if isinstance(module, nn.LayerNorm) and module.bias is not None]
    return any(norm.bias.requires_grad and not norm.weight.requires_grad for norm in norms)


def _learning(encoder: Encoder, config: TrainConfig) -> str:
    """As in "9,216 of 1,200,000 parameters (0.7680 %), bfloat16 trunk, float32 biases, peak learning rate 1.00e-02"."""
    learned, total = count_parameters(encoder.trunk)
    types = precisions(encoder.trunk, config.trainer.precision)
    only_biases = all(name.endswith("bias") for name in trainable_parameters(encoder.trunk))
    kind = "biases" if only_biases else "learning parameters"
    computed = ", computed in bfloat16" if types["computed"] == "bf16" else ""
    return (
        f"{learned:,} of {total:,} parameters ({100 * learned / total:.4f} %), {types['frozen']} trunk, "
        f"{types['trained']} {kind}{computed}, peak learning rate {config.optim.learning_rate:.2e}"
    )


def _steps(feed: Feed, trainer: TrainerConfig, steps: int, done: int, tokens: float) -> str:
    examples = sum(len(source.examples) for source in feed.sources)
    epochs = steps * trainer.gradient_accumulation / feed.batches_per_epoch
    so_far = f" ({done:,} are done)" if done else ""
    return f"{steps:,}{so_far}, which is {epochs:.2f} epochs of {examples:,} examples and {_rounded(tokens)} tokens"


def _queries_and_candidates(feed: Feed) -> str:
    queries = feed.queries_in_total
    candidates = sorted({queries * (1 + source.num_hard_negatives) for source in feed.sources})
    return f"{' or '.join(map(str, candidates))} candidates, in batches of {queries} queries in total"


def _texts(encoder: Encoder, feed: Feed, sampled: SampledTexts) -> str:
    """Of the first source, what stands around its texts; of all, how many are cut."""

    def described(role: Role, plural: str) -> str:
        frame = feed.sources[0].frames[role]
        share = f"{100 * sampled.truncated[role]:.1f} % are cut to {frame.length} tokens"
        return f"{plural} as {describe_frame(frame, encoder.tokenizer)}, {share}"

    return f"{described('query', 'queries')}; {described('document', 'documents')} (of {sampled.examples} sampled)"


def _memory(expected: Forecast) -> str:
    twice = 1 - expected.kept_share
    recomputed = f"; {100 * twice:.0f} % of the texts are computed twice" if twice else ""
    peak, added, free = map(_gigabytes, (expected.peak_bytes, expected.added_bytes, expected.free_bytes))
    return f"{peak} at most in each process, of which {added} are to come; {free} are free{recomputed}"


def _time(
    encoder: Encoder, trainer: TrainerConfig, expected: Forecast, steps: int, done: int, tokens: float, tests: Sets,
    dev: Sets,
) -> str:  # fmt: skip
    """Of the steps to come, and of the evaluations by the model alone."""
    step_tokens = tokens / steps
    training = clock((steps - done) * expected.step_seconds)
    line = f"about {training} of training, {step_tokens / expected.step_seconds:,.0f} tokens/s"
    times_test = 1 if done else 2  # before and after
    times_dev = sum(trainer.evaluates_after(step, steps) for step in range(done + 1, steps + 1))
    for sets, purpose, times, processes in ((tests, "test", times_test, 1), (dev, "dev", times_dev, world()[1])):
        seconds = _tokens_of(encoder, sets) * expected.forward_seconds / processes
        if seconds and times:
            line += f"; {times} evaluation{'s' if times > 1 else ''} on the {purpose} sets, about {clock(seconds)} each"
    return line


def _tokens_of(encoder: Encoder, sets: Sets) -> float:
    """Tokens of all texts that an evaluation embeds, by the lengths of some."""
    kinds: list[tuple[Role, list[str]]] = []
    for dataset in sets.retrieval:
        kinds += [("query", [*dataset.queries.values()]), ("document", [*dataset.corpus.values()])]
    kinds += [("query", [*pairs.first, *pairs.second]) for pairs in sets.sts]
    total = 0.0
    for role, texts in kinds:
        measured = encoder.token_ids(texts[:: max(1, len(texts) // MEASURED)], role)
        total += len(texts) * sum(map(len, measured)) / max(1, len(measured))
    return total


def _rounded(number: float) -> str:
    """As in 3.1 million."""
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,.0f}"


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB"
