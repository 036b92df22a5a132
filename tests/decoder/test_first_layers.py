"""`model.layers`: the first blocks of a base, as plain transformers computes them on its way through all of them."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.adapter import load_adapter, save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import announce_export, export
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from sgpt.training.config import TrainConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune

LAST_NORM = {"gpt2": "ln_f", "gpt_neo": "ln_f", "gptj": "ln_f", "gpt_neox": "final_layer_norm", "bloom": "ln_f"}
TEXTS = ["parse a date", "open a file and read all of its lines"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj", "gpt_neox", "bloom", "llama", "qwen2", "qwen3"])
def test_it_is_the_state_after_these_blocks_and_the_last_norm(family, tiny_base):
    base = str(tiny_base(family))
    ids = torch.arange(3, 20)[None]
    plain = AutoModel.from_pretrained(base).eval()
    last_norm = plain.get_submodule(LAST_NORM.get(family, "norm"))
    trunk = load_trunk(ModelConfig(base, layers=1))
    with torch.no_grad():
        expected = last_norm(plain(ids, output_hidden_states=True).hidden_states[1])
        torch.testing.assert_close(trunk(ids).last_hidden_state, expected, rtol=0, atol=2e-6)


def test_more_blocks_than_there_are_are_refused(tiny_base):
    with pytest.raises(InputError, match=r"model.layers=3: .* has 2 blocks; lower it"):
        load_trunk(ModelConfig(str(tiny_base("llama")), layers=3))


@pytest.mark.parametrize("layers", [0, -1])
def test_no_block_is_refused(layers):
    with pytest.raises(InputError, match=r"model.layers"):
        ModelConfig(layers=layers)


def test_lora_is_refused():
    with pytest.raises(InputError, match=r"model.layers=1 with tuning=lora: PEFT would open its adapter over all"):
        TrainConfig(model=ModelConfig(layers=1), tuning=TuningConfig("lora"))


@pytest.mark.parametrize("family", ["gpt_neo", "qwen2"])
def test_the_adapter_and_the_export_have_these_blocks(family, tiny_base, tmp_path):
    base = str(tiny_base(family))
    contract = Contract(markers=MarkersConfig("brackets", 24, 40), base=base)
    encoder = Encoder(load_trunk(ModelConfig(base, layers=1)), load_tokenizer(base), contract)
    encoder.trunk = tune(encoder.trunk, TuningConfig())
    before = {name: value.detach().clone() for name, value in trainable_parameters(encoder.trunk).items()}
    with torch.no_grad():
        for value in trainable_parameters(encoder.trunk).values():
            value.add_(0.1)
    expected = encoder.encode(TEXTS, "query")
    adapter = save_adapter(encoder.trunk, encoder.tokenizer, contract, before, tmp_path / "adapter")
    assert (Encoder.from_pretrained(adapter).encode(TEXTS, "query") == expected).all()
    assert not (adapter / "adapter_config.json").exists()  # stock PEFT would open it over all blocks
    with pytest.raises(InputError, match=r"made from the first 1 blocks of "):
        load_adapter(load_trunk(ModelConfig(base)), adapter)

    export(encoder, tmp_path / "export", card="")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["num_layers" if family == "gpt_neo" else "num_hidden_layers"] == 1
    theirs = SentenceTransformer(str(tmp_path / "export"), device="cpu").encode_query(TEXTS)
    assert abs(theirs - expected).max() < 1e-5


def test_a_cut_base_whose_biases_no_class_holds_is_refused_before_training(tiny_base):
    base = str(tiny_base("qwen3"))
    contract = Contract(markers=MarkersConfig("brackets", 24, 40), base=base)
    encoder = Encoder(load_trunk(ModelConfig(base, layers=1)), load_tokenizer(base), contract)
    encoder.trunk = tune(encoder.trunk, TuningConfig())
    with pytest.raises(InputError, match=r"model.layers: no class of transformers holds .* or leave model.layers out"):
        announce_export(encoder)
