"""What train/verify.py says of servers with one fault each, and of the right one.

    python benchmarks/wrong_servers.py

The servers are those of the tests (tests/verification/servers.py), which batch what comes within a few milliseconds and
compute it by transformers alone. The model is a small Llama of random weights with the tokenizer of data/nano; "tuned"
means that its biases were moved at random. Prints a Markdown table: in how many of the conditions, each in two roles,
vectors are off, by how much, and what the fault is called.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaModel

from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.text.markers import MarkersConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from sgpt.verification.config import VerifyConfig
from sgpt.verification.server import verify_server

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.verification.servers import ByHand, serving

LIMIT = 300
FAULTS = {
    None: "none", "mask": "no causal mask on equal lengths", "mask under load": "the same, across requests alone",
    "base": "the base in place of the tuned model", "delta ignored": "a delta accepted and not applied",
    "last token": "last-token pooling", "truncation to 128": "truncation to 128 tokens", "no markers": "no markers",
    "role": "every text as a document", "mixed up": "answers in another order, across requests",
}  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        base = random_base(Path(temporary) / "base")
        models = {name: tuned(base, Path(temporary) / name, seed) for seed, name in enumerate(("own", "legal"))}
        print("| the server's fault | off in | lowest cosine | called | seconds |")
        print("|---|---|---|---|---|")
        for fault, words in FAULTS.items():
            print(f"| {words} | {' | '.join(verified(base, models, fault))} |", flush=True)


def random_base(folder: Path) -> Path:
    tokenizer = load_tokenizer(str(Path(__file__).parents[1] / "data" / "nano"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    trunk = LlamaModel(config)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    trunk.save_pretrained(folder)
    return folder


def tuned(base: Path, folder: Path, seed: int) -> Path:
    """An export of the base with its biases moved at random."""
    trunk = tune(load_trunk(ModelConfig(str(base))), TuningConfig("bitfit"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(trunk).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    contract = Contract("weighted_mean", MarkersConfig("brackets", LIMIT, LIMIT), base=str(base))
    export(Encoder(trunk, load_tokenizer(str(base)), contract), folder, card="")
    return folder


def verified(base: Path, models: dict[str, Path], fault: str | None) -> list[str]:
    served = ByHand({None: base if fault == "base" else models["own"], "legal": models["legal"]}, base, LIMIT, fault)
    deltas = {"legal": str(models["legal"])} if fault in (None, "delta ignored") else {}
    started = time.perf_counter()
    with serving(served) as server:
        found = list(verify_server(VerifyConfig(model=str(models["own"]), endpoint=server.url, deltas=deltas)))
    seconds = time.perf_counter() - started
    off = [finding for finding in found if finding.fault]
    called = "; ".join(dict.fromkeys(finding.fault for finding in off)) or "–"
    cosine = min(finding.cosine for finding in found)
    return [f"{len(off)} of {len(found)}", f"{cosine:.6f}", called, f"{seconds:.0f}"]


if __name__ == "__main__":
    main()
