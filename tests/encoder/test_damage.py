"""One byte, key or value of an export or adapter changed: refused in a sentence that names the file, or the same
embeddings.

Expected embeddings are those of the untouched folder, equal to the bit: nothing changed may give others in silence.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.export import export
from sgpt.runtime.errors import InputError
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune

TEXTS = ["sort a path", "naïve 東京 🙂"]
VALUES = [None, True, 3, -1, 2.5, float("nan"), 1e400, "", "a", [], {}, [["a"]], {"a": "b"}]
KINDS = ["export", "bitfit", "lora"]


@pytest.fixture(scope="module")
def folders(tiny_encoder, tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    """kind -> the folder and its embeddings."""
    made = {}
    for kind in KINDS:
        encoder, place = tiny_encoder("gpt_neo"), tmp_path_factory.mktemp(kind)
        encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit" if kind == "export" else kind))
        encoder.eval()
        base = {name: parameter.detach().clone() for name, parameter in trainable_parameters(encoder.trunk).items()}
        with torch.no_grad():
            for parameter in trainable_parameters(encoder.trunk).values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        if kind == "export":
            export(encoder, place / "whole", card="")
        else:
            save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, base, place / "whole")
        made[kind] = place / "whole", Encoder.from_pretrained(place / "whole").encode_queries(TEXTS)
    return made


def same_or_refused(folder: Path, expected: np.ndarray) -> None:
    """Fails when the folder opens with other embeddings, or ends in anything but one sentence."""
    try:
        embeddings = Encoder.from_pretrained(folder).encode_queries(TEXTS)
    except InputError as error:
        sentence = str(error)
    else:
        assert np.array_equal(embeddings, expected)
        return
    assert "\n" not in sentence


def places(value: object, at: tuple = ()) -> list[tuple]:
    """Every key and index of a JSON value, the whole of it aside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [place for key, part in inside for place in [(*at, key), *places(part, (*at, key))]]


def change_json(file: Path, data: st.DataObject) -> str:
    content = json.loads(file.read_text())
    where = places(content)
    assume(where)
    *outer, key = data.draw(st.sampled_from(where))
    part = content
    for step in outer:
        part = part[step]
    how = data.draw(st.sampled_from(["remove", "retype", "add", "move"]))
    if how == "remove":
        del part[key]
    elif how == "retype":
        part[key] = data.draw(st.sampled_from(VALUES))
    elif how == "add" and isinstance(part, dict):
        part["new"] = data.draw(st.sampled_from(VALUES))
    elif type(part[key]) in (int, float):
        part[key] += data.draw(st.sampled_from([1, -1, 0.5, 1e-7]))
    elif isinstance(part[key], str):
        part[key] += "a"
    file.write_text(json.dumps(content))
    return f"{file.name} {how} {outer} {key}"


def change_bytes(file: Path, data: st.DataObject) -> str:
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "empty"]))
    if how == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "insert":
        content[place:place] = b"x"
    else:
        del content[place if how == "cut" else 0 :]
    file.write_bytes(content)
    return f"{file.name} {how} {place}"


def try_one(folders: dict, kind: str, data: st.DataObject, tmp_path: Path) -> None:
    whole, expected = folders[kind]
    names = sorted(file.name for file in whole.iterdir() if file.is_file() and file.name != "README.md")
    changed = tmp_path / "changed"
    shutil.rmtree(changed, ignore_errors=True)
    shutil.copytree(whole, changed)
    file = changed / data.draw(st.sampled_from(names))
    change = change_json if file.suffix == ".json" and data.draw(st.booleans()) else change_bytes
    what = change(file, data)
    try:
        same_or_refused(changed, expected)
    except Exception as error:
        error.add_note(what)
        raise


LIMITS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=25, derandomize=True, **LIMITS)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_a_changed_folder_is_refused_or_the_same(kind, data, folders, tmp_path_factory):
    try_one(folders, kind, data, tmp_path_factory.getbasetemp() / "damage")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, **LIMITS)
@given(data=st.data())
def test_many_changed_folders_are_refused_or_the_same(kind, data, folders, tmp_path_factory):
    try_one(folders, kind, data, tmp_path_factory.getbasetemp() / "damage")


# --- what each is told ---


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pooling": 3}, r"sgpt\.json: pooling is '3', which is not valid"),
        ({"markers": []}, r"sgpt\.json: markers is '\[\]', which is not valid"),
        (
            {
                "markers": {
                    "name": "brackets",
                    "query_max_tokens": "a",
                    "document_max_tokens": 40,
                    "original_limit": False,
                }
            },
            r"markers is .*'a'",
        ),
        ({"normalize": "yes"}, r"normalize is 'yes'"),
        ({"probes": {"texts": ["a"], "query": [["x"]], "document": [["x"]]}}, r"probes is .*which is not valid"),
        ({"probes": {"texts": ["a"], "query": [[float("nan")]], "document": [[0.5]]}}, r"probes is .*nan"),
        ({"rounding": {"bfloat16": "much"}}, r"rounding is .*much"),
        ({"similarity": "dot"}, r"similarity is 'dot', which is not valid"),
        ({"truncation_side": "left"}, r"truncation_side is 'left', which is not valid"),
        ({"roles": {"query": {}}}, r"roles is .*which is not valid"),
        ({"origin": {"revision": 3}}, r"origin is .*which is not valid"),
        ({"files": {"../model.safetensors": "0"}}, r"files is .*which is not valid"),
        ({"format": 4}, r"format 4 is of a newer version of this framework, and formats 1 to 3 are read here; update"),
        ({"format": 0}, r"format 0 is of another version"),
        ({"format": "2"}, r"format '2' is of another version"),
        ({"later": 1}, r"key 'later' is unknown here, as from a newer version"),
        ({"normalize": True}, r"sgpt\.json: the contract was changed since it was saved"),
    ],
)
def test_a_contract_that_states_something_else_is_refused_by_its_key(changes, sentence, folders, tmp_path):
    folder = shutil.copytree(folders["export"][0], tmp_path / "export")
    file = folder / "sgpt.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=sentence):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("key", ["format", "pooling", "probes", "roles", "origin", "counting", "files", "hash"])
def test_a_contract_without_a_key_is_refused_by_it(key, folders, tmp_path):
    folder = shutil.copytree(folders["export"][0], tmp_path / "export")
    stored = json.loads((folder / "sgpt.json").read_text())
    del stored[key]
    (folder / "sgpt.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=rf"sgpt\.json: .*key '{key}'"):
        Encoder.from_pretrained(folder)


def test_a_missing_file_is_named(folders, tmp_path):
    for kind, name in (
        ("export", "model.safetensors"),
        ("bitfit", "trained.safetensors"),
        ("lora", "adapter_model.safetensors"),
        ("export", "tokenizer.json"),
    ):
        folder = shutil.copytree(folders[kind][0], tmp_path / f"{kind}-{name}")
        (folder / name).unlink()
        with pytest.raises(InputError, match=rf"{name}: the file is missing"):
            Encoder.from_pretrained(folder)


def test_a_change_that_disagrees_with_the_trained_tensors_is_noticed(folders, tmp_path):
    """PEFT opens the one and we the other; one smallest bit in one of them gave two models and no word."""
    for name in ("adapter_model.safetensors", "trained.safetensors"):
        folder = shutil.copytree(folders["bitfit"][0], tmp_path / name)
        tensors = load_file(folder / name)
        first = next(iter(tensors))
        tensors[first].view(-1)[0] = torch.nextafter(tensors[first].view(-1)[0], torch.tensor(9.0))
        save_file(tensors, folder / name)
        with pytest.raises(InputError, match=rf"{name}: its hash differs"):
            Encoder.from_pretrained(folder)


def test_an_adapter_over_another_tokenizer_is_refused(tiny_encoder, tmp_path):
    """The weights of the base are the same, and every text would get other ids."""
    encoder = tiny_encoder("gpt_neo")
    base = shutil.copytree(encoder.contract.base, tmp_path / "base")
    encoder.contract.base = str(base)
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit"))
    before = {name: value.detach().clone() for name, value in trainable_parameters(encoder.trunk).items()}
    save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, tmp_path / "adapter")
    Encoder.from_pretrained(tmp_path / "adapter")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"trained with another tokenizer than .*base has now"):
        Encoder.from_pretrained(tmp_path / "adapter")


def test_an_adapter_of_format_1_still_opens_and_its_damage_is_told(folders, tmp_path):
    folder = shutil.copytree(folders["bitfit"][0], tmp_path / "adapter")
    contract, delta = (json.loads((folder / name).read_text()) for name in ("sgpt.json", "sgpt_delta.json"))
    old = {"format": 1, **{key: contract[key] for key in ("pooling", "markers", "normalize", "base", "probes")}}
    (folder / "sgpt.json").write_text(json.dumps(old))
    delta = {key: value for key, value in delta.items() if key != "tokenizer_hash"} | {"format": 1}
    (folder / "sgpt_delta.json").write_text(json.dumps(delta))
    assert np.array_equal(Encoder.from_pretrained(folder).encode_queries(TEXTS), folders["bitfit"][1])
    for key in ("form", "dtype", "base_hash"):
        (folder / "sgpt_delta.json").write_text(
            json.dumps({name: value for name, value in delta.items() if name != key})
        )
        with pytest.raises(InputError, match=rf"sgpt_delta\.json: key '{key}' is None, expected a text"):
            Encoder.from_pretrained(folder)
    (folder / "sgpt_delta.json").write_text(json.dumps(delta))
    whole = (folder / "trained.safetensors").read_bytes()
    (folder / "trained.safetensors").write_bytes(whole[:-7])
    with pytest.raises(InputError, match=r"trained\.safetensors: cannot be read"):
        Encoder.from_pretrained(folder)
    tensors = load_file(folders["bitfit"][0] / "trained.safetensors")
    save_file({**tensors, "ln_f.bias": torch.zeros(3)}, folder / "trained.safetensors")
    with pytest.raises(InputError, match=r"trained\.safetensors: its ln_f\.bias is \(32,\) and not \(3,\)"):
        Encoder.from_pretrained(folder)
    save_file({**tensors, "ln_g.bias": torch.zeros(3)}, folder / "trained.safetensors")
    with pytest.raises(InputError, match=r"trained\.safetensors: it has no ln_g\.bias"):
        Encoder.from_pretrained(folder)
