"""Stopped and resumed through the trainer: losses and weights bit-equal to a run that never stopped, dropout on."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from sgpt.data.feed.example import Example
from sgpt.data.feed.sampling import Feed, Source
from sgpt.data.feed.store import Examples, Tokens
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from sgpt.runtime.interrupt import Interrupted
from sgpt.training import checkpoint
from sgpt.training.checkpoint import TrainState
from sgpt.training.loss import LossConfig
from sgpt.training.optim import OptimConfig
from sgpt.training.run_folder import RunFolder
from sgpt.training.trainer import TrainerConfig, train
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune

WORDS = ["parse", "date", "string", "open", "file", "read", "write", "sort", "list", "number",
         "path", "folder", "text", "line", "sum", "count", "join", "split", "find", "match"]  # fmt: skip
EXAMPLES = [
    Example(f"{a} the {b}", f"how to {a} every {b} of it", (f"never {b} the {a}",))
    for number, a in enumerate(WORDS) for b in WORDS[number + 1 : number + 4]
]  # fmt: skip
STEPS = 7  # of 8 queries; an epoch has 6.75 batches


class Stopped(Exception):
    pass


def fresh_encoder(tiny_encoder, method: str) -> Encoder:
    encoder = tiny_encoder("gpt2")  # its own dropout of 0.1
    torch.manual_seed(0)  # as the start of a run does: LoRA draws its first weights
    encoder.trunk = tune(encoder.trunk, TuningConfig(method, lora_dropout=0.1))
    return encoder


def trained(
    folder: Path, encoder: Encoder, *, stop_after: int | None = None, rate: float = 1e-2, **config
) -> TrainState:
    """Trains in `folder`; evaluating after every step, it raises `Stopped` after one, past the last checkpoint."""
    folder.mkdir(exist_ok=True)
    taken = []

    def evaluate() -> dict:
        taken.append(len(taken))
        encoder.encode_queries(["in evaluation mode"])  # leaves training mode, and must not leave it for good
        if len(taken) == stop_after:
            raise Stopped
        return {"toy": {"ndcg@10": 0.5}}

    settings = {
        "queries_per_process": 8,
        "epochs": 2,
        "max_steps": STEPS,
        "log_every_steps": 1,
        "save_every_steps": 2,
        "evaluate_every_steps": 1,
        "keep_best": None,
    } | config
    given = TrainerConfig(**settings)
    feed = feed_of(EXAMPLES, encoder, given.queries_per_process)
    optim = OptimConfig(learning_rate=rate)
    return train(encoder, feed, Accelerator(cpu=True), RunFolder(folder), given, LossConfig(), optim, evaluate)


def feed_of(examples: list[Example], encoder: Encoder, queries_per_process: int) -> Feed:
    kept = Examples.of(examples)
    source = Source("toy", kept, Tokens(kept, encoder.tokenizer, 100), encoder.frames, len(examples[0].hard_negatives))
    return Feed([source], queries_per_process)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


SETTINGS = {
    "bitfit": ("bitfit", {}),
    "full": ("full", {}),
    "lora": ("lora", {}),
    "recomputed": ("bitfit", {"keep_gigabytes": 0, "tokens_per_pack": 40}),
    "accumulated over the epoch's end": ("bitfit", {"gradient_accumulation": 2, "epochs": 3}),
    "bfloat16": ("bitfit", {"precision": "bf16"}),
}


@pytest.mark.bitwise
@pytest.mark.parametrize(("method", "config"), SETTINGS.values(), ids=SETTINGS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_run_bit_for_bit(method, config, tiny_encoder, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = fresh_encoder(tiny_encoder, method)
    state = trained(whole, expected, **config)
    with pytest.raises(Stopped):
        trained(stopped, fresh_encoder(tiny_encoder, method), stop_after=5, **config)
    assert checkpoint.latest(stopped / "checkpoints").name == "step-4"
    assert [line["step"] for line in lines(stopped) if "loss" in line] == [1, 2, 3, 4, 5]

    resumed = fresh_encoder(tiny_encoder, method)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # another process would have other states
    again = trained(stopped, resumed, **config)

    expected_batches = STEPS * config.get("gradient_accumulation", 1)
    assert (again.step, again.batches) == (state.step, state.batches) == (STEPS, expected_batches)
    weights = trainable_parameters(expected.trunk)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in trainable_parameters(resumed.trunk).items())
    one, other = (
        load_file(folder / "checkpoints" / f"step-{STEPS}" / "trained.safetensors") for folder in (whole, stopped)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # metrics.jsonl continues without a repeated step, step 5 was dropped and taken again
    measured = ("queries_per_second", "tokens_per_second", "peak_memory_bytes", "seconds")
    one, other = (
        [{key: value for key, value in line.items() if key not in measured} for line in lines(folder)]
        for folder in (whole, stopped)
    )
    assert one == other


@pytest.mark.bitwise
def test_the_uninterrupted_run_itself_is_the_same_twice_and_dropout_was_on(tiny_encoder, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        trained(tmp_path / name, fresh_encoder(tiny_encoder, "bitfit"), seed=seed)
    one, two, other = (
        [line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two", "other")
    )
    assert one == two
    assert one != other
    still = fresh_encoder(tiny_encoder, "bitfit")
    for module in still.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained(tmp_path / "still", still)
    assert [line["loss"] for line in lines(tmp_path / "still") if "loss" in line] != one


@pytest.mark.bitwise
def test_a_run_whose_newest_checkpoint_is_damaged_resumes_from_the_one_before(tiny_encoder, tmp_path, caplog):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trained(whole, fresh_encoder(tiny_encoder, "bitfit"))
    with pytest.raises(Stopped):
        trained(stopped, fresh_encoder(tiny_encoder, "bitfit"), stop_after=5)
    file = stopped / "checkpoints" / "step-4" / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    trained(stopped, fresh_encoder(tiny_encoder, "bitfit"))
    assert "step-4/trained.safetensors is damaged" in caplog.text
    assert "step-2 is used instead" in caplog.text
    one, other = (run / "checkpoints" / f"step-{STEPS}" / "trained.safetensors" for run in (whole, stopped))
    assert one.read_bytes() == other.read_bytes()
    assert [line["loss"] for line in lines(stopped) if "loss" in line] == [
        line["loss"] for line in lines(whole) if "loss" in line
    ]


def test_where_the_file_system_vanishes_nothing_is_written_in_its_place_and_the_run_resumes(tiny_encoder, tmp_path):
    """As with a disk that is unmounted: the folder around it is there, and empty."""
    trained(tmp_path / "whole", fresh_encoder(tiny_encoder, "bitfit"))
    folder, elsewhere, encoder = tmp_path / "run", tmp_path / "elsewhere", fresh_encoder(tiny_encoder, "bitfit")
    folder.mkdir()
    taken = []

    def evaluate() -> dict:
        taken.append(1)
        if len(taken) == 5:
            folder.rename(elsewhere)
        return {"toy": {"ndcg@10": 0.5}}

    config = TrainerConfig(
        queries_per_process=8, epochs=2, max_steps=STEPS, log_every_steps=1, save_every_steps=2, evaluate_every_steps=1
    )
    feed, optim = feed_of(EXAMPLES, encoder, 8), OptimConfig(learning_rate=1e-2)
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        train(encoder, feed, Accelerator(cpu=True), RunFolder(folder), config, LossConfig(), optim, evaluate)
    assert not folder.exists()
    elsewhere.rename(folder)
    assert checkpoint.newest_undamaged(folder / "checkpoints").name == "step-4"
    trained(folder, fresh_encoder(tiny_encoder, "bitfit"))
    one, other = (
        tmp_path / name / "checkpoints" / f"step-{STEPS}" / "trained.safetensors" for name in ("whole", "run")
    )
    assert one.read_bytes() == other.read_bytes()


def test_a_half_written_last_line_is_dropped(tiny_encoder, tmp_path):
    with pytest.raises(Stopped):
        trained(tmp_path / "run", fresh_encoder(tiny_encoder, "bitfit"), stop_after=3)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    trained(tmp_path / "run", fresh_encoder(tiny_encoder, "bitfit"))
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, STEPS + 1))


def test_a_finished_run_takes_no_further_step(tiny_encoder, tmp_path):
    first = fresh_encoder(tiny_encoder, "bitfit")
    trained(tmp_path / "run", first)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = fresh_encoder(tiny_encoder, "bitfit")
    assert trained(tmp_path / "run", again).step == STEPS
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    expected = trainable_parameters(first.trunk)
    assert all(torch.equal(p, expected[name]) for name, p in trainable_parameters(again.trunk).items())


@pytest.mark.parametrize("log_every_steps", [1, 100])
def test_a_run_that_diverges_stops_with_one_sentence_and_saves_nothing_of_it(log_every_steps, tiny_encoder, tmp_path):
    """With a step logged only now and then, a checkpoint without numbers must not replace the last good one."""
    encoder = fresh_encoder(tiny_encoder, "bitfit")
    with torch.no_grad():
        trainable_parameters(encoder.trunk)["ln_f.bias"].fill_(float("nan"))
    refusal = (
        r"step \d: the loss is nan, the gradient norm nan; lower optim\.learning_rate=.* "
        "Nothing of this step is saved, and earlier checkpoints are untouched"
    )
    with pytest.raises(InputError, match=refusal):
        trained(tmp_path / "run", encoder, log_every_steps=log_every_steps)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_batch_without_any_negative_is_refused(tiny_encoder, tmp_path):
    encoder, run = fresh_encoder(tiny_encoder, "bitfit"), RunFolder(tmp_path)
    config = TrainerConfig(queries_per_process=1)
    feed = feed_of([Example("q", "p")] * 3, encoder, 1)
    refusal = r"no negative at all .* would be 0; raise trainer\.queries_per_process or data\.num_hard_negatives"
    with pytest.raises(InputError, match=refusal):
        train(encoder, feed, Accelerator(cpu=True), run, config, LossConfig(), OptimConfig(), dict)
    assert not list(tmp_path.iterdir())


def test_more_accumulation_than_batches_is_refused(tiny_encoder, tmp_path):
    refusal = (
        r"the run has 13\.5 batches, less than the 99 of one optimizer step \(trainer\.gradient_accumulation\); lower "
        r"trainer\.gradient_accumulation or trainer\.queries_per_process, or give more data"
    )
    with pytest.raises(InputError, match=refusal):
        trained(tmp_path / "run", fresh_encoder(tiny_encoder, "bitfit"), gradient_accumulation=99)


def test_a_run_that_would_learn_nothing_is_refused_at_its_first_step(tiny_encoder, tmp_path):
    """A cosine is always above another one less 2.5."""
    encoder = tiny_encoder("gpt2")
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit"))
    feed = feed_of([Example(f"{word} one", f"how to {word}", ()) for word in WORDS[:8]], encoder, 4)
    config, loss = TrainerConfig(queries_per_process=4), LossConfig(false_negative_margin=2.5)
    with pytest.raises(InputError, match=r"its gradient is 0: loss\.false_negative_margin=2\.5 may leave out every"):
        train(encoder, feed, Accelerator(cpu=True), RunFolder(tmp_path), config, loss, OptimConfig(), dict)


@pytest.mark.parametrize("padded", [False, True])
def test_the_log_is_of_all_micro_batches_of_a_step(padded, tiny_encoder, tmp_path):
    """Written out in float64: each micro-batch's queries against its own documents.

    Padded, each is as wide as its longest text.
    """
    examples = [
        Example(f"{a} {b}", f"how to {a}" + f" every {b}" * (1 + number))
        for number, (a, b) in enumerate(zip(WORDS[:12], WORDS[5:17], strict=True))
    ]
    encoder = tiny_encoder("gpt2")
    if padded:
        encoder.trunk.config._attn_implementation = "sdpa"  # which does not know where texts end
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit"))
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    feed = feed_of(examples, encoder, 4)
    cosines, tokens, positions = [], 0, 0
    for number in range(3):
        batch = feed.batch(number, 0)
        with torch.no_grad():
            queries, documents = encoder(batch.queries).double(), encoder(batch.documents).double()
        rows = [[torch.cosine_similarity(query, document, dim=0) for document in documents] for query in queries]
        cosines.append(torch.tensor(rows, dtype=torch.float64))
        lengths = [len(row) for row in (*batch.queries, *batch.documents)]
        tokens, positions = tokens + sum(lengths), positions + 8 * max(lengths)
    losses = [-(20 * matrix).log_softmax(1).diagonal().mean().item() for matrix in cosines]
    hardest = [matrix.clone().fill_diagonal_(-2).amax(1).mean().item() for matrix in cosines]

    run = RunFolder(tmp_path)
    config = TrainerConfig(queries_per_process=4, gradient_accumulation=3, keep_gigabytes=0)
    train(encoder, feed, Accelerator(cpu=True), run, config, LossConfig(), OptimConfig(), dict)

    (line,) = lines(tmp_path)
    assert max(losses) - min(losses) > 0.01  # so that one of them is not the mean
    assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert line["positive_cosine"] == pytest.approx(
        np.mean([matrix.diagonal().mean().item() for matrix in cosines]), rel=1e-5
    )
    assert line["hardest_negative_cosine"] == pytest.approx(np.mean(hardest), rel=1e-5)
    assert line["negatives_per_query"] == 3
    assert line["padding_share"] == pytest.approx(1 - tokens / positions if padded else 0, abs=1e-9)
    assert line["kept_share"] == 0


def test_a_loss_that_is_no_number_in_any_micro_batch_is_refused(tiny_encoder, tmp_path):
    encoder = fresh_encoder(tiny_encoder, "bitfit")
    feed = feed_of(EXAMPLES, encoder, 4)
    first = feed.batch(0, 0).queries[0]
    with torch.no_grad():  # a token that only the first micro-batch has
        second = feed.batch(1, 0)
        elsewhere = {token for row in (*second.queries, *second.documents) for token in row}
        token = next(token for token in first if token not in elsewhere)
        encoder.trunk.wte.weight[token] = float("nan")
    config = TrainerConfig(queries_per_process=4, gradient_accumulation=2, max_steps=1)
    with pytest.raises(InputError, match=r"step 1: the loss is nan"):
        train(encoder, feed, Accelerator(cpu=True), RunFolder(tmp_path), config, LossConfig(), OptimConfig(), dict)


def test_a_broken_line_of_the_log_is_refused_by_its_number(tiny_encoder, tmp_path):
    with pytest.raises(Stopped):
        trained(tmp_path / "run", fresh_encoder(tiny_encoder, "bitfit"), stop_after=3)
    file = tmp_path / "run" / "metrics.jsonl"
    broken = file.read_text().splitlines(keepends=True)
    broken[1] = "{torn\n"
    file.write_text("".join(broken))
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: not a line of this log .*; delete the line"):
        trained(tmp_path / "run", fresh_encoder(tiny_encoder, "bitfit"))


def test_an_evaluation_is_broken_off_and_done_again_on_resuming(ctrl_c, tiny_encoder, tmp_path):
    """The step is saved at once, and its line of the dev set is there in the end."""
    trained(tmp_path / "whole", fresh_encoder(tiny_encoder, "bitfit"))
    folder, encoder = tmp_path / "run", fresh_encoder(tiny_encoder, "bitfit")
    folder.mkdir()
    taken = []

    def evaluate() -> dict:
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the evaluation was not broken off")
        return {"toy": {"ndcg@10": 0.5}}

    config = TrainerConfig(
        queries_per_process=8, epochs=2, max_steps=STEPS, log_every_steps=1, save_every_steps=2, evaluate_every_steps=1,
        keep_best=None,
    )  # fmt: skip
    optim = OptimConfig(learning_rate=1e-2)
    feed = feed_of(EXAMPLES, encoder, 8)
    with pytest.raises(Interrupted, match=f"step 3 of {STEPS} is saved"):
        train(encoder, feed, Accelerator(cpu=True), RunFolder(folder), config, LossConfig(), optim, evaluate)
    assert checkpoint.latest(folder / "checkpoints").name == "step-3"
    trained(folder, fresh_encoder(tiny_encoder, "bitfit"))
    runs = (folder, tmp_path / "whole")
    measured, expected = ([line["step"] for line in lines(run) if "dev" in line] for run in runs)
    assert measured == expected
    one, other = (
        load_file(tmp_path / name / "checkpoints" / f"step-{STEPS}" / "trained.safetensors")
        for name in ("whole", "run")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
