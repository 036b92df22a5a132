"""What a run changed, in kilobytes: the base is named, not copied.

    adapter/  adapter_model.safetensors   the change, in PEFT's own form where it has one
              adapter_config.json         only then: AutoPeftModelForFeatureExtraction opens the folder
              trained.safetensors         the trained tensors themselves: base + change is not them bit for bit
              sgpt_delta.json             which form, and by what the right base is known
              sgpt.json                   the contract

Form "beft": biases of nn.Linear are a BEFT adapter (an added bias; PEFT 0.20 or newer), normalisations are `modules_to_save`.
Where the base is stored in a half type and was trained in float32, give PEFT dtype=torch.float32 as well.
Form "plain": PEFT has no form for the tensors (the Conv1D of GPT-2, for one), so the change is stored by parameter name.
Low-rank adapters are saved and opened by PEFT alone.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgpt import contract as contracts
from sgpt.contract import Contract
from sgpt.errors import InputError
from sgpt.files import replace_folder
from sgpt.model import ModelConfig, load_trunk

if TYPE_CHECKING:
    from sgpt.encoder import Encoder

DELTA, TRAINED, CHANGE, PEFT = "sgpt_delta.json", "trained.safetensors", "adapter_model.safetensors", "adapter_config.json"
FORMAT = 1
SAMPLE = 256  # numbers a tensor that go into the base's hash


def save_adapter(encoder: "Encoder", base: Mapping[str, Tensor], folder: Path) -> Path:
    """Writes `folder` and returns it. base: values before training of all trained tensors, by parameter name of `encoder.trunk`.

    Replaces an adapter of ours; raises InputError for any other folder that is not empty, or when the contract names no base.
    """
    folder, trunk = Path(folder), encoder.trunk
    if not encoder.contract.base:
        raise InputError("the contract names no base model, without which an adapter is of no use; set contract.base")
    if folder.exists() and not is_adapter(folder) and any(folder.iterdir()):
        raise InputError(f"{folder} exists and is no adapter of this framework; choose another folder or remove it")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if _by_peft(trunk):
        trunk.save_pretrained(temporary)
        stated = json.loads((temporary / PEFT).read_text()) | {"base_model_name_or_path": encoder.contract.base}
        (temporary / PEFT).write_text(json.dumps(stated, indent=2) + "\n")
    else:
        _write_delta(trunk, base, temporary, encoder.contract.base)
    replace(encoder.contract, probes={}).save(temporary)  # probes belong to merged weights
    replace_folder(temporary, folder)
    return folder


def is_adapter(folder: Path) -> bool:
    return (folder / contracts.FILE).is_file() and ((folder / DELTA).is_file() or (folder / PEFT).is_file())


def load_adapter(trunk: nn.Module, folder: Path) -> None:
    """Sets the trained tensors in `trunk`, which must hold the values of the base, in place and bit for bit.

    Raises InputError when it is another base: other parameter names, shapes or values. (Low rank: use `open_trunk`.)
    """
    _refuse_other_base(trunk, folder)
    _set(trunk, folder)


class Delta:
    """The trained tensors of an adapter beside the frozen trunk that others use, too: inside of `with delta:` the trunk has them.

    Nothing is copied on entering: each parameter is given other storage, and its own again on leaving. Raises InputError for
    another base, and for low-rank adapters, which change the modules themselves.
    """

    def __init__(self, trunk: nn.Module, folder: Path) -> None:
        if not (folder / DELTA).is_file():
            raise InputError(f"{folder} holds no {DELTA}: it is no bias delta, so it cannot share a trunk; open it by itself, or train with tuning=bitfit")
        _refuse_other_base(trunk, folder)
        parameters = dict(trunk.named_parameters())
        self.inside = False
        self.pairs = [(parameters[name], value.to(parameters[name].device)) for name, value in load_file(folder / TRAINED).items()]

    def __enter__(self) -> None:
        assert not self.inside, "entered twice, the trunk would be the base again"
        self._exchange()

    def __exit__(self, *failure) -> None:
        self._exchange()

    def _exchange(self) -> None:
        exchanged = []
        for parameter, value in self.pairs:
            exchanged.append((parameter, parameter.data))
            parameter.data = value
        self.pairs, self.inside = exchanged, not self.inside


def open_trunk(folder: Path, dtype: str) -> nn.Module:
    """The base that the contract names, with the adapter in it: changed in place, or wrapped by PEFT for low rank."""
    base = Contract.load(folder).base
    if not (folder / DELTA).is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(load_trunk(ModelConfig(base, dtype)), folder).eval()
    trunk = load_trunk(ModelConfig(base, _read(folder)["dtype"]))  # the dtype it was trained over
    _refuse_other_base(trunk, folder)
    trunk = trunk.to(getattr(torch, dtype))
    _set(trunk, folder)  # after the conversion: float32 biases over a bfloat16 base keep their digits
    return trunk


def base_hash(values: Mapping[str, Tensor], dtype: str) -> str:
    """Of names, shapes and some numbers of every tensor, read in `dtype`: a float32 copy of bfloat16 weights is the same base."""
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name].detach().flatten()
        sample = value[:: max(1, len(value) // SAMPLE)].to(getattr(torch, dtype)).float().cpu()
        digest.update(f"{name} {tuple(values[name].shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _write_delta(trunk: nn.Module, base: Mapping[str, Tensor], folder: Path, base_path: str) -> None:
    parameters = dict(trunk.named_parameters())
    assert base.keys() <= parameters.keys(), sorted(base.keys() - parameters.keys())
    trained = {name: parameters[name].detach().cpu().clone() for name in base}
    change = {name: (value.double() - base[name].detach().cpu().double()).float() for name, value in trained.items()}
    peft_form = _beft_form(trunk, trained, change)
    dtype = str(trunk.dtype).removeprefix("torch.")
    if peft_form is None:
        save_file(change, folder / CHANGE)
        note = f"PEFT has no form for every tensor here; {CHANGE} is the change by parameter name, for load_adapter"
    else:
        tensors, targets, saved = peft_form
        save_file(tensors, folder / CHANGE, metadata={"format": "pt"})
        _write_beft_config(folder, targets, saved, base_path)
        note = f"{CHANGE} is a BEFT adapter of PEFT with modules_to_save; {TRAINED} restores the trained tensors bit for bit"
    save_file(trained, folder / TRAINED)
    (folder / DELTA).write_text(json.dumps({
        "format": FORMAT, "form": "plain" if peft_form is None else "beft", "base": base_path, "dtype": dtype,
        "base_hash": base_hash({**parameters, **base}, dtype), "note": note,
    }, indent=2) + "\n")  # fmt: skip


def _beft_form(trunk: nn.Module, trained: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]] | None:
    """PEFT's tensors, its target modules and its modules to save; None where a tensor is neither bias of a Linear nor of a norm."""
    modules, tensors, targets, saved = dict(trunk.named_modules()), {}, [], []
    for name in trained:
        place, _, leaf = name.rpartition(".")
        module = modules[place]
        if isinstance(module, nn.Linear) and leaf == "bias":
            tensors[f"base_model.model.{place}.beft_bias"] = change[name].unsqueeze(0)
            targets.append(place)
        elif "norm" in type(module).__name__.lower():
            for part, value in module.named_parameters():
                tensors[f"base_model.model.{place}.{part}"] = value.detach().cpu().clone()
            saved += [place] if place not in saved else []
        else:
            return None
    return (tensors, targets, saved) if targets else None  # PEFT refuses an adapter without target modules


def _write_beft_config(folder: Path, targets: list[str], saved: list[str], base_path: str) -> None:
    from peft import BeftConfig

    BeftConfig(
        base_model_name_or_path=base_path, task_type="FEATURE_EXTRACTION", inference_mode=True,
        target_modules=targets, modules_to_save=saved or None,
    ).save_pretrained(folder)  # fmt: skip


def _by_peft(trunk: nn.Module) -> bool:
    return hasattr(trunk, "peft_config")


def _read(folder: Path) -> dict:
    file = folder / DELTA
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give an adapter folder of this framework") from error
    if stated["format"] != FORMAT:
        raise InputError(f"{file}: made by another version of this framework; save the adapter again")
    return stated


def _refuse_other_base(trunk: nn.Module, folder: Path) -> None:
    stated, parameters = _read(folder), dict(trunk.named_parameters())
    if base_hash(parameters, stated["dtype"]) != stated["base_hash"]:
        raise InputError(
            f"{folder}: made from {stated['base']} in {stated['dtype']}, and this {type(trunk).__name__} in {trunk.dtype} is another: "
            f"{_first_difference(parameters, load_file(folder / TRAINED))}; load that base, untuned"
        )


def _first_difference(parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> str:
    for name, value in trained.items():
        if name not in parameters:
            return f"it has no {name}"
        if parameters[name].shape != value.shape:
            return f"its {name} is {tuple(parameters[name].shape)} and not {tuple(value.shape)}"
    return "names, shapes or values of its weights differ"


@torch.no_grad()
def _set(trunk: nn.Module, folder: Path) -> None:
    parameters = dict(trunk.named_parameters())
    for name, value in load_file(folder / TRAINED).items():
        parameters[name].copy_(value)
