"""Folders of sentence-transformers that are none of ours: its own vectors, or one sentence with file and key."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, LayerNorm, Normalize, Pooling, Transformer
from torch import nn
from transformers import AutoTokenizer

from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.encoder.model_folder import announce_base
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from tests.conftest import random_trunk
from tests.damage import damaged

QUERIES = ["Parse a DATE from a string", "what?", "x" * 5, "how long can a text be that is long " * 6]
DOCUMENTS = ["Dates are PARSED by strptime.", "Naïve 東京 Text", "a b c d e f g " * 12]
SETTINGS, TRANSFORMER, POOLING = (
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory) -> Callable[..., Path]:
    """saved(family, *modules behind the transformer): what sentence-transformers itself writes."""
    made: dict[str, Path] = {}

    def save(family: str = "gpt2", mode: str = "mean") -> Path:
        if family + mode not in made:
            folder = tmp_path_factory.mktemp("st") / "model"
            transformer = Transformer(str(tiny_base(family)), max_seq_length=48)
            if transformer.tokenizer.pad_token is None:
                transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
            modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode=mode), Normalize()]
            SentenceTransformer(modules=modules, device="cpu").save(str(folder))
            made[family + mode] = folder
        return made[family + mode]

    return save


@pytest.fixture
def folder(saved, tmp_path) -> Callable[..., Path]:
    """A copy that a test may change."""
    return lambda *arguments: Path(shutil.copytree(saved(*arguments), tmp_path / "model"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | values))


def agrees(folder: Path) -> Encoder:
    ours, theirs = Encoder.from_pretrained(folder), SentenceTransformer(str(folder), device="cpu")
    for made, expected in (
        (ours.encode_queries(QUERIES), theirs.encode_query(QUERIES)),
        (ours.encode_documents(DOCUMENTS), theirs.encode_document(DOCUMENTS)),
    ):
        assert np.abs(made - expected).max() <= 1e-6 * max(1, np.abs(expected).max())
    return ours


@pytest.mark.parametrize("mode", ["mean", "weightedmean", "lasttoken", "cls", "max"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_poolings_and_lengths_are_theirs(family, mode, saved):
    encoder = agrees(saved(family, mode))
    assert encoder.contract.normalize
    assert encoder.contract.markers.query_max_tokens == 48


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": {"query": "query: "}},
        {"prompts": {"query": "Query: ", "document": "passage: "}},
        {"prompts": {"query": None, "document": "d "}, "default_prompt_name": None},
        {"prompts": {"passage": "passage: ", "s2s": "same: "}, "default_prompt_name": "s2s"},
        {"similarity_fn_name": "dot"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_prompts_stand_before_queries_and_documents(family, settings, folder):
    """They were dropped: the smallest cosine to the model's own vectors was 0.15."""
    model = folder(family)
    plain = Encoder.from_pretrained(model).encode_queries(QUERIES)
    change(model / SETTINGS, **{"prompts": {}, **settings})
    prompted = agrees(model).encode_queries(QUERIES)
    assert (np.abs(prompted - plain).max() > 0.01) == bool(settings.get("prompts", {}).get("query"))


def test_other_similarities_and_prompts_without_a_role_are_told(folder, caplog):
    model = folder()
    change(model / SETTINGS, prompts={"s2s": "same: "}, similarity_fn_name="dot")
    Encoder.from_pretrained(model)
    assert "similarity_fn_name=dot; here texts are compared by cosine" in caplog.text
    assert "prompts ['s2s'] stand before neither queries nor documents" in caplog.text


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_texts_are_lower_cased_where_the_folder_says_so(family, folder):
    model = folder(family)
    plain = Encoder.from_pretrained(model).encode_queries(QUERIES)
    change(model / TRANSFORMER, do_lower_case=True)
    assert (np.abs(agrees(model).encode_queries(QUERIES) - plain).max() > 0.01) == (
        family == "gpt2"
    )  # this BERT does it anyway


@pytest.mark.parametrize(
    "stated",
    [
        {"max_seq_length": 16},
        {"max_seq_length": 128},
        {"query_length": 9, "document_length": 20},
        {"max_seq_length": 30, "query_length": 8},
    ],
)
def test_limits_are_theirs(stated, folder):
    model = folder("bert")
    change(model / "tokenizer_config.json", model_max_length=48)
    change(model / TRANSFORMER, **stated)
    agrees(model)


def test_without_a_stated_length_the_tokenizers_and_the_models_limits_hold(folder):
    model = folder("bert")
    change(model / "tokenizer_config.json", model_max_length=14)
    (model / TRANSFORMER).write_text("{}")
    assert agrees(model).contract.markers.query_max_tokens == 14
    change(model / "tokenizer_config.json", model_max_length=10**30)
    assert agrees(model).contract.markers.query_max_tokens == 128


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": False},
    ],
)
def test_old_pooling_keys_are_theirs(pooling, folder):
    """The last one states none at all, which is the mean."""
    model = folder()
    (model / POOLING).write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    agrees(model)


def test_a_folder_without_optional_files_opens(folder):
    model = folder("bert")
    for name in (SETTINGS, "tokenizer_config.json"):
        (model / name).unlink()
    agrees(model)


REFUSED = [
    (SETTINGS, {"prompts": ["query: "]}, r"prompts=\['query: '\] must give a text"),
    (SETTINGS, {"prompts": {"query": 3}}, r"prompts=.* must give a text"),
    (SETTINGS, {"default_prompt_name": "none"}, r"default_prompt_name='none' is none of its prompts"),
    (SETTINGS, {"truncate_dim": 8}, r"truncate_dim=8 is not applied here"),
    (SETTINGS, {"similarity_fn_name": "mine"}, r"similarity_fn_name='mine' is unknown"),
    (SETTINGS, {"model_type": "SparseEncoder"}, r"model_type='SparseEncoder' is no model"),
    (TRANSFORMER, {"max_seq_length": 129}, r"max_seq_length=129 is more than the 128 positions of GPT2Model"),
    (TRANSFORMER, {"max_seq_length": "64"}, r"max_seq_length='64' must be a number of tokens"),
    (TRANSFORMER, {"max_seq_length": 2}, r"max_seq_length: .*leaves no room"),
    (TRANSFORMER, {"query_length": -1}, r"query_length=-1 must be a number of tokens"),
    (TRANSFORMER, {"do_lower_case": "yes"}, r"do_lower_case='yes' must be true or false"),
    (TRANSFORMER, {"mine": 1}, r"key 'mine' is not known here"),
    (TRANSFORMER, {"transformer_task": "text-generation"}, r"transformer_task='text-generation' is not applied here"),
    (TRANSFORMER, {"processor_kwargs": {"padding_side": "left"}}, r"processor_kwargs=.* is not applied here"),
    (TRANSFORMER, {"modality_config": {"message": {}}}, r"go through a chat template"),
    ("tokenizer_config.json", {"truncation_side": "left"}, r"truncation_side='left' is not supported"),
    (POOLING, {"pooling_mode": ["mean", "max"]}, r"pooling \['mean', 'max'\] is not supported"),
    (POOLING, {"pooling_mode": "mine"}, r"pooling \['mine'\] is not supported"),
    (POOLING, {"pooling_mode": "mean_sqrt_len_tokens"}, r"pooling \['mean_sqrt_len_tokens'\] is not supported"),
    (POOLING, {"pooling_mode": {"a": 1}}, r"pooling .* is not supported"),
    (POOLING, {"include_prompt": "no"}, r"include_prompt='no' must be true or false"),
    (POOLING, {"mine": 1}, r"key 'mine' is not known here"),
]


@pytest.mark.parametrize(("file", "values", "match"), REFUSED)
def test_what_is_not_applied_is_refused_by_its_key(file, values, match, folder):
    model = folder()
    change(model / file, **values)
    refused(model, rf"{file}|{model}".replace(".", r"\.") + ".*" + match)


def refused(model: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        Encoder.from_pretrained(model)
    assert "\n" not in str(caught.value)


def test_prompts_left_out_of_the_pooling_are_refused_where_there_are_any(folder):
    model = folder()
    change(model / POOLING, include_prompt=False)
    agrees(model)
    change(model / SETTINGS, prompts={"query": "q: "})
    refused(model, r"1_Pooling/config\.json: include_prompt=false leaves the prompts")


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("mine.modules.Pooling", r"type='mine\.modules\.Pooling' is a class of its own, whose code is never run here"),
        ("custom.Pooling", r"type='custom\.Pooling' is a class of its own"),
        ("sentence_transformers.models.CNN", r"module CNN is not supported; Transformer, Pooling, Dense, Layer"),
        ("sentence_transformers.models.Router", r"module Router sends queries and documents through modules of their"),
        ("sentence_transformers.models.Asym", r"module Asym sends queries and documents through modules of their"),
        ("sentence_transformers.models.StaticEmbedding", r"module StaticEmbedding has no decoder"),
        ("sentence_transformers.models.Transformer", r"lists Transformer twice"),
        (3, r"must state a type and a path"),
    ],
)  # fmt: skip
def test_modules_that_are_not_ours_to_run_are_refused(kind, match, folder):
    model = folder()
    modules = json.loads((model / "modules.json").read_text())
    modules[1]["type"] = kind
    (model / "modules.json").write_text(json.dumps(modules))
    refused(model, r"modules\.json: .*" + match)


HEADS = {
    "tanh": [lambda: Dense(32, 16)],
    "residual": [lambda: Dense(32, 32, use_residual=True, activation_function=nn.GELU())],
    "narrowed": [lambda: Dense(32, 8, bias=False, use_residual=True, activation_function=nn.Identity())],
    "norm": [lambda: LayerNorm(32), Normalize],
    "many": [Normalize, lambda: Dense(32, 24), lambda: LayerNorm(24), lambda: Dense(24, 16, bias=False), Normalize],
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_what_changes_embeddings_is_applied_as_theirs(head, pickled, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    modules = [make() for make in HEADS[head]]
    for module in modules:
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    transformer = Transformer(str(tiny_base("bert")), max_seq_length=48)
    model = SentenceTransformer(modules=[transformer, Pooling(32), *modules], device="cpu")
    model.save_pretrained(str(tmp_path / "model"))
    if pickled:  # as published before safetensors
        for file in (tmp_path / "model").rglob("model.safetensors"):
            torch.save(load_file(file), file.with_name("pytorch_model.bin"))
            file.unlink()
        expected = model.encode_query(QUERIES)
        encoder = Encoder.from_pretrained(tmp_path / "model")
        difference = np.abs(encoder.encode_queries(QUERIES) - expected).max()
        assert difference <= 1e-6 * max(1, np.abs(expected).max())
    else:
        encoder = agrees(tmp_path / "model")
    assert encoder.embedding_size == model.get_embedding_dimension()
    assert encoder.hashes()["head"] != ""
    with pytest.raises(InputError, match=r"modules behind its pooling, which no export holds"):
        export(encoder, tmp_path / "export", card="")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"activation_function": "mine.Swish"}, r"activation_function='mine\.Swish' is none of torch\.nn's"),
        ({"in_features": 31}, r"in_features=31, and what comes in has 32 numbers"),
        ({"out_features": 15}, r"linear\.bias is \(16,\) where config\.json makes it \(15,\)"),
        ({"bias": False}, r"linear\.bias has no place there"),
        ({"use_residual": True}, r"residual\.weight is missing"),
        ({"module_input_name": "token_embeddings"}, r"module_input_name='token_embeddings' is not the"),
        ({"mine": 1}, r"key 'mine' is not known here"),
    ],
)
def test_a_dense_layer_that_cannot_be_applied_is_refused_by_its_key(values, match, tiny_base, tmp_path):
    modules = [Transformer(str(tiny_base("bert"))), Pooling(32), Dense(32, 16)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path))
    change(tmp_path / "2_Dense" / "config.json", **values)
    refused(tmp_path, r"2_Dense.*" + match)


# published SGPT models: sentence-transformers 2, pickled, and their roles in the name alone


@pytest.fixture
def published(tiny_base, tmp_path, monkeypatch) -> Callable[..., Path]:
    """published(name, limit, tokens): as on the hub, a tiny GPT-Neo with rows for tokens that were added."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, limit: int, tokens: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / name
        tokenizer = AutoTokenizer.from_pretrained(tiny_base("gpt_neo"))
        tokenizer.add_tokens([*tokens], special_tokens=True)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        trunk = random_trunk("gpt_neo", len(tokenizer), max_position_embeddings=512)
        trunk.config.save_pretrained(folder)
        torch.save(trunk.state_dict(), folder / "pytorch_model.bin")
        (folder / "1_Pooling").mkdir()
        flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
        pooling = {f"pooling_mode_{flag}": flag == "weightedmean_tokens" for flag in flags}
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        for file, content in {
            POOLING: {"word_embedding_dimension": 32, **pooling}, "modules.json": modules,
            TRANSFORMER: {"max_seq_length": limit, "do_lower_case": False},
            SETTINGS: {"__version__": {"sentence_transformers": "2.1.0"}},
        }.items():  # fmt: skip
            (folder / file).write_text(json.dumps(content))
        return folder

    return make


def by_hand(folder: Path, rows: list[list[int]]) -> np.ndarray:
    """Means of the last hidden states, weighted by 1 to n, in float64."""
    trunk = random_trunk("gpt_neo", len(AutoTokenizer.from_pretrained(folder)), max_position_embeddings=512)
    means = []
    for row in rows:
        with torch.no_grad():
            hidden = trunk(input_ids=torch.tensor([row])).last_hidden_state[0].double().numpy()
        weights = np.arange(1, len(row) + 1)
        means.append(weights @ hidden / weights.sum())
    return np.array(means)


LONG = "how to sort every path of the folder " * 60


@pytest.mark.parametrize(
    ("name", "tokens", "said"),
    [
        ("SGPT-125M-weightedmean-msmarco-specb-bitfit", (), "by the name SGPT-125M-weightedmean-msmarco-specb-bitfit"),
        ("models--M--SGPT-125M-specb-bitfit/snapshots/0a1b", (), "by the name models--M--SGPT-125M-specb-bitfit"),
        ("renamed", ("[SOS]", "{SOS}"), r"by the tokens [SOS] and {SOS} of its vocabulary"),
    ],
)  # fmt: skip
def test_an_asymmetric_sgpt_model_as_published_gets_its_roles(name, tokens, said, published, caplog):
    """297 tokens of a text and two markers, as the original cuts to 300."""
    folder = published(name, 300, tokens)
    encoder = Encoder.from_pretrained(folder)
    assert f"{said}" in caplog.text
    assert "queries are put in [ ] and documents in { }" in caplog.text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for role, (opening, closing) in {"query": "[]", "document": "{}"}.items():
        rows = []
        for text in ("what?", "a date", LONG):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:297]
            rows.append([tokenizer.convert_tokens_to_ids(opening), *ids, tokenizer.convert_tokens_to_ids(closing)])
        assert len(rows[-1]) == 299
        means = by_hand(folder, rows)
        assert np.abs(encoder.encode(["what?", "a date", LONG], role) - means).max() < 1e-5
    unmarked = MarkersConfig("none", 300, 300)
    assert Encoder.from_pretrained(folder, markers=unmarked).token_ids(["what?"], "query") == [
        tokenizer("what?", add_special_tokens=False)["input_ids"]
    ]


def test_a_symmetric_sgpt_model_as_published_has_no_roles_and_75_tokens(published, caplog):
    folder = published("SGPT-125M-weightedmean-nli-bitfit", 75)
    encoder = Encoder.from_pretrained(folder)
    assert "asymmetric" not in caplog.text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["what?", LONG]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:75] for text in texts]
    assert len(rows[1]) == 75
    for role in ("query", "document"):
        assert np.abs(encoder.encode(texts, role) - by_hand(folder, rows)).max() < 1e-5


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda modules: modules[:1], r"lists no Pooling module, so it makes no embedding of a text"),
        (lambda modules: modules[1:], r"lists no Transformer module"),
        (lambda modules: [modules[0], modules[2], modules[1]], r"has the order Transformer, Normalize, Pooling"),
        (lambda modules: [], r"lists no Transformer module"),
        (lambda modules: {"modules": modules}, r"holds dict where a list belongs"),
        (lambda modules: ["Transformer"], r"must state a type and a path"),
        (
            lambda modules: [{**modules[0], "path": "../elsewhere"}, *modules[1:]],
            r"path='\.\./elsewhere' leaves the folder",
        ),
        (lambda modules: [modules[0], {**modules[1], "path": "/etc"}], r"path='/etc' leaves the folder"),
        (
            lambda modules: [modules[0], {**modules[1], "kwargs": ["task"]}],
            r"kwargs=\['task'\] of module Pooling is not applied",
        ),
    ],
)  # fmt: skip
def test_a_list_of_modules_that_cannot_be_right_is_refused(edit, match, folder):
    model = folder()
    (model / "modules.json").write_text(json.dumps(edit(json.loads((model / "modules.json").read_text()))))
    refused(model, r"modules\.json: .*" + match)


@pytest.mark.parametrize(
    "name", ["modules.json", POOLING, TRANSFORMER, SETTINGS, "tokenizer_config.json", "config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("text", ["", '{"a": ', "3", "\x00\x01"])
def test_broken_json_is_one_sentence_with_the_file(name, text, folder):
    model = folder()
    (model / name).write_text(text)
    refused(model, name.replace(".", r"\."))


def test_a_missing_pooling_config_is_one_sentence(folder):
    model = folder()
    (model / POOLING).unlink()
    refused(model, r"1_Pooling/config\.json: no such file")


# --- whatever else is changed ---

FILES = ["modules.json", POOLING, TRANSFORMER, SETTINGS, "tokenizer_config.json", "config.json"]


def is_theirs_or_refused(folder: Path, draw: st.DataObject, count: dict[str, int]) -> None:
    """Where both open a damaged folder, they give the same vectors."""
    copy = folder.parent / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    what = damaged(copy, draw, FILES)
    try:
        ours = Encoder.from_pretrained(copy)
        made = ours.encode_queries(QUERIES), ours.encode_documents(DOCUMENTS)
    except InputError as error:
        assert len(str(error)) < 700, what  # noqa: PT017
        count["refused"] = count.get("refused", 0) + 1
        return
    try:
        theirs = SentenceTransformer(str(copy), device="cpu")
        expected = theirs.encode_query(QUERIES), theirs.encode_document(DOCUMENTS)
    except Exception:  # theirs fails in many ways
        count["opened by us alone"] = count.get("opened by us alone", 0) + 1
        return
    count["equal"] = count.get("equal", 0) + 1
    for one, other in zip(made, expected, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max(), what


def fuzz(folder: Path, examples: int, count: dict[str, int], **options) -> None:
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    @given(st.data())
    def check(draw):
        is_theirs_or_refused(folder, draw, count)

    check()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_changed_folder_gives_their_vectors_or_is_refused(family, folder):
    count: dict[str, int] = {}
    fuzz(folder(family), 15, count, derandomize=True)
    assert {"refused", "equal"} <= count.keys()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_many_changed_folders_give_their_vectors_or_are_refused(family, folder):
    count: dict[str, int] = {}
    fuzz(folder(family), 1000, count)
    print(family, count)


# --- as a base to train ---


def test_what_training_leaves_out_of_them_is_said(tiny_base, tmp_path, caplog):
    transformer = Transformer(str(tiny_base("bert")), max_seq_length=48)
    modules = [transformer, Pooling(32, pooling_mode="mean"), Dense(32, 16)]
    prompts = {"query": "q: ", "document": "d: "}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(tmp_path / "model"))
    announce_base(str(tmp_path / "model"), Contract("weighted_mean"))
    assert caplog.messages[-1] == (
        f"{tmp_path / 'model'}: its decoder alone is trained and exported, without Dense, the prompt 'q: ', "
        "the prompt 'd: ', pooling mean (this run's is weighted_mean)"
    )


def test_another_contract_than_that_of_an_export_is_said(tiny_encoder, tmp_path, caplog):
    encoder = tiny_encoder("gpt_neo")
    export(encoder, tmp_path / "export", card="")
    caplog.clear()
    announce_base(str(tmp_path / "export"), encoder.contract)
    assert not caplog.messages
    changed = replace(encoder.contract.markers, name="none")
    announce_base(str(tmp_path / "export"), replace(encoder.contract, pooling="max", markers=changed))
    assert "(markers.name: brackets -> none; pooling: weighted_mean -> max)" in caplog.text
