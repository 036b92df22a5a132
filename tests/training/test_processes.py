"""The same global batches give the same training, by one process or by several: losses and biases of whole runs.

Each run is `train` itself over real gloo processes, with a feed whose epochs end inside of a batch. In float64 a wrong
formula shows; in float32 what is left is the order of sums, over which AdamW divides.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from accelerate import Accelerator
from safetensors.torch import load_file

from sgpt.data.feed.example import Example
from sgpt.data.feed.sampling import Feed, Source
from sgpt.data.feed.store import Examples, Tokens
from sgpt.decoder.attention import prepare
from sgpt.decoder.trunk import load_tokenizer
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from sgpt.training.loss import LossConfig
from sgpt.training.optim import OptimConfig
from sgpt.training.run_folder import RunFolder
from sgpt.training.sharding import check_shardable, shard_frozen
from sgpt.training.trainer import TrainerConfig, train
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import random_trunk
from tests.starts import Start, free_port, in_processes, start_all

QUERIES, STEPS = 12, 5  # of all processes together; 60 queries are two epochs of 29 and two examples more
WORDS = ["parse", "open", "sort", "sum", "join", "read", "make", "find", "count", "split"]
THINGS = ["date", "file", "list"]
EXAMPLES = [
    Example(
        "find it" if verb == "find" else f"{verb} the {thing}",  # three ask alike, of three things
        f"how to {verb} every {thing}" + number * " of a folder",
        (f"never {verb} a {thing}", f"how to {verb} every {THINGS[number - 1]}"),  # which may be another's positive
        number * (f"{verb} one {thing}",),  # processes hold different numbers of further positives
    )
    for verb in WORDS for number, thing in enumerate(THINGS)
][:29]  # fmt: skip


@dataclass(frozen=True)
class Case:
    hard_negatives: int = 0
    trainer: dict = field(default_factory=dict)
    loss: dict = field(default_factory=dict)
    sharded: bool = False


CASES = {
    "packed": Case(),
    "recomputed, hard negatives": Case(2, {"keep_gigabytes": 0.0}),
    "symmetric, margin": Case(1, loss={"symmetric": True, "false_negative_margin": 0.01}),
    "accumulated": Case(1, {"gradient_accumulation": 2}),
}
SHARDED = {
    "sharded": Case(2, sharded=True),
    "sharded, recomputed": Case(2, {"keep_gigabytes": 0.0}, sharded=True),
}
QUICK = "recomputed, hard negatives"


def whole_run(rank: int, processes: int, port: int, base: str, folder: Path, cases: list[str], dtype: str) -> None:
    """What one of the processes does; the first leaves what the cases learned in `folder`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes
    tokenizer = load_tokenizer(base)
    for name in cases:
        case = (CASES | SHARDED)[name]
        encoder = _encoder(tokenizer, getattr(torch, dtype))
        kept = Examples.of(EXAMPLES)
        source = Source("toy", kept, Tokens(kept, tokenizer, 100), encoder.frames, case.hard_negatives)
        config = TrainerConfig(
            queries_per_process=QUERIES // processes, epochs=9, max_steps=STEPS, log_every_steps=1, **case.trainer
        )
        feed = Feed([source], config.queries_per_process, processes)
        run = RunFolder(folder / name)
        run.folder.mkdir(parents=True, exist_ok=True)
        if case.sharded:
            shard_frozen(encoder.trunk, accelerator.device)
            frozen = [parameter for parameter in encoder.trunk.parameters() if not parameter.requires_grad]
            assert sum(p.to_local().numel() for p in frozen) < 0.51 * sum(p.numel() for p in frozen)
        train(encoder, feed, accelerator, run, config, LossConfig(**case.loss), OptimConfig(1e-2), dict)
        if rank == 0:
            torch.save({n: p.detach() for n, p in trainable_parameters(encoder.trunk).items()}, run.folder / "biases")


def _encoder(tokenizer, dtype: torch.dtype) -> Encoder:
    trunk = random_trunk("gpt2", len(tokenizer), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).to(dtype)
    trunk = tune(prepare(trunk), TuningConfig("bitfit"))
    contract = Contract(markers=MarkersConfig(query_max_tokens=24, document_max_tokens=40))
    return Encoder(trunk, tokenizer, contract, tokens_per_pack=48)


def trained(folder: Path, base: Path, processes: int, cases: list[str], dtype: str) -> dict[str, dict]:
    """Of each case its losses and its biases."""
    in_processes(whole_run, (processes, free_port(), str(base), folder, cases, dtype), processes)
    return {name: _read(folder / name) for name in cases}


def _read(run: Path) -> dict:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {"losses": [json.loads(line)["loss"] for line in lines], "biases": torch.load(run / "biases")}


def worst_bias(one: dict, other: dict) -> float:
    """Largest difference of two runs' biases, but for those of the keys.

    They shift all scores of a query alike, so their gradient is 0, and AdamW divides the rounding by itself.
    """
    differences = [_without_keys(name, one["biases"][name] - value) for name, value in other["biases"].items()]
    return max(float(difference.abs().max()) for difference in differences)


def _without_keys(name: str, bias: torch.Tensor) -> torch.Tensor:
    queries, _, values = bias.chunk(3)
    return torch.cat([queries, values]) if name.endswith("attn.c_attn.bias") else bias


def test_three_processes_train_as_one(tiny_base, tmp_path):
    base = tiny_base("gpt2")
    one, three = (trained(tmp_path / str(number), base, number, [QUICK], "float64")[QUICK] for number in (1, 3))
    assert len(one["losses"]) == STEPS
    assert one["losses"][-1] < one["losses"][0] - 0.01
    assert three["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert worst_bias(three, one) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "of_biases"), [("float64", 1e-10), ("float32", 3e-6)])
def test_two_three_and_four_processes_train_as_one(tiny_base, tmp_path, dtype, of_biases):
    base = tiny_base("gpt2")
    runs = {number: trained(tmp_path / str(number), base, number, [*CASES], dtype) for number in (1, 2, 3, 4)}
    for name in CASES:
        for number in (2, 3, 4):
            one, several = runs[1][name], runs[number][name]
            off = max(abs(a / b - 1) for a, b in zip(several["losses"], one["losses"], strict=True))
            print(f"{dtype}, {name}, {number} processes: losses {off:.1e}, biases {worst_bias(several, one):.1e}")
            assert off < 1e-6, (name, number)
            assert worst_bias(several, one) < of_biases, (name, number)


def test_a_sharded_trunk_trains_as_a_whole_one_with_other_numbers_of_packs_in_each_process(tiny_base, tmp_path):
    base = tiny_base("gpt2")
    one = trained(tmp_path / "1", base, 1, [QUICK], "float64")[QUICK]
    for name, two in trained(tmp_path / "2", base, 2, [*SHARDED], "float64").items():
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-6), name
        assert worst_bias(two, one) < 1e-10, name


def test_what_cannot_be_sharded_is_refused(tiny_encoder):
    trunk = tiny_encoder("gpt2").trunk
    with pytest.raises(InputError, match=r"trainer\.shard_trunk=true with one process"):
        check_shardable(trunk)
    with pytest.raises(InputError, match=r"set trainer\.evaluate_every_steps=0"):
        TrainerConfig(shard_trunk=True, evaluate_every_steps=5)


@pytest.mark.slow
def test_a_run_with_a_sharded_trunk_is_scored_and_exported_as_one_with_a_whole_trunk(training, tmp_path):
    arguments = {name: training(tmp_path / name) for name in ("whole", "sharded")}
    arguments["sharded"].append("trainer.shard_trunk=true")
    ended = start_all("biencoder", tmp_path, {n: Start(a, port=free_port()) for n, a in arguments.items()})
    assert [one.codes for one in ended.values()] == [[0, 0], [0, 0]], ended
    whole, sharded = (tmp_path / name / "runs" / "run" for name in arguments)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, sharded)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, bias in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], bias, rtol=0, atol=1e-4)  # float32; AdamW divides rounding
    scores = [json.loads((run / "results.json").read_text()) for run in (whole, sharded)]
    assert scores[0]["before"] == scores[1]["before"]
    assert scores[0]["after"] == scores[1]["after"]
    assert (sharded / "export" / "model.safetensors").is_file()
