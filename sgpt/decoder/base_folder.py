"""Where a base lies: a folder of this machine, a GGUF file, which is converted into one, or the model hub."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from sgpt.decoder.gguf import converted
from sgpt.decoder.model_files import ADAPTER, CONFIG, INDEX, WEIGHTS, first_line
from sgpt.decoder.pickled import PICKLED, PICKLED_INDEX
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import may_be_hub_id
from sgpt.text.markers import ROLES

FETCHED = [  # from the hub
    CONFIG, WEIGHTS, INDEX, "model-*.safetensors", ADAPTER, "token*", "vocab*", "merges.txt", "bpe.codes", "*.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "sgpt.json", "modules.json",
    "config_sentence_transformers.json", "sentence_*_config.json", "*Pooling/config.json",
    *(f"*_{module}/{file}" for module in ("Dense", "LayerNorm") for file in (CONFIG, WEIGHTS, PICKLED)),
    "adapter_model.safetensors", "trained.safetensors", "sgpt_delta.json", "merge.json",  # sgpt/encoder/adapter.py
    *(f"{role}/token*" for role in ROLES), "README.md",
]  # fmt: skip
FETCHED_OF_OLD = [PICKLED, PICKLED_INDEX, "pytorch_model-*.bin"]  # where there are no safetensors
CONVERTED = "data/cache/gguf"  # a folder for each GGUF file that was opened
WRITTEN_BY = {"data/raw/smollm2_135m": "make smollm2"}  # folders that a command of this project writes


def resolve(path: str) -> Path:
    """A local path as it is, or below this project when it is not in the working directory.

    Need not exist: a hub id.
    """
    below_project = Path(__file__).parents[2] / path
    return below_project if not Path(path).exists() and below_project.exists() else Path(path)


def is_of_hub(path: str) -> bool:
    """Whether others find it by this name: an id of the model hub, and no folder here."""
    return "/" in path and may_be_hub_id(path) and not resolve(path).exists()


def is_gguf(path: str | Path) -> bool:
    """Whether the name is that of a GGUF file."""
    return Path(path).suffix.lower() == ".gguf"


def local_folder(path: str) -> Path:
    """The folder itself, what a GGUF file was converted into, or where the hub's files were put.

    InputError where there is none of them.
    """
    base = resolve(path)
    if base.is_dir():
        _refuse_gguf_inside(base)
        return base
    if is_gguf(base):
        return converted(base, resolve(CONVERTED))
    if base.exists():
        raise InputError(
            f"{path}: is a file; give a .gguf file, or the folder that holds {CONFIG}, {WEIGHTS} and tokenizer files"
        )
    if not may_be_hub_id(path):
        raise InputError(f"{path}: no such folder; {how_to_have(path)}")
    try:
        folder = Path(snapshot_download(path, allow_patterns=FETCHED))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(path, allow_patterns=FETCHED_OF_OLD)
        return folder
    except Exception as error:  # of httpx, of the hub, of the system
        raise InputError(
            f"{path}: no such local folder, and it could not be had from the model hub ({first_line(error)}). "
            "Without a network, download it elsewhere and give the local folder"
        ) from error


def revision_of(path: str) -> str:
    """The commit of a base of the model hub, by the folder that the hub's files are in; "" for any other base."""
    folder = local_folder(path)
    return folder.name if folder.parent.name == "snapshots" else ""


def how_to_have(path: str) -> str:
    """What to do about a folder that is not there, as the end of a sentence."""
    command = writer_of(path)
    return f"`{command}` writes it" if command else "check the path"


def writer_of(path: str) -> str | None:
    """The command of this project that writes the folder, there or not."""
    project, place = Path(__file__).parents[2], Path(os.path.abspath(path))
    written = (folder for folder in WRITTEN_BY if place in (Path(folder).absolute(), project / folder))
    return WRITTEN_BY.get(next(written, ""))


def path_for_others(path: str) -> str:
    """By what stock transformers and PEFT open the base that `path` names here.

    A GGUF file by its converted folder, and what lies below this project by its whole path; the rest as it is.
    """
    if is_gguf(path):
        return str(local_folder(path))
    return path if Path(path).exists() else str(resolve(path))


def _refuse_gguf_inside(folder: Path) -> None:
    """A folder with no model but a GGUF file, as hubs have them."""
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: holds no {CONFIG}, but {files[0].name}; give that file: {files[0]}")
