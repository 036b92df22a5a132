"""What a run changed, in kilobytes: the base is named, not copied.

    adapter/  adapter_model.safetensors   the change, in PEFT's own form where it has one
              adapter_config.json         only then: AutoPeftModelForFeatureExtraction opens the folder
              trained.safetensors         the trained tensors themselves: base + change is not them bit for bit
              sgpt_delta.json             which form, and by what the right base and tokenizer are known
              sgpt.json                   the contract, with the hashes of the others

Form "beft": biases of nn.Linear are a BEFT adapter (an added bias, whether the base has one or not; PEFT 0.20 or
newer), normalisations are `modules_to_save`. Where the base is stored in a half type and was trained in float32, give
PEFT dtype=torch.float32 as well. Form "plain": PEFT has no form for the tensors (the Conv1D of GPT-2, for one), so the
change is stored by parameter name. Form "peft": low-rank adapters are saved and opened by PEFT alone.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgpt.decoder.added_biases import add_named_biases, added_biases
from sgpt.decoder.base_folder import local_folder, path_for_others
from sgpt.decoder.families import is_norm
from sgpt.decoder.quantised import QUANTISED, WeightSample, quantised_dtype, quantised_layers, unquantised_weights
from sgpt.decoder.trunk import DTYPES, FLOATS, ModelConfig, load_trunk
from sgpt.encoder import contract as contracts
from sgpt.encoder.contract import Contract
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import replace_folder
from sgpt.runtime.values import check_choice

DELTA, TRAINED = "sgpt_delta.json", "trained.safetensors"
CHANGE, PEFT = "adapter_model.safetensors", "adapter_config.json"
FORMAT = 2  # 1, which has no tokenizer_hash and leaves low-rank adapters out, is still read
FORMS = ("plain", "beft", "peft")


def save_adapter(
    trunk: nn.Module, tokenizer, contract: Contract, base: Mapping[str, Tensor], folder: Path, *,
    measured: Mapping[str, dict] | None = None, more: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Writes `folder` and returns it. base: values before training of all trained tensors, by parameter name of
    `trunk`.

    measured: what `measure` of sgpt/encoder/probes.py gives for these weights; without, the embeddings are not checked
    when it is opened. more: texts of further files, by name. Replaces an adapter of ours; raises InputError for any
    other folder that is not empty, or when the contract names no base.
    """
    folder = Path(folder)
    if not contract.base:
        raise InputError("the contract names no base model, without which an adapter has no effect; set contract.base")
    if folder.exists() and not is_adapter(folder) and any(folder.iterdir()):
        raise InputError(f"{folder} exists and is no adapter of this framework; choose another folder or remove it")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    base_for_peft = path_for_others(contract.base)
    if _by_peft(trunk):
        trunk.save_pretrained(temporary)
        _rewrite_peft_config(temporary, base_for_peft)
        form, note = "peft", f"{CHANGE} is a low-rank adapter of PEFT"
    else:
        form, note = _write_delta(trunk, base, temporary, base_for_peft)
    untuned = _of_the_base(trunk) if form == "peft" else {**_of_the_base(trunk), **base}
    untuned = {name: value for name, value in untuned.items() if name not in added_biases(trunk)}
    # as it was opened: what learns is float32 since, and a quantised trunk has the base that it was made of
    dtype = str(trunk.config.dtype).removeprefix("torch.")
    delta = {
        "format": FORMAT,
        "form": form,
        "base": contract.base,
        "dtype": dtype,
        "quantised": quantised_dtype(trunk),
        "base_hash": base_hash(untuned, dtype),
        "tokenizer_hash": _rules_hash(tokenizer),
        "added": added_biases(trunk),
        "layers": getattr(trunk, "first_layers", None),
        "note": note,
    }
    (temporary / DELTA).write_text(json.dumps(delta, indent=2) + "\n")
    for name, text in (more or {}).items():
        (temporary / name).write_text(text)
    files = [file.name for file in temporary.iterdir() if file.name != "README.md"]  # PEFT writes one
    measured = measured or {"probes": {}, "rounding": {}}  # the contract's own may be of other weights
    contract.of_model(tokenizer, **measured).save(temporary, files)
    replace_folder(temporary, folder)
    return folder


def is_adapter(folder: Path) -> bool:
    return (folder / contracts.FILE).is_file() and ((folder / DELTA).is_file() or (folder / PEFT).is_file())


def base_of(folder: Path) -> str:
    """The path or hub id of the adapter's base; InputError, which names both, where it is not there or no base."""
    base = Contract.load(folder).base
    try:
        local_folder(base)
    except InputError as error:
        raise InputError(f"{folder}: is an adapter, and its base cannot be opened: {error}") from error
    return base


def load_adapter(trunk: nn.Module, folder: Path) -> None:
    """Sets the trained tensors in `trunk`, which must hold the values of the base, in place and bit for bit.

    Raises InputError when it is another base: other parameter names, shapes or values. (Low rank: use `open_trunk`.)
    """
    refuse_other_base(trunk, folder)
    _set(trunk, folder)


def open_trunk(folder: Path, dtype: str) -> nn.Module:
    """The base that the contract names, with the adapter in it: changed in place, or wrapped by PEFT for low rank."""
    known = (folder / DELTA).is_file()
    trunk = load_trunk(base_config(folder, dtype))
    refuse_other_base(trunk, folder)
    convert(trunk, dtype)
    if known and read_delta(folder)["form"] != "peft":
        _set(trunk, folder)  # after the conversion: float32 biases over a bfloat16 base keep their digits
        return trunk
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(trunk, folder).eval()
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: PEFT cannot open the adapter ({reason:.160}); save it again") from error


def is_its_base(trunk: nn.Module, folder: Path) -> bool:
    """Whether the trunk is the one that the adapter was trained over, not tuned: biases added to it are zeros."""
    stated, weights = read_delta(folder), unquantised_weights(trunk)
    if any(weights[name].any() for name in added_biases(trunk)):
        return False
    return base_hash(_of_the_base(trunk), stated["dtype"]) == stated["base_hash"]


def refuse_other_base(trunk: nn.Module, folder: Path) -> None:
    """InputError when the trunk is not the one that the adapter was trained over, or was tuned.

    An adapter without DELTA, of PEFT alone, does not say what it was trained over, and is not checked.
    """
    if not (folder / DELTA).is_file():
        return
    stated, parameters = read_delta(folder), dict(trunk.named_parameters())
    if is_its_base(trunk, folder):
        _refuse_trained_weights(trunk, folder, stated)
        return
    trained = {} if stated["form"] == "peft" else load_file(folder / TRAINED)
    of_base = {name: value for name, value in trained.items() if name not in stated["added"]}
    first = f"the first {stated['layers']} blocks of " if stated["layers"] else ""
    raise InputError(
        f"{folder}: made from {first}{stated['base']} in {stated['dtype']}, and this {type(trunk).__name__} in "
        f"{trunk.dtype} is another: {_first_difference(parameters, of_base)}; load that base, untuned"
    )


def _refuse_trained_weights(trunk: nn.Module, folder: Path, stated: Mapping) -> None:
    """InputError where the weights that quantised layers hold are what was trained."""
    layers = quantised_layers(trunk)
    if not layers or stated["form"] == "peft":
        return
    trained = trained_shapes(folder)
    changed = next((name for path in layers if (name := f"{path}.weight") in trained), None)
    if changed is not None:
        raise InputError(
            f"{folder}: changes {changed}, which a trunk in {quantised_dtype(trunk)} holds quantised; open it in "
            f"{stated['dtype']}, or export it and open the export in {quantised_dtype(trunk)}"
        )


def base_config(folder: Path, dtype: str) -> ModelConfig:
    """How the base of an adapter is opened, before it is converted to `dtype`: its path, blocks and own dtype.

    That is the one that the base had in training: opened in another, its weights would be others. A trunk is quantised
    from the weights as they are stored, and biases trained over a quantised one are at home over the whole one, too.
    InputError for a dtype that no trunk is opened in.
    """
    check_choice("dtype", dtype, DTYPES)
    base = base_of(folder)
    if not (folder / DELTA).is_file():
        return ModelConfig(base, dtype)
    stated = read_delta(folder)
    return ModelConfig(base, dtype if dtype in QUANTISED else stated["dtype"], layers=stated["layers"])


def convert(model: nn.Module, dtype: str) -> None:
    """To the dtype, in place; a quantised model, which `base_config` has opened so, is left as it is.

    Parameters only: rotary frequencies, which are buffers, stay float32 as after opening in it.
    """
    if dtype in QUANTISED:
        return
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))


def check_tokenizer(tokenizer, folder: Path) -> None:
    """InputError when the base's tokenizer is no longer the one that the adapter was trained with."""
    stated = read_delta(folder) if (folder / DELTA).is_file() else {}
    if stated.get("tokenizer_hash", "") not in ("", _rules_hash(tokenizer)):
        raise InputError(
            f"{folder}: trained with another tokenizer than {stated['base']} has now, so its texts would get other "
            "ids; restore that"
        )


def _rules_hash(tokenizer) -> str:
    """Of how a text becomes ids: of the whole tokenizer.json as it is in use, padding and truncation aside.

    Empty without one. `provenance.tokenizer_hash`, by which runs and indexes are known, holds padding, truncation and
    the special tokens too; adapters are opened elsewhere, where those may be set otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    stated = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:32]


def base_hash(values: Mapping[str, Tensor | WeightSample], dtype: str) -> str:
    """Of names, shapes and some numbers of every tensor, read in `dtype`.

    So a float32 copy of bfloat16 weights is the same base, which `provenance.weights_hash`, of every bit, would deny;
    so is a quantised trunk, which has kept these numbers of its weights. A few hundred of a tensor tell two models from
    each other in a fraction of a second.
    """
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        sample = value if isinstance(value, WeightSample) else WeightSample.of(value)
        numbers = sample.numbers.to(getattr(torch, dtype)).float().cpu()
        digest.update(f"{name} {sample.shape} ".encode() + numbers.numpy().tobytes())
    return digest.hexdigest()[:32]


def _write_delta(trunk: nn.Module, base: Mapping[str, Tensor], folder: Path, base_path: str) -> tuple[str, str]:
    """Returns the form and a note on it."""
    parameters = dict(trunk.named_parameters())
    assert base.keys() <= parameters.keys(), sorted(base.keys() - parameters.keys())
    trained = {name: parameters[name].detach().cpu().clone() for name in base}
    change: dict[str, Tensor] = {}
    for name, value in trained.items():
        before = base[name].detach().cpu()
        change[name] = (value.double() - before.double()).float()  # in float32 the difference would be rounded twice
    peft_form = None if is_cut(trunk) else _beft_form(trunk, trained, change)  # PEFT opens all blocks of a base
    if peft_form is None:
        save_file(change, folder / CHANGE)
        why = "PEFT would open all blocks of the base" if is_cut(trunk) else "PEFT has no form for this"
        note = f"{why}; {CHANGE} is the change by parameter name, for load_adapter"
    else:
        tensors, targets, saved = peft_form
        save_file(tensors, folder / CHANGE, metadata={"format": "pt"})
        _write_beft_config(folder, targets, saved, base_path)
        note = (
            f"{CHANGE} is a BEFT adapter of PEFT with modules_to_save; {TRAINED} restores the trained tensors bit for "
            "bit"
        )
    save_file(trained, folder / TRAINED)
    return "plain" if peft_form is None else "beft", note


def is_cut(trunk: nn.Module) -> bool:
    """Whether it has the first blocks of its base alone (`model.layers`)."""
    return getattr(trunk, "first_layers", None) is not None


def _of_the_base(trunk: nn.Module) -> dict[str, Tensor | WeightSample]:
    """Weights that the base has, by their names there."""
    if _by_peft(trunk):
        wrapped = unquantised_weights(trunk.get_base_model())
        return {name.replace(".base_layer.", "."): value for name, value in wrapped.items() if ".lora_" not in name}
    added = added_biases(trunk)
    return {name: value for name, value in unquantised_weights(trunk).items() if name not in added}


def _beft_form(
    trunk: nn.Module, trained: Mapping[str, Tensor], change: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str]] | None:
    """PEFT's tensors, its target modules and its modules to save, as paths.

    None where a tensor is neither bias of a Linear nor of a norm.
    """
    modules = dict(trunk.named_modules())
    norms = [path for path, module in modules.items() if is_norm(module)]
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    saved: list[str] = []
    for name in trained:
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        if isinstance(module, nn.Linear) and leaf == "bias":
            tensors[f"base_model.model.{path}.beft_bias"] = change[name].unsqueeze(0)
            targets.append(path)
        elif is_norm(module):
            # PEFT takes every module whose path ends so: the last norm, called norm, brings all of the blocks along
            for taken in (other for other in norms if other.endswith(path)):
                for part, value in modules[taken].named_parameters():
                    tensors[f"base_model.model.{taken}.{part}"] = value.detach().cpu().clone()
            if path not in saved:
                saved.append(path)
        else:
            return None
    return (tensors, targets, saved) if targets else None  # PEFT refuses an adapter without target modules


def _write_beft_config(folder: Path, targets: list[str], saved: list[str], base_path: str) -> None:
    from peft import BeftConfig

    BeftConfig(
        task_type="FEATURE_EXTRACTION", inference_mode=True, target_modules=targets, modules_to_save=saved or None,
    ).save_pretrained(folder)  # fmt: skip
    _rewrite_peft_config(folder, base_path)


def _rewrite_peft_config(folder: Path, base_path: str) -> None:
    """Names the base, and sorts module names: PEFT keeps them in sets, whose order differs from process to process."""
    stated = json.loads((folder / PEFT).read_text(encoding="utf-8")) | {"base_model_name_or_path": base_path}
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(stated.get(key), list):
            stated[key] = sorted(stated[key])
    (folder / PEFT).write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def _by_peft(trunk: nn.Module) -> bool:
    return hasattr(trunk, "peft_config")


def read_delta(folder: Path) -> dict:
    """What DELTA states; InputError when some of it is missing or unknown."""
    file = folder / DELTA
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give an adapter folder of this framework") from error
    if not isinstance(stated, dict) or type(stated.get("format")) is not int or stated["format"] not in (1, FORMAT):
        raise InputError(f"{file}: made by another version of this framework; save the adapter again")
    keys = ["form", "base", "dtype", "base_hash"]
    if stated["format"] > 1:
        keys.append("tokenizer_hash")
    for key in keys:
        if not isinstance(stated.get(key), str):
            raise InputError(f"{file}: key {key!r} is {stated.get(key)!r}, expected a text; save the adapter again")
    added = stated.setdefault("added", [])
    if not isinstance(added, list) or not all(isinstance(name, str) and name.endswith(".bias") for name in added):
        raise InputError(f"{file}: key 'added' is {added!r:.80}, expected names of biases; save the adapter again")
    layers = stated.setdefault("layers", None)
    if layers is not None and (type(layers) is not int or layers < 1):
        raise InputError(f"{file}: key 'layers' is {layers!r}, expected a number of blocks; save the adapter again")
    for key, known in (("form", FORMS), ("dtype", FLOATS)):
        if stated[key] not in known:
            raise InputError(
                f"{file}: {key} {stated[key]!r} is unknown; it is one of {', '.join(known)}. Save the adapter again"
            )
    return stated


def read_trained(folder: Path, trunk: nn.Module) -> dict[str, Tensor]:
    """The trained tensors, each for a parameter of its name and shape in the trunk.

    Biases that training added to the base are added here, as zeros, with which it computes what it did without them.
    """
    file = folder / TRAINED
    try:
        # in memory of their own: mapped, they would be whatever somebody copies over the file
        trained = {name: value.clone() for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error
    add_named_biases(trunk, read_delta(folder)["added"])
    parameters = dict(trunk.named_parameters())
    for name, value in trained.items():
        if name not in parameters or parameters[name].shape != value.shape:
            difference = _first_difference(parameters, {name: value})
            raise InputError(f"{file}: {difference}; give the base that it was trained over")
    return trained


def trained_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of the trained tensors, by the head of their file."""
    file = folder / TRAINED
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(f"{file}: cannot be read ({error}); copy the adapter again, or make it again from its run")


def _first_difference(parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> str:
    for name, value in trained.items():
        if name not in parameters:
            return f"it has no {name}"
        if parameters[name].shape != value.shape:
            return f"its {name} is {tuple(parameters[name].shape)} and not {tuple(value.shape)}"
    return "names, shapes or values of its weights differ"


@torch.no_grad()
def _set(trunk: nn.Module, folder: Path) -> None:
    trained = read_trained(folder, trunk)
    parameters = dict(trunk.named_parameters())
    for name, value in trained.items():
        parameters[name].copy_(value)
