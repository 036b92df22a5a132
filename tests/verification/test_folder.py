"""Folders by every loader: a table, exit code 1 where one is off, one sentence where nothing can be opened."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgpt.encoder.adapter import save_adapter
from sgpt.encoder.contract import Contract
from sgpt.encoder.export import export
from sgpt.encoder.probes import measure
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune
from sgpt.verification.folder import verify_folder
from sgpt.verification.table import loaders_table

LOADERS = ["sgpt, since it was saved", "sgpt", "sentence-transformers", "transformers"]


@pytest.fixture(scope="module")
def run(tiny_encoder, tmp_path_factory) -> Path:
    """A run's folder, as far as its models go: an export and the adapter, of a family that PEFT has a form for."""
    folder, encoder = tmp_path_factory.mktemp("run"), tiny_encoder("gpt_neo")
    encoder.trunk = tune(encoder.trunk, TuningConfig("bitfit")).eval()
    before = {name: value.detach().clone() for name, value in trainable_parameters(encoder.trunk).items()}
    with torch.no_grad():
        for value in trainable_parameters(encoder.trunk).values():
            value.add_(torch.randn_like(value) * 0.05)
    measured = measure(encoder)
    save_adapter(encoder.trunk, encoder.tokenizer, encoder.contract, before, folder / "adapter", measured=measured)
    export(encoder, folder / "export", card="")
    return folder


def test_every_loader_gives_the_model_of_a_run_from_its_export_and_its_adapter(run):
    found = list(verify_folder(str(run)))
    assert all(deviation.error is None for _, deviation in found)
    names = {folder.name: [] for folder, _ in found}
    for folder, deviation in found:
        if deviation.role in ("query", "both"):
            names[folder.name].append(re.sub(r" \d[\d.]*$", "", deviation.loader))
    assert names == {"export": LOADERS, "adapter": ["sgpt, since it was saved", "sgpt", "peft"]}
    assert all(deviation.difference <= deviation.bound for _, deviation in found)
    assert loaders_table(found, "").row_count == len(found) == 12


def test_an_adapter_alone_is_verified_and_a_foreign_folder_by_the_loaders_that_it_needs(run, tiny_base):
    assert {folder.name for folder, _ in verify_folder(str(run / "adapter"))} == {"adapter"}
    found = list(verify_folder(str(tiny_base("gpt_neo"))))  # a bare base, which has no contract
    assert {deviation.loader for _, deviation in found} == {"sgpt"}


def test_a_loader_that_is_off_is_shown_and_the_others_go_on(run, tmp_path):
    folder = shutil.copytree(run / "export", tmp_path / "export")
    pooling = folder / "1_Pooling" / "config.json"
    modes = {"pooling_mode_weightedmean_tokens": False, "pooling_mode_mean_tokens": True}
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | modes))
    (folder / "chat_template.jinja").write_text("{{ no template")
    errors = {deviation.loader.split()[0]: deviation.error for _, deviation in verify_folder(str(folder))}
    assert errors["sgpt"] is None
    assert "sentence-transformers" in errors["sentence-transformers"]
    assert errors["transformers"].startswith("transformers cannot open")


def test_an_adapter_that_cannot_be_opened_leaves_the_export_its_rows(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "adapter" / "sgpt.json").write_text("{}")
    found = list(verify_folder(str(folder)))
    assert {deviation.error for part, deviation in found if part.name == "export"} == {None}
    errors = [deviation.error for part, deviation in found if part.name == "adapter"]
    assert "sgpt.json: not a contract" in errors[0]


def test_weights_that_changed_under_a_contract_are_off_from_its_probes(run, tmp_path, start):
    folder = shutil.copytree(run / "export", tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    tensors["h.0.mlp.c_fc.weight"] = tensors["h.0.mlp.c_fc.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    contract = Contract.load(run / "export")
    contract.save(folder, contract.files)  # with the right hashes: the embeddings alone tell
    ended = start("verify", f"model={folder}")
    assert ended.code == 1
    assert re.search(r"sgpt, since it was saved .* both .* WRONG", ended.said)
    assert re.search(r"embeddings are off by \d\.\de[-+]\d\d of the largest entry", ended.said)


def test_the_script_shows_its_table_and_ends_with_0_1_or_2(run, start):
    ended = start("verify", f"model={run}")
    assert ended.code == 0, ended.said
    assert len(re.findall(r" ok ", ended.said)) == 12
    assert ended.out.rstrip().endswith("every loader gives the trained model")
    assert start("verify").sentence == (
        "set model=<folder of a run, export or adapter>, for example model=runs/pydocs"
    )
    assert "no such folder" in start("verify", "model=/nowhere/at/all").sentence
    nobody = start("verify", f"model={run}", "endpoint=http://127.0.0.1:9", "timeout_seconds=2").sentence
    assert nobody.startswith("http://127.0.0.1:9/v1/embeddings: no server answers")
