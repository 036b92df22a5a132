"""Products of int8 weights with int8 activations, against integers and loops in Python, and against float32 weights."""

import logging
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from sgpt.decoder import attention, int8
from sgpt.decoder.int8 import Int8Products, int8_products, outlier_channels, quantise_tokens
from sgpt.decoder.quantised import QuantisedLinear, find_outliers, quantised_layers
from sgpt.decoder.trunk import ModelConfig, load_trunk

NONE = torch.empty(0, dtype=torch.long)
NO_OUTLIERS = {"": NONE}  # of a layer without a name
CPU = torch.device("cpu")
FAST = int8.multiplies_int8(CPU)
needs_vnni = pytest.mark.skipif(not FAST, reason="this processor has no VNNI, and dequantises instead")
TEXTS = ["sort a path", "[[1]]", "what?", "naïve 東京 🙂", "word " * 30, "", "read a file line by line"]


def activations(tokens: int, width: int) -> torch.Tensor:
    """Random, with a token of zeros, one with a single large number, and one that is very small."""
    inputs = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    inputs[0] = 0
    inputs[1, 3] = -200
    inputs[2] *= 1e-20
    return inputs


def test_codes_are_the_nearest_of_255_steps_of_each_token():
    inputs = activations(6, 40)
    codes, scale, _ = quantise_tokens(inputs, NONE)
    assert codes.dtype == torch.int8
    for token, of_token, step in zip(inputs.tolist(), codes.tolist(), scale[:, 0].tolist(), strict=True):
        furthest = max(map(abs, token))
        assert step == pytest.approx(max(furthest, 1e-30) / 127, rel=1e-6)
        for value, code in zip(token, of_token, strict=True):
            assert abs(value - code * step) <= (0.5 + 1e-4) * furthest / 127
        assert max(map(abs, of_token)) == (127 if furthest else 0)


@needs_vnni
@pytest.mark.parametrize(("tokens", "width", "outputs"), [(1, 8, 3), (7, 33, 5), (70, 576, 192), (300, 1536, 576)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_that_of_the_integers(tokens, width, outputs, with_bias):
    """In numpy's int64, which nothing can overflow, also where every code is 127: then scales and bias in float64."""
    layer = QuantisedLinear(nn.Linear(width, outputs, bias=with_bias), "int8", name="", source="")
    layer.codes[0] = 127
    inputs = activations(max(tokens, 3), width)[:tokens]
    inputs[-1] = 1
    codes, scale, _ = quantise_tokens(inputs, NONE)
    integers = codes.numpy().astype(np.int64) @ layer.codes.numpy().astype(np.int64).T
    expected = integers * scale.numpy().astype(np.float64) * layer.scale[:, 0].numpy().astype(np.float64)
    if with_bias:
        expected += layer.bias.detach().numpy().astype(np.float64)
    with torch.inference_mode(), int8_products(NO_OUTLIERS):
        output = layer(inputs)
    product = np.abs(expected - layer.bias.detach().numpy()) if with_bias else np.abs(expected)
    assert (np.abs(output.numpy() - expected) <= 4 * 2.0**-24 * (product + np.abs(expected))).all()  # a rounding a pass


@needs_vnni
@pytest.mark.parametrize("with_bias", [False, True])
def test_outliers_are_multiplied_in_float32_and_leave_the_others_their_steps(with_bias):
    layer = QuantisedLinear(nn.Linear(64, 48, bias=with_bias), "int8", name="", source="")
    inputs = activations(20, 64)[3:]
    inputs[:, [5, 40]] *= 100
    channels = outlier_channels(inputs)
    assert sorted(channels.tolist()) == [5, 40]
    with torch.inference_mode(), int8_products({"": channels}):
        output = layer(inputs).double()
    weight, wide = layer.weight.double(), inputs.double()
    outliers = torch.zeros_like(wide)
    outliers[:, [5, 40]] = wide[:, [5, 40]]
    expected = (rounded(wide - outliers) + outliers) @ weight.T + (layer.bias.double() if with_bias else 0)
    assert (output - expected).norm() < 1e-6 * expected.norm()
    without = rounded(wide) @ weight.T + (layer.bias.double() if with_bias else 0)
    exact = wide @ weight.T + (layer.bias.double() if with_bias else 0)
    assert (output - exact).norm() < 0.1 * (without - exact).norm()


@needs_vnni
def test_outliers_are_found_where_a_norm_makes_a_channel_large(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    stored = load_file(folder / "model.safetensors")
    stored["layers.1.input_layernorm.weight"][7] = 50
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    outliers = find_outliers(load_trunk(ModelConfig(str(folder), "int8")))
    attention = [outliers[f"layers.1.self_attn.{name}_proj"] for name in "qkv"]
    assert 7 in attention[0].tolist()
    assert attention[0] is attention[1] is attention[2]
    assert 7 not in outliers["layers.0.self_attn.q_proj"].tolist()


@needs_vnni
def test_a_token_is_multiplied_alike_whatever_stands_next_to_it():
    layer = QuantisedLinear(nn.Linear(64, 48), "int8", name="", source="")
    inputs = activations(50, 64)
    with torch.inference_mode(), int8_products(NO_OUTLIERS):
        together = layer(inputs)
        for token in range(50):
            assert torch.equal(layer(inputs[token : token + 1]), together[token : token + 1])


def test_layers_that_read_one_tensor_share_its_codes_and_another_tensor_gets_its_own():
    products = Int8Products(NO_OUTLIERS)
    weight, scale = torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 1)
    one, other = torch.full((3, 4), 1.0), torch.full((3, 4), 2.0)
    assert products.linear(one, weight, scale, None, "")[0, 0] == pytest.approx(4)
    shared = products.of_inputs
    products.linear(one, weight, scale, None, "")
    assert products.of_inputs is shared
    assert products.linear(other, weight, scale, None, "")[0, 0] == pytest.approx(8)


@needs_vnni
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt_neo", "gptj", "opt", "bloom", "bert"])
def test_embeddings_are_those_of_a_model_whose_activations_are_rounded_so(family, tiny_encoder, monkeypatch):
    """transformers' own model in float64, every linear layer of which rounds its weights and its inputs; each text
    alone. Attention as on processors without bfloat16.

    Equal but for float32's rounding; only a number next to the middle of two steps may become the other one, which
    moves a text by less than what rounding no activation does (0.0014 and more, over these).
    """
    monkeypatch.setattr(attention, "FAST_BFLOAT16", False)
    encoder = tiny_encoder(family, dtype="int8")
    model = AutoModel.from_pretrained(encoder.contract.base).eval().double()
    outliers = find_outliers(encoder.trunk)
    for path, layer in quantised_layers(encoder.trunk).items():
        linear = model.get_submodule(path)
        linear.weight.data.copy_(layer.weight)
        linear.register_forward_pre_hook(partial(round_inputs, outliers[path]))
    embeddings = encoder.encode_queries(TEXTS)
    errors = []
    for row, embedding in zip(encoder.token_ids(TEXTS, "query"), embeddings, strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row])).last_hidden_state[0]  # [T, D]
        places = torch.arange(1, len(row) + 1, dtype=torch.float64)
        expected = ((places / places.sum()) @ hidden).numpy()
        errors.append(np.linalg.norm(embedding - expected) / np.linalg.norm(expected))
    assert np.median(errors) < 1e-6
    assert max(errors) < 1e-3


@needs_vnni
@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_attention_in_bfloat16_rounds_less_than_the_products_around_it(family, tiny_encoder, monkeypatch):
    """Next to float32's embeddings of the same model: on processors that multiply bfloat16, and on others."""
    exact = tiny_encoder(family).encode_queries(TEXTS, normalize=True)
    encoder = tiny_encoder(family, dtype="int8")
    of_attention = {}
    for fast in (True, False):
        monkeypatch.setattr(attention, "FAST_BFLOAT16", fast)
        of_attention[fast] = encoder.encode_queries(TEXTS, normalize=True)
    moved = np.linalg.norm(of_attention[True] - of_attention[False], axis=1)
    of_products = np.linalg.norm(of_attention[False] - exact, axis=1)
    assert np.median(moved) < np.median(of_products)
    assert (moved > 0).any()


def round_inputs(outliers: torch.Tensor, _: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """To steps, but for the outliers."""
    exact = torch.zeros_like(arguments[0])
    exact[..., outliers] = arguments[0][..., outliers]
    return (rounded(arguments[0] - exact) + exact,)


def rounded(inputs: torch.Tensor) -> torch.Tensor:
    """To the steps of each token, by hand."""
    steps = inputs.abs().amax(-1, keepdim=True) / 127
    return torch.where(steps > 0, (inputs / steps).round() * steps, inputs)


@needs_vnni
def test_a_text_is_embedded_alike_alone_and_among_others(tiny_encoder):
    """Its scales are its own. Attention rounds otherwise in another pack, and that may turn a code to its neighbour."""
    encoder = tiny_encoder("llama", dtype="int8")
    together = encoder.encode_queries(TEXTS, normalize=True)
    alone = np.concatenate([encoder.encode_queries([text], normalize=True) for text in TEXTS])
    assert np.abs(together - alone).max() < 0.01


@needs_vnni
def test_what_learns_does_so_over_dequantised_weights_also_after_encoding(tiny_encoder):
    encoder = tiny_encoder("llama", dtype="int8")
    rows = encoder.token_ids(TEXTS[:5], "query")
    before = encoder(rows)
    encoded = encoder.encode_queries(TEXTS[:5], as_tensor=True)
    assert torch.equal(encoder(rows), before)
    assert before.requires_grad
    assert 0 < (encoded - before).norm() / before.norm() < 0.1


def test_without_vnni_weights_are_dequantised_and_the_log_says_so_once(tiny_encoder, monkeypatch, caplog):
    encoder = tiny_encoder("llama", dtype="int8")
    with torch.inference_mode():
        expected = encoder(encoder.token_ids(TEXTS, "query"))
    monkeypatch.setattr(int8, "_WARNED", set())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with caplog.at_level(logging.WARNING, logger="sgpt"):
        embeddings = [encoder.encode_queries(TEXTS, as_tensor=True) for _ in range(2)]
    assert all(torch.equal(one, expected) for one in embeddings)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("dtype=int8: this processor has no VNNI, or ONEDNN_MAX_CPU_ISA leaves it unused, so weights")


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_where_vnni_is_taken_away_products_are_wrong_and_are_not_taken(instructions):
    code = """
import torch
from sgpt.decoder.int8 import multiplies_int8
largest = torch.full((64, 576), 127, dtype=torch.int8)
exact = bool((torch._int_mm(largest, largest.T) == 576 * 127**2).all())
print(multiplies_int8(torch.device("cpu")) <= exact)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "True\n"


@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_other_dtypes_multiply_as_before(dtype, tiny_encoder, caplog):
    encoder = tiny_encoder("llama", dtype=dtype)
    with torch.inference_mode():
        expected = encoder(encoder.token_ids(TEXTS, "query"))
    assert torch.equal(encoder.encode_queries(TEXTS, as_tensor=True), expected)
    assert not caplog.records
