"""Does a run take what it said before its first step? Peak memory and time, foretold and measured.

    python benchmarks/preflight.py [--shape smollm2] [--queries 6] [--pack 512] [--keep 0.5] [--tuning full] [--steps 2]

Random weights of the shape, random texts of 10 to 120 words and queries of 3 to 30. One thread; seconds are of the
processor, so that other work on the machine does not count. The last line is JSON: bytes and seconds.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoModel, LlamaConfig, LlamaModel

from sgpt.data.feed.example import Example
from sgpt.data.feed.sampling import Feed, Source
from sgpt.data.feed.store import Examples, Tokens
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import Sets
from sgpt.preflight.preflight import preflight
from sgpt.runtime.memory import keep_freed_memory
from sgpt.training.config import TrainConfig
from sgpt.training.log import peak_memory_bytes
from sgpt.training.run_folder import RunFolder
from sgpt.training.trainer import TrainerConfig, train
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune

NANO = Path(__file__).parents[1] / "data" / "nano"
WORDS = ("parse", "a", "date", "from", "the", "text", "of", "every", "file", "and", "count", "what", "was", "read")


def gpt_neo_125m(vocabulary: int) -> nn.Module:
    layers = {"num_layers": 12, "num_heads": 12, "attention_types": [[["global", "local"], 6]]}
    return GPTNeoModel(GPTNeoConfig(vocab_size=vocabulary, hidden_size=768, **layers))


def smollm2_135m(_: int) -> nn.Module:
    """With its own 49,152 tokens, of which nano's tokenizer gives the first."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49_152}
    return LlamaModel(LlamaConfig(**shape, **heads))


SHAPES = {"gpt_neo": gpt_neo_125m, "smollm2": smollm2_135m}


def base_of(shape: str, folder: Path) -> str:
    if shape not in SHAPES:
        return str(NANO) if shape == "nano" else shape
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.save_pretrained(folder)
    SHAPES[shape](len(tokenizer)).save_pretrained(folder)
    return str(folder)


def text(words: random.Random, fewest: int, most: int) -> str:
    return " ".join(words.choices(WORDS, k=words.randint(fewest, most)))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", default="nano", help="nano, gpt_neo, smollm2, or the folder of a base")
    arguments.add_argument("--queries", type=int, default=32, help="of a batch (default: %(default)s)")
    arguments.add_argument("--pack", type=int, default=4096, help="tokens of a pack (default: %(default)s)")
    arguments.add_argument("--keep", type=float, help="gigabytes of activations (default: half of what is free)")
    arguments.add_argument("--tuning", default="bitfit")
    arguments.add_argument("--steps", type=int, default=3)
    options = arguments.parse_args()
    time.perf_counter = time.process_time
    keep_freed_memory()  # as every script
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(vars(options) | compared(options, Path(folder))))


def compared(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    model = ModelConfig(base_of(options.shape, folder / "base"))
    trainer = TrainerConfig(
        queries_per_process=options.queries,
        tokens_per_pack=options.pack,
        keep_gigabytes=options.keep,
        max_steps=options.steps,
    )
    config = TrainConfig(model=model, trainer=trainer, tuning=TuningConfig(options.tuning))
    config.markers.name = "none"  # which not every vocabulary has
    tokenizer, accelerator = load_tokenizer(model.path), Accelerator(cpu=True)
    contract = Contract("weighted_mean", config.markers, base=model.path)
    encoder = Encoder(load_trunk(model), tokenizer, contract, tokens_per_pack=options.pack)
    encoder.trunk = tune(encoder.trunk, config.tuning, model.path)
    words = random.Random(0)
    number = options.queries * options.steps
    examples = Examples.of(
        Example(f"{text(words, 3, 30)} {row}", f"{text(words, 10, 120)} {row}") for row in range(number)
    )
    tokens = Tokens(examples, tokenizer, max(frame.content_tokens for frame in encoder.frames.values()))
    feed = Feed([Source("random", examples, tokens, encoder.frames)], options.queries)

    started = time.perf_counter()
    foretold = preflight(encoder, feed, config, accelerator, Sets([], []), Sets([], []))
    trial_seconds = time.perf_counter() - started
    before = peak_memory_bytes(encoder.device)
    learning = trainable_parameters(encoder.trunk).values()
    untrained = [value.detach().clone() for value in learning]  # as a run keeps them
    state = train(encoder, feed, accelerator, RunFolder(folder), trainer, config.loss, config.optim, dict)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "foretold_bytes": foretold.forecast.peak_bytes,
        "measured_bytes": peak_memory_bytes(encoder.device),
        "bytes_before": before,
        "foretold_kept_share": foretold.forecast.kept_share,
        "measured_kept_share": lines[-1]["kept_share"],
        "foretold_seconds": foretold.steps * foretold.forecast.step_seconds,
        "measured_seconds": state.seconds,
        "trial_seconds": trial_seconds,
        "trained": sum(value.numel() for value in untrained),
    }


if __name__ == "__main__":
    main()
