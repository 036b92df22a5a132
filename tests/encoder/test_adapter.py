"""Adapters against stock PEFT, and against the tuned trunk bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, PeftModel
from safetensors.torch import load_file

from sgpt.decoder.fused import fuse
from sgpt.decoder.trunk import ModelConfig, load_trunk
from sgpt.encoder.adapter import load_adapter, save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.verify import verify
from sgpt.runtime.errors import InputError
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import BIASES_ADDED, FAMILIES, random_trunk

IDS = torch.arange(1, 19).reshape(2, 9)
# GPT-2's Conv1D has no form there; where biases are added, see tests/decoder/test_family_table.py
IN_PEFT = [family for family in FAMILIES if family != "gpt2" and family not in BIASES_ADDED]

SAVING = """
import sys
from pathlib import Path
import torch
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.encoder import Encoder
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
base, place = sys.argv[1:]
for method in ("bitfit_norm", "lora"):
    encoder = Encoder.from_pretrained(base)
    torch.manual_seed(0)
    trunk = tune(encoder.trunk, TuningConfig(method))
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(trunk).items()}
    save_adapter(trunk, encoder.tokenizer, encoder.contract, before, Path(place, method))
"""


def saved(encoder: Encoder, base: dict[str, torch.Tensor], folder: Path) -> Path:
    return save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, base, folder)


def trained(encoder: Encoder, tuning: str = "bitfit", **keys) -> dict[str, torch.Tensor]:
    """Changes what `tuning` trains and returns the values before. 1e-10 is lost in base + (trained - base)."""
    encoder.trunk = tune(encoder.trunk, TuningConfig(tuning, **keys))
    base = {name: parameter.detach().clone() for name, parameter in trainable_parameters(encoder.trunk).items()}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(encoder.trunk).values():
            parameter.add_(torch.randn_like(parameter) * 0.1).flatten()[0] = 1e-10
    return base


def hidden(trunk: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return trunk(input_ids=IDS).last_hidden_state


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("family", IN_PEFT)
def test_stock_peft_reproduces_the_tuned_trunk(family, tiny_encoder, tmp_path):
    encoder = tiny_encoder(family)
    untuned = hidden(encoder.trunk)
    folder = saved(encoder, trained(encoder), tmp_path / "adapter")
    stock = AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    assert stock.peft_config["default"].peft_type == "BEFT"
    norms = {name for name, module in encoder.trunk.named_modules() if "Norm" in type(module).__name__}
    assert set(stock.peft_config["default"].modules_to_save or ()) == {
        name for name in norms if f"{name}.bias" in trainable_parameters(encoder.trunk)
    }
    assert (hidden(stock) - untuned).abs().max() > 0.1
    # base + change rounds once more; GPT-Neo runs eagerly there
    assert torch.allclose(hidden(stock), hidden(encoder.trunk), atol=5e-6)
    merged = stock.merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in encoder.trunk.named_parameters()}


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term")  # PEFT's, of added ones
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stock_peft_opens_gains_of_the_last_blocks_alone(family, tiny_encoder, tmp_path):
    """It takes modules by the ends of their paths, so that the last norm, called norm, stands for all of them."""
    encoder = tiny_encoder(family)
    base = trained(encoder, "bitfit_norm", layers="last:1")
    folder = saved(encoder, base, tmp_path / "adapter")
    stock = AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    assert torch.allclose(hidden(stock), hidden(encoder.trunk), atol=5e-6)


def test_peft_is_asked_too_where_the_base_is_of_the_hub(tiny_encoder, hub, tmp_path):
    encoder = tiny_encoder("gpt_neo")
    encoder.contract.base = hub("me/base", Path(encoder.contract.base))
    adapter = saved(encoder, trained(encoder), tmp_path / "adapter")
    assert [reader.split()[0] for reader in verify(adapter, encoder)["readers"]] == ["sgpt", "peft"]


@pytest.mark.parametrize(
    ("family", "tuning"),
    [
        ("gpt_neo", "bitfit"),
        ("gpt_neo", "bitfit_norm"),
        ("gpt2", "bitfit"),
        ("llama", "bitfit_norm"),
        ("qwen3", "bitfit_norm"),
        ("gpt2", "full"),
    ],
)
def test_our_reader_restores_every_bit(family, tuning, tiny_encoder, tmp_path):
    encoder = tiny_encoder(family)
    run = tmp_path / "run"
    saved(encoder, trained(encoder, tuning), run / "adapter")
    opened = Encoder.from_pretrained(run)
    assert same(opened.trunk, encoder.trunk)
    assert opened.contract == encoder.contract
    assert np.array_equal(opened.encode_queries(["a [b]?"]), encoder.encode_queries(["a [b]?"]))


def test_change_is_kilobytes_and_says_its_form(tiny_encoder, tmp_path):
    """A bias of a Linear is stored once, as a change in a row, under PEFT's name."""
    encoder = tiny_encoder("gptj")
    base = trained(encoder)
    folder = saved(encoder, base, tmp_path / "adapter")
    stored, name = load_file(folder / "adapter_model.safetensors"), "h.1.mlp.fc_in.bias"
    change = dict(encoder.trunk.named_parameters())[name].detach() - base[name]
    assert torch.equal(stored["base_model.model.h.1.mlp.fc_in.beft_bias"], change.unsqueeze(0))
    stated = json.loads((folder / "adapter_config.json").read_text())
    assert (stated["base_model_name_or_path"], stated["task_type"], stated["peft_type"]) == (
        encoder.contract.base,
        "FEATURE_EXTRACTION",
        "BEFT",
    )
    assert (
        sum(file.stat().st_size for file in folder.iterdir())
        < (Path(encoder.contract.base) / "model.safetensors").stat().st_size / 10
    )


def test_conv1d_has_no_form_in_peft_and_says_so(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt2")
    base = trained(encoder)
    folder = saved(encoder, base, tmp_path / "adapter")
    assert not (folder / "adapter_config.json").exists()
    assert json.loads((folder / "sgpt_delta.json").read_text())["form"] == "plain"
    change = load_file(folder / "adapter_model.safetensors")
    assert change.keys() == base.keys()
    for name, parameter in trainable_parameters(encoder.trunk).items():
        assert torch.allclose(base[name] + change[name], parameter, atol=1e-7)


def test_low_rank_is_saved_and_opened_by_peft(tiny_encoder, tmp_path):
    encoder = tiny_encoder("llama")
    folder = saved(encoder, trained(encoder, "lora"), tmp_path / "adapter")
    stock = AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    torch.testing.assert_close(hidden(stock), hidden(encoder.trunk), rtol=0, atol=1e-5)  # norms round in another order
    fuse(stock)
    assert torch.equal(hidden(stock), hidden(encoder.trunk))
    opened = Encoder.from_pretrained(folder)
    assert isinstance(opened.trunk, PeftModel)
    assert np.array_equal(opened.encode_documents(["x"]), encoder.encode_documents(["x"]))


def test_two_processes_write_the_same_bytes(tiny_base, tmp_path):
    """Names in PEFT's sets come in an order that depends on the process's hash seed."""
    places = [tmp_path / "0", tmp_path / "1"]
    for place in places:
        subprocess.run(
            [sys.executable, "-c", SAVING, str(tiny_base("llama")), str(place)], check=True, timeout=240,
            env={**os.environ, "PYTHONHASHSEED": place.name, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
    first, second = ({file.relative_to(place): file.read_bytes() for file in place.rglob("*.*")} for place in places)
    assert {Path("bitfit_norm/adapter_config.json"), Path("lora/adapter_config.json")} <= first.keys()
    assert first == second


def test_another_base_is_refused(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt_neo")
    folder = saved(encoder, trained(encoder), tmp_path / "adapter")
    vocabulary = encoder.trunk.config.vocab_size
    load_adapter(load_trunk(ModelConfig(encoder.contract.base)), folder)  # the right one
    with pytest.raises(InputError, match="values of its weights differ"):
        load_adapter(random_trunk("gpt_neo", vocabulary, seed=1), folder)
    with pytest.raises(InputError, match="it has no"):
        load_adapter(random_trunk("opt", vocabulary), folder)
    with pytest.raises(InputError, match="untuned"):
        load_adapter(encoder.trunk, folder)


def test_adapter_over_bfloat16_opens_in_float32_with_the_values_it_was_trained_over(tiny_encoder, tmp_path):
    encoder = tiny_encoder("opt", dtype="bfloat16")
    folder = saved(encoder, trained(encoder), tmp_path / "adapter")
    opened = Encoder.from_pretrained(folder)
    assert opened.trunk.dtype == torch.float32
    assert same(opened.trunk, encoder.trunk.float())


def test_only_an_adapter_of_ours_is_replaced(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt_neo")
    base = trained(encoder)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no adapter"):
        saved(encoder, base, tmp_path / "foreign")
    for _ in range(2):
        saved(encoder, base, tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"foreign", "ours"}


def test_adapter_without_a_named_base_is_refused(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt_neo")
    encoder.contract = Contract(markers=encoder.contract.markers)
    with pytest.raises(InputError, match="no base"):
        saved(encoder, trained(encoder), tmp_path / "adapter")
