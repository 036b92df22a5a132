"""The step: the same gradients whatever is kept, computed again or scored in chunks, those of the loss written out."""

import gc

import pytest
import torch

from sgpt.data.feed.collate import Batch, collate
from sgpt.data.feed.example import Example
from sgpt.decoder.attention import prepare
from sgpt.decoder.packing import distinct
from sgpt.decoder.trunk import load_tokenizer
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.text.markers import MarkersConfig
from sgpt.training.health import batch_statistics
from sgpt.training.loss import LOSSES, LossConfig, objective
from sgpt.training.step import contrastive_step
from sgpt.training.tuning import TuningConfig, tune
from tests.conftest import random_trunk

TEXTS = [
    "parse a date",
    "open a file for reading and writing",
    "a",
    "sum of all the numbers in the list",
    "what?",
    "how to sort words by length",
]


def examples(hard_negatives: int) -> list[Example]:
    return [
        Example(text, f"positive of {text}", tuple(f"{n} not {text}" * (n + 1) for n in range(hard_negatives)))
        for text in TEXTS
    ]


def encoder_of(
    family: str, tiny_base, method: str = "full", dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> Encoder:
    """In float64, so that hardly anything but a wrong formula can tell two ways apart."""
    base = str(tiny_base(family))
    tokenizer = load_tokenizer(base)
    trunk = prepare(random_trunk(family, len(tokenizer)).to(dtype))
    for module in trunk.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    encoder = Encoder(
        tune(trunk, TuningConfig(method)),
        tokenizer,
        Contract(markers=MarkersConfig(query_max_tokens=24, document_max_tokens=40), base=base),
    )
    return encoder.train()


def batch_of(encoder: Encoder, hard_negatives: int) -> Batch:
    return collate(examples(hard_negatives), encoder.tokenizer, encoder.frames)


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    """By parameter, taken away from the encoder."""
    taken = {}
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            taken[name] = parameter.grad.clone()
    encoder.zero_grad()
    return taken


def cosines_of(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """[Q, C], one by one."""
    rows = [[torch.cosine_similarity(query, document, dim=0) for document in documents] for query in queries]
    return torch.stack([torch.stack(row) for row in rows])


def assert_equal_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).norm()) <= relative * float(gradient.norm()) + 1e-15, name


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hard_negatives", [0, 2])
@pytest.mark.parametrize("keep_bytes", [0, 1, 700_000])
def test_what_is_computed_again_gives_the_gradient_of_what_was_kept_for_every_parameter(
    keep_bytes, hard_negatives, symmetric, tiny_base
):
    """Reference: both sides embedded and scored with their graphs, and one backward pass."""
    encoder, loss = encoder_of("gpt_neo", tiny_base), LossConfig(symmetric=symmetric)
    batch = batch_of(encoder, hard_negatives)
    value, _ = objective(encoder(batch.queries), encoder(batch.documents), batch, loss)
    value.backward()
    expected = gradients(encoder)
    encoder.tokens_per_pack = 60  # several packs, of queries and documents together
    result = contrastive_step(encoder, batch, loss, keep_bytes=keep_bytes, weight=0.5)
    ours = {name: 2 * gradient for name, gradient in gradients(encoder).items()}
    assert len(expected) == len(list(encoder.parameters()))
    assert_equal_gradients(ours, expected, 1e-10)
    assert result.loss.item() == pytest.approx(value.item(), rel=1e-12)
    assert result.kept_share == (0 if keep_bytes < 2 else pytest.approx(0.5, abs=0.45))


@pytest.mark.parametrize("keep_bytes", [0, float("inf")])
def test_autocast_rounds_no_product_of_the_backward_pass(keep_bytes, tiny_base):
    """Reference: the forward pass alone inside of autocast, as torch's documentation asks for."""
    encoder, loss = encoder_of("gpt_neo", tiny_base, "bitfit", dtype=torch.float32), LossConfig()
    batch = batch_of(encoder, 1)
    with torch.autocast("cpu", torch.bfloat16):
        rows = encoder([*batch.queries, *batch.documents])
        value, _ = objective(*rows.split([len(batch.queries), len(batch.documents)]), batch, loss)
    value.backward()
    expected = gradients(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        contrastive_step(encoder, batch, loss, keep_bytes=keep_bytes)
    assert_equal_gradients(gradients(encoder), expected, 1e-6)


def test_a_budget_is_kept_to_and_used(tiny_base):
    """Against a second count: what torch's hooks see of all packs is alive between forward and backward pass."""
    encoder, loss = encoder_of("gpt_neo", tiny_base, "bitfit"), LossConfig()
    encoder.tokens_per_pack = 30
    batch = batch_of(encoder, 2)
    sizes, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    for pack in encoder.packs(distinct([*batch.queries, *batch.documents])[0]):
        storages: dict[int, int] = {}

        def count(tensor, storages=storages):
            if tensor.untyped_storage().data_ptr() not in weights:  # a linear layer keeps a view of its weight
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            embeddings = encoder.embed_pack(pack)
        sizes[len(sizes)] = (len(pack), sum(storages.values()))
        del embeddings
    total, tokens = sum(size for _, size in sizes.values()), sum(length for length, _ in sizes.values())
    shares = [
        contrastive_step(encoder, batch, loss, keep_bytes=budget).kept_share
        for budget in (0, total // 3, total // 2, 2 * total)
    ]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert 0.15 < shares[1] < 0.36
    assert shares[1] <= shares[2] < 0.53
    assert tokens == sum(map(len, distinct([*batch.queries, *batch.documents])[0]))


@pytest.mark.parametrize("keep_bytes", [1, 10**9], ids=["a pack that is not kept", "kept"])
@pytest.mark.parametrize("family", ["llama", "gpt_neo", "bert"])  # whose pooler nothing goes back through
def test_a_step_leaves_no_tensor_behind(family, keep_bytes, tiny_base):
    """A graph whose tensors hold it by themselves is freed by nothing, not even by a collection."""
    encoder = encoder_of(family, tiny_base, "bitfit")
    batch = batch_of(encoder, 1)
    alive = []
    for _ in range(3):
        contrastive_step(encoder, batch, LossConfig(), keep_bytes=keep_bytes)
        gc.collect()
        alive.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))
    assert alive[1] == alive[2]


@pytest.mark.parametrize("rows_at_a_time", [1, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scores_in_chunks_are_the_same_loss_and_gradient(symmetric, rows_at_a_time, tiny_base, monkeypatch):
    encoder, loss = encoder_of("gpt_neo", tiny_base), LossConfig(symmetric=symmetric)
    batch = batch_of(encoder, 1)
    whole = contrastive_step(encoder, batch, loss)
    expected, cosines = gradients(encoder), batch_statistics(whole)
    monkeypatch.setattr("sgpt.training.loss.SCORES_AT_A_TIME", 12 * rows_at_a_time)  # 12 candidates
    chunked = contrastive_step(encoder, batch, loss)
    assert_equal_gradients(gradients(encoder), expected, 1e-12)
    assert chunked.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    assert batch_statistics(chunked) == pytest.approx(cosines, rel=1e-12)


def test_dropout_is_replayed(tiny_base):
    encoder, loss = encoder_of("gpt2", tiny_base, dropout=0.3), LossConfig()
    encoder.tokens_per_pack = 40
    batch = batch_of(encoder, 1)
    torch.manual_seed(0)
    kept = contrastive_step(encoder, batch, loss)
    expected, next_number = gradients(encoder), torch.rand(1)
    torch.manual_seed(0)
    again = contrastive_step(encoder, batch, loss, keep_bytes=0)
    assert again.loss.item() == kept.loss.item()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(encoder).items())
    assert torch.rand(1) == next_number  # the step leaves the random stream where one pass leaves it
    torch.manual_seed(1)
    assert contrastive_step(encoder, batch, loss).loss.item() != kept.loss.item()  # dropout was on


@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_no_gradient_is_lost_under_autocast(method, tiny_base):
    """Autocast keeps its casts of the weights; those of the first pass, without a graph, must not serve the second."""
    encoder, loss = encoder_of("gpt_neo", tiny_base, method, dtype=torch.float32), LossConfig()
    encoder.tokens_per_pack = 40
    batch = batch_of(encoder, 1)
    with torch.autocast("cpu", torch.bfloat16):
        contrastive_step(encoder, batch, loss)
        expected = gradients(encoder)
        contrastive_step(encoder, batch, loss, keep_bytes=0)
    assert_equal_gradients(gradients(encoder), expected, 1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_objective_is_the_cross_entropy_of_scaled_cosines(symmetric, tiny_base):
    """Written out in float64 for one positive and one hard negative each; the other direction has no hard negatives."""
    encoder = encoder_of("gpt_neo", tiny_base)
    batch = batch_of(encoder, 1)
    with torch.no_grad():
        queries, documents = encoder(batch.queries), encoder(batch.documents)
        value, result = objective(queries, documents, batch, LossConfig(scale=7.0, symmetric=symmetric))
    scores = 7 * cosines_of(queries, documents)
    forwards = sum(-(scores[i, 2 * i] - scores[i].exp().sum().log()) for i in range(6)) / 6
    backwards = sum(-(scores[i, 2 * i] - scores[:, 2 * i].exp().sum().log()) for i in range(6)) / 6
    assert value.item() == pytest.approx(float((forwards + backwards) / 2 if symmetric else forwards), rel=1e-10)
    assert result.loss.item() == value.item()


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_that_is_named_is_the_loss_that_trains(symmetric, tiny_base, monkeypatch):
    """A new row of LOSSES: minus the mean scaled cosine of the positives, whose gradient is written out here."""

    def pull(queries, candidates, scale, positives, ignored=None):
        return -scale * (queries * candidates[positives]).sum(1).mean()

    monkeypatch.setitem(LOSSES, "pull", pull)
    encoder = encoder_of("gpt_neo", tiny_base)
    batch = batch_of(encoder, 1)
    queries, documents = encoder(batch.queries), encoder(batch.documents)
    expected = -7 * torch.cosine_similarity(queries, documents[::2], dim=1).mean()
    expected.backward()
    gradient = gradients(encoder)
    result = contrastive_step(encoder, batch, LossConfig("pull", scale=7.0, symmetric=symmetric), keep_bytes=0)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_equal_gradients(gradients(encoder), gradient, 1e-10)
    other = contrastive_step(encoder, batch, LossConfig(scale=7.0)).loss.item()
    assert other != pytest.approx(expected.item(), rel=0.1)


def test_duplicates_take_no_part_in_either_direction(tiny_base):
    """The third example repeats the first one's query, the fourth the second one's positive.

    The fifth's positive is the fourth's query.
    """
    encoder = encoder_of("gpt_neo", tiny_base)
    pairs = [Example("a", "one"), Example("b", "two"), Example("a", "three"), Example("c", "two"), Example("d", "c")]
    batch = collate(pairs, encoder.tokenizer, encoder.frames)
    with torch.no_grad():
        queries, documents = encoder(batch.queries), encoder(batch.documents)
        value, _ = objective(queries, documents, batch, LossConfig(symmetric=True))
    scores = 20 * cosines_of(queries, documents)
    candidates = [(0, 1, 3, 4), (0, 1, 2, 4), (1, 2, 3, 4), (0, 2, 3), (0, 1, 2, 3, 4)]  # of each query
    askers = [(0, 1, 3, 4), (0, 1, 2, 4), (1, 2, 3, 4), (0, 2, 3, 4), (0, 1, 2, 4)]  # of each document
    forwards = sum(-(scores[i, i] - scores[i, list(rows)].exp().sum().log()) for i, rows in enumerate(candidates)) / 5
    backwards = sum(-(scores[i, i] - scores[list(rows), i].exp().sum().log()) for i, rows in enumerate(askers)) / 5
    assert value.item() == pytest.approx(float((forwards + backwards) / 2), rel=1e-10)


def test_health_gives_the_mean_cosines_of_positives_and_hardest_negatives(tiny_base):
    encoder = encoder_of("gpt_neo", tiny_base)
    batch = batch_of(encoder, 1)
    result = contrastive_step(encoder, batch, LossConfig())
    with torch.no_grad():
        queries, documents = encoder(batch.queries), encoder(batch.documents)
    cosines = [[float(torch.cosine_similarity(q, d, dim=0)) for d in documents] for q in queries]
    positive = sum(cosines[i][2 * i] for i in range(6)) / 6
    hardest = sum(max(value for row, value in enumerate(cosines[i]) if row != 2 * i) for i in range(6)) / 6
    expected = {
        "positive_cosine": positive,
        "hardest_negative_cosine": hardest,
        "negatives_per_query": 11,
        "masked_share": 0,
    }
    statistics = batch_statistics(result)
    assert {name: statistics[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_candidates_above_the_positive_are_taken_for_false_negatives_and_curated_ones_stay(tiny_base):
    """Written out in float64; the margin is chosen so that it leaves out some candidates and not all."""
    encoder = encoder_of("gpt_neo", tiny_base)
    batch = batch_of(encoder, 1)
    with torch.no_grad():
        queries, documents = encoder(batch.queries), encoder(batch.documents)
        cosines = cosines_of(queries, documents)
        margin = float(torch.stack([cosines[i, 2 * i] - cosines[i].median() for i in range(6)]).mean())
        value, result = objective(queries, documents, batch, LossConfig(false_negative_margin=margin))
    total, masked = 0.0, 0
    for i in range(6):
        kept = [c for c in range(12) if c in (2 * i, 2 * i + 1) or cosines[i, c] <= cosines[i, 2 * i] - margin]
        masked += 12 - len(kept)
        total -= float(20 * cosines[i, 2 * i] - (20 * cosines[i, kept]).exp().sum().log())
    assert 0 < masked < 60
    assert value.item() == pytest.approx(total / 6, rel=1e-10)
    assert batch_statistics(result)["masked_share"] == pytest.approx(masked / 6 / 11)
    assert batch_statistics(result)["negatives_per_query"] == pytest.approx(11 - masked / 6)
