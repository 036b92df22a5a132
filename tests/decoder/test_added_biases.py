"""Biases that a base does not have: nothing changes before training, and every format gives back what was trained."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from sgpt.cross_encoder import CrossEncoder
from sgpt.decoder.added_biases import add_biases, added_biases, with_biases
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.adapter import load_adapter, save_adapter
from sgpt.encoder.contract import Origin
from sgpt.encoder.delta import Delta
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import announce_export, export
from sgpt.retrieval.searcher import load_encoder_and_reranker
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune

MODELS = Path(__file__).parents[3] / "shared" / "models"
STORIES, TWIN = MODELS / "stories260k", MODELS / "stories260k-zerobias"
TEXTS = ["parse a date", "a story of a dog", "", "one day a girl was sad and then she was not"]
PEFT_WARNS = "ignore:Detected that the base layer has no bias term"
needs_stories = pytest.mark.skipif(not TWIN.is_dir(), reason=f"no {TWIN.name} at {MODELS}")


def trained(
    base: Path, seed: int = 0, dtype: str = "float32", **tuning
) -> tuple[Encoder, dict[str, torch.Tensor]]:  # fmt: skip
    """An encoder over the base with random values in what learns, and the values before."""
    encoder = Encoder.from_pretrained(base, markers=MarkersConfig("brackets", 24, 40), dtype=dtype)
    encoder.trunk = tune(encoder.trunk, TuningConfig(**tuning))
    before = {name: value.detach().clone() for name, value in trainable_parameters(encoder.trunk).items()}
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in trainable_parameters(encoder.trunk).values():
            value.add_(torch.randn(value.shape, generator=random) * 0.3)
    return encoder.eval(), before


@needs_stories
@pytest.mark.bitwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_base_and_of_its_twin_with_zeros_bit_for_bit(dtype):
    ids = torch.arange(120).view(4, 30)
    base, twin = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for folder in (STORIES, TWIN))
    with torch.no_grad():
        before = base(ids).logits
        names = add_biases(base.model)
        assert torch.equal(base(ids).logits, before)
        assert torch.equal(twin(ids).logits, before)
    assert set(names) == {name for name, _ in twin.model.named_parameters() if name.endswith("bias")}
    assert sum(base.model.get_parameter(name).numel() for name in names) == 3_000


@pytest.mark.bitwise
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_an_encoder_gives_the_embeddings_of_its_base_before_the_first_step(family, tiny_encoder):
    encoder = tiny_encoder(family)
    before = encoder.encode(TEXTS, "query")
    encoder.trunk = tune(encoder.trunk, TuningConfig())
    assert added_biases(encoder.trunk)
    assert (encoder.eval().encode(TEXTS, "query") == before).all()


@pytest.mark.filterwarnings(PEFT_WARNS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_adapter_is_kilobytes_and_opens_bit_for_bit_and_by_stock_peft(family, tiny_base, tmp_path):
    base = tiny_base(family)
    encoder, before = trained(base)
    expected = encoder.encode(TEXTS, "document")
    save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter")
    assert (Encoder.from_pretrained(tmp_path / "adapter").encode(TEXTS, "document") == expected).all()
    trunk = load_trunk(ModelConfig(str(base)))
    load_adapter(trunk, tmp_path / "adapter")
    assert all(torch.equal(value, trunk.get_parameter(name)) for name, value in encoder.trunk.named_parameters())

    ids = torch.arange(3, 20)[None]
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        ours, theirs = encoder.trunk(ids).last_hidden_state, by_peft(input_ids=ids).last_hidden_state
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)


def test_another_base_is_refused_before_biases_are_added_to_it(tiny_base, tmp_path):
    encoder, before = trained(tiny_base("qwen3"))
    save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter")
    other = load_trunk(ModelConfig(str(tiny_base("qwen2"))))
    with pytest.raises(InputError, match=r"this Qwen2Model .* is another: names, shapes or values"):
        load_adapter(other, tmp_path / "adapter")
    assert not added_biases(other)


def test_a_delta_shares_the_trunk_and_takes_its_biases_off_again(tiny_base, language_model, tmp_path):
    base = language_model("qwen3")
    deltas, expected = [], []
    for seed in (1, 2):
        encoder, before = trained(base, seed)
        expected.append(encoder.encode(TEXTS, "query"))
        folder = tmp_path / str(seed)
        save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, folder)
        deltas.append(folder)
    scorer = CrossEncoder.from_pretrained(str(base))
    pairs = ["a date", "a dog"], ["parse a date", "a story"]
    scores = scorer.score(*pairs)
    trunk = scorer.model.base_model
    shared = [Encoder(trunk, encoder.tokenizer, encoder.contract, delta=Delta(trunk, folder)) for folder in deltas]
    for one, values in zip(shared, expected, strict=True):
        assert (one.encode(TEXTS, "query") == values).all()
    assert (scorer.score(*pairs) == scores).all()


def test_an_export_holds_the_biases_as_plain_llama(tiny_base, tmp_path):
    """Llama by its own switches, and Qwen2, whose class has no bias at the output and in the MLP, as Llama."""
    for family in ("llama", "qwen2"):
        base = tmp_path / family
        shutil.copytree(tiny_base(family), base)
        if family == "llama":
            _without_its_biases(base)
        encoder, _ = trained(base)
        verified = export(encoder, tmp_path / f"{family}-export", card="")
        config = json.loads((tmp_path / f"{family}-export" / "config.json").read_text())
        assert (config["model_type"], config["attention_bias"], config["mlp_bias"]) == ("llama", True, True)
        assert verified["max_difference"] < 1e-5
        assert "sentence-transformers" in verified["readers"][1]


def test_adapter_and_export_of_a_run_are_one_model_to_an_index(tiny_base, tmp_path):
    """The export's class has biases in the first block too, where none were trained."""
    shutil.copytree(tiny_base("llama"), tmp_path / "base")
    _without_its_biases(tmp_path / "base")
    encoder, before = trained(tmp_path / "base", layers="last:1")
    adapter = save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter")
    export(encoder, tmp_path / "export", card="")
    opened = [Encoder.from_pretrained(tmp_path / "export"), Encoder.from_pretrained(adapter)]
    opened.append(Encoder.over_base(adapter)[0])
    assert len(added_biases(opened[1].trunk)) == 7
    assert len({one.fingerprint() for one in opened}) == 1


def test_an_export_with_biases_of_attention_alone_switches_on_these(tiny_base, tmp_path):
    encoder, _ = trained(tiny_base("qwen3"), add_biases="attention")
    export(encoder, tmp_path / "export", card="")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["model_type"], config["attention_bias"]) == ("qwen3", True)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    for name, value in trainable_parameters(encoder.trunk).items():
        assert torch.equal(stored[name], value)


@pytest.mark.filterwarnings(PEFT_WARNS)
def test_an_export_that_no_class_holds_is_the_adapter_in_the_form_of_peft(tiny_base, tmp_path):
    encoder, before = trained(tiny_base("qwen3"))
    save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter")
    remedy = r"use the adapter, formats=\[onnx\], or train with tuning"
    with pytest.raises(InputError, match=rf"no class of transformers holds .* {remedy}"):
        export(encoder, tmp_path / "export", card="")
    verified = export(encoder, tmp_path / "export", card="", adapter=tmp_path / "adapter")
    assert verified["readers"][0] == "sgpt"
    assert sum(file.stat().st_size for file in (tmp_path / "export").glob("*.safetensors")) < 10_000
    model = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    theirs = model.encode_query(TEXTS[:2])
    assert abs(theirs - encoder.encode(TEXTS[:2], "query")).max() < 1e-5


@pytest.mark.filterwarnings(PEFT_WARNS)
def test_an_adapter_over_a_rounded_base_is_exported_where_the_base_is_stored_so(tiny_base, tmp_path):
    """Other readers open the base as it is stored."""
    for stored in (torch.float32, torch.bfloat16):
        base = tmp_path / str(stored)
        shutil.copytree(tiny_base("qwen3"), base)
        AutoModel.from_pretrained(base, dtype=stored).save_pretrained(base)
        encoder, before = trained(base, dtype="bfloat16")
        adapter = save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter")
        if stored == torch.float32:
            refusal = r"its weights were rounded to bfloat16 for training, and as no class"
            with pytest.raises(InputError, match=refusal):
                announce_export(encoder)  # before an hour of training, not after it
            with pytest.raises(InputError, match=refusal):
                export(encoder, tmp_path / "export", card="", adapter=adapter)
            assert not (tmp_path / "export").exists()
        else:
            announce_export(encoder)
            readers = export(encoder, tmp_path / "export", card="", adapter=adapter)["readers"]
            assert [name.split()[0] for name in readers] == ["sgpt", "sentence-transformers", "peft"]
            assert f"an adapter of PEFT over `{base}`" in (tmp_path / "export" / "README.md").read_text()


def test_a_whole_model_is_the_way_where_peft_would_open_the_base_unrounded(tiny_base, tmp_path):
    """GPT-Neo has a class, so that only the adapter is refused."""
    encoder, before = trained(tiny_base("gpt_neo"), dtype="bfloat16")
    adapter = save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"rounded to bfloat16 for training, and PEFT would open the base unrounded"):
        export(encoder, tmp_path / "peft", card="", adapter=adapter, form="peft")
    export(encoder, tmp_path / "export", card="", adapter=adapter)


def test_an_adapter_without_its_base_says_which_is_missing(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base("qwen3"), tmp_path / "base")
    encoder, before = trained(base)
    adapter = save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter")
    shutil.move(base, tmp_path / "moved")
    missing = f"{adapter}: is an adapter, and its base cannot be opened: {base}: no such folder"
    for opened in (Encoder.from_pretrained, load_encoder_and_reranker):
        with pytest.raises(InputError, match=missing):
            opened(adapter)


def test_with_biases_gives_the_same_numbers_and_shares_the_weights(tiny_base):
    for family in ("qwen2", "qwen3"):
        trunk = load_trunk(ModelConfig(str(tiny_base(family))))
        assert with_biases(trunk) is trunk
        add_biases(trunk, "attention")
        with torch.no_grad():
            for name in added_biases(trunk):
                trunk.get_parameter(name).normal_()
        whole = with_biases(trunk).eval()
        name = "layers.0.mlp.up_proj.weight"
        assert whole.get_parameter(name).data_ptr() == trunk.get_parameter(name).data_ptr()
        ids = torch.arange(3, 20)[None]
        rebuilt = type(whole)(whole.config).eval()  # its buffers are made anew
        rebuilt.load_state_dict(whole.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(rebuilt(ids)[0], trunk(ids)[0], rtol=0, atol=1e-6)


def test_layers_outside_of_the_blocks_are_given_none(tiny_base):
    trunk = load_trunk(ModelConfig(str(tiny_base("qwen3"))))
    trunk.projection = nn.Linear(32, 16, bias=False)  # as OPT-350m has two around its blocks
    add_biases(trunk)
    assert trunk.projection.bias is None


def _without_its_biases(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    config = model.config
    config.attention_bias = config.mlp_bias = False
    bare = type(model)(config)
    bare.load_state_dict(model.state_dict(), strict=False)
    bare.save_pretrained(folder)


def test_the_tokenizer_of_an_export_keeps_a_sequence_of_pre_tokenizers(tiny_base, tmp_path):
    """Qwen's splits, then maps bytes; a class that takes tokenizer.json as it stands has both from there alone."""
    encoder, _ = trained(tiny_base("qwen2"))
    export(encoder, tmp_path / "export", card="")
    opened = load_tokenizer(str(tmp_path / "export"))
    texts = ["12 dogs?]", "[a] {b}", "  x\n\ny"]
    assert opened(texts)["input_ids"] == encoder.tokenizer(texts)["input_ids"]
    kinds = [part["type"] for part in json.loads(opened.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]]
    assert kinds == ["Split", "ByteLevel"]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_the_export_will_be_is_said_before_training(dtype, tiny_encoder, caplog):
    for family, warns in {"llama": False, "qwen2": False, "qwen3": True}.items():
        encoder = tiny_encoder(family, dtype=dtype)
        encoder.trunk = tune(encoder.trunk, TuningConfig())
        caplog.clear()
        announce_export(encoder)
        assert ("the export will be an adapter over" in caplog.text) == warns


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt_neo", {}), ("gpt_neo", {"layers": "last:1"}), ("llama", {"add_biases": "attention"}),
        ("llama", {"add_biases": "mlp"}), ("qwen2", {}), ("qwen2", {"add_biases": "mlp"}),
        ("llama", {"name": "bitfit_norm", "layers": "last:1"}),
    ],
)  # fmt: skip
def test_an_export_that_is_trained_on_keeps_its_frozen_set(family, settings, tiny_base, hub, tmp_path):
    """attention alone is too few biases for a base, and Llama's class has some that Qwen2's run did not train."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base(family), base)
    if family == "llama":
        _without_its_biases(base)
    encoder, before = trained(base, **settings)
    encoder.contract.origin = Origin(tuning=settings.get("name", "bitfit"), layers=settings.get("layers", "all"))
    export(encoder, tmp_path / "export", card="")
    config = TuningConfig(**{"name": "bitfit", **settings})
    for again in (config, TuningConfig(config.name, layers=config.layers), TuningConfig(config.name)):
        for exported in (str(tmp_path / "export"), hub("me/tuned", tmp_path / "export")):
            trunk = tune(load_trunk(ModelConfig(exported)), again, exported)
            assert trainable_parameters(trunk).keys() == before.keys()
            assert not added_biases(trunk)


def test_others_than_those_of_the_run_do_not_learn_and_the_log_says_where_they_would(tiny_base, tmp_path, caplog):
    """A run of before with such keys is reopened by the same rule."""
    shutil.copytree(tiny_base("llama"), tmp_path / "base")
    _without_its_biases(tmp_path / "base")
    encoder, before = trained(tmp_path / "base", add_biases="attention", layers="last:1")
    encoder.contract.origin = Origin(tuning="bitfit", layers="last:1")
    export(encoder, tmp_path / "export", card="")
    exported = str(tmp_path / "export")
    caplog.set_level(logging.INFO)
    both = tune(load_trunk(ModelConfig(exported)), TuningConfig("bitfit", "mlp", layers="last:2"), exported)
    assert trainable_parameters(both).keys() == before.keys()
    said = r"of these learn the ones in the blocks of tuning\.layers=last:2; others, and more .* that run's own base"
    assert any(re.search(said, message) for message in caplog.messages)
