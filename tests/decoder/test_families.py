"""Families that nobody has proved here: right, or refused with the number. All of them: tests/family_sweep.py."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from sgpt.cross_encoder.cross_encoder import load_language_model
from sgpt.cross_encoder.likelihood import ScoredText, log_probabilities
from sgpt.decoder import agreement, families
from sgpt.decoder.trunk import ModelConfig, load_trunk
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from tests.conftest import byte_level
from tests.family_sweep import build, main, sweep

QUICK = [
    "longformer",
    "luke",
    "xlm-roberta-xl",
    "roberta",
    "distilbert",
    "mpnet",
    "deberta-v2",
    "modernbert",
    "gemma2",
    "mistral",
    "phi",
    "olmo2",
]


@pytest.mark.parametrize("family", QUICK)
def test_embeddings_are_those_of_plain_transformers(family, tmp_path):
    """Of Longformer, LUKE and XLM-RoBERTa-XL they were off by 0.4 to 1.1: their positions start behind the padding id.
    """
    row = sweep(family, tmp_path)
    assert (row.outcome, row.reason) == ("right", "")


def test_a_family_that_looks_at_padding_is_refused_with_the_number(tmp_path):
    row = sweep("convbert", tmp_path)
    assert row.outcome == "refused"
    assert (
        "rows of different lengths are not computed as each alone by ConvBertModel (convbert): they differ by "
        in row.reason
    )


def test_positions_handed_in_where_they_count_otherwise_are_noticed(tmp_path):
    """The fault itself: positions from 0 for a family whose table starts behind the padding id."""
    build("longformer", 300).save_pretrained(tmp_path)
    trunk = load_trunk(ModelConfig(str(tmp_path)))

    def positions_from_0(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return trunk(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).last_hidden_state

    with pytest.raises(
        InputError, match=r"not computed as each alone by LongformerModel \(longformer\): they differ by"
    ):
        agreement.check_agreement("x", trunk, positions_from_0, 32, 100)


def test_a_family_that_is_right_only_when_it_counts_itself_is_left_to_do_so(tmp_path, monkeypatch):
    """Without what is known of such tables: the check at opening finds out."""
    monkeypatch.setattr(families, "position_offset", lambda trunk: 0)
    assert sweep("longformer", tmp_path).outcome == "right"
    assert load_trunk(ModelConfig(str(tmp_path))).counts_positions_itself


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "mpnet"])
def test_the_bound_is_the_rounding_of_these_weights(family, dtype, tmp_path):
    """A right family is right in half precision too, and a thousandth of its largest number is not let pass in float32.
    """
    build(family, 300).save_pretrained(tmp_path)
    trunk = load_trunk(ModelConfig(str(tmp_path), dtype))
    rows = agreement.probe_rows(trunk, 100)
    with torch.no_grad():
        alone = [trunk(row[None]).last_hidden_state[0] for row in rows]
    measured = agreement.trunk_rounding(trunk, rows, alone)
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert eps / 4 < measured < 30 * eps
    if dtype == "float32":
        with pytest.raises(InputError, match="not computed as each alone"):
            agreement.check_agreement(
                "x", trunk, lambda ids, mask: trunk(ids, attention_mask=mask).last_hidden_state * 1.001, 32, 100
            )


def test_an_encoder_with_a_language_model_head_is_no_re_ranker(tmp_path):
    """BERT is known by name; another encoder of its kind is known by what it looks at."""
    torch.manual_seed(0)
    trunk = build("roberta", 600)
    AutoModelForCausalLM.from_config(trunk.config).save_pretrained(tmp_path / "roberta")
    config = BertConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    camembert = build("roberta-prelayernorm", 600)
    AutoModelForCausalLM.from_config(camembert.config).save_pretrained(tmp_path / "other")
    for name in ("roberta", "bert"):
        with pytest.raises(InputError, match="predicts no next token"):
            load_language_model(ModelConfig(str(tmp_path / name)))
    with pytest.raises(
        InputError,
        match=r"\(roberta-prelayernorm\) looks at tokens behind the one it reads, by .* predicts no next token",
    ):
        load_language_model(ModelConfig(str(tmp_path / "other")))


@pytest.mark.parametrize("family", ["mistral", "phi"])
def test_scores_of_other_decoders_are_those_of_each_text_alone(family, tmp_path):
    trunk = build(family, 300)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(trunk.config).save_pretrained(tmp_path)
    opened, theirs = (
        load_language_model(ModelConfig(str(tmp_path))),
        AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
    )
    texts = [ScoredText(tuple(range(5, 5 + length)), 3) for length in (6, 20, 11)]
    expected = []
    for text in texts:
        with torch.no_grad():
            logits = theirs(torch.tensor([text.ids])).logits[0].double().log_softmax(-1)
        expected.append(
            sum(float(logits[place - 1, text.ids[place]]) for place in range(len(text.ids) - 3, len(text.ids)))
        )
    assert log_probabilities(opened, texts, tokens_per_pack=4096).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_sweep_tells_right_from_refused(capsys, tmp_path):
    assert main(["mistral", "bart"]) == 0
    logging.disable(logging.NOTSET)
    printed = capsys.readouterr().out
    assert "mistral                      right" in printed
    assert "bart                         not built ValueError: an encoder-decoder" in printed


def test_a_padding_id_of_a_text_is_a_token_to_families_that_do_not_count_by_it(tmp_path: Path):
    """The end token pads in GPT: a text that holds it is read whole."""
    tokenizer = byte_level()
    build("mistral", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, pooling="mean")
    text = f"a{tokenizer.eos_token}b"
    together = encoder.encode([text, "a much longer text that pads the other"], "document")[0]
    with torch.no_grad():
        alone = encoder.trunk(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
    assert torch.allclose(torch.from_numpy(together), alone, atol=1e-5)
