"""On a GPU: a bias-only training step and encoding, ours next to sentence-transformers, from raw text.

    python benchmarks/gpu.py [--shapes smollm2 125m 1.3b 6b] [--data medquad] [--batch 128] [--rounds 3]

Weights are random, in bfloat16 as we hold them; sentence-transformers gets the same in float32 under autocast, as its
trainer's `bf16=True` does, and unfreezes the same biases; beyond 65,536 padded positions its layer norms may fail
(pytorch#193016). Ours, theirs, ours, theirs, in one process; loss and gradient
norm must agree before any time is shown. Shapes in --alone are run without them. MFU: the products with the weights
that a bias-only step needs (outputs and input gradients, real tokens alone), over what the GPU promises in --peak.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure.engines import COMPETITORS, Step, open_theirs, theirs
from measure.given import SHAPES, SOURCES, Setting, read_documents, read_texts, refuse
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from sgpt.data.feed.collate import collate
from sgpt.data.feed.example import Example
from sgpt.decoder.attention import prepare
from sgpt.decoder.trunk import load_tokenizer
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.device import prepare_gpu
from sgpt.training.loss import LossConfig
from sgpt.training.step import contrastive_step
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune

TOLERANCES = {"loss": 2e-2, "gradient norm": 1e-1}  # theirs has its scores in bfloat16, which rounds by 4e-3
BATCH_SIZES = (64, 256, 1024)  # of sentence-transformers' encode, the best of which counts


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2", "125m", "1.3b", "6b"])
    arguments.add_argument("--alone", nargs="*", choices=SHAPES, default=["6b"])
    arguments.add_argument("--data", choices=SOURCES, default="medquad")
    arguments.add_argument("--batch", type=int, default=128, help="pairs a step (default: %(default)s)")
    arguments.add_argument("--documents", type=int, default=4096, help="to encode (default: %(default)s)")
    arguments.add_argument("--steps", type=int, default=5, help="of a round (default: %(default)s)")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--competitors", nargs="+", choices=COMPETITORS, default=["mnrl", "cached-64"])
    arguments.add_argument("--peak", type=float, default=989e12, help="of dense bfloat16 (default: an H100's)")
    arguments.add_argument("--shared", default="../shared")
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        refuse("no GPU here; benchmarks/train_step.py and encode.py are for CPUs")
    prepare_gpu(deterministic=True)  # as training does
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", vars(options), flush=True)
    shared = Path(options.shared)
    examples = [
        Example(query, positive, tuple(negatives))
        for query, positive, *negatives in read_texts(options.data, options.batch, shared / "data")
    ]
    documents = read_documents("medquad", options.documents, shared / "data")
    for shape in options.shapes:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            tokenizer = load_tokenizer(str(shared / "models" / "tokenizer-gpt2"))
            tokenizer.save_pretrained(f"{folder}/model")
            setting = Setting(folder, shape, options.data, options.batch, "bf16", 1, device="cuda")
            encoder = random_encoder(shape, tokenizer, setting)
            if shape not in options.alone:
                encoder.trunk.save_pretrained(f"{folder}/model")
            measure(encoder, setting, examples, documents, options)
        del encoder
        torch.cuda.empty_cache()


def random_encoder(shape: str, tokenizer, setting: Setting) -> Encoder:
    torch.manual_seed(0)
    with torch.device("cuda"):
        trunk = AutoModel.from_config(SHAPES[shape], dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    trunk.config.use_cache = False
    return Encoder(prepare(trunk.eval()), tokenizer, Contract("weighted_mean", setting.markers, base=shape))


def measure(
    encoder: Encoder, setting: Setting, examples: list[Example], documents: list[str], options: argparse.Namespace
) -> None:
    """Prints the rows of a shape."""
    batch = collate(examples, encoder.tokenizer, encoder.frames)
    weights = sum(module.weight.numel() for module in encoder.modules() if isinstance(module, (nn.Linear, Conv1D)))
    products = 4 * weights * batch.num_tokens  # of a step, outputs and input gradients, in operations
    alone = setting.shape in options.alone
    print_encoding(encoder, setting, documents, alone)
    tune(encoder.trunk, TuningConfig())
    encoder.train()
    engines: dict[str, tuple[nn.Module, Step]] = {"ours": (encoder, our_step(encoder))}
    for name in [] if alone else options.competitors:
        engines[COMPETITORS[name].name] = theirs(setting, **COMPETITORS[name].options)
    found: dict[str, list[float]] = {}
    reference: tuple[float, float] | None = None
    peaks: dict[str, float] = {}
    for number in range(options.rounds):
        for name, (model, step) in list(engines.items()):
            try:
                steps = options.steps if number else 1  # the first warms up, and is compared
                seconds, loss, norm, peaks[name] = timed(model, step, examples, steps, setting)
            except torch.OutOfMemoryError:
                print(f"    {name}: does not fit", flush=True)
                del engines[name]
                model = step = None
                torch.cuda.empty_cache()
                continue
            if not number:
                reference = reference or (loss, norm)
                agree(name, reference, (loss, norm))
            else:
                found.setdefault(name, []).append(seconds)
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        ratios = [other / own for own, other in zip(found["ours"], seconds, strict=True)]
        print(
            f"    {name:14s} {1e3 * middle:8.1f} ms a step, {setting.batch / middle:7.0f} pairs/s, "
            f"{batch.num_tokens / middle / 1e3:7.1f} k tokens/s, MFU {products / middle / options.peak:.3f}, "
            f"{peaks[name]:6.2f} GB at most; {statistics.median(ratios):.2f} times ours "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def print_encoding(encoder: Encoder, setting: Setting, documents: list[str], alone: bool) -> None:
    encode = partial(encoder.encode_documents, documents, progress=False)
    seconds_of(encode)  # warms up
    ours = len(documents) / seconds_of(encode)
    print(f"{setting.shape}: ours encodes {ours:,.0f} documents/s in packs of {encoder.pack_size:,}", flush=True)
    if alone:
        return
    model = open_theirs(setting).to(torch.bfloat16).eval()
    for size in BATCH_SIZES:
        rate = len(documents) / seconds_of(partial(model.encode, documents, batch_size=size))
        print(f"    ST in bfloat16, batches of {size}: {rate:,.0f}; ours is {ours / rate:.2f} times", flush=True)


def our_step(encoder: Encoder) -> Step:
    def step(examples):
        batch = collate(examples, encoder.tokenizer, encoder.frames)
        return contrastive_step(encoder, batch, LossConfig()).loss

    return step


def timed(model: nn.Module, step: Step, examples, steps: int, setting: Setting) -> tuple[float, float, float, float]:
    """Seconds a step, loss, gradient norm, and GB at most with the weights."""
    parameters = trainable_parameters(model)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=not isinstance(model, Encoder)):
            loss = step(examples)
        norm = clip_grad_norm_(parameters.values(), 1.0)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / steps
    return seconds, loss.item(), norm.item(), torch.cuda.max_memory_allocated() / 1e9


def agree(name: str, reference: tuple[float, float], found: tuple[float, float]) -> None:
    for (what, tolerance), one, other in zip(TOLERANCES.items(), reference, found, strict=True):
        if not abs(one - other) <= tolerance * abs(one):
            raise SystemExit(f"{name} does not do the same work: {what} {other} and not {one}; no time is shown")
    print(f"    {name}: loss {found[0]:.4f}, gradient norm {found[1]:.4f}", flush=True)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
