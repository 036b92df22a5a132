"""A model is opened as it lies on disk, or refused in one sentence that names file, key or tensor, whoever opens it."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from sgpt.cross_encoder.cross_encoder import CrossEncoder, load_language_model
from sgpt.data.formats.beir import RetrievalSet
from sgpt.data.formats.scored_pairs import PairSet
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.model_folder import ModelFolder, find_model
from sgpt.evaluation.evaluate import Sets, evaluate
from sgpt.mining.rules import load_rescorer
from sgpt.runtime.errors import InputError
from tests.damage import damaged

TEXTS = ["parse a date from a string", "[x] {y} naïve 東京", "the quick brown fox " * 5]


@pytest.fixture
def base(tiny_base, tmp_path) -> Callable[[str], Path]:
    """A copy that a test may damage."""
    return lambda family="gpt2": Path(shutil.copytree(tiny_base(family), tmp_path / family))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder: Path, edit: Callable[[dict], dict]) -> None:
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def embeddings(folder: Path) -> np.ndarray:
    return Encoder.from_pretrained(folder).encode(TEXTS, "document")


def refused(load: Callable[[], object], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


OPENERS: dict[str, Callable[[Path], object]] = {
    "trunk": lambda folder: load_trunk(ModelConfig(str(folder))),
    "encoder": Encoder.from_pretrained,
    "language model": lambda folder: load_language_model(ModelConfig(str(folder))),
    "cross-encoder": CrossEncoder.from_pretrained,
}


# --- weights ---


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "base_model.model.",
        "0.auto_model.",
        "model.",
        "model.module.",
        "transformer.",
    ],
)
def test_prefixes_of_wrappers_are_taken_off_and_said(prefix, base, caplog):
    """Opened at random before: the trunk, without a word, so two openings gave two results."""
    folder = base()
    expected = embeddings(folder)
    change_weights(folder, lambda tensors: {prefix + name: value for name, value in tensors.items()})
    assert np.array_equal(embeddings(folder), expected)
    said = [record.getMessage() for record in caplog.records if "taken off" in record.getMessage()]
    assert len(said) == (0 if prefix == "transformer." else 1)  # GPT-2's own name for its trunk


def test_wrappers_of_single_modules_are_taken_off(base):
    folder = base()
    expected = embeddings(folder)
    change_weights(
        folder, lambda tensors: {name.replace("attn.", "attn._orig_mod."): value for name, value in tensors.items()}
    )
    assert np.array_equal(embeddings(folder), expected)


@pytest.mark.parametrize("opener", OPENERS)
def test_missing_weights_are_refused_by_name(opener, language_model, tmp_path):
    folder = Path(shutil.copytree(language_model("gpt2"), tmp_path / "model"))
    change_weights(
        folder,
        lambda tensors: {name: value for name, value in tensors.items() if not name.endswith("h.1.attn.c_attn.weight")},
    )
    refused(lambda: OPENERS[opener](folder), r"h\.1\.attn\.c_attn\.weight is missing.*whole")


@pytest.mark.parametrize("opener", OPENERS)
def test_nan_and_infinite_weights_are_refused_by_name(opener, language_model, tmp_path):
    for value, word in ((float("nan"), "NaN"), (float("inf"), "an infinite number")):
        folder = Path(shutil.copytree(language_model("gpt2"), tmp_path / word))

        def damage(tensors: dict, value: float = value) -> dict:
            tensors["transformer.h.0.ln_1.weight"][3] = value
            return tensors

        change_weights(folder, damage)
        refused(lambda folder=folder: OPENERS[opener](folder), rf"h\.0\.ln_1\.weight holds {word}")


def test_a_float32_weight_beyond_float16_is_refused_with_its_value(base):
    folder = base()

    def enlarge(tensors: dict) -> dict:
        tensors["ln_f.weight"][0] = 1e6
        return tensors

    change_weights(folder, enlarge)
    load_trunk(ModelConfig(str(folder), "bfloat16"))
    refused(
        lambda: load_trunk(ModelConfig(str(folder), "float16")),
        r"ln_f\.weight holds 1e\+06, and float16 ends at 65504; set dtype",
    )


def test_a_layer_that_the_config_does_not_count_is_refused(base):
    """One number changed: the model would be one layer deep, without a word."""
    folder = base()
    change(folder / "config.json", n_layer=1)
    refused(lambda: embeddings(folder), r"hold h\.1\..* for which config\.json leaves no place in GPT2Model")


def test_heads_of_other_tasks_and_a_pooler_that_is_not_there_are_no_reason_to_refuse(tiny_base, tmp_path):
    torch.manual_seed(0)
    trunk = AutoModel.from_pretrained(tiny_base("bert"))
    model = AutoModelForMaskedLM.from_config(trunk.config)
    model.bert.load_state_dict(trunk.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base("bert")).save_pretrained(tmp_path)
    assert not any("pooler" in name for name in load_file(tmp_path / "model.safetensors"))
    assert np.array_equal(embeddings(tmp_path), embeddings(tiny_base("bert")))
    pooler = [load_trunk(ModelConfig(str(tmp_path))).pooler.dense.weight for _ in range(2)]
    assert torch.equal(*pooler)  # else an adapter's base would be another at each opening


def sharded(folder: Path) -> Path:
    trunk = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    trunk.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_sharded_weights_open_and_a_missing_shard_is_named(base):
    folder = base()
    expected = embeddings(folder)
    sharded(folder)
    assert np.array_equal(embeddings(folder), expected)
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.unlink()
    refused(lambda: embeddings(folder), rf"model\.safetensors\.index\.json: its file {shard.name} is missing")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 12\n"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda data: POINTER, "model.safetensors: is a Git LFS pointer, not the weights; fetch them with"),
        (lambda data: b"", "model.safetensors: is empty"),
        (lambda data: data[: len(data) // 2], "model.safetensors: is cut or damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "model.safetensors: is cut or damaged"),
        (lambda data: data[:8] + b"\x00" * 20 + data[28:], "model.safetensors: is cut or damaged"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opener", OPENERS)
def test_damaged_weights_are_refused(opener, edit, match, base):
    folder = base()
    file = folder / "model.safetensors"
    file.write_bytes(edit(file.read_bytes()))
    refused(lambda: OPENERS[opener](folder), match)


# --- config.json ---


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"vocab_size": 99}, r"wte\.weight is stored as \(\d+, 32\) where config\.json makes it \(99, 32\)"),
        ({"vocab_size": 9999}, r"wte\.weight is stored as"),
        ({"n_embd": "32"}, r"the folder cannot be loaded"),
        ({"n_head": 5}, r"the folder cannot be loaded"),
        ({"activation_function": "gelu_of_mine"}, r"the folder cannot be loaded .*gelu_of_mine"),
        ({"layer_norm_epsilon": "small"}, r"the folder cannot be loaded"),
        ({"model_type": "mine"}, r"config\.json: model_type='mine' is no family of transformers"),
        ({"model_type": None}, r"config\.json: model_type=None is no family"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "modeling.Mine"}},
            r"config\.json: auto_map='modeling\.Mine' asks for Python code",
        ),
        (
            {"auto_map": {"AutoModel": "someone/code--modeling.Mine"}},
            r"auto_map='someone/code--modeling\.Mine' asks for Python code",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            r"quantization_config \(awq\) says quantised weights",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantization_config \(None\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opener", OPENERS)
def test_a_config_that_cannot_be_right_is_refused(opener, values, match, base, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("a question at the terminal"))
    folder = base()
    change(folder / "config.json", **values)
    refused(lambda: OPENERS[opener](folder), match)


@pytest.mark.parametrize(
    "values",
    [{"attn_implementation": "flash_attention_2"}, {"_attn_implementation": "flash_attention_2"},
     {"return_dict": False}, {"use_cache": False},
     {"auto_map": {"AutoModel": "modeling_gpt2.GPT2Model"}}, {"dtype": "float16"}, {"output_hidden_states": True}],
)  # fmt: skip
def test_a_config_that_says_what_does_not_matter_opens(values, base):
    folder = base()
    expected = embeddings(folder)
    change(folder / "config.json", **values)
    assert np.array_equal(embeddings(folder), expected)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"model_type": "gpt2"'])
def test_a_broken_config_is_one_sentence(text, base):
    folder = base()
    (folder / "config.json").write_text(text)
    for opener in OPENERS.values():
        refused(
            lambda opener=opener: opener(folder),
            r"config\.json: (cannot be read as JSON|holds (list|NoneType) where an object belongs)",
        )


def test_a_peft_adapter_is_no_model(base):
    folder = base()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    refused(lambda: embeddings(folder), r"adapter_config\.json: a PEFT adapter of 'gpt2' and no whole model")


# --- tokenizers ---


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_a_tokenizer_without_its_files_is_refused(family, base):
    """BERT read every word as [UNK], GPT none: the numbers that came out meant nothing."""
    folder = base(family)
    for file in folder.glob("token*"):
        file.unlink()
    for load in (load_tokenizer, Encoder.from_pretrained):
        refused(
            lambda load=load: load(str(folder)),
            r"the tokenizer has no vocabulary; the folder lacks tokenizer\.json|the folder cannot be loaded",
        )


def test_a_tokenizer_whose_words_are_gone_is_refused(base):
    folder = base("bert")
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    refused(lambda: load_tokenizer(str(folder)), "no vocabulary|the folder cannot be loaded")


def test_a_tokenizer_whose_unknown_token_is_gone_is_refused_before_an_unknown_word_comes(base):
    folder = base("bert")
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["unk_token"] = ""
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    refused(lambda: load_tokenizer(str(folder)), r"Missing \[UNK\] token")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: cannot be read as JSON"),
        ("tokenizer.json", "{}", "the folder cannot be loaded"),
        ("tokenizer.json", POINTER.decode(), r"tokenizer\.json: is a Git LFS pointer"),
        ("tokenizer_config.json", "[", r"tokenizer_config\.json: cannot be read as JSON"),
        (
            "tokenizer_config.json",
            '{"auto_map": {"AutoTokenizer": ["tok.Mine", null]}}',
            r"tokenizer_config\.json: auto_map='tok\.Mine' asks for Python code",
        ),
    ],
)  # fmt: skip
def test_a_broken_tokenizer_is_one_sentence(name, text, match, base, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("a question at the terminal"))
    folder = base()
    (folder / name).write_text(text)
    refused(lambda: Encoder.from_pretrained(folder), match)


def test_a_token_beyond_the_embedding_table_is_refused_at_the_start(base, language_model, tmp_path):
    folder = base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    match = rf"the text '<extra>' has token id {size}, and the embedding table ends after {size} rows"
    refused(lambda: Encoder.from_pretrained(folder), match)
    reranker = Path(shutil.copytree(language_model("gpt2"), tmp_path / "reranker"))
    tokenizer.save_pretrained(reranker)
    refused(lambda: CrossEncoder.from_pretrained(reranker), match)


# --- embeddings ---


def test_an_embedding_that_is_not_finite_names_role_text_and_set(tiny_encoder):
    """Weights that are finite can still overflow. nDCG of NaN scores was printed as a number."""
    encoder = tiny_encoder("gpt2", "none")
    word = encoder.token_ids(["date"], "query")[0][0]
    with torch.no_grad():
        encoder.trunk.wte.weight[word] = float("nan")
    encoder.encode(["a", "b"], "document")
    refused(
        lambda: encoder.encode(["a", "b", "date"], "document"),
        r"encode: the embedding of document 2 \('date'\) holds NaN or infinity",
    )
    sets = RetrievalSet("fruit", {"1": "a", "2": "b"}, {"q": "date"}, {"q": {"1": 1}})
    refused(lambda: evaluate(encoder, Sets([sets], [])), r"^fruit: encode: the embedding of query 0 \('date'\)")
    refused(
        lambda: evaluate(encoder, Sets([], [PairSet("sts", ["a"], ["date"], [1.0])])),
        r"^sts: encode: the embedding of query 0 \('date'\)",
    )


def test_a_score_that_is_not_finite_names_the_pair(language_model):
    reranker = CrossEncoder.from_pretrained(language_model("gpt2"), "A")
    with torch.no_grad():
        reranker.model.transformer.wte.weight[reranker.tokenizer("date")["input_ids"][0]] = float("nan")
    refused(lambda: reranker.score(["a"], ["date"]), r"score: pair 0 \(query 'a', document 'date'\) has the score nan")


def test_a_classifier_whose_head_is_missing_rescores_nothing(tiny_base, tmp_path):
    trunk = AutoModel.from_pretrained(tiny_base("bert"))
    trunk.config.num_labels = 1
    AutoModelForSequenceClassification.from_config(trunk.config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_base("bert")).save_pretrained(tmp_path)
    assert len(load_rescorer(str(tmp_path), torch.device("cpu"))([("a", "b")])) == 1
    change_weights(
        tmp_path, lambda tensors: {name: value for name, value in tensors.items() if "classifier" not in name}
    )
    refused(
        lambda: load_rescorer(str(tmp_path), torch.device("cpu")), r"classifier\.bias, classifier\.weight is missing"
    )


# --- whatever else is done to a folder ---

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]


def opens_or_is_refused(folder: Path, draw: st.DataObject, count: dict | None = None) -> None:
    with_damage = folder.parent / "damaged"
    shutil.rmtree(with_damage, ignore_errors=True)
    shutil.copytree(folder, with_damage)
    what = damaged(with_damage, draw, FILES)
    try:
        made = Encoder.from_pretrained(with_damage).encode(TEXTS, "document")
    except InputError as error:
        assert len(str(error)) < 700, what  # noqa: PT017
        outcome = "refused"
    else:
        assert np.isfinite(made).all(), what
        outcome = "opened"
    if count is not None:
        count[outcome] = count.get(outcome, 0) + 1


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_damaged_folder_opens_or_is_refused(family, tiny_base, tmp_path_factory):
    logging.disable(logging.CRITICAL)
    folder = Path(shutil.copytree(tiny_base(family), tmp_path_factory.mktemp("fuzz") / "whole"))

    @settings(max_examples=30, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(draw):
        opens_or_is_refused(folder, draw)

    try:
        check()
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_thousands_of_damaged_folders_open_or_are_refused(family, tiny_base, tmp_path_factory):
    folder, count = Path(shutil.copytree(tiny_base(family), tmp_path_factory.mktemp("fuzz") / "whole")), {}

    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(draw):
        opens_or_is_refused(folder, draw, count)

    check()
    print(family, count)


def test_what_a_path_holds_is_said_in_one_place(tmp_path):
    """An export before an adapter, both before what lies in the folder itself."""
    assert find_model(tmp_path) == ModelFolder(tmp_path, "base")
    (tmp_path / "modules.json").write_text("[]")
    assert find_model(tmp_path) == ModelFolder(tmp_path, "sentence-transformers")
    assert not find_model(tmp_path).is_ours
    for part, others in (("adapter", ["sgpt.json", "sgpt_delta.json"]), ("export", ["sgpt.json", "modules.json"])):
        (tmp_path / part).mkdir()
        for name in others:
            (tmp_path / part / name).write_text("{}")
        for path in (tmp_path, tmp_path / part):
            assert find_model(path) == ModelFolder(tmp_path / part, part)
    assert find_model(tmp_path, ("adapter",)).kind == "adapter"
