"""What does a batch of many tuned models cost? Texts of several deltas mixed in one forward pass, next to one delta.

    python benchmarks/mixed_deltas.py [--shape small] [--documents 300] [--deltas 8 100] [--rounds 5]

small is the shape of data/nano; smollm2 has biases in every linear layer. The same encoder embeds the same texts, with
one delta for all and with a delta for each in turn, A B A B in one process; bulk is all texts in one call, and calls of
32 are as a server has them. The result is the throughput of the mixed batch over that of one delta, by CPU seconds.
Before anything is shown, each text's embedding must be what its delta alone gives the whole batch, bit for bit in
float32.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from measure.engines import Variant
from measure.given import DOCUMENTS, Setting, read_documents, setting
from measure.processes import fresh, stopwatch
from measure.report import Report, parser

from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.text.markers import MarkersConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune

COLUMNS = {
    "one": ("one, s", ".2f"), "mixed": ("mixed, s", ".2f"), "ratio": ("one/mixed", ".3f"),
    "delta_kb": ("delta kB", ".0f"), "load": ("load", ".1f"),
}  # fmt: skip
CALLS = {"bulk": None, "calls of 32": 32}


def main() -> None:
    arguments = parser(__doc__, shape="small", rounds=5)
    arguments.add_argument(
        "--data", choices=DOCUMENTS, default="squad", help="documents below --shared (default: %(default)s)"
    )
    arguments.add_argument("--documents", type=int, default=300, help="(default: %(default)s)")
    arguments.add_argument(
        "--deltas", type=int, nargs="+", default=[8, 100], help="how many a batch holds (default: %(default)s)"
    )
    arguments.add_argument(
        "--tuning", choices=("bitfit", "bitfit_norm"), default="bitfit", help="of the deltas (default: %(default)s)"
    )
    options = arguments.parse_args()
    with setting(options, "squad", lambda folder: read_documents(options.data, options.documents, folder)) as given:
        report = Report(options, COLUMNS)
        for number in options.deltas:
            save_deltas(given, number, options.tuning)
            for name, texts_a_call in CALLS.items():
                found = fresh(work, given, asdict(Variant(name, "ours")), number, texts_a_call, options.rounds)
                for row in found["rounds"]:
                    about = {"name": f"{number} deltas, {name}", "source": found["source"], "load": found["load"]}
                    report.add(row | about)
                ratios = [row["ratio"] for row in found["rounds"]]
                report.verdict(f"{number} deltas, {name}: throughput mixed / one delta", ratios, against=0.85)


def save_deltas(given: Setting, number: int, tuning: str) -> None:
    """Adapters 0, 1, … of one base, their biases moved at random."""
    contract = Contract("weighted_mean", MarkersConfig("brackets", 75, 300), base=given.model)
    trunk, tokenizer = tune(load_trunk(ModelConfig(given.model)), TuningConfig(tuning)), load_tokenizer(given.model)
    base = {name: value.detach().clone() for name, value in trainable_parameters(trunk).items()}
    for seed in range(number):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, value in trainable_parameters(trunk).items():
                value.copy_(base[name] + 0.02 * torch.randn_like(value))
        save_adapter(trunk, tokenizer, contract, base, Path(given.folder, str(seed)))


def work(setting: dict, variant: dict, number: int, texts_a_call: int | None, rounds: int) -> dict:
    given = Setting(**setting)
    texts = given.texts()
    encoder = Encoder.from_pretrained(given.model)
    for delta in range(number):
        encoder.load_delta(str(delta), Path(given.folder, str(delta)))
    rows = [str(position % number) for position in range(len(texts))]
    size = texts_a_call or len(texts)

    def encode(deltas: list[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(texts), size):
            stop = start + size
            parts.append(encoder.encode_documents(texts[start:stop], delta=deltas[start:stop], progress=False))
        return np.concatenate(parts)

    mixed = encode(rows)
    for delta in ("0", "1"):
        own = [position for position, row in enumerate(rows) if row == delta]
        if not np.array_equal(mixed[own], encode([delta] * len(texts))[own]):
            raise SystemExit(f"delta {delta} in a mixed batch is not what it is alone; no time is shown")
    found = []
    for _ in range(rounds):
        with stopwatch() as one:
            encode(["0"] * len(texts))
        with stopwatch() as several:
            encode(rows)
        ratio = one["cpu"] / several["cpu"]
        delta_kb = encoder.deltas["0"].nbytes / 1000
        found.append({"one": one["cpu"], "mixed": several["cpu"], "ratio": ratio, "delta_kb": delta_kb})
    return {"rounds": found}


if __name__ == "__main__":
    main()
