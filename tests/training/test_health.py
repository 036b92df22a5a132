"""The numbers of a log line, each worked out again in float64, and the alarm when embeddings collapse."""

import math

import pytest
import torch
from accelerate import Accelerator

from sgpt.data.feed.collate import collate
from sgpt.data.feed.example import Example
from sgpt.encoder.encoder import Encoder
from sgpt.training.health import TEXTS_COMPARED, batch_statistics, collapse_alarm, gradient_norms
from sgpt.training.loss import LossConfig
from sgpt.training.optim import OptimConfig
from sgpt.training.run_folder import RunFolder
from sgpt.training.step import contrastive_step
from sgpt.training.trainer import TrainerConfig, train
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.training.test_resume import EXAMPLES, feed_of, lines

TOPICS = ["sort a list", "read a file", "parse a date", "join two paths", "sum the numbers", "match a word"]
BATCH = [Example(f"how to {topic}", f"{topic} with this", (f"{topic} is not here",)) for topic in TOPICS]
TWICE = [*BATCH[:5], Example("another question", BATCH[0].positive, ("nothing of it",))]  # one document is there twice


def fresh(tiny_encoder, family: str = "gpt_neo", tuning: str = "bitfit") -> Encoder:
    encoder = tiny_encoder(family)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    encoder.trunk = tune(encoder.trunk, TuningConfig(tuning))
    return encoder


@pytest.mark.parametrize("scale", [20.0, 2.0])
@pytest.mark.parametrize("examples", [BATCH, TWICE], ids=["all different", "a document twice"])
def test_alignment_uniformity_and_effective_negatives_are_those_of_their_definitions(examples, scale, tiny_encoder):
    encoder = fresh(tiny_encoder)
    batch = collate(examples, encoder.tokenizer, encoder.frames)
    statistics = batch_statistics(contrastive_step(encoder, batch, LossConfig(scale=scale)))
    with torch.no_grad():
        queries, documents = encoder(batch.queries).double(), encoder(batch.documents).double()
    queries, documents = (rows / rows.norm(dim=1, keepdim=True) for rows in (queries, documents))
    texts = [text for example in examples for text in (example.positive, *example.hard_negatives)]

    distances = [float((queries[i] - documents[2 * i]).norm()) ** 2 for i in range(6)]
    assert statistics["alignment"] == pytest.approx(sum(distances) / 6, rel=1e-5)
    closeness = [
        math.exp(-2 * float((documents[2 * i] - documents[2 * j]).norm()) ** 2)
        for i in range(6) for j in range(6) if texts[2 * i] != texts[2 * j]
    ]  # fmt: skip
    assert statistics["uniformity"] == pytest.approx(math.log(sum(closeness) / len(closeness)), rel=1e-5)

    effective = []
    for i in range(6):
        weights = [
            math.exp(scale * float(queries[i] @ documents[c])) for c in range(12) if texts[c] != examples[i].positive
        ]
        shares = [weight / sum(weights) for weight in weights]
        effective.append(math.exp(-sum(share * math.log(share) for share in shares)))
    assert statistics["effective_negatives"] == pytest.approx(sum(effective) / 6, rel=1e-5)
    assert 1 < statistics["effective_negatives"] < statistics["negatives_per_query"]


def test_effective_negatives_are_all_of_them_where_all_are_equally_near(tiny_encoder):
    encoder = fresh(tiny_encoder)
    batch = collate(BATCH, encoder.tokenizer, encoder.frames)
    even = batch_statistics(contrastive_step(encoder, batch, LossConfig(scale=1e-4)))
    assert even["effective_negatives"] == pytest.approx(even["negatives_per_query"], rel=1e-5)


def test_a_query_without_negatives_has_no_effective_ones(tiny_encoder):
    """All questions have one answer, so no candidate is a negative, and no two documents are different."""
    encoder = fresh(tiny_encoder)
    examples = [Example(f"question {number}", "the answer") for number in range(3)]
    batch = collate(examples, encoder.tokenizer, encoder.frames)
    statistics = batch_statistics(contrastive_step(encoder, batch, LossConfig()))
    assert statistics["effective_negatives"] == statistics["negatives_per_query"] == 0
    assert statistics["uniformity"] is statistics["hardest_negative_cosine"] is None


def test_uniformity_of_a_large_batch_is_near_that_of_all_its_pairs(tiny_encoder):
    encoder = fresh(tiny_encoder)
    examples = [Example(f"{n} is {n % 7}", f"what follows {n} and {n * n % 31}") for n in range(2 * TEXTS_COMPARED + 9)]
    batch = collate(examples, encoder.tokenizer, encoder.frames)
    statistics = batch_statistics(contrastive_step(encoder, batch, LossConfig()))
    with torch.no_grad():
        documents = torch.nn.functional.normalize(encoder(batch.documents).double(), dim=1)
    closeness = (-2 * torch.cdist(documents, documents).square()).exp()
    closeness = closeness[~torch.eye(len(documents), dtype=torch.bool)]
    assert statistics["uniformity"] == pytest.approx(float(closeness.mean().log()), rel=0.05)


@pytest.mark.parametrize(
    ("family", "tuning", "groups"),
    [
        ("gpt2", "bitfit", {"block 0", "block 1", "last norm"}),
        ("gpt2", "full", {"embeddings", "block 0", "block 1", "last norm"}),
        ("bloom", "full", {"embeddings", "block 0", "block 1", "last norm"}),
        ("llama", "lora", {"block 0", "block 1"}),
    ],
)
def test_gradient_norms_are_of_groups_that_make_up_the_whole(family, tuning, groups, tiny_encoder):
    encoder = fresh(tiny_encoder, family, tuning)
    contrastive_step(encoder, collate(BATCH, encoder.tokenizer, encoder.frames), LossConfig())
    parameters = trainable_parameters(encoder.trunk)
    norms = gradient_norms(parameters)
    assert norms.keys() == groups
    of_first = [p.grad.double() for name, p in parameters.items() if ".0." in name]
    assert float(norms["block 0"]) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in of_first)), rel=1e-5)
    whole = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values() if p.grad is not None))
    assert math.sqrt(sum(float(norm) ** 2 for norm in norms.values())) == pytest.approx(whole, rel=1e-5)


def test_blocks_are_in_quarters():
    parameters = {f"h.{block}.mlp.bias": torch.nn.Parameter(torch.zeros(1)) for block in range(6)}
    for parameter in parameters.values():
        parameter.grad = torch.ones(1)
    norms = gradient_norms(parameters)
    assert list(norms) == ["blocks 0-1", "block 2", "blocks 3-4", "block 5"]
    assert [float(norm) ** 2 for norm in norms.values()] == pytest.approx([2, 1, 2, 1])


def test_a_run_whose_embeddings_collapse_says_so_once_also_when_it_is_resumed(tiny_encoder, tmp_path, caplog):
    """Collapsed for good: the last norm scales every embedding by 0.0001, and adds what is the same for all texts."""
    run = RunFolder(tmp_path)

    def trained(max_steps: int) -> None:
        encoder = fresh(tiny_encoder, "gpt2")
        with torch.no_grad():
            encoder.trunk.ln_f.weight.mul_(1e-4)
            encoder.trunk.ln_f.bias.add_(1)
        config = TrainerConfig(
            queries_per_process=4, epochs=3, max_steps=max_steps, log_every_steps=8, save_every_steps=24
        )
        optim = OptimConfig(learning_rate=1e-6, schedule="constant")
        train(encoder, feed_of(EXAMPLES, encoder, 4), Accelerator(cpu=True), run, config, LossConfig(), optim, dict)

    with caplog.at_level("WARNING", logger="sgpt"):
        trained(32)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged if "alarm" in line] == [24]  # neither before the twentieth, nor again
    assert caplog.messages == [logged[2]["alarm"]]
    assert "step 24: different documents have nearly the same embedding (uniformity -0.000, a mean" in caplog.text
    trained(40)
    assert [line["step"] for line in lines(tmp_path) if "alarm" in line] == [24]


def test_a_base_whose_embeddings_begin_alike_has_time_to_spread_them():
    assert collapse_alarm(-0.001, step=20, steps=1000) is None
    assert collapse_alarm(-0.37, step=900, steps=1000) is None  # of SmolLM2 before training
    assert collapse_alarm(None, step=900, steps=1000) is None
    assert collapse_alarm(-0.001, step=100, steps=1000)
