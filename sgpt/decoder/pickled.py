"""Weights in PyTorch's own files, as models were published before safetensors: read, and kept as safetensors.

A pickle is a program. `torch.load(weights_only=True)` runs none: it takes tensors and plain containers, and refuses
whatever else a file asks for. What it gives is written once as safetensors, and only that is opened afterwards.
"""

import hashlib
import logging
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sgpt.runtime.errors import InputError
from sgpt.runtime.files import check_writable, hash_of, make_once

log = logging.getLogger(__name__)
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
UNPICKLED = Path("data/cache/pickled")  # a folder for each model that was opened


def unpickled(files: list[Path], name: str) -> Path:
    """The safetensors file with the tensors of all files. name: of the model, for the folder below UNPICKLED.

    Its folder's name holds the hashes of the files' contents. It is made where it is not there, by one process while
    others wait for it; a kill leaves none. InputError for a file that holds more than tensors, or cannot be read.
    """
    digest = hashlib.sha256(" ".join(hash_of(file) for file in files).encode()).hexdigest()
    folder = UNPICKLED / f"{name}-{digest[:16]}"
    if not folder.is_dir():
        check_writable(folder, "another working folder")
    make_once(folder, folder.is_dir, lambda: _convert(files, folder))
    return folder / "model.safetensors"


def _convert(files: list[Path], folder: Path) -> None:
    log.warning(
        "%s: weights in PyTorch's pickle; the tensors in it are taken, no code of it is run, and they are kept as "
        "safetensors in %s",
        ", ".join(map(str, files)), folder,
    )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _tensors(file)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_apart(tensors), temporary / "model.safetensors", metadata={"format": "pt"})
    temporary.rename(folder)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of before PyTorch 1.6, which cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file}: asks for more than tensors, which would run code from the file, so it is not opened "
            f"({_reason(error)}); get the model as safetensors"
        ) from error
    except Exception as error:
        raise InputError(f"{file}: is cut or damaged ({_reason(error)}); fetch it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{file}: holds more than named tensors; get the model as safetensors")
    return {str(name): value for name, value in content.items()}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0]:.100}" if lines else type(error).__name__


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own: a head may be tied to the embeddings, and safetensors holds no tensor twice."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    return apart
