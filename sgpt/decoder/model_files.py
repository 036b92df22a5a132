"""A model's folder as it lies on disk: its JSON and its weights, looked at before transformers reads them.

transformers asks at a terminal for leave to run foreign code, gives random values to weights that it does not find, and
meets a damaged file with whatever exception comes. What is known to end so is refused here by file, key and value.
"""

import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING

from sgpt.decoder.pickled import PICKLED, PICKLED_INDEX, unpickled
from sgpt.runtime.errors import InputError

log = logging.getLogger(__name__)
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, ADAPTER = "tokenizer.json", "tokenizer_config.json", "adapter_config.json"
OTHER_FORMS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")  # of weights: opening a pickle runs its code
LFS_POINTER = b"version https://git-lfs"
# of modules that were wrapped one by one
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
AROUND = ("module.", "base_model.model.", "0.auto_model.", "auto_model.")  # DDP, PEFT, sentence-transformers
# tried where names do not fit: some families have them by themselves
OUTER = ("model.", "transformer.", "encoder.", "backbone.", "trunk.")


def unloadable(path: str | Path, reason: str) -> InputError:
    return InputError(
        f"{path}: the folder cannot be loaded ({reason}); it needs {CONFIG}, {WEIGHTS} and tokenizer files"
    )


def first_line(error: BaseException) -> str:
    """Its first line of text, after the error's type where that says more than the text."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = lines[0].strip()[:200] if lines else ""
    if isinstance(error, (OSError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


def read_json(file: Path, kind: type = dict):
    """What the file holds. InputError when it is missing, is no JSON, or holds something else than `kind`."""
    try:
        data = file.read_bytes()
        if data.startswith(LFS_POINTER):
            raise InputError(
                f"{file}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`, or download it again"
            )
        content = json.loads(data.decode("utf-8"))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; the model's folder is not whole, fetch it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({first_line(error)}); fetch it again") from None
    if not isinstance(content, kind):
        raise InputError(
            f"{file}: holds {type(content).__name__} where {'an object' if kind is dict else 'a list'} belongs; "
            "fetch it again"
        )
    return content


def check_config(folder: Path, path: str) -> None:
    """Refuses a folder whose config.json asks for foreign code, quantised weights or other files."""
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        remedy = "merge it into its base, and save that as one folder"
        if (folder / "sgpt.json").is_file():  # one of ours, over a family of which no class holds what was trained
            remedy = f"give {base}, or the export of a run with tuning.add_biases=attention, which is a whole model"
        raise InputError(f"{folder / ADAPTER}: a PEFT adapter of {base!r} and no whole model; {remedy}")
    if not (folder / CONFIG).is_file():
        raise unloadable(path, f"there is no {CONFIG}")
    stated = read_json(folder / CONFIG)
    family = stated.get("model_type")
    refuse_foreign_code(folder / CONFIG, stated, known=isinstance(family, str) and family in CONFIG_MAPPING)
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise InputError(
            f"{folder / CONFIG}: model_type={family!r} is no family of transformers {transformers.__version__}; "
            "give a model of one that it has, or install a version that has this one"
        )
    if quantised := stated.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(
            f"{folder / CONFIG}: quantization_config ({method}) says quantised weights, which are not read here; "
            "give the model unquantised"
        )
    if (elsewhere := stated.get("transformers_weights")) not in (None, WEIGHTS):
        raise InputError(
            f"{folder / CONFIG}: transformers_weights={elsewhere!r} names another file; call the weights {WEIGHTS} "
            "and remove the key"
        )


def refuse_foreign_code(file: Path, stated: Mapping, *, known: bool) -> None:
    """By `auto_map`, unless transformers has these very classes itself."""
    auto_map = stated.get("auto_map")
    if not auto_map:
        return
    named: list[object] = []  # "module.Class", of which a value may list a slow and a fast one
    for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        named += value if isinstance(value, (list, tuple)) else [value]
    named = [one for one in named if one is not None]
    foreign = [one for one in named if not isinstance(one, str) or not hasattr(transformers, one.rsplit(".", 1)[-1])]
    if foreign or not known:
        raise InputError(
            f"{file}: auto_map={foreign[0] if foreign else named[0]!r} asks for Python code from the model's folder, "
            "which is never run here; give a model whose class is in transformers"
        )


def stored_tensors(folder: Path, path: str) -> dict[str, Path]:
    """Name of each stored tensor -> its file, a safetensors file also where the folder has pickled ones.

    InputError when weights are missing, cut, damaged or in another form.
    """
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.is_file():
        return dict.fromkeys(_names(whole), whole)
    if not index.is_file() and (pickles := _pickles(folder)):
        file = unpickled(pickles, folder.resolve().name)
        return dict.fromkeys(_names(file), file)
    if not index.is_file():
        pickled = [file.name for file in sorted(folder.glob("*")) if file.suffix in OTHER_FORMS]
        if pickled:
            raise unloadable(
                path,
                f"only safetensors are read, and its weights are {pickled[0]}: save the model again as safetensors",
            )
        raise unloadable(path, f"there is no {WEIGHTS}")
    shards = _weight_map(index)
    held: dict[str, Path] = {}
    for shard in sorted(set(shards.values())):
        held |= dict.fromkeys(_names(folder / shard), folder / shard)
    if absent := sorted(shards.keys() - held.keys()):
        raise InputError(f"{index}: {_some(absent)} should be in {shards[absent[0]]} and is not; fetch the files again")
    return held


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of the file next to the index that holds it."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise InputError(f"{index}: weight_map must give a file to every tensor; fetch it again")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or shard in (".", ".."):
            raise InputError(f"{index}: weight_map names {shard!r}, which is no file of this folder")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index}: its file {shard} is missing; fetch it again")
    return shards


def _pickles(folder: Path) -> list[Path]:
    """The files of weights in PyTorch's pickle; none where the folder has no such weights."""
    if (folder / PICKLED_INDEX).is_file():
        return [folder / shard for shard in sorted({*_weight_map(folder / PICKLED_INDEX).values()})]
    return [folder / PICKLED] if (folder / PICKLED).is_file() else []


def stored_dtype(stored: Mapping[str, Path]) -> str:
    """bfloat16 or float16 where all tensors are stored in it, otherwise float32."""
    kinds = set()
    for file in set(stored.values()):
        with safe_open(file, "pt") as opened:
            kinds |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118, it is no mapping
    halves = {"BF16": "bfloat16", "F16": "float16"}
    return halves.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _names(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    if not start:
        raise InputError(f"{file}: is empty; fetch it again")
    if start == LFS_POINTER:
        raise InputError(
            f"{file}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`, or download the file again"
        )
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except Exception as error:
        raise InputError(f"{file}: is cut or damaged ({first_line(error)}); fetch it again") from error


def read_tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def without_wrappers(names: Collection[str], also: tuple[str, ...] = ()) -> dict[str, str]:
    """Stored name -> the model's own, where all names stand in what wrapped the model when it was saved.

    also: more prefixes to take off.
    """
    own = {name: name for name in names}
    for part in INSIDE:
        own = {name: value.replace(part, "") for name, value in own.items()}
    while prefix := _shared(own.values(), AROUND + also):
        own = {name: value.removeprefix(prefix) for name, value in own.items()}
    return own if len(set(own.values())) == len(own) else {name: name for name in names}


def _shared(names: Collection[str], prefixes: tuple[str, ...]) -> str | None:
    return next((prefix for prefix in prefixes if names and all(name.startswith(prefix) for name in names)), None)


def _some(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


# Of old checkpoints: masks, numbers of positions and frequencies, which every class makes itself.
CONSTANTS = re.compile(r"(position_ids|inv_freq|masked_bias|\battn\.bias|\battention\.bias|attn\.attention\.bias)$")
UNUSED = re.compile(r"(^|\.)pooler\.")  # nothing here reads what it computes


def check_names(path: str, model: torch.nn.Module, report: Mapping) -> None:
    """Refuses weights that are missing, of another shape, or left over within the trunk: then it is another model."""
    missing = sorted(name for name in report["missing_keys"] if not UNUSED.search(name))
    if missing:
        raise InputError(
            f"{path}: {_some(missing)} is missing, so it is no whole {type(model).__name__}, and would be filled "
            "with random numbers; give the model's whole folder, or the base it was made from"
        )
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"], key=str)[0]
        raise InputError(
            f"{path}: {name} is stored as {tuple(stored)} where {CONFIG} makes it {tuple(wanted)}; "
            "the weights and config.json are of different models, fetch both again"
        )
    if failures := [*report.get("error_msgs", ()), *(report.get("conversion_errors") or {}).values()]:
        raise unloadable(path, first_line(ValueError(str(failures[0]))))
    # tensors that no part of the trunk could be meant for are another head's, and have no effect
    base = model.base_model
    parts = {name for name, _ in base.named_children()} | {name for name, _ in base.named_parameters(recurse=False)}
    prefix = f"{model.base_model_prefix}."
    left = []
    for name in sorted(report["unexpected_keys"]):
        part = name.removeprefix(prefix).split(".")[0]
        if part in parts and not CONSTANTS.search(name):
            left.append(name)
    if left:
        raise InputError(
            f"{path}: the weights hold {_some(left)}, for which {CONFIG} leaves no place in {type(base).__name__}; "
            "the weights and config.json are of different models, fetch both again"
        )


def check_numbers(path: str, model: torch.nn.Module, stored: Mapping[str, Path]) -> None:
    """Refuses NaN and infinite weights by name. One sum of each tensor: it is finite only if all numbers are."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or value.sum().isfinite() or value.isfinite().all():
            continue
        # finite as it is stored, it overflowed when it was read in the dtype
        dtype = str(value.dtype).removeprefix("torch.")
        for key, file in stored.items():
            if not (key.endswith(name) or name.endswith(key)):  # a head's prefix may be in either name
                continue
            original = read_tensor(file, key)
            if original.shape == value.shape and original.isfinite().all():
                raise InputError(
                    f"{path}: {name} holds {original.abs().max():.6g}, and {dtype} ends at "
                    f"{torch.finfo(value.dtype).max:.6g}; set dtype to float32 or bfloat16"
                )
        number = "NaN" if value.isnan().any() else "an infinite number"
        raise InputError(
            f"{path}: {name} holds {number}, so every embedding would; the weights are damaged, fetch or train them "
            "again"
        )
