"""Runs that an older version started, and bases that are no longer those of a run."""

import json
import shutil

import pytest
import torch
import yaml

from sgpt.cli.compose import plain
from sgpt.decoder.base_folder import WRITTEN_BY
from sgpt.decoder.trunk import ModelConfig, load_tokenizer, load_trunk
from sgpt.encoder.contract import Contract
from sgpt.encoder.encoder import Encoder
from sgpt.runtime.errors import InputError
from sgpt.text.markers import MarkersConfig
from sgpt.training.checkpoint import TrainState, save
from sgpt.training.config import TrainConfig
from sgpt.training.optim import OptimConfig, build_optimizer, build_schedule
from sgpt.training.record import base_inputs, relative_change, reopen
from sgpt.training.run_folder import RunFolder, open_run, read_config, stated_pack
from sgpt.training.trainer import TrainerConfig
from sgpt.training.tuning import TuningConfig, trainable_parameters, tune


def older_run(folder, method: str) -> None:
    """As before biases could be added, and blocks chosen."""
    config = plain(TrainConfig(tuning=TuningConfig(method)))
    del config["tuning"]["add_biases"], config["tuning"]["layers"], config["model"]["hub"]
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("method", ["bitfit", "lora", "full"])
def test_a_run_of_before_there_were_added_biases_resumes(method, tmp_path):
    older_run(tmp_path / "run", method)
    open_run(tmp_path / "run", plain(TrainConfig(tuning=TuningConfig(method))), resume=True)


def test_a_run_of_before_is_resumed_in_its_packs(tmp_path):
    config = plain(TrainConfig())
    config["trainer"]["tokens_per_pack"] = 4096  # which was the default
    del config["trainer"]["deterministic"]
    assert stated_pack(tmp_path / "run") is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert stated_pack(tmp_path / "run") == 4096
    open_run(tmp_path / "run", plain(TrainConfig(trainer=TrainerConfig(tokens_per_pack=4096))), resume=True)


def test_one_that_trained_gains_alone_resumes_without_added_biases(tmp_path):
    older_run(tmp_path / "run", "bitfit_norm")
    with pytest.raises(InputError, match=r"tuning\.add_biases: none -> all\. Resume it with that one"):
        open_run(tmp_path / "run", plain(TrainConfig(tuning=TuningConfig("bitfit_norm"))), resume=True)
    same = TrainConfig(tuning=TuningConfig("bitfit_norm", add_biases="none"))
    open_run(tmp_path / "run", plain(same), resume=True)
    assert read_config(tmp_path / "run")["tuning"] == plain(same)["tuning"]


def test_a_run_is_not_exported_over_the_folder_that_has_come_since_it_was_started_from_the_hub(
    tiny_base, tmp_path, monkeypatch
):
    """Where the hub's name stands for a folder here, the later one holds the same weights under another name."""
    hub, here = tmp_path / "hub", tmp_path / "here"
    monkeypatch.setitem(WRITTEN_BY, str(here), "make it")
    shutil.copytree(tiny_base("gpt_neo"), hub)
    model = ModelConfig(str(here), hub=str(hub))
    config = TrainConfig(model=model, markers=MarkersConfig("brackets", 24, 40))
    encoder = Encoder(load_trunk(model), load_tokenizer(str(hub)), Contract(markers=config.markers, base=str(hub)))
    run = RunFolder(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / "manifest.json").write_text(json.dumps({"inputs": base_inputs(encoder)}))
    learned = trainable_parameters(tune(encoder.trunk, config.tuning))
    optimizer = build_optimizer(learned, OptimConfig())
    save(run.checkpoints, learned, optimizer, build_schedule(optimizer, OptimConfig(), 2), TrainState(step=1), keep=1)
    assert reopen(run, config)[0].contract.base == str(hub)
    shutil.copytree(hub, here)
    with pytest.raises(InputError, match=f"was started with the base model {hub}, and model.path={here} is now {here}"):
        reopen(run, config)


def test_what_was_zero_has_no_relative_change():
    before = {"own": torch.tensor([3.0, 4.0]), "added": torch.zeros(2)}
    after = {"own": torch.tensor([3.0, 5.0]), "added": torch.ones(2)}
    assert relative_change(before, after) == {"own": pytest.approx(0.2), "added": None}
