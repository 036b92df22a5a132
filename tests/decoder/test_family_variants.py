"""Keys of config.json that change how a family attends: packed is as plain transformers, text by text, or refused."""

import copy

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Phi3Config,
    Phi3Model,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
)

from sgpt.cross_encoder.cross_encoder import CrossEncoder
from sgpt.decoder.packing import packs
from sgpt.decoder.trunk import ModelConfig, check_family, load_trunk, packed_token_embeddings
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from tests.conftest import byte_level

SHAPE = {
    "vocab_size": 800, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WINDOW = 8
ALTERNATE = {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0,
}  # fmt: skip
VARIANTS = {
    "gemma 3 both ways": (Gemma3TextModel, Gemma3TextConfig, {**ALTERNATE, "use_bidirectional_attention": True}),
    "gemma 3": (Gemma3TextModel, Gemma3TextConfig, ALTERNATE),
    "llama both ways": (LlamaModel, LlamaConfig, {"is_causal": False}),
    "qwen2 both ways": (Qwen2Model, Qwen2Config, {"is_causal": False}),
    "mistral both ways": (MistralModel, MistralConfig, {"is_causal": False, "sliding_window": None}),
}


def random(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """With weights that let attention matter, and transformers' eager attention."""
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn_like(parameter)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_pack_is_what_plain_transformers_gives_each_text_alone(name, tmp_path):
    model_class, config_class, changed = VARIANTS[name]
    plain = random(model_class, config_class(**SHAPE, **changed))
    plain.save_pretrained(tmp_path)
    rows = [torch.randint(3, 800, (length,)).tolist() for length in (40, 25, 25, WINDOW + 1, WINDOW - 1, 1)]
    expected = [plain(input_ids=torch.tensor([row])).last_hidden_state[0] for row in rows]
    other = [rows[0][0], (rows[0][1] + 1) % 800, *rows[0][2:]]
    sees_ahead = not torch.equal(plain(input_ids=torch.tensor([other])).last_hidden_state[0, 0], expected[0][0])
    assert sees_ahead == ("both ways" in name)

    trunk = load_trunk(ModelConfig(str(tmp_path)))
    [pack] = packs(rows, 1000)
    hidden = packed_token_embeddings(trunk, pack).split([len(rows[row]) for row in pack.rows])
    for row, of_row in zip(pack.rows, hidden, strict=True):
        assert (of_row - expected[row]).abs().max() <= 1e-5 * expected[row].abs().max(), len(rows[row])


REFUSED = {  # whose mask and attention do not agree in transformers, or say otherwise what a window is
    "gemma": (GemmaModel, GemmaConfig, {"head_dim": 8, "use_bidirectional_attention": True}),
    "mistral": (MistralModel, MistralConfig, {"is_causal": False, "sliding_window": WINDOW}),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_decoder_that_is_turned_around_and_computed_otherwise_is_refused(family, tmp_path):
    model_class, config_class, changed = REFUSED[family]
    random(model_class, config_class(**SHAPE, **changed)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"rows of different lengths are not computed as each alone by .* .{family}.:"):
        load_trunk(ModelConfig(str(tmp_path)))


def test_a_decoder_that_looks_both_ways_does_not_re_rank(tmp_path):
    """Its head is the embedding table, so that none is missing."""
    config = Gemma3TextConfig(**SHAPE, **ALTERNATE, use_bidirectional_attention=True, tie_word_embeddings=True)
    random(Gemma3TextModel, config).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="gemma3_text predicts no next token"):
        CrossEncoder.from_pretrained(tmp_path)


def test_the_check_of_packs_sees_a_window_that_is_not_kept(tmp_path):
    """The measure itself."""
    model_class, config_class, changed = VARIANTS["gemma 3 both ways"]
    random(model_class, config_class(**SHAPE, **changed)).save_pretrained(tmp_path)
    trunk = load_trunk(ModelConfig(str(tmp_path)))
    broken = copy.deepcopy(trunk)
    for layer in broken.layers:
        layer.self_attn.is_causal = True  # packs read it; padded rows have a mask
    with pytest.raises(InputError, match="not computed as each alone"):
        check_family(str(tmp_path), broken)
    check_family(str(tmp_path), trunk)


def test_texts_stay_within_the_first_of_two_sets_of_rotary_frequencies(tmp_path):
    """The second is taken for all texts of a call where one is longer (Phi-3 for 128k tokens)."""
    positions = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    config = Phi3Config(**SHAPE, **positions, rope_parameters=LONGROPE)
    random(Phi3Model, config).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="document_max_tokens=17 is more than the 16 positions of Phi3Model"):
        Encoder.from_pretrained(tmp_path, markers=MarkersConfig("none", 16, 17))
    encoder = Encoder.from_pretrained(tmp_path, markers=MarkersConfig("none", 16, 16))
    short, long = "abc", "abcdefgh" * 8
    alone, beside = encoder.encode_documents([short]), encoder.encode_documents([short, long])
    torch.testing.assert_close(torch.tensor(beside[:1]), torch.tensor(alone), rtol=0, atol=1e-5)
