"""What does a trunk in int8 or nf4 save, and what does a training step over it cost?

    python benchmarks/quantised.py [--shape 125m] [--data nli] [--rounds 2] [--steps 2] [--dtypes float32 bfloat16 …]
    python benchmarks/quantised.py --gpt-j nf4

Every point is a fresh process. "held" are the bytes of the weights as they are held, "opening" is the peak of the
resident size while they are opened, and "peak" that of the steps, each over what it was before. The biases learn.
"cosine" is the mean of embeddings of the texts with those of the same weights in float32; random weights make more of
a rounding than trained ones do, so --model names a folder for it, and for all else.

--gpt-j holds the shape of GPT-J-6B, 28 copies of a random block, in a dtype: held and resident bytes, and the time of
one step of 64 tokens, forward and backward.
"""

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from measure.engines import Variant, open_ours
from measure.given import Setting, read_texts, setting
from measure.processes import MB, fresh, peak_bytes, settle
from measure.report import Report, race, training_parser
from measure.train import UNTIMED, train
from torch.nn import functional as F
from transformers import GPTJConfig, GPTJModel

from sgpt.decoder.attention import prepare
from sgpt.decoder.quantised import QUANTISED, held_bytes, num_weights, quantise
from sgpt.decoder.trunk import DTYPES
from sgpt.training.tuning import TuningConfig, tune

COLUMNS = {
    "held_mb": ("held MB", ".0f"), "opening_mb": ("opening +MB", ".0f"), "peak_mb": ("peak +MB", ".0f"),
    "cpu_seconds": ("CPU s/step", ".2f"), "wall_seconds": ("wall s/step", ".2f"), "cosine": ("cosine", ".5f"),
    "load": ("load", ".1f"),
}  # fmt: skip


def main() -> None:
    arguments = training_parser(__doc__, shape="125m", rounds=2, steps=2, batch=32, competitors=[])
    arguments.add_argument("--dtypes", choices=DTYPES, nargs="+", default=DTYPES, help="(default: %(default)s)")
    arguments.add_argument("--model", help="folder of a model instead of random weights of --shape")
    arguments.add_argument("--gpt-j", choices=("bfloat16", *QUANTISED), help="the shape of GPT-J-6B, and nothing else")
    options = arguments.parse_args()
    if options.gpt_j:
        torch.set_num_threads(options.threads)
        print(json.dumps(gpt_j(options.gpt_j), indent=1))
        return
    number = max(options.steps * options.batch, UNTIMED)
    with setting(
        options, options.data, lambda folder: read_texts(options.data, number, folder), batch=options.batch
    ) as given:
        if options.model:
            Path(given.model).rename(Path(given.folder, "random"))
            Path(given.model).symlink_to(Path(options.model).resolve())
        report = Report(options, COLUMNS)

        def measure(variant: Variant) -> dict:
            return fresh(opened, given, asdict(variant)) | fresh(train, given, asdict(variant), options.steps)

        rows = race(report, [Variant(dtype, "ours", {"dtype": dtype}) for dtype in options.dtypes], options.rounds,
                    measure)  # fmt: skip
    first = options.dtypes[0]
    for dtype in options.dtypes[1:]:
        for key in ("held_mb", "peak_mb", "cpu_seconds"):
            ratios = [other[key] / one[key] for one, other in zip(rows[first], rows[dtype], strict=True)]
            report.verdict(f"{dtype} / {first}, {key}", ratios)


def opened(given: dict, variant: dict) -> dict:
    """Bytes of the weights, the peak while they are opened, and how near the embeddings are to those in float32."""
    place, dtype = Setting(**given), variant["options"]["dtype"]
    before = settle()
    encoder = open_ours(place, dtype)
    opening = peak_bytes() - before
    texts = [query for query, *_ in place.texts()[:UNTIMED]]
    both = [one.encode_queries(texts, as_tensor=True) for one in (encoder, open_ours(place, "float32"))]
    return {
        "held_mb": held_bytes(encoder.trunk) / MB, "opening_mb": opening / MB,
        "cosine": float(F.cosine_similarity(*both).mean()),
    }  # fmt: skip


def gpt_j(dtype: str) -> dict:
    """The trunk of GPT-J-6B in as many bytes as `dtype` takes; its blocks are copies, which differ in storage alone."""
    config = GPTJConfig()
    layers = config.n_layer
    config.n_layer = 1
    before = settle()
    trunk = GPTJModel(config).eval()
    if dtype in QUANTISED:
        quantise(trunk, dtype, "GPT-J-6B of random weights")
    else:
        trunk = trunk.to(getattr(torch, dtype))
    for _ in range(layers - 1):
        trunk.h.append(copy.deepcopy(trunk.h[0]))
    config.n_layer = layers
    trunk = tune(prepare(trunk), TuningConfig("bitfit"))
    resident = settle() - before
    ids = torch.randint(config.vocab_size, (1, 64))
    started = time.perf_counter()
    trunk(input_ids=ids).last_hidden_state.float().square().mean().backward()
    return {
        "dtype": dtype, "weights": num_weights(trunk),
        "held_gb": held_bytes(trunk) / 1e9, "resident_gb": resident / 1e9,
        "peak_of_step_gb": (peak_bytes() - before) / 1e9, "seconds_of_step": time.perf_counter() - started,
    }  # fmt: skip


if __name__ == "__main__":
    main()
