"""The step: chunked or at once, the same gradients; and both are those of the loss written out."""

import pytest
import torch
from conftest import random_trunk

from sgpt.contract import Contract
from sgpt.data.collate import Batch, collate
from sgpt.data.example import Example
from sgpt.encoder import Encoder
from sgpt.loss import LossConfig
from sgpt.markers import MarkersConfig
from sgpt.model import load_tokenizer
from sgpt.step import chunked_step, health, objective, plain_step
from sgpt.tuning import TuningConfig, tune

TEXTS = ["parse a date", "open a file for reading and writing", "a", "sum of all the numbers in the list", "what?", "how to sort words by length"]


def examples(hard_negatives: int) -> list[Example]:
    return [Example(text, f"positive of {text}", tuple(f"{n} not {text}" * (n + 1) for n in range(hard_negatives))) for text in TEXTS]


def encoder_of(family: str, tiny_base, method: str = "full", dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Encoder:
    """In float64, so that hardly anything but a wrong formula can tell two roads apart."""
    base = str(tiny_base(family))
    tokenizer = load_tokenizer(base)
    trunk = random_trunk(family, len(tokenizer)).to(dtype)
    for module in trunk.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    encoder = Encoder(tune(trunk, TuningConfig(method)), tokenizer, Contract(markers=MarkersConfig(query_max_tokens=24, document_max_tokens=40), base=base))
    return encoder.train()


def batch_of(encoder: Encoder, hard_negatives: int) -> Batch:
    return collate(examples(hard_negatives), encoder.tokenizer, encoder.frames)


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    encoder.zero_grad()
    return found


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= relative * float(gradient.norm()) + 1e-15, name


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard_negatives", [0, 2])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_the_chunked_step_gives_the_gradient_of_the_plain_step_for_every_parameter(chunk_size, hard_negatives, symmetric, tiny_base):
    encoder, loss = encoder_of("gpt_neo", tiny_base), LossConfig(symmetric=symmetric)
    batch = batch_of(encoder, hard_negatives)
    plain = plain_step(encoder, batch, loss, torch.Tensor.backward)
    expected = gradients(encoder)
    chunked = chunked_step(encoder, batch, loss, torch.Tensor.backward, chunk_size)
    found = gradients(encoder)
    assert len(expected) == len(list(encoder.parameters()))
    # float64, but the pooling's weights are float32 (6e-8) and add up over another padded width
    assert_equal_gradients(found, expected, 1e-6)
    assert chunked.loss.item() == pytest.approx(plain.loss.item(), rel=1e-8)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_the_chunked_step_replays_dropout(chunk_size, tiny_base):
    """Reference: the same chunks embedded with their graphs kept, and one backward pass through all of them."""
    encoder, loss = encoder_of("gpt2", tiny_base, dropout=0.3), LossConfig()
    batch = batch_of(encoder, 1)
    torch.manual_seed(0)
    queries = torch.cat([encoder(batch.queries[i : i + chunk_size]) for i in range(0, len(batch.queries), chunk_size)])
    documents = torch.cat([encoder(batch.documents[i : i + chunk_size]) for i in range(0, len(batch.documents), chunk_size)])
    value, _ = objective(queries, documents, batch, loss)
    value.backward()
    expected, next_number = gradients(encoder), torch.rand(1)
    torch.manual_seed(0)
    outcome = chunked_step(encoder, batch, loss, torch.Tensor.backward, chunk_size)
    assert outcome.loss.item() == value.item()
    assert_equal_gradients(gradients(encoder), expected, 1e-10)
    assert torch.rand(1) == next_number  # the step leaves the random stream where one pass leaves it
    torch.manual_seed(1)
    assert chunked_step(encoder, batch, loss, torch.Tensor.backward, chunk_size).loss.item() != value.item()  # dropout was on


def test_with_dropout_a_chunk_as_large_as_the_batch_is_the_plain_step(tiny_base):
    encoder, loss = encoder_of("gpt2", tiny_base, dropout=0.3), LossConfig()
    batch = batch_of(encoder, 1)
    torch.manual_seed(0)
    plain_step(encoder, batch, loss, torch.Tensor.backward)
    expected = gradients(encoder)
    torch.manual_seed(0)
    chunked_step(encoder, batch, loss, torch.Tensor.backward, 100)
    assert_equal_gradients(gradients(encoder), expected, 1e-10)


@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_the_chunked_step_loses_no_gradient_under_autocast(method, tiny_base):
    """Autocast keeps its casts of the weights; casts made without a graph, for the first pass, must not serve the second."""
    encoder, loss = encoder_of("gpt_neo", tiny_base, method, dtype=torch.float32), LossConfig()
    batch = batch_of(encoder, 1)
    with torch.autocast("cpu", torch.bfloat16):
        plain_step(encoder, batch, loss, torch.Tensor.backward)
        expected = gradients(encoder)
        chunked_step(encoder, batch, loss, torch.Tensor.backward, 4)
    # bfloat16 holds 8 bits, and chunks of other lengths round otherwise: a few percent of the norm, where a lost term is all of it
    assert_equal_gradients(gradients(encoder), expected, 0.05)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_objective_is_the_cross_entropy_of_scaled_cosines(symmetric, tiny_base):
    """Written out in float64 for one positive and one hard negative each; the other direction has no hard negatives."""
    encoder = encoder_of("gpt_neo", tiny_base)
    batch = batch_of(encoder, 1)
    with torch.no_grad():
        queries, documents = encoder(batch.queries), encoder(batch.documents)
        value, outcome = objective(queries, documents, batch, LossConfig(scale=7.0, symmetric=symmetric))
    scores = 7 * torch.stack([torch.stack([torch.cosine_similarity(q, d, dim=0) for d in documents]) for q in queries])
    forwards = sum(-(scores[i, 2 * i] - scores[i].exp().sum().log()) for i in range(6)) / 6
    backwards = sum(-(scores[i, 2 * i] - scores[:, 2 * i].exp().sum().log()) for i in range(6)) / 6
    assert value.item() == pytest.approx(float((forwards + backwards) / 2 if symmetric else forwards), rel=1e-10)
    assert outcome.loss.item() == value.item()


def test_duplicates_take_no_part_in_either_direction(tiny_base):
    """The third example repeats the first one's query, the fourth the second one's positive; the fifth's positive is the fourth's query."""
    encoder = encoder_of("gpt_neo", tiny_base)
    chosen = [Example("a", "one"), Example("b", "two"), Example("a", "three"), Example("c", "two"), Example("d", "c")]
    batch = collate(chosen, encoder.tokenizer, encoder.frames)
    with torch.no_grad():
        queries, documents = encoder(batch.queries), encoder(batch.documents)
        value, _ = objective(queries, documents, batch, LossConfig(symmetric=True))
    scores = 20 * torch.stack([torch.stack([torch.cosine_similarity(q, d, dim=0) for d in documents]) for q in queries])
    candidates = [(0, 1, 3, 4), (0, 1, 2, 4), (1, 2, 3, 4), (0, 2, 3), (0, 1, 2, 3, 4)]  # of each query
    askers = [(0, 1, 3, 4), (0, 1, 2, 4), (1, 2, 3, 4), (0, 2, 3, 4), (0, 1, 2, 4)]  # of each document
    forwards = sum(-(scores[i, i] - scores[i, list(rows)].exp().sum().log()) for i, rows in enumerate(candidates)) / 5
    backwards = sum(-(scores[i, i] - scores[list(rows), i].exp().sum().log()) for i, rows in enumerate(askers)) / 5
    assert value.item() == pytest.approx(float((forwards + backwards) / 2), rel=1e-10)


def test_health_gives_the_mean_cosines_of_positives_and_hardest_negatives(tiny_base):
    encoder = encoder_of("gpt_neo", tiny_base)
    batch = batch_of(encoder, 1)
    outcome = plain_step(encoder, batch, LossConfig(), torch.Tensor.backward)
    with torch.no_grad():
        queries, documents = encoder(batch.queries), encoder(batch.documents)
    cosines = [[float(torch.cosine_similarity(q, d, dim=0)) for d in documents] for q in queries]
    positive = sum(cosines[i][2 * i] for i in range(6)) / 6
    hardest = sum(max(value for row, value in enumerate(cosines[i]) if row != 2 * i) for i in range(6)) / 6
    assert health(outcome) == pytest.approx({"positive_cosine": positive, "hardest_negative_cosine": hardest}, rel=1e-6)
