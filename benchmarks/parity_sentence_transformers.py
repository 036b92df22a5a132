"""Is it the same training? Our loop and sentence-transformers' trainer, from the same base, texts, batch order and
steps.

    python benchmarks/parity_sentence_transformers.py [--steps 60] [--data data/raw/pydocs] [--base data/nano]

Both train the biases of `nano` on pydocs in float32 without dropout. sentence-transformers 6.2 gets an export of the
untuned base (so it sees the same markers), its biases are unfrozen by hand, and its batches are put in our order.
Examples with a text that occurs twice are left out, because our loss masks duplicates and theirs does not. Printed: the
loss of each step, the largest difference over the first 50, nDCG@10 on the dev packages before and after, and pairs per
second of both.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from torch.utils.data import BatchSampler

from sgpt.data.feed.example import Example
from sgpt.data.feed.sampling import Feed, Source
from sgpt.data.feed.store import Examples, Tokens
from sgpt.data.readers import DataConfig, read_examples
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.evaluation.evaluate import EvaluationConfig, evaluate, read_sets
from sgpt.text.markers import MarkersConfig
from sgpt.training.loss import LossConfig
from sgpt.training.optim import OptimConfig
from sgpt.training.run_folder import RunFolder
from sgpt.training.trainer import TrainerConfig, train
from sgpt.training.tuning import TuningConfig, tune

QUERIES, SEED, COMPARED = 64, 0, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--data", default="data/raw/pydocs")
    parser.add_argument("--base", default="data/nano")
    parser.add_argument("--learning-rate", type=float, default=5e-2)
    options = parser.parse_args()

    examples = distinct(read_examples(DataConfig("pydocs", options.data, num_hard_negatives=1), Path("data/cache")))
    optim = OptimConfig(learning_rate=options.learning_rate)
    sets = read_sets(EvaluationConfig([f"{options.data}/pydocs_dev"], split="dev"))
    encoder = fresh_encoder(options.base)
    print(f"{len(examples):,} examples without a repeated text; before: {evaluate(encoder, sets)}")
    with tempfile.TemporaryDirectory() as folder:
        export(encoder, Path(folder) / "base", card="the untuned base")
        feed = feed_of(examples, encoder)
        ours, our_seconds = train_ours(encoder, feed, optim, options.steps, Path(folder) / "run")
        theirs, their_seconds, tuned = train_theirs(
            Path(folder) / "base", examples, feed, optim, options.steps, Path(folder) / "st"
        )
        other = fresh_encoder(options.base)
        other.trunk.load_state_dict(tuned.transformers_model.state_dict())

    for step, (left, right) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"step {step:3d}  ours {left:.6f}  sentence-transformers {right:.6f}  difference {abs(left - right):.1e}")
    worst = max(abs(left - right) for left, right in list(zip(ours, theirs, strict=True))[:COMPARED])
    print(
        f"largest difference of the loss over the first {min(COMPARED, options.steps)} steps: {worst:.1e} (wanted: "
        f"1e-4 or less)"
    )
    print(f"after, ours:                  {evaluate(encoder, sets)}")
    print(f"after, sentence-transformers: {evaluate(other, sets)}")
    pairs = options.steps * QUERIES
    print(
        f"pairs per second: ours {pairs / our_seconds:.1f}, sentence-transformers {pairs / their_seconds:.1f}, ratio "
        f"{their_seconds / our_seconds:.2f}"
    )


def distinct(examples: Iterable[Example]) -> list[Example]:
    """Examples none of whose texts was seen before."""
    seen: set[str] = set()
    kept = []
    for example in examples:
        texts = {example.query, example.positive, *example.hard_negatives}
        if not texts & seen:
            seen |= texts
            kept.append(example)
    return kept


def fresh_encoder(base: str) -> Encoder:
    contract = Contract("weighted_mean", MarkersConfig(query_max_tokens=48, document_max_tokens=96), base=base)
    encoder = Encoder(load_trunk(ModelConfig(base)), load_tokenizer(base), contract)
    tune(encoder.trunk, TuningConfig())
    return encoder


def feed_of(examples: list[Example], encoder: Encoder) -> Feed:
    kept = Examples.of(examples)
    tokens = Tokens(kept, encoder.tokenizer, max(frame.content_tokens for frame in encoder.frames.values()))
    return Feed([Source("pydocs", kept, tokens, encoder.frames, num_hard_negatives=1)], QUERIES, seed=SEED)


def train_ours(encoder: Encoder, feed: Feed, optim: OptimConfig, steps: int, folder: Path) -> tuple[list[float], float]:
    folder.mkdir()
    run = RunFolder(folder)
    config = TrainerConfig(
        queries_per_process=QUERIES, max_steps=steps, seed=SEED, log_every_steps=1, save_every_steps=10**9
    )
    state = train(encoder, feed, Accelerator(), run, config, LossConfig(), optim, dict)

    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()], state.seconds


def train_theirs(
    base: Path, examples: list[Example], feed: Feed, optim: OptimConfig, steps: int, folder: Path
) -> tuple[list[float], float, torch.nn.Module]:
    model = SentenceTransformer(str(base), device="cpu", trust_remote_code=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    columns = {
        "query": [example.query for example in examples],
        "positive": [example.positive for example in examples],
        "negative": [example.hard_negatives[0] for example in examples],
    }

    class OurOrder(BatchSampler):
        def __init__(self, *arguments, **options) -> None:
            pass

        def __iter__(self):
            yield from ([example for _, example, _ in feed.drawn_examples(step, 0)] for step in range(steps))

        def __len__(self) -> int:
            return steps

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=QUERIES, max_steps=steps, learning_rate=optim.learning_rate,
        weight_decay=0.0,
        adam_epsilon=optim.epsilon, lr_scheduler_type="linear", warmup_steps=-(-steps // 10),
        max_grad_norm=optim.max_grad_norm, seed=SEED,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, batch_sampler=OurOrder,
        router_mapping={"query": "query", "positive": "document", "negative": "document"},
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(columns), loss=MultipleNegativesRankingLoss(model, scale=20.0)
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], seconds, model


if __name__ == "__main__":
    main()
