"""Each row of docs/families.md is what tests/family_table.py measures of that family."""

import logging
import re
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralModel

from sgpt.decoder import trunk as opening
from sgpt.decoder.added_biases import added_biases, place_of, with_biases
from sgpt.decoder.families import FAMILIES
from sgpt.decoder.trunk import ModelConfig, load_trunk
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.family_sweep import build
from tests.family_table import GROUPED, ROWS, TEXTS, WINDOW, build_small, line, measure, train_at_random

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.mark.bitwise
@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term")
@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_what_is_measured(name, tmp_path):
    """In float64 all agree to 1e-13 (BLOOM to 3e-10: its ALiBi is float32); in float32 a sum is rounded by 3e-7."""
    measured = measure(ROWS[name], tmp_path)
    bound = 1e-9 if name == "BLOOM" else 1e-12
    assert max(measured.values.values()) <= bound, measured.values
    assert max(measured.gradients.values()) <= bound, measured.gradients
    assert measured.start == measured.loaded == 0
    assert measured.by_peft is None or measured.by_peft <= 2e-6
    assert measured.by_transformers <= 2e-6
    assert line(measured.cells) in DOCUMENT.read_text(encoding="utf-8").splitlines()


def test_the_table_has_the_rows_that_are_tested_and_each_family_that_is_known():
    first_cells = re.findall(r"^\| ([^|]+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert first_cells == ["family", *ROWS]
    assert {row.family for row in ROWS.values()} == FAMILIES.keys()


def test_a_lost_window_or_bias_would_be_seen(tmp_path):
    """The measure itself: the longest text outgrows the window, and one number of one bias is seen."""
    measure(ROWS["Mistral with a window"], tmp_path)
    encoder = Encoder.from_pretrained(tmp_path / "adapter")
    expected = encoder.encode(TEXTS, "document")
    encoder.trunk.config.sliding_window = None
    assert abs(encoder.encode(TEXTS, "document") - expected).max() > 1e-3
    encoder.trunk.config.sliding_window = WINDOW
    with torch.no_grad():
        encoder.trunk.get_parameter("layers.1.mlp.down_proj.bias")[0] += 1e-3
    assert abs(encoder.encode(TEXTS, "document") - expected).max() > 1e-5


@pytest.mark.parametrize("name", ["Qwen3", "Gemma", "Gemma 2", "Gemma 3 (text)", "OLMo 2"])
def test_with_biases_of_attention_alone_these_are_whole_models_of_their_own_class(name):
    row = ROWS[name]
    trunk = tune(build_small(row, {"vocab_size": 50}), TuningConfig("bitfit", add_biases="attention"))
    train_at_random(trunk)
    weights = with_biases(trunk)
    assert (type(weights), weights.config.attention_bias) == (type(trunk), True)
    whole = type(trunk)(weights.config).eval()  # its buffers, which no file holds, are made anew
    whole.load_state_dict(weights.state_dict())
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(whole(ids).last_hidden_state, trunk(ids).last_hidden_state)


def test_a_family_without_a_row_is_checked_and_said_to_be_so_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(opening, "_WARNED", set())
    build("starcoder2", 300).save_pretrained(tmp_path / "unknown")
    build("gemma2", 300).save_pretrained(tmp_path / "known")
    with caplog.at_level(logging.WARNING, "sgpt"):
        for folder in ("unknown", "unknown", "known"):
            load_trunk(ModelConfig(str(tmp_path / folder)))
    [warning] = [record.getMessage() for record in caplog.records if record.name.startswith("sgpt")]
    assert re.fullmatch(
        r".*unknown: no test knows the family starcoder2, and it runs padded. Checked on these weights: rows of "
        r"different lengths are as each alone to \d\.\de-\d\d of the largest number, where rounding explains .*",
        warning,
    )


def test_a_family_that_fails_the_check_is_refused_and_not_warned_of(tmp_path, caplog):
    build("convbert", 300).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not computed as each alone by ConvBertModel"):
        load_trunk(ModelConfig(str(tmp_path)))
    assert not [record for record in caplog.records if record.name.startswith("sgpt")]


def mixtral() -> MixtralModel:
    with torch.device("meta"):
        return MixtralModel(MixtralConfig(vocab_size=50, num_local_experts=4, **GROUPED))


def test_fused_experts_are_given_no_biases_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, "sgpt"):
        trunk = tune(mixtral(), TuningConfig("bitfit"))
    assert {place_of(name) for name in added_biases(trunk)} == {"attention"}
    assert "8 linear layers, 8 of attention and 0 of the MLP, are given one of zeros" in caplog.text


def test_layers_that_can_take_no_bias_are_refused_with_the_reason():
    with pytest.raises(
        InputError,
        match=r"found no bias parameters in MixtralModel \(0 of 20 tensors, 0 numbers for 2 layers of width 32\) and "
        r"tuning.add_biases=mlp can add none: no layer there is an nn.Linear \(fused experts are none\); "
        r"set tuning.add_biases=all, use tuning=bitfit_norm",
    ):
        tune(mixtral(), TuningConfig("bitfit", add_biases="mlp"))


def test_albert_whose_layers_share_one_block_has_biases_enough():
    """Its blocks are counted, not its layers: the twelfth has no biases of its own."""
    trunk = build("albert", 300)
    trunk.config.num_hidden_layers = 12
    tuned = tune(trunk, TuningConfig("bitfit"))
    assert not added_biases(tuned)
    assert all(name.endswith("bias") for name in trainable_parameters(tuned))
