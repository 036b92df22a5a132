"""What a GGUF file states of its model and transformers passes over: carried over exactly, or refused by its key."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from sgpt.decoder.trunk import ModelConfig, load_tokenizer, open_model
from sgpt.runtime.errors import InputError
from tests.conftest import byte_level
from tests.decoder.test_gguf import SHAPE, add_tokenizer, language_model, write_gguf

gguf = pytest.importorskip("gguf", reason="GGUF files are opened with the package gguf")

WITHOUT_HEAD_SIZE = {key: value for key, value in SHAPE.items() if key != "head_dim"}
LAYER_NORMS = ("starcoder2", "stablelm")
ADD: dict[type, Callable] = {
    bool: gguf.GGUFWriter.add_bool, int: gguf.GGUFWriter.add_uint32, float: gguf.GGUFWriter.add_float32,
    str: gguf.GGUFWriter.add_string,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Where data/cache is."""
    monkeypatch.chdir(tmp_path)


def random(family: str, **changed) -> PreTrainedModel:
    """A language model with its head, random everywhere; family: before Config and ForCausalLM in transformers."""
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    shape = WITHOUT_HEAD_SIZE | {"vocab_size": len(byte_level()), "pad_token_id": 0}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, config_name)(**(shape | changed)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write(file: Path, architecture: str, model: PreTrainedModel, stated: Mapping[str, Any]) -> Path:
    """As the converter of llama.cpp does. stated: keys of the architecture, besides those of every model."""
    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    every: dict[str, Any] = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    if architecture in LAYER_NORMS:
        every["attention.layer_norm_epsilon"] = getattr(config, "norm_epsilon", None) or config.layer_norm_eps
    else:
        every["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    for key, value in (every | stated).items():
        ADD[type(value)](writer, f"{architecture}.{key}", value)
    add_tokenizer(writer, "gpt-2")
    writer.add_pad_token_id(0)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for own, value in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        if architecture == "gemma3" and own.endswith("norm.weight"):
            array = array + 1  # which its norm adds in transformers
        writer.add_tensor(names.get_name(own, (".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def rotary(**changed) -> dict:
    return {"rope_type": "default", "rope_theta": 10000.0, **changed}


GEMMA = {"head_dim": 256, "sliding_window": 8, "num_hidden_layers": 6}
CARRIED = {
    "another base of rotary frequencies": (
        "Starcoder2", "starcoder2", {"rope_parameters": rotary(rope_theta=1e6)}, {"rope.freq_base": 1e6},
    ),
    "a window": ("Phi3", "phi3", {"sliding_window": 8}, {"attention.sliding_window": 8, "rope.freq_base": 10000.0}),
    "rotary over half of a head, phi3": (
        "Phi3", "phi3", {"sliding_window": None, "rope_parameters": rotary(partial_rotary_factor=0.5)},
        {"rope.dimension_count": 4, "rope.freq_base": 10000.0},
    ),
    "rotary over half of a head, stablelm": (
        "StableLm", "stablelm", {"rope_parameters": rotary(partial_rotary_factor=0.5)},
        {"rope.dimension_count": 4, "rope.freq_base": 10000.0},
    ),
    "heads of 256, whose root divides the scores": (
        "Gemma3", "gemma3", GEMMA,
        {"attention.key_length": 256, "attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
    ),
    "heads of 128, whose root divides the scores": (
        "Gemma3", "gemma3", {**GEMMA, "head_dim": 128, "query_pre_attn_scalar": 128},
        {"attention.key_length": 128, "attention.sliding_window": 8, "rope.freq_base": 1e6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CARRIED)
@torch.inference_mode()
def test_a_file_computes_what_its_model_does(name, tmp_path):
    family, architecture, changed, stated = CARRIED[name]
    model = random(family, **changed)
    file = write(tmp_path / "x.gguf", architecture, model, stated)
    opened = open_model(ModelConfig(str(file)), transformers.AutoModelForCausalLM)
    ids = torch.arange(1, 101).reshape(4, 25)
    torch.testing.assert_close(opened(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scale_linear", 4.0), ("attention.scale", 0.5), ("embedding_scale", 12.0), ("logit_scale", 0.25),
        ("attention.sliding_window", 8), ("attention.causal", False), ("attn_logit_softcapping", 50.0),
        ("rope.scaling.factor", 2.0),
    ],
)  # fmt: skip
def test_what_the_config_cannot_say_is_refused_by_its_key(key, value, tmp_path):
    stated = {key: value, "rope.freq_base": 10000.0, "rope.dimension_count": 8}
    file = write(tmp_path / "x.gguf", "llama", random("Llama"), stated)
    with pytest.raises(InputError, match=rf"x\.gguf: llama\.{key}={value} is not in the config .* \(LlamaConfig\)"):
        open_model(ModelConfig(str(file)))


@pytest.mark.parametrize(
    ("key", "value"), [("rope.scale_linear", 1.0), ("attention.causal", True), ("pooling_type", 3)]
)
def test_what_says_nothing_else_is_taken(key, value, tmp_path):
    stated = {key: value, "rope.freq_base": 10000.0, "rope.dimension_count": 8}
    open_model(ModelConfig(str(write(tmp_path / "x.gguf", "llama", random("Llama"), stated))))


@pytest.mark.parametrize(("rule", "says", "begins"), [
    ("llama-bpe", None, True), ("llama-bpe", False, False), ("llama-bpe", True, True), ("gpt-2", None, False),
])  # fmt: skip
def test_texts_of_llama_3_begin_with_its_token_unless_the_file_says_otherwise(rule, says, begins, tmp_path):
    """llama.cpp's own rule (src/llama-vocab.cpp): older files do not state it."""
    file = write_gguf(tmp_path / "x.gguf", language_model(), rule=rule, begins=says)
    ids = load_tokenizer(str(file))("a text")["input_ids"]
    plain = byte_level()("a text")["input_ids"]
    assert ids == ([0, *plain] if begins else plain)


def test_a_tokenizer_that_lies_next_to_a_file_is_not_its_own(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", language_model())
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((Path(__file__).parents[2] / "data" / "nano" / name).read_bytes())
    tokenizer = load_tokenizer(str(file))
    assert tokenizer("a text")["input_ids"] == byte_level()("a text")["input_ids"]
