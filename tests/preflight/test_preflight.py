"""What is said of a run before its first step is what the run then does, and saying it changes nothing."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from sgpt.data.feed.example import Example
from sgpt.data.feed.sampling import Feed, Source
from sgpt.data.feed.store import Examples, Tokens
from sgpt.data.formats.beir import RetrievalSet
from sgpt.data.formats.scored_pairs import PairSet
from sgpt.decoder.trunk import ModelConfig
from sgpt.encoder.encoder import Encoder
from sgpt.evaluation.evaluate import Sets
from sgpt.preflight import trial
from sgpt.preflight.preflight import Preflight, preflight
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig, frames
from sgpt.training.config import TrainConfig
from sgpt.training.optim import OptimConfig
from sgpt.training.run_folder import RunFolder
from sgpt.training.trainer import TrainerConfig, train
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.starts import Start, free_port, start_all

REPOSITORY = Path(__file__).parents[2]
NONE = Sets([], [])
EXAMPLES = [Example(f"what is {n}?", f"{n} is behind {n - 1}, and " * (1 + n % 3)) for n in range(64)]
TRAINER = {"queries_per_process": 8, "log_every_steps": 1, "save_every_steps": 100}


def made_feed(encoder: Encoder, examples: list[Example], queries: int = 8, **changed) -> Feed:
    kept = Examples.of(examples)
    tokens = Tokens(kept, encoder.tokenizer, 100)
    source = Source("toy", kept, tokens, encoder.frames, len(examples[0].hard_negatives), **changed)
    return Feed([source], queries)


def tuned(tiny_encoder, family: str = "gpt2", method: str = "bitfit", **options) -> Encoder:
    encoder = tiny_encoder(family, **options)
    torch.manual_seed(0)
    encoder.trunk = tune(encoder.trunk, TuningConfig(method))
    return encoder


def checked(
    encoder: Encoder, feed: Feed, tests: Sets = NONE, dev: Sets = NONE, steps_done: int = 0, **trainer
) -> Preflight:
    config = TrainConfig(model=ModelConfig("base"), trainer=TrainerConfig(**TRAINER))
    config.trainer = TrainerConfig(**TRAINER | trainer)  # without files of dev sets, which TrainConfig asks for
    return preflight(encoder, feed, config, Accelerator(cpu=True), tests, dev, steps_done)


@pytest.mark.bitwise
@pytest.mark.parametrize("method", ["bitfit", "lora"])
def test_a_run_is_the_same_bit_for_bit_after_it_was_tried(method, tiny_encoder, tmp_path):
    """With dropout, which draws numbers."""
    trained = []
    for number, is_tried in enumerate((False, True)):
        encoder = tuned(tiny_encoder, method=method)
        feed = made_feed(encoder, EXAMPLES)
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        if is_tried:
            before = copy.deepcopy(encoder.state_dict())
            checked(encoder, feed)
            assert all(parameter.grad is None for parameter in encoder.parameters())
            assert not encoder.training
            for name, value in encoder.state_dict().items():
                assert torch.equal(value, before[name])
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
        folder = tmp_path / str(number)
        folder.mkdir()
        config = TrainConfig(model=ModelConfig("base"), trainer=TrainerConfig(**TRAINER))
        arguments = config.trainer, config.loss, OptimConfig(learning_rate=0.05)
        train(encoder, feed, Accelerator(cpu=True), RunFolder(folder), *arguments, dict)
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        trained.append((drawn, losses, trainable_parameters(encoder.trunk)))
    assert trained[0][:2] == trained[1][:2]
    assert len(trained[0][1]) == 8
    for name, value in trained[0][2].items():
        assert torch.equal(value, trained[1][2][name]), name


def test_tokens_negatives_and_padding_are_those_of_the_batches(tiny_encoder):
    """Counted by hand: two queries ask the same, so that neither's answer is a negative of the other."""
    encoder = tuned(tiny_encoder)
    examples = [Example(f"q{n}", f"answer {n}") for n in range(6)] + [Example("q", "first"), Example("q", "second")]
    feed = made_feed(encoder, examples)
    told = checked(encoder, feed, max_steps=3, epochs=3)
    batch = feed.batch(0, 0)
    rows = {tuple(row) for row in (*batch.queries, *batch.documents)}
    assert len(rows) == 15  # of 16
    assert told.tokens == 3 * sum(map(len, rows))
    assert told.first.negatives == pytest.approx(7 - 2 / 8)
    assert (told.first.padding_share, told.forecast.kept_share) == (0, 1)
    assert "3, which is 3.00 epochs of 8 examples" in told.table["steps"]
    assert "6.8 a query of 8 candidates, in batches of 8 queries" in told.table["negatives"]
    assert "queries as [ … ], 0.0 % are cut to 24 tokens" in told.table["texts"]


def test_padding_is_that_of_a_trunk_that_needs_it(tiny_encoder):
    encoder = tuned(tiny_encoder)
    encoder.trunk.config._attn_implementation = "sdpa"  # which does not know where texts end
    told = checked(encoder, made_feed(encoder, EXAMPLES))
    assert told.first.padding_share > 0
    assert "GPT2Model cannot compute texts end to end without padding" in told.warnings


PRECISIONS = {
    ("float32", "bitfit", "fp32"): "float32 trunk, float32 biases,",
    ("bfloat16", "bitfit", "fp32"): "bfloat16 trunk, float32 biases,",
    ("float16", "lora", "fp32"): "float16 trunk, float32 learning parameters,",
    ("float32", "full", "bf16"): "float32 trunk, float32 learning parameters, computed in bfloat16,",
}


@pytest.mark.parametrize(("dtype", "method", "precision"), PRECISIONS)
def test_it_says_what_the_weights_are_kept_in(dtype, method, precision, tiny_encoder):
    encoder = tuned(tiny_encoder, method=method, dtype=dtype)
    told = checked(encoder, made_feed(encoder, EXAMPLES), precision=precision)
    assert f" %), {PRECISIONS[dtype, method, precision]} peak learning rate 3.20e-04" in told.table["learning"]
    assert told.table["computed on"].startswith("cpu, 1 process(es), ")


def test_accumulation_is_warned_about(tiny_encoder):
    encoder = tuned(tiny_encoder)
    told = checked(encoder, made_feed(encoder, EXAMPLES), gradient_accumulation=2)
    assert any("gradient_accumulation=2 adds no in-batch negatives" in warning for warning in told.warnings)
    assert told.table["negatives"].startswith("7.0 a query of 8 candidates")


def test_dev_sets_that_are_never_scored_are_warned_about(tiny_encoder):
    encoder = tuned(tiny_encoder)
    dev = Sets([], [PairSet("pairs", ["one"], ["another"], [0.5])])
    never = "dev sets are named and never scored"
    assert never in " ".join(checked(encoder, made_feed(encoder, EXAMPLES), dev=dev).warnings)
    scored = checked(encoder, made_feed(encoder, EXAMPLES), dev=dev, evaluate_every_steps=4)
    assert never not in " ".join(scored.warnings)


def test_of_a_resumed_run_the_steps_to_come_are_counted(tiny_encoder):
    """Of eight steps, scored after each fourth one."""
    encoder, sets = tuned(tiny_encoder), Sets([], [PairSet("pairs", ["one"], ["another"], [0.5])])
    told = checked(encoder, made_feed(encoder, EXAMPLES), sets, sets, steps_done=4, evaluate_every_steps=4)
    assert told.table["steps"].startswith("8 (4 are done), which is 1.00 epochs of 64 examples")
    assert "1 evaluation on the test sets, about 0:00 each; 1 evaluation on the dev sets" in told.table["time"]


# what is refused


def test_a_float16_trunk_that_overflows_is_refused(tiny_encoder):
    encoder = tuned(tiny_encoder, dtype="float16")
    with torch.no_grad():
        encoder.trunk.h[0].mlp.c_fc.weight *= 5e4
    with pytest.raises(InputError, match=r"embedding that is NaN or infinite in GPT2Model: it overflows in float16; "):
        checked(encoder, made_feed(encoder, EXAMPLES))
    for parameter in encoder.trunk.parameters():  # what float16 cannot hold, bfloat16 can
        parameter.data = parameter.data.to(torch.bfloat16) if parameter.dtype == torch.float16 else parameter.data
    checked(encoder, made_feed(encoder, EXAMPLES))


def test_a_run_in_which_nothing_learns_is_refused(tiny_encoder):
    encoder = tiny_encoder("gpt2")
    encoder.trunk.requires_grad_(False)
    with pytest.raises(InputError, match=r"no parameter of GPT2Model learns"):
        checked(encoder, made_feed(encoder, EXAMPLES))


def test_a_source_with_longer_texts_than_the_base_has_positions_is_refused(tiny_encoder):
    encoder = tuned(tiny_encoder)
    longer = frames(MarkersConfig(query_max_tokens=24, document_max_tokens=129), encoder.tokenizer)
    feed = made_feed(encoder, EXAMPLES)
    source = Source("toy", feed.sources[0].examples, feed.sources[0].tokens, longer)
    with pytest.raises(InputError, match=r"toy: a document may have 129 tokens, and GPT2Model has 128 positions; "):
        checked(encoder, Feed([source], 8))


def test_batches_in_which_every_document_answers_every_query_are_refused(tiny_encoder):
    encoder = tuned(tiny_encoder)
    with pytest.raises(InputError, match=r"no query of the first batches has a negative"):
        checked(encoder, made_feed(encoder, [Example(f"q{n}", "one answer") for n in range(16)]))


# what is warned about


def warned(encoder: Encoder, examples: list[Example], **sets: Sets) -> str:
    return "\n".join(checked(encoder, made_feed(encoder, examples), **sets).warnings)


def test_a_clean_run_has_no_warning(tiny_encoder):
    unseen = Sets([RetrievalSet("unseen", {"d": "a document"}, {"q": "a query"}, {"q": {"d": 1}})], [])
    assert warned(tuned(tiny_encoder), EXAMPLES, tests=unseen) == ""


def test_test_and_dev_sets_inside_of_the_training_data_are_warned_about(tiny_encoder):
    """Known although case, blanks and the form of letters differ."""
    corpus = {"a": "1 is behind 0,  and 1 IS behind 0, and", "b": "new", "c": "also new"}
    queries = {"x": "What is  1?", "y": "ｗｈａｔ is 2?", "z": "what is 99?"}
    seen = RetrievalSet("seen", corpus, queries, {query: {"b": 1} for query in queries})
    pairs = PairSet("pairs", ["what is 5?", "new one"], ["other", "another"], [0.1, 0.9])
    told = warned(tuned(tiny_encoder), EXAMPLES, tests=Sets([seen], []), dev=Sets([], [pairs]))
    assert "seen: 2 of 3 queries and 1 of 3 documents of this test set are in the training data, for example" in told
    assert "'What is  1?'" in told
    assert "pairs: 1 of 4 texts of this dev set are in the training data, for example 'what is 5?'" in told


def test_positives_among_hard_negatives_and_positives_that_are_nearly_equal_are_warned_about(tiny_encoder):
    examples = [Example(f"q{n}", f"answer {n}", (f"wrong {n}",)) for n in range(12)]
    examples += [Example("q1", "other answer", ("Answer  1",)), Example("q13", "ANSWER 2", ("q13",))]
    told = warned(tuned(tiny_encoder), examples)
    assert "toy: 2 hard negatives are a positive or the text of their own query, for example 'Answer  1'; " in told
    assert "toy: 1 positives equal another one but for case, blanks or forms of letters, for example" in told


CHAT = ["<|im_start|>user\nhi", "[INST] hi [/INST]", "<start_of_turn>model", "### Response:\nhi", "<|eot_id|>"]


@pytest.mark.parametrize("markup", CHAT)
def test_a_chat_template_that_was_left_in_is_warned_about(markup, tiny_encoder):
    examples = [Example(f"q{n}", f"answer {n}") for n in range(7)] + [Example("q7", markup)]
    assert "1 of 16 sampled texts hold the markup of a chat template, for example" in warned(
        tuned(tiny_encoder), examples
    )


def test_a_pad_token_inside_of_texts_is_warned_about(tiny_encoder):
    examples = [Example(f"q{n}", f"answer {n}") for n in range(7)] + [Example("q7", "one<|endoftext|>two")]
    told = warned(tuned(tiny_encoder), examples)
    assert "the pad token <|endoftext|>, which is the end token too, stands inside 1 of 16 sampled texts" in told


def test_a_beginning_token_that_is_missing_or_double_is_warned_about(tiny_encoder):
    encoder = tuned(tiny_encoder, "opt")  # whose tokenizer puts </s> before every text
    examples = [Example(f"q{n}", f"answer {n}") for n in range(7)] + [Example("</s>q7", "answer 7")]
    assert "1 of 16 sampled texts begin with </s>, and the tokenizer puts another one before them" in warned(
        encoder, examples
    )
    encoder.trunk.config.bos_token_id = 0
    assert "puts </s> (id 1) before every text, and config.json of the base names id 0" in warned(encoder, EXAMPLES)
    encoder = tuned(tiny_encoder, "llama")
    encoder.tokenizer = copy.deepcopy(encoder.tokenizer)
    encoder.tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert "the tokenizer puts no <s> before a text" in warned(encoder, EXAMPLES)


# memory and time


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("keep", [9, pytest.param(0.1, marks=pytest.mark.slow)])
def test_the_peak_of_memory_is_foretold(keep, tmp_path):
    """In a process of its own."""
    script = REPOSITORY / "benchmarks" / "preflight.py"
    command = [sys.executable, str(script), "--pack=1024", "--steps=2", f"--keep={keep}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["measured_bytes"] - told["bytes_before"] > 0.1e9 or keep < 1
    assert told["foretold_bytes"] == pytest.approx(told["measured_bytes"], rel=0.15)
    assert told["foretold_kept_share"] == pytest.approx(told["measured_kept_share"], abs=0.1)
    assert (told["measured_kept_share"] == 1) == (keep == 9)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is what getrusage says")
def test_the_peak_of_memory_is_not_that_of_the_process_that_started_this_one():
    ballast = bytearray(1) * 1_000_000_000  # resident while the other one starts
    code = "import torch, sgpt.training.log as log; print(log.peak_memory_bytes(torch.device('cpu')))"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=100)
    assert int(started.stdout) < len(ballast), started.stderr


def test_a_part_stands_for_a_pack_that_takes_long(tiny_encoder, monkeypatch):
    """The same tokens, and memory in proportion; bytes that autograd keeps are counted, not timed."""
    encoder = tuned(tiny_encoder)
    feed = made_feed(encoder, EXAMPLES)
    whole = trial.try_pack(encoder, feed.batch(0, 0), Accelerator(cpu=True), 0)
    monkeypatch.setattr(trial, "MOST_SECONDS", 0.0)
    part = trial.try_pack(encoder, feed.batch(0, 0), Accelerator(cpu=True), 0)
    assert part.positions == whole.positions
    assert part.saved_bytes == pytest.approx(whole.saved_bytes, rel=0.2)


# from the command line


def test_a_dry_run_shows_the_table_and_writes_no_run(start, training, tmp_path):
    ended = start("biencoder", *training(tmp_path), "trainer.dry_run=true")
    assert ended.code == 0, ended.said
    for label in ("learning", "steps", "negatives", "texts", "padding", "memory", "time"):
        assert f" {label} " in ended.said
    assert "run before training: nothing is written" in ended.said
    assert not (tmp_path / "runs").exists()


def test_a_run_says_first_what_it_does_and_before_its_first_step_what_it_takes(start, training, tmp_path):
    ended = start("biencoder", *training(tmp_path))
    assert ended.code == 0, ended.said
    lines = [line for line in ended.err.splitlines() if "so far" not in line]
    assert "is trained on" in lines[0]
    kinds = ("learning ", "memory ", "time ", "step 1/4 ")
    places = [next(place for place, line in enumerate(lines) if line.startswith(kind)) for kind in kinds]
    assert places == sorted(places)


def test_two_processes_agree_on_what_they_will_do(training, tmp_path):
    arguments = [*training(tmp_path), "trainer.dry_run=true"]
    ended = start_all("biencoder", tmp_path, {"two": Start(arguments, port=free_port())})["two"]
    assert ended.codes == [0, 0], ended.err
    assert "cpu, 2 process(es), 1 thread(s) each" in ended.out
    assert "15.0 a query of 16 candidates, in batches of 16 queries in total" in ended.out
