"""What does a re-ranker cost beside the encoder? Memory of one, of the other, of both over one trunk, and of both
opened apart.

    python benchmarks/one_trunk.py [--shape 125m] [--documents 40] [--rounds 2]

The encoder is a bias delta over the decoder that re-ranks, both opened by
`sgpt.retrieval.searcher.load_encoder_and_reranker`. Each way is a fresh process, which encodes the documents and
re-ranks them for one query; embeddings and scores must be the same before anything is shown. Memory is the peak of the
resident size, and what it is when the work is done, over what it was before the models were opened.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from measure.engines import Variant
from measure.given import DOCUMENTS, Setting, read_documents, setting
from measure.processes import MB, fresh, peak_bytes, settle
from measure.report import Report, parser, race

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.retrieval.searcher import load_encoder_and_reranker
from sgpt.text.markers import MarkersConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune

COLUMNS = {"peak_mb": ("peak MB", ".0f"), "resident_mb": ("then MB", ".0f"), "load": ("load", ".1f")}
QUERY = "When was it founded?"
WAYS = ("one trunk", "encoder alone", "re-ranker alone", "opened apart")


def main() -> None:
    made = parser(__doc__, shape="125m", rounds=2)
    made.add_argument(
        "--data", choices=DOCUMENTS, default="squad", help="documents below --shared (default: %(default)s)"
    )
    made.add_argument("--documents", type=int, default=40, help="(default: %(default)s)")
    options = made.parse_args()
    with setting(options, "squad", lambda folder: read_documents(options.data, options.documents, folder)) as given:
        save_tuned(given)
        report = Report(options, COLUMNS, same_results)
        rows = race(
            report, [Variant(way, way) for way in WAYS], options.rounds,
            lambda variant: fresh(work, given, asdict(variant))
        )
    for way in ("encoder alone", "re-ranker alone", "opened apart"):
        for key, name in {"peak_mb": "peak", "resident_mb": "afterwards"}.items():
            report.verdict(
                f"one trunk / {way}, {name}",
                [both[key] / one[key] for both, one in zip(rows["one trunk"], rows[way], strict=True)], against=None
            )


def save_tuned(given: Setting) -> None:
    """A run's adapter, its biases moved at random."""
    contract = Contract("weighted_mean", MarkersConfig("brackets", 75, 300), base=given.model)
    encoder = Encoder(tune(load_trunk(ModelConfig(given.model)), TuningConfig()), load_tokenizer(given.model), contract)
    base = {name: value.detach().clone() for name, value in trainable_parameters(encoder.trunk).items()}
    torch.manual_seed(0)
    with torch.no_grad():
        for value in trainable_parameters(encoder.trunk).values():
            value.add_(0.02 * torch.randn_like(value))
    save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, base, Path(given.folder, "run", "adapter"))


def work(setting: dict, variant: dict) -> dict:
    given, way = Setting(**setting), Variant(**variant).engine
    run, documents, row = f"{given.folder}/run", given.texts(), {}
    before = settle()
    encoder = reranker = None
    if way == "one trunk":
        encoder, reranker = load_encoder_and_reranker(run)
    if way in ("encoder alone", "opened apart"):
        encoder = Encoder.from_pretrained(run)
    if way in ("re-ranker alone", "opened apart"):
        reranker = CrossEncoder.from_pretrained(given.model)
    if encoder is not None:
        row["embeddings"] = encoder.encode_documents(documents, progress=False).tolist()
    if reranker is not None:
        row["scores"] = reranker.score([QUERY] * len(documents), documents, progress=False).tolist()
    peak = peak_bytes() - before
    return row | {"peak_mb": peak / MB, "resident_mb": (settle() - before) / MB}


def same_results(reference: dict, row: dict) -> str | None:
    row["differs"] = 0.0
    for key in ("embeddings", "scores"):
        if key in row and not np.array_equal(reference[key], row[key]):
            return f"{key} differ by {np.abs(np.array(reference[key]) - np.array(row[key])).max():.1e}"
    return None


if __name__ == "__main__":
    main()
