"""Folders of sentence-transformers that are none of ours: its own vectors, or one sentence with file and key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
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
        ("sentence_transformers.models.LayerNorm", r"module LayerNorm is not supported"),
        ("sentence_transformers.models.Router", r"module Router is not supported"),
        ("sentence_transformers.models.StaticEmbedding", r"module StaticEmbedding is not supported"),
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


def test_a_dense_layer_is_refused(saved, tiny_base, tmp_path):
    transformer = Transformer(str(tiny_base("bert")))
    SentenceTransformer(modules=[transformer, Pooling(32), Dense(32, 16)], device="cpu").save(str(tmp_path))
    refused(tmp_path, r"modules\.json: module Dense is not supported")


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
