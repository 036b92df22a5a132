"""Trunks of every family: padding changes nothing, our attention is the family's own, and bases that cannot work are
refused.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModel, PreTrainedTokenizerFast

import sgpt.encoder.encoder
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk, token_embeddings
from sgpt.runtime.errors import InputError
from tests.conftest import FAMILIES, POSITIONS

# Entries are about 1. Padding changes the shapes of the matrix products, hence the order of float32 sums, over two
# layers.
TOLERANCE = {"rtol": 0, "atol": 5e-6}
LENGTHS = (3, 45, 20)  # 45 and 20 are past GPT-Neo's local window of 16


def padded(rows: list[list[int]], side: str, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + 2  # even the longest row is padded
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


def some_rows(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padding_right_padding_and_no_padding_give_the_same_embeddings(family, tiny_encoder):
    encoder = tiny_encoder(family, "none")
    rows = some_rows(encoder.trunk.config.vocab_size)
    alone = torch.cat([encoder.embed(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in rows])
    for side in ("right", "left"):
        # the pad id is also a token of the text's own vocabulary: only the mask tells
        torch.testing.assert_close(encoder.embed(*padded(rows, side, pad_id=7)), alone, **TOLERANCE)
    # the path of training: length groups, no mask where causal
    torch.testing.assert_close(encoder(rows), alone, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_only_the_mask_and_not_the_padding_token_changes_the_result(family, tiny_encoder):
    encoder = tiny_encoder(family, "none")
    rows = some_rows(encoder.trunk.config.vocab_size)
    for side in ("right", "left"):
        one, other = (encoder.embed(*padded(rows, side, pad_id)) for pad_id in (0, 9))
        torch.testing.assert_close(one, other, **TOLERANCE)
        assert one.isfinite().all()


@pytest.mark.parametrize("mask", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["gpt_neo", "gptj"])
def test_sdpa_gives_the_embeddings_and_gradients_of_the_familys_eager_attention(family, mask, tiny_base):
    """GPT-Neo has a global and a local layer here, whose window of 16 is smaller than the text."""
    folder = tiny_base(family)
    ours, theirs = (
        load_trunk(ModelConfig(str(folder))),
        AutoModel.from_pretrained(folder, attn_implementation="eager").eval(),
    )
    assert theirs.config._attn_implementation == "eager"
    ids, attention_mask = (
        padded(some_rows(theirs.config.vocab_size), mask, 0)
        if mask != "none"
        else (torch.arange(60).view(2, 30) + 5, None)
    )
    real = attention_mask.bool() if attention_mask is not None else torch.ones_like(ids).bool()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(*ids.shape, 32, generator=generator)
    hidden = {}
    for name, trunk in (("ours", ours), ("theirs", theirs)):
        hidden[name] = token_embeddings(trunk, ids, attention_mask)
        (hidden[name] * weight)[real].mean().backward()
    torch.testing.assert_close(hidden["ours"][real], hidden["theirs"][real], **TOLERANCE)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        largest = expected[name].grad.abs().max()
        assert largest > 0, name
        # float32 sums in another order: 1e-5 of the tensor's largest gradient (a key's bias has none but rounding)
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=0, atol=max(1e-5 * float(largest), 1e-8), msg=name
        )


def test_the_local_layer_of_gpt_neo_sees_its_window_only(tiny_base):
    """One layer deep, a token 16 places back is out of sight of a window of 16, one 15 back is in it."""
    trunk = load_trunk(ModelConfig(str(tiny_base("gpt_neo"))))
    trunk.h = trunk.h[1:]  # the local layer alone
    ids = torch.arange(5, 45)[None]
    before = token_embeddings(trunk, ids, None)[0, -1]
    for distance, seen in ((15, True), (16, False)):
        changed = ids.clone()
        changed[0, -1 - distance] = 99
        assert torch.equal(token_embeddings(trunk, changed, None)[0, -1], before) != seen


def test_gradients_of_sdpa_are_finite_on_rows_of_padding_only(tiny_encoder):
    encoder = tiny_encoder("gpt_neo", "none")
    ids, mask = padded(some_rows(300), "left", 0)
    mask[0] = 0
    encoder.embed(ids, mask).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters() if parameter.grad is not None)


def test_a_hub_id_without_a_network_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (lambda path: load_trunk(ModelConfig(path)), load_tokenizer):
        with pytest.raises(
            InputError, match=r"nobody/nothing: no such local folder, and .* give the local folder"
        ) as caught:
            load("nobody/nothing")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["runs/none/export", "./none", "/none", "~/none", "none/"])
def test_a_path_that_can_be_no_hub_id_is_not_asked_of_the_hub(path):
    for load in (lambda path: load_trunk(ModelConfig(path)), load_tokenizer):
        with pytest.raises(InputError, match=f"^{path}: no such folder; check the path$"):
            load(path)


def test_a_folder_that_is_no_model_is_a_clear_error(tmp_path):
    for load in (lambda path: load_trunk(ModelConfig(path)), load_tokenizer):
        with pytest.raises(
            InputError,
            match=r"the folder cannot be loaded .* it needs config\.json, model\.safetensors and tokenizer files",
        ):
            load(str(tmp_path))


@pytest.mark.parametrize("form", ["zip", "old", "shards"])
def test_pickled_tensors_are_read_and_kept_as_safetensors(form, tiny_base, tmp_path, monkeypatch, caplog):
    """Of old GPT-Neo files with their masks, of before PyTorch 1.6, and in shards with an index."""
    monkeypatch.chdir(tmp_path)
    trunk = AutoModel.from_pretrained(tiny_base("gpt_neo"))
    folder = tmp_path / "published"
    trunk.config.save_pretrained(folder)
    tensors = trunk.state_dict() | {"h.0.attn.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
    if form == "shards":
        names = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(tensors)}
        for shard in {*names.values()}:
            torch.save({name: tensors[name] for name in names if names[name] == shard}, folder / shard)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    opened = load_trunk(ModelConfig(str(folder)))
    for name, value in trunk.named_parameters():
        assert torch.equal(opened.get_parameter(name), value)
    assert "no code of it is run, and they are kept as safetensors in data/cache/pickled/published-" in caplog.text
    caplog.clear()
    load_trunk(ModelConfig(str(folder)))  # of which nothing is unpickled again
    assert "kept as safetensors" not in caplog.text


class _Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("was-run"),))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda tensors: {**tensors, "extra": _Harmful()}, r"asks for more than tensors, .* get the model as safet"),
        (lambda tensors: {"model": tensors}, r"holds more than named tensors; get the model as safetensors"),
        (None, r"is cut or damaged .*; fetch it again"),
    ],
)  # fmt: skip
def test_pickles_of_anything_else_are_refused_and_run_nothing(content, match, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trunk = load_trunk(ModelConfig(str(tiny_base("gpt2"))))
    folder = tmp_path / "model"
    trunk.config.save_pretrained(folder)
    if content is None:
        torch.save(trunk.state_dict(), folder / "pytorch_model.bin")
        whole = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    else:
        torch.save(content(trunk.state_dict()), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=rf"pytorch_model\.bin: {match}"):
        load_trunk(ModelConfig(str(folder)))
    assert not (tmp_path / "was-run").exists()
    assert not [*tmp_path.rglob("*.safetensors")]


def test_limits_beyond_the_position_table_are_refused(tiny_encoder):
    tiny_encoder("gpt_neo", query_max_tokens=POSITIONS)
    with pytest.raises(
        InputError,
        match=rf"markers\.query_max_tokens={POSITIONS + 1} is more than the {POSITIONS} positions of GPTNeoModel; "
        "lower it",
    ):
        tiny_encoder("gpt_neo", query_max_tokens=POSITIONS + 1)
    tiny_encoder("bloom", query_max_tokens=100_000)  # ALiBi: no table


def test_the_end_token_pads_where_there_is_no_pad_token_and_none_at_all_is_refused(tiny_base, tmp_path):
    folder = tiny_base("gpt2")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match="neither a pad token nor an end token"):
        load_tokenizer(str(tmp_path))


def test_an_encoder_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(InputError, match="t5 is an encoder-decoder; use a decoder or an encoder"):
        load_trunk(ModelConfig(str(tmp_path)))


def test_any_number_of_texts_at_a_time_gives_the_same_embeddings_also_into_a_memory_map(
    tiny_encoder, tmp_path, monkeypatch
):
    encoder = tiny_encoder("gpt_neo", markers="none")
    texts = [" ".join(["word"] * length) for length in (3, 1, 12, 0, 7, 2, 9)]
    at_once = encoder.encode(texts, "document", normalize=True)
    monkeypatch.setattr(sgpt.encoder.encoder, "TEXTS_AT_A_TIME", 3)
    file = np.lib.format.open_memmap(tmp_path / "embeddings.npy", "w+", np.float32, at_once.shape)
    file[:] = np.nan
    filled = encoder.encode(texts, "document", normalize=True, out=torch.from_numpy(file))
    assert filled.data_ptr() == file.ctypes.data
    np.testing.assert_allclose(np.load(tmp_path / "embeddings.npy"), at_once, atol=1e-6)
    assert not at_once[3].any()
    assert not file[3].any()
