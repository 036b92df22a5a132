"""Trunks in int8 and nf4: what they hold, what they compute and learn, and that what was learned moves to whole ones.

References: loops in float64 and the levels of NF4 by scipy's normal distribution; bitsandbytes, where it is installed;
transformers' own model, never prepared, with the dequantised weights in float64 and each text alone.
"""

import copy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModel

from sgpt.cross_encoder.cross_encoder import CrossEncoder, load_language_model
from sgpt.decoder.quantised import (
    NF4_LEVELS,
    QUANTISED,
    SCHEMES,
    QuantisedLinear,
    held_bytes,
    num_weights,
    quantised_layers,
    unquantised_weights,
)
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.adapter import base_hash, read_delta, save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.delta import Delta
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from sgpt.training.config import TrainConfig
from sgpt.training.tuning import TuningConfig, count_parameters, trainable_parameters, tune
from tests.conftest import LIMITS
from tests.encoder.test_export import TOLERANCE, weighted_mean_by_hand

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k-zerobias"
TEXTS = ["sort a path", "[[1]]", "what?", "naïve 東京 🙂", "word " * 100]
FAMILIES = ["llama", "qwen3", "gpt_neox", "gpt_neo", "gptj", "opt", "bloom", "bert"]
SHAPES = [(48, 192), (7, 33), (1, 64)]  # of 144 blocks of nf4, of 3.6 and of one
Reference = tuple[torch.Tensor, dict[str, torch.Tensor]]  # embeddings, and gradients by name
ROUNDING = 2.0**-23  # of the product of a level and a scale in float32
COSINES = {"int8": 0.999, "nf4": 0.97}  # of a trained model's embeddings with those of the same weights quantised


def weights(shape: tuple[int, int]) -> torch.Tensor:
    """Random, with a row of zeros and a single large weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[-1, 0] = 0.5
    weight[0] = 0
    return weight


def round_trip(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    """The weight quantised and dequantised."""
    return SCHEMES[dtype].dequantise(*SCHEMES[dtype].quantise(weight), tuple(weight.shape))


# --- what is held ---


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_nearest_of_255_steps_of_each_row(shape):
    weight = weights(shape)
    dequantised = round_trip(weight, "int8")
    for row, given in zip(weight.double(), dequantised.double(), strict=True):
        step = float(row.abs().max()) / 127
        nearest = torch.tensor([round(float(value) / step) * step if step else 0.0 for value in row])
        assert (given - nearest).abs().max() <= ROUNDING * row.abs().max()


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """As QLoRA makes them: eight of the positive side and seven of the negative, the outermost of which are 1."""
    outermost = 0.9677083
    positive = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    levels = np.sort([*positive, 0, *negative])
    assert np.abs(NF4_LEVELS.numpy() - levels / levels.max()).max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_level_of_each_block(shape):
    weight = weights(shape)
    dequantised = round_trip(weight, "nf4")
    flat, given = weight.double().flatten(), dequantised.double().flatten()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        levels = NF4_LEVELS.double() * block.abs().max()
        nearest = (block[:, None] - levels).abs().min(dim=1).values
        assert ((given[start : start + 64] - block).abs() - nearest).abs().max() <= ROUNDING * block.abs().max()


@pytest.mark.parametrize("shape", [(48, 192), (64, 64)])
def test_both_agree_with_bitsandbytes(shape, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)  # it would fetch compiled code from the hub
    theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = weights(shape)
    codes, scale = SCHEMES["nf4"].quantise(weight)
    expected, state = theirs.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    assert torch.equal(codes, expected.flatten())
    assert torch.equal(round_trip(weight, "nf4"), theirs.dequantize_4bit(expected, state))
    codes, scale = SCHEMES["int8"].quantise(weight)
    expected, largest, _ = theirs.int8_vectorwise_quant(weight)
    assert torch.equal(codes, expected)
    assert torch.allclose(scale[:, 0] * 127, largest)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_linear_layers_are_quantised_and_all_else_is_as_it_was(dtype, tiny_base):
    base = str(tiny_base("llama"))
    trunk, whole = load_trunk(ModelConfig(base, dtype)), AutoModel.from_pretrained(base)
    linears = {name for name, module in whole.named_modules() if isinstance(module, nn.Linear)}
    assert quantised_layers(trunk).keys() == linears
    expected = {name: value for name, value in whole.named_parameters() if name.removesuffix(".weight") not in linears}
    held = dict(trunk.named_parameters())
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in held)
    assert num_weights(trunk) == sum(value.numel() for value in whole.parameters())
    # a scale for each row, of 32 weights or more here; or 4.5 bits a weight
    bits = {"int8": 8 + 32 / 32, "nf4": 4.5}[dtype]
    of_linears = sum(whole.get_submodule(name).weight.numel() for name in linears)
    assert held_bytes(trunk) <= sum(value.numel() for value in expected.values()) * 4 + of_linears * bits / 8


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_base_stored_in_half_precision_is_quantised_as_its_float32_copy(family, half, tiny_base, tmp_path):
    """It is read in half precision, which takes half of the memory while it is opened."""
    folders = {dtype: tmp_path / str(dtype) for dtype in (half, torch.float32)}
    for dtype, folder in folders.items():
        shutil.copytree(tiny_base(family), folder)
        stored = load_file(folder / "model.safetensors")
        save_file({name: value.to(half).to(dtype) for name, value in stored.items()}, folder / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
    one, other = (Encoder.from_pretrained(folder, dtype="int8") for folder in folders.values())
    assert {value.dtype for value in one.trunk.parameters()} == {torch.float32}
    assert np.array_equal(one.encode_queries(TEXTS), other.encode_queries(TEXTS))


# --- what is computed and learned ---


def dequantised_reference(base: str, trunk: nn.Module, rows: list[list[int]], precision: torch.dtype) -> Reference:
    """transformers' own model with the weights that the quantised trunk multiplies with, each row alone."""
    model = AutoModel.from_pretrained(base).eval()
    with torch.no_grad():
        for path, layer in quantised_layers(trunk).items():
            model.get_submodule(path).weight.copy_(layer.weight)
    model = model.to(precision)
    means = []
    for row in rows:
        hidden = model(input_ids=torch.tensor([row])).last_hidden_state[0]  # [T, D]
        places = torch.arange(1, len(row) + 1, dtype=precision)
        means.append((places / places.sum()) @ hidden)
    embeddings = torch.stack(means)
    (embeddings * towards(embeddings)).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return embeddings.detach(), gradients


def towards(embeddings: torch.Tensor) -> torch.Tensor:
    """A random direction of each, the same in every precision."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(embeddings.shape, generator=random, dtype=torch.float64).to(embeddings.dtype)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_gradient_are_those_of_the_dequantised_weights(family, dtype, tiny_encoder):
    """In packs and padded on either side, each text next to longer ones.

    To 1e-6 of the float64 reference, or to twice what the same model in float32 comes to where rounding takes more.
    """
    encoder = tiny_encoder(family, dtype=dtype)
    rows = encoder.token_ids(TEXTS, "query")
    expected, exact = dequantised_reference(encoder.contract.base, encoder.trunk, rows, torch.float64)
    _, rounded = dequantised_reference(encoder.contract.base, encoder.trunk, rows, torch.float32)
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit_norm", add_biases="none")).eval()
    longest = max(map(len, rows))

    def padded(left: bool) -> torch.Tensor:
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(longest - len(row), longest) if left else slice(len(row))
            ids[index, place], mask[index, place] = torch.tensor(row), 1
        return encoder.embed(ids, mask)

    for embeddings in (encoder(rows), padded(left=False), padded(left=True)):
        assert (embeddings - expected).norm() <= 1e-6 * expected.norm()
        encoder.zero_grad()
        (embeddings * towards(embeddings)).sum().backward()
        learned = {name: value for name, value in trainable_parameters(encoder.trunk).items() if name in exact}
        assert learned.keys() == {name for name in trainable_parameters(encoder.trunk) if "pooler" not in name}
        largest = max(exact[name].norm() for name in learned)
        for name, parameter in learned.items():
            # keys' biases shift all scores of a query alike: their gradient is 0, and what is left of it is rounding
            size = exact[name].norm() if exact[name].norm() > 1e-6 * largest else largest
            error, allowed = ((gradient - exact[name]).norm() / size for gradient in (parameter.grad, rounded[name]))
            assert error <= max(1e-6, 2 * allowed), name


@pytest.mark.parametrize("dtype", QUANTISED)
def test_added_biases_get_the_gradient_that_they_get_over_the_dequantised_weights(dtype, tiny_encoder):
    """Over ordinary linear layers, whose gradient for them tests/decoder/test_family_table.py proves in float64."""
    quantised, whole = tiny_encoder("qwen3", dtype=dtype), tiny_encoder("qwen3")
    with torch.no_grad():
        for path, layer in quantised_layers(quantised.trunk).items():
            whole.trunk.get_submodule(path).weight.copy_(layer.weight)
    gradients = []
    for encoder in (quantised, whole):
        encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit")).eval()
        embeddings = encoder(encoder.token_ids(TEXTS, "query"))
        (embeddings * towards(embeddings)).sum().backward()
        gradients.append({name: value.grad for name, value in trainable_parameters(encoder.trunk).items()})
    assert len(gradients[0]) == len(quantised_layers(quantised.trunk))
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).norm() <= 1e-6 * expected.norm(), name


@pytest.mark.parametrize("dtype", QUANTISED)
def test_backward_keeps_neither_weight_nor_inputs(dtype):
    layer = QuantisedLinear(nn.Linear(96, 64), dtype, name="", source="")
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(5, 96, requires_grad=True))
    assert not kept


@pytest.mark.parametrize("dtype", QUANTISED)
def test_under_autocast_products_are_bfloat16_and_gradients_float32(dtype, tiny_encoder):
    encoder = tiny_encoder("llama", dtype=dtype)
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit"))
    gradients = []
    for enabled in (False, True):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            encoder(encoder.token_ids(TEXTS, "query")).float().square().sum().backward()
        found = [parameter.grad for parameter in trainable_parameters(encoder.trunk).values()]
        assert {gradient.dtype for gradient in found} == {torch.float32}
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    exact, rounded = gradients
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.03  # 2**-8 a rounding, over two layers


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_quantised_reranker_scores_as_its_dequantised_weights(dtype, language_model):
    base = str(language_model("gpt_neox"))
    quantised, whole = load_language_model(ModelConfig(base, dtype)), load_language_model(ModelConfig(base))
    assert isinstance(quantised.get_output_embeddings(), nn.Linear)
    assert not quantised_layers(quantised.get_output_embeddings())
    with torch.no_grad():
        for path, layer in quantised_layers(quantised).items():
            whole.get_submodule(path).weight.copy_(layer.weight)
    tokenizer = load_tokenizer(base)
    scores = [CrossEncoder(model, tokenizer).score(TEXTS[:4], TEXTS[1:]) for model in (quantised, whole)]
    assert np.allclose(*scores, rtol=1e-5)


# --- what was learned moves ---


def trained(encoder: Encoder, tuning: str, adapter: Path) -> Encoder:
    """Tunes, moves what learns, saves it as an adapter."""
    torch.manual_seed(1)
    encoder.trunk = tune(encoder.trunk, TuningConfig(tuning)).eval()
    base = {name: parameter.detach().clone() for name, parameter in trainable_parameters(encoder.trunk).items()}
    with torch.no_grad():
        for parameter in trainable_parameters(encoder.trunk).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, base, adapter)
    return encoder


def cosines(one: Encoder, other: Encoder) -> np.ndarray:
    both = [encoder.encode_queries(TEXTS, normalize=True) for encoder in (one, other)]
    return (both[0] * both[1]).sum(1)


@pytest.fixture
def stories(tmp_path: Path) -> str:
    """A trained decoder of 260 thousand parameters, with biases of zero."""
    if not STORIES.is_dir():
        pytest.skip(f"no model at {STORIES}")
    return str(STORIES)


def stories_encoder(base: str, dtype: str) -> Encoder:
    contract = Contract("weighted_mean", MarkersConfig("none", **LIMITS), base=base)
    return Encoder(load_trunk(ModelConfig(base, dtype)), load_tokenizer(base), contract)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_biases_move_between_quantised_and_whole_trunks_both_ways(dtype, stories, tmp_path):
    quantised = trained(stories_encoder(stories, dtype), "bitfit", tmp_path / "quantised")
    whole = trained(stories_encoder(stories, "float32"), "bitfit", tmp_path / "whole")
    assert read_delta(tmp_path / "quantised")["quantised"] == dtype
    assert read_delta(tmp_path / "quantised")["base_hash"] == read_delta(tmp_path / "whole")["base_hash"]

    moved = Encoder.from_pretrained(tmp_path / "quantised")
    stored = load_file(f"{stories}/model.safetensors")
    for name, parameter in moved.trunk.named_parameters():
        expected = trainable_parameters(quantised.trunk).get(name, stored.get(name, stored.get(f"model.{name}")))
        assert torch.equal(parameter, expected), name
    assert cosines(quantised, moved).min() > COSINES[dtype]
    again = Encoder.from_pretrained(tmp_path / "quantised", dtype=dtype)
    assert np.array_equal(again.encode_queries(TEXTS), quantised.encode_queries(TEXTS))
    assert again.fingerprint() == quantised.fingerprint() != moved.fingerprint()

    back = Encoder.from_pretrained(tmp_path / "whole", dtype=dtype)
    assert quantised_layers(back.trunk)
    there = dict(back.trunk.named_parameters())
    assert all(torch.equal(there[name], value) for name, value in trainable_parameters(whole.trunk).items())
    assert cosines(whole, back).min() > COSINES[dtype]


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_delta_goes_on_and_off_a_quantised_trunk(dtype, stories, tmp_path):
    trained(stories_encoder(stories, "float32"), "bitfit", tmp_path / "adapter")
    encoder = stories_encoder(stories, dtype)
    untuned = encoder.encode_queries(TEXTS)
    both = Encoder(encoder.trunk, encoder.tokenizer, encoder.contract, delta=Delta(encoder.trunk, tmp_path / "adapter"))
    alone = Encoder.from_pretrained(tmp_path / "adapter", dtype=dtype)
    assert np.array_equal(both.encode_queries(TEXTS), alone.encode_queries(TEXTS))
    assert np.array_equal(encoder.encode_queries(TEXTS), untuned)


def test_a_quantised_trunk_is_known_as_its_base_in_every_dtype(tiny_base):
    base = str(tiny_base("llama"))
    whole = load_trunk(ModelConfig(base))
    for dtype in QUANTISED:
        for read in ("float32", "bfloat16"):
            values = unquantised_weights(load_trunk(ModelConfig(base, dtype)))
            assert base_hash(values, read) == base_hash(dict(whole.named_parameters()), read)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize(("family", "tuning"), [("llama", "bitfit_norm"), ("gpt_neox", "bitfit"), ("llama", "lora")])
def test_export_merges_into_the_unquantised_base(family, tuning, dtype, tiny_encoder, tmp_path):
    encoder = trained(tiny_encoder(family, dtype=dtype), tuning, tmp_path / "adapter")
    before = copy.deepcopy(encoder.trunk.state_dict())
    export(encoder, tmp_path / "export", card="")  # opened by sentence-transformers too, and compared
    assert all(torch.equal(value, before[name]) for name, value in encoder.trunk.state_dict().items())
    if tuning != "lora":
        by_hand = load_file(f"{encoder.contract.base}/model.safetensors") | dict(trainable_parameters(encoder.trunk))
        exported = load_file(tmp_path / "export" / "model.safetensors")
        assert all(torch.equal(value, by_hand[name]) for name, value in exported.items())
    whole = Encoder.from_pretrained(tmp_path / "adapter").encode_queries(TEXTS)
    means = weighted_mean_by_hand(str(tmp_path / "export"), encoder.token_ids(TEXTS, "query"))
    theirs = SentenceTransformer(str(tmp_path / "export"), device="cpu").encode_query(TEXTS)
    for embeddings in (whole, theirs, Encoder.from_pretrained(tmp_path / "export").encode_queries(TEXTS)):
        assert np.abs(embeddings - means).max() < TOLERANCE
    if tuning != "lora":
        opened = Encoder.from_pretrained(tmp_path / "export", dtype=dtype)
        assert quantised_layers(opened.trunk).keys() == quantised_layers(encoder.trunk).keys()
        assert np.abs(opened.encode_queries(TEXTS) - encoder.encode_queries(TEXTS)).max() < TOLERANCE


def test_numbers_of_a_run_count_quantised_weights(tiny_base):
    base = str(tiny_base("llama"))
    counts = [count_parameters(tune(load_trunk(ModelConfig(base, dtype)), TuningConfig())) for dtype in
              ("float32", "int8", "nf4")]  # fmt: skip
    assert counts[0] == counts[1] == counts[2]


# --- refused ---


def test_what_cannot_be_quantised_is_refused_with_the_reason(tiny_base, tiny_encoder, tmp_path):
    base = str(tiny_base("llama"))
    with pytest.raises(InputError, match=r"model\.dtype='int4' is unknown; choose float32, .*, int8 or nf4"):
        ModelConfig(base, "int4")
    with pytest.raises(InputError, match=r"GPT2Model belongs to Conv1D, and dtype=nf4 is for layers that are nn\."):
        load_trunk(ModelConfig(str(tiny_base("gpt2")), "nf4"))
    with pytest.raises(InputError, match="tuning=full trains every weight, and in int8 those of linear layers are"):
        TrainConfig(model=ModelConfig(base, "int8"), tuning=TuningConfig("full"))
    with pytest.raises(InputError, match="tuning=full trains every weight, and in int8"):
        tune(load_trunk(ModelConfig(base, "int8")), TuningConfig("full"))
    trained(tiny_encoder("llama"), "full", tmp_path / "full")
    with pytest.raises(InputError, match=r"changes layers.*weight, which a trunk in nf4 holds quantised; open it in"):
        Encoder.from_pretrained(tmp_path / "full", dtype="nf4")


def test_another_base_is_refused_over_a_quantised_trunk(tiny_base, tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    encoder = trained(Encoder.from_pretrained(folder, dtype="int8"), "bitfit", tmp_path / "adapter")
    stored = load_file(folder / "model.safetensors")
    stored["layers.0.mlp.down_proj.weight"] += 0.01
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("float32", "int8"):
        with pytest.raises(InputError, match="is another: names, shapes or values of its weights differ"):
            Encoder.from_pretrained(tmp_path / "adapter", dtype=dtype)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj\.weight has changed since it was quantised"):
        export(encoder, tmp_path / "export", card="")
