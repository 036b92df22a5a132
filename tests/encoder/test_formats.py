"""Exports in every format, read by their own libraries and compared with means worked out by hand from the base."""

import contextlib
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, PreTrainedTokenizerFast

from sgpt.decoder.base_folder import local_folder
from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import IMPOSSIBLE, ExportConfig, export, folder_of
from sgpt.encoder.hub import files_to_push, listing, of_repository, push
from sgpt.encoder.onnx import is_here
from sgpt.encoder.pooling import POOLINGS
from sgpt.encoder.probes import measure
from sgpt.encoder.snippets import outputs, snippet
from sgpt.runtime.errors import InputError
from sgpt.text.markers import ROLES
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from tests.conftest import FAMILIES, LIMITS
from tests.encoder.test_export import TEXTS, ids_by_hand, weighted_mean_by_hand

needs_onnx = pytest.mark.skipif(
    not (is_here("onnx") and is_here("onnxruntime")), reason="onnx and onnxruntime are not installed"
)  # fmt: skip
needs_openvino = pytest.mark.skipif(not is_here("openvino"), reason="openvino is not installed")
QUICK = ["gpt2", "gpt_neo", "bloom", "opt", "gemma3_text", "bert"]  # one of each kind of positions and attention
OTHERS = [family for family in FAMILIES if family not in QUICK]
PEFT_WARNS = "ignore:Detected that the base layer has no bias term"


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def by_role(folder: Path, role: str, texts: list[str]) -> dict[str, np.ndarray]:
    """As the card says: the tokenizer of the role, called plainly."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, subfolder=role)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    return {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}


def onnx_runtime(folder: Path, role: str, texts: list[str]) -> np.ndarray:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(folder / "onnx" / "model.onnx", options)
    return session.run(["sentence_embedding"], by_role(folder, role, texts))[0]


@needs_onnx
@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_onnx_runtime_gives_weighted_means_worked_out_by_hand(family, tiny_encoder, tmp_path):
    encoder = tiny_encoder(family)
    export(encoder, tmp_path / "onnx", card="", form="onnx")
    for role in ROLES:
        rows = [ids_by_hand(encoder.contract.base, text, role, LIMITS[f"{role}_max_tokens"]) for text in TEXTS]
        given = by_role(tmp_path / "onnx", role, TEXTS)
        for row, ids, mask in zip(rows, given["input_ids"], given["attention_mask"], strict=True):
            assert ids[mask == 1].tolist() == row
        means = weighted_mean_by_hand(encoder.contract.base, rows)
        assert np.abs(onnx_runtime(tmp_path / "onnx", role, TEXTS) - means).max() < 4e-6


@needs_onnx
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_and_unit_length_are_in_the_graph(pooling, tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt2", "none", pooling=pooling, normalize=True)
    export(encoder, tmp_path / "onnx", card="", form="onnx")
    texts = [text for text in TEXTS if text]
    assert np.abs(onnx_runtime(tmp_path / "onnx", "query", texts) - encoder.encode_queries(texts)).max() < 2e-6
    with_nothing = onnx_runtime(tmp_path / "onnx", "query", ["", "a"])  # which alone has no token, and pads here
    assert not with_nothing[0].any()
    assert np.allclose(np.linalg.norm(with_nothing[1]), 1, atol=1e-6)


@needs_onnx
def test_a_graph_holds_biases_that_no_class_of_transformers_does(tiny_base, tiny_encoder, tmp_path):
    encoder = tiny_encoder("qwen3")
    encoder.trunk = tune(encoder.trunk, TuningConfig())
    with torch.no_grad():
        for parameter in trainable_parameters(encoder.trunk).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    with pytest.raises(InputError, match=r"formats=\[transformers\]: no class .* holds .* use formats=\[peft\]"):
        export(encoder, tmp_path / "plain", card="", form="transformers")
    export(encoder, tmp_path / "onnx", card="", form="onnx")
    assert np.abs(onnx_runtime(tmp_path / "onnx", "query", TEXTS) - encoder.encode_queries(TEXTS)).max() < 4e-6


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@needs_onnx
@pytest.mark.parametrize(("family", "layers"), [("llama", 14), ("gpt2", 8), ("bloom", 8), ("bert", 12)])
def test_int8_computes_every_linear_layer_in_integers(family, layers, tiny_encoder, tmp_path):
    """GPT-2's layers are stored the other way round, and are Gemm in the graph."""
    import onnx

    encoder = tiny_encoder(family)
    verified = export(encoder, tmp_path / "int8", card="", form="onnx-int8")
    graph = onnx.load(tmp_path / "int8" / "onnx" / "model.onnx").graph
    operations = [node.op_type for node in graph.node]
    assert operations.count("MatMulInteger") == layers
    assert "Gemm" not in operations
    int8 = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert len(int8) == layers
    exact, given = encoder.encode_queries(TEXTS), onnx_runtime(tmp_path / "int8", "query", TEXTS)
    assert cosines(exact, given).min() > 0.995
    assert np.abs(exact - given).max() > 1e-4  # it is int8
    assert 0.98 <= verified["min_cosine"] <= 1


@needs_onnx
def test_int8_survives_channels_that_are_far_larger_than_the_others(tiny_encoder, tmp_path):
    """As real decoders have them. ONNX Runtime's own way, next to it, loses all the other channels."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    encoder = tiny_encoder("llama")
    with torch.no_grad():
        for layer in encoder.trunk.layers:
            layer.input_layernorm.weight[3] *= 1000
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight[:, 3] /= 1000
    export(encoder, tmp_path / "onnx", card="", form="onnx")
    export(encoder, tmp_path / "int8", card="", form="onnx-int8")
    export(encoder, tmp_path / "theirs", card="", form="onnx")
    exact = encoder.encode_queries(TEXTS)
    quantize_dynamic(
        tmp_path / "onnx" / "onnx" / "model.onnx", tmp_path / "theirs" / "onnx" / "model.onnx",
        weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip
    assert cosines(exact, onnx_runtime(tmp_path / "theirs", "query", TEXTS)).min() < 0.95
    assert cosines(exact, onnx_runtime(tmp_path / "int8", "query", TEXTS)).min() > 0.99


@needs_onnx
def test_int8_does_not_depend_on_the_batch(tiny_encoder, tmp_path):
    export(tiny_encoder("gpt_neo"), tmp_path / "int8", card="", form="onnx-int8")
    alone = np.concatenate([onnx_runtime(tmp_path / "int8", "query", [text]) for text in TEXTS])
    together = onnx_runtime(tmp_path / "int8", "query", TEXTS)
    # another order of summation in the attention may turn a rounding
    assert cosines(alone, together).min() > 0.9999


@needs_onnx
@needs_openvino
def test_openvino_gives_the_encoders_embeddings(tiny_encoder, tmp_path):
    import openvino

    encoder = tiny_encoder("gpt_neo", normalize=True)
    export(encoder, tmp_path / "openvino", card="", form="openvino")
    file = tmp_path / "openvino" / "openvino" / "openvino_model.xml"
    model = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for role in ROLES:
        given = model(by_role(tmp_path / "openvino", role, TEXTS))["sentence_embedding"]
        assert np.abs(given - encoder.encode(TEXTS, role)).max() < 2e-6


@needs_onnx
def test_a_family_that_cannot_be_traced_is_refused_and_nothing_is_left(tiny_encoder, tmp_path, monkeypatch):
    """By the exporter itself, which has no form for complex numbers, as some families compute rotary positions by."""
    encoder = tiny_encoder("gpt2")

    def complex_pooling(hidden, mask):
        return torch.view_as_real(torch.view_as_complex(hidden.unflatten(-1, (-1, 2)))).flatten(-2).sum(1)

    monkeypatch.setitem(POOLINGS, "weighted_mean", complex_pooling)
    with pytest.raises(InputError, match=r"formats=\[onnx\]: GPT2Model \(gpt2\) cannot be traced .*; use formats="):
        export(encoder, tmp_path / "out" / "onnx", card="", form="onnx")
    assert not list((tmp_path / "out").iterdir())


@needs_onnx
def test_our_reader_says_what_a_graph_is(tiny_encoder, tmp_path):
    export(tiny_encoder("gpt2"), tmp_path / "onnx", card="", form="onnx")
    with pytest.raises(InputError, match=r"onnx: holds a graph for ONNX Runtime .* give the run, its export or"):
        Encoder.from_pretrained(tmp_path / "onnx")


@needs_onnx
def test_a_graph_is_laid_out_for_servers(tiny_encoder, tmp_path):
    """text-embeddings-inference reads these files; its Rust code needs the three keys of config.json."""
    encoder = tiny_encoder("gpt_neo")
    export(encoder, tmp_path / "onnx", card="", form="onnx")
    assert files_to_push(tmp_path / "onnx").keys() == {
        "README.md", "config.json", "sgpt.json", "onnx/model.onnx", "tokenizer.json", "tokenizer_config.json",
        *(f"{role}/{name}" for role in ROLES for name in ("tokenizer.json", "tokenizer_config.json")),
    }  # fmt: skip
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (32, 2)
    assert config["pad_token_id"] == encoder.tokenizer.pad_token_id
    root = PreTrainedTokenizerFast.from_pretrained(tmp_path / "onnx")
    assert root(TEXTS, truncation=True)["input_ids"] == encoder.token_ids(TEXTS, "document")
    alike = tiny_encoder("gpt_neo", "none", query_max_tokens=40)
    export(alike, tmp_path / "onnx", card="", form="onnx")  # over the other, of which nothing is left behind
    assert (tmp_path / "onnx" / "modules.json").is_file()  # both roles are read alike, so one tokenizer does for both


@pytest.mark.parametrize(
    ("family", "pooling"), [("opt", "weighted_mean"), ("bert", "cls"), ("qwen2", "weighted_mean"), ("gpt_neo", "max")]
)
def test_plain_transformers_with_the_tokenizer_of_each_role(family, pooling, tiny_encoder, tmp_path):
    encoder = tiny_encoder(family, pooling=pooling)
    folder = tmp_path / "transformers"
    export(encoder, folder, card="", form="transformers")
    model = AutoModel.from_pretrained(folder).eval()
    for role in ROLES:
        batch = {name: torch.from_numpy(values) for name, values in by_role(folder, role, TEXTS).items()}
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        embeddings = POOLINGS[pooling](hidden, batch["attention_mask"]).numpy()
        assert np.abs(embeddings - encoder.encode(TEXTS, role)).max() < 4e-6
    assert Encoder.from_pretrained(folder).contract.fingerprint() == encoder.contract.fingerprint()


@pytest.mark.filterwarnings(PEFT_WARNS)
@pytest.mark.parametrize("method", ["bitfit", "lora"])
def test_the_adapter_opens_with_peft_and_sentence_transformers(method, tiny_encoder, hub, tmp_path):
    from peft import AutoPeftModelForFeatureExtraction
    from sentence_transformers import SentenceTransformer

    encoder = tiny_encoder("gpt_neo")
    encoder.trunk = tune(encoder.trunk, TuningConfig(method))
    learning = trainable_parameters(encoder.trunk)
    before = {name: parameter.detach().clone() for name, parameter in learning.items()}
    with torch.no_grad():
        for parameter in learning.values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    with pytest.raises(InputError, match=r"formats=\[peft\]: the adapter of this .* is in no form of PEFT"):
        export(encoder, tmp_path / "peft", card="", form="peft")
    adapter = save_adapter(
        encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter", measured=measure(encoder)
    )
    folder = tmp_path / "peft"
    export(encoder, folder, card="", form="peft", adapter=adapter)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 50_000
    model = AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    expected = encoder.encode_queries(TEXTS)
    batch = {name: torch.from_numpy(values) for name, values in by_role(folder, "query", TEXTS).items()}
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    assert np.abs(POOLINGS["weighted_mean"](hidden, batch["attention_mask"]).numpy() - expected).max() < 4e-6
    theirs = SentenceTransformer(str(folder), device="cpu").encode_query(TEXTS)
    assert np.abs(theirs - expected).max() < 4e-6
    assert np.abs(Encoder.from_pretrained(hub("me/tuned", folder)).encode_queries(TEXTS) - expected).max() < 4e-6


# --- refusing ---


def test_formats_that_cannot_say_what_is_computed_are_refused_with_the_nearest_way(tiny_encoder, tmp_path):
    for form in IMPOSSIBLE:
        with pytest.raises(InputError, match=rf"formats=\[{form}\]: .* no position-weighted mean .* formats=\[onnx\]"):
            export(tiny_encoder("gpt2"), tmp_path / "export", card="", form=form)
    with pytest.raises(InputError, match=r"formats='gguff' is unknown; choose sentence-transformers, transformers"):
        ExportConfig(formats=["onnx", "gguff"])
    for formats in ([], ["onnx", "onnx"]):
        with pytest.raises(InputError, match=r"must name one or more different ones"):
            ExportConfig(formats=formats)


@needs_onnx
def test_a_format_whose_library_is_missing_names_the_extra(tiny_encoder, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(InputError, match=r"package onnxruntime, which is not installed: pip install -e '\.\[onnx\]'"):
        export(tiny_encoder("gpt2"), tmp_path / "out" / "onnx", card="", form="onnx")
    assert not list((tmp_path / "out").iterdir())


def test_a_graph_beyond_what_one_file_holds_is_refused(tiny_encoder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("sgpt.encoder.onnx.LARGEST_FILE", 1000)
    with pytest.raises(InputError, match=r"an ONNX file holds 2 GB at most; use formats="):
        export(tiny_encoder("gpt2"), tmp_path / "onnx", card="", form="onnx")


def test_only_an_export_is_replaced_and_an_adapter_is_none(tiny_encoder, tmp_path):
    encoder = tiny_encoder("gpt_neo")
    encoder.trunk = tune(encoder.trunk, TuningConfig())
    before = {name: value.detach().clone() for name, value in trainable_parameters(encoder.trunk).items()}
    adapter = save_adapter(
        encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter", measured=measure(encoder)
    )
    with pytest.raises(InputError, match=r"adapter exists and is no export of this framework"):
        export(encoder, adapter, card="", form="transformers")
    for form in ("sentence-transformers", "transformers"):  # one over the other, of which nothing is left
        export(encoder, tmp_path / "export", card="", form=form)
        assert (tmp_path / "export" / "modules.json").is_file() == (form == "sentence-transformers")


@needs_onnx
def test_files_get_ordinary_permissions(umask, tiny_encoder, tmp_path):
    for form in ("transformers", "onnx-int8"):
        folder = folder_of(form, tmp_path / "export")
        export(tiny_encoder("gpt2"), folder, card="", form=form)
        assert {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()} == {0o640}


# --- the card's lines ---


@pytest.mark.parametrize(
    "form",
    [
        "sentence-transformers", "transformers", pytest.param("onnx", marks=needs_onnx),
        pytest.param("onnx-int8", marks=needs_onnx), pytest.param("openvino", marks=[needs_onnx, needs_openvino]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("pooling", "normalize"), [("weighted_mean", False), ("last_token", True)])
def test_the_lines_of_a_card_print_what_it_says(form, pooling, normalize, tiny_encoder, hub, tmp_path):
    encoder = tiny_encoder("gpt_neo", pooling=pooling, normalize=normalize)
    folder = folder_of(form, tmp_path / "export")

    def card(verified: dict, embed) -> str:
        return f"```python\n{snippet(form, encoder.contract, str(folder))}```\n```\n{outputs(embed)}\n```\n"

    export(encoder, folder, card=card, form=form)
    runs_as_it_says((folder / "README.md").read_text())
    of_hub = local_folder(hub("me/model", folder))
    assert Contract.load(of_hub).files  # all that it names was fetched
    assert form == "sentence-transformers" or all((of_hub / role / "tokenizer.json").is_file() for role in ROLES)


def runs_as_it_says(card: str) -> None:
    [lines] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    [said] = re.findall(r"```\n(\[.*?)\n```", card, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(lines, {})
    said_rows, rows = ([json.loads(line) for line in text.strip().splitlines()] for text in (said, printed.getvalue()))
    assert [len(row) for row in rows] == [4, 2]
    for row, said_row in zip(rows, said_rows, strict=True):
        assert np.abs(np.array(row) - said_row).max() <= 1.01e-3  # the last digit


# --- the hub ---


def test_what_would_be_pushed_is_the_folder_with_its_path_replaced(tiny_encoder, tmp_path, monkeypatch):
    encoder = tiny_encoder("gpt_neo")
    folder = tmp_path / "export"
    export(encoder, folder, card=f'model = SentenceTransformer("{folder}")\n')
    files = files_to_push(folder)
    assert files["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert "1_Pooling/config.json" in files
    assert of_repository(folder, "me/model") == 'model = SentenceTransformer("me/model")\n'
    assert listing("me/model", {"a": 5, "b": 2000}).splitlines()[0] == "me/model: 2 files, 2,005 bytes"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match=r"push_to_hub=me/model: there is no token of the hub; log in with"):
        push(folder, "me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(InputError, match=r"push_to_hub=me/model: the hub could not be reached") as refusal:
        push(folder, "me/model")
    assert "hf_nobodys" not in str(refusal.value)
    with pytest.raises(InputError, match=r"push_to_hub='../x' is no hub id"):
        ExportConfig(push_to_hub="../x")
    with pytest.raises(InputError, match=r"dry_run=false has no effect without push_to_hub="):
        ExportConfig(dry_run=False)


@pytest.mark.parametrize("private", [True, False])
def test_a_push_deletes_and_names_what_an_earlier_export_left_and_refuses_what_is_none(
    tmp_path, monkeypatch, caplog, private
):
    """The hub itself is stood in for: it is a network."""
    caplog.set_level("INFO")
    (tmp_path / "sgpt.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    there, commits = {".gitattributes"}, []

    class Hub:
        def create_repo(self, repository: str, **options) -> str:
            return f"https://hub/{repository}"

        def model_info(self, repository: str) -> SimpleNamespace:
            return SimpleNamespace(private=private)

        def list_repo_files(self, repository: str) -> list[str]:
            return sorted(there)

        def create_commit(self, repository: str, operations: list, **options) -> None:
            commits.append([f"{type(one).__name__} {one.path_in_repo}" for one in operations])

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys")
    added = ["CommitOperationAdd README.md", "CommitOperationAdd sgpt.json"]
    assert push(tmp_path, "me/model") == "https://hub/me/model"
    readers = "its owners alone" if private else "everybody, as it is public"
    assert caplog.messages == [f"me/model can be read by {readers}"]
    there |= {"pytorch_model.bin", "README.md"}
    with pytest.raises(InputError, match=r"^push_to_hub=me/model: the repository holds README\.md and no sgpt\.json"):
        push(tmp_path, "me/model")
    there |= {"sgpt.json"}
    push(tmp_path, "me/model")
    assert caplog.messages[-1] == "me/model: these of an earlier export are deleted: pytorch_model.bin"
    assert commits == [added, ["CommitOperationDelete pytorch_model.bin", *added]]


def test_a_folder_without_a_name_is_refused():
    for output in (".", ".."):
        with pytest.raises(InputError, match=r"output=\.+ has no name, to which a format could be added"):
            folder_of("onnx", Path(output))
