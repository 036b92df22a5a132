"""What a model of sentence-transformers does to an embedding after pooling: its Dense, LayerNorm and Normalize modules.

They are applied in their order as version 6.2 does, or refused by file and key. Nothing here is trained.
"""

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sgpt.decoder.model_files import CONFIG, read_json, stored_tensors
from sgpt.runtime.errors import InputError

ACTIVATIONS: dict[str, type[nn.Module]] = {  # by the last part of the path in a Dense's config.json
    kind.__name__: kind
    for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Mish)
}
EMBEDDING = "sentence_embedding"  # what a module reads and writes, where its config.json says nothing
DENSE_KEYS = {
    "in_features", "out_features", "bias", "activation_function", "use_residual", "module_input_name",
    "module_output_name",
}  # fmt: skip


class Dense(nn.Module):
    """A linear layer, an activation, and with `residual` what goes in added: itself, or through a layer of its own."""

    def __init__(self, sizes: tuple[int, int], bias: bool, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(*sizes, bias=bias)
        self.activation = activation
        self.is_residual = residual
        self.residual = nn.Linear(*sizes, bias=False) if residual and sizes[0] != sizes[1] else nn.Identity()

    def forward(self, embeddings: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""
        changed = self.activation(self.linear(embeddings))
        return changed + self.residual(embeddings) if self.is_residual else changed


class Norm(nn.Module):
    """A LayerNorm of the embedding."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[rows, D] -> the same shape."""
        return self.norm(embeddings)


class Unit(nn.Module):
    """Embeddings of length 1."""

    def forward(self, embeddings: Tensor) -> Tensor:
        """[rows, D] -> the same shape."""
        return F.normalize(embeddings, dim=1)


def read_head(modules: Iterable[tuple[str, Path]], size: int) -> nn.Sequential | None:
    """The modules behind the pooling, by kind and folder, in float32; None where there is none. size: D.

    InputError for a key that is not applied here, and for weights that do not fit.
    """
    layers: list[nn.Module] = []
    for kind, folder in modules:
        layer, size = READERS_OF_MODULES[kind](folder, size)
        layers.append(layer)
    return nn.Sequential(*layers).eval() if layers else None


def output_size(head: nn.Module, size: int) -> int:
    """Of embeddings of `size` numbers, behind the head."""
    for layer in head:
        size = layer.linear.out_features if isinstance(layer, Dense) else size
    return size


def _dense(folder: Path, size: int) -> tuple[nn.Module, int]:
    file = folder / CONFIG
    stated = read_json(file)
    if unknown := sorted(stated.keys() - DENSE_KEYS):
        raise InputError(f"{file}: key {unknown[0]!r} is not known here, so it cannot be applied")
    for key in ("module_input_name", "module_output_name"):
        if stated.get(key) not in (None, EMBEDDING):
            raise InputError(
                f"{file}: {key}={stated[key]!r} is not the embedding of a text ({EMBEDDING}), which is what is changed "
                "here; open it with sentence-transformers"
            )
    sizes = _count(file, stated, "in_features"), _count(file, stated, "out_features")
    _check_size(file, "in_features", sizes[0], size)
    flags = {key: stated.get(key, default) for key, default in (("bias", True), ("use_residual", False))}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise InputError(f"{file}: {key}={value!r:.40} must be true or false")
    dense = Dense(sizes, flags["bias"], _activation(file, stated), flags["use_residual"])
    return _with_weights(dense, folder), sizes[1]


def _activation(file: Path, stated: dict) -> nn.Module:
    path = stated.get("activation_function", "torch.nn.modules.activation.Tanh")
    name = path.rpartition(".")[2] if isinstance(path, str) and path.startswith("torch.nn.") else None
    if name not in ACTIVATIONS:
        raise InputError(
            f"{file}: activation_function={path!r:.80} is none of torch.nn's {', '.join(ACTIVATIONS)}; open it with "
            "sentence-transformers"
        )
    return ACTIVATIONS[name]()


def _layer_norm(folder: Path, size: int) -> tuple[nn.Module, int]:
    file = folder / CONFIG
    stated = read_json(file)
    if unknown := sorted(stated.keys() - {"dimension"}):
        raise InputError(f"{file}: key {unknown[0]!r} is not known here, so it cannot be applied; dimension is")
    _check_size(file, "dimension", _count(file, stated, "dimension"), size)
    return _with_weights(Norm(size), folder), size


def _normalize(folder: Path, size: int) -> tuple[nn.Module, int]:
    return Unit(), size


READERS_OF_MODULES = {"Dense": _dense, "LayerNorm": _layer_norm, "Normalize": _normalize}


def _count(file: Path, stated: dict, key: str) -> int:
    value = stated.get(key)
    if type(value) is not int or not 1 <= value <= 1_000_000:
        raise InputError(f"{file}: {key}={value!r:.40} must be a number of dimensions, 1 or more")
    return value


def _check_size(file: Path, key: str, stated: int, size: int) -> None:
    if stated != size:
        raise InputError(f"{file}: {key}={stated}, and what comes in has {size} numbers; the modules are of two models")


def _with_weights(layer: nn.Module, folder: Path) -> nn.Module:
    tensors: dict[str, Tensor] = {}
    for file in {*stored_tensors(folder, str(folder)).values()}:
        tensors |= load_file(file)
    wanted = layer.state_dict()
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())[0]
        problem = "is missing" if odd in wanted else "has no place there"
        raise InputError(f"{folder}: {odd} {problem}, by what {CONFIG} says; fetch both again")
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != wanted[name].shape:
            shapes = tuple(tensor.shape), tuple(wanted[name].shape)
            raise InputError(f"{folder}: {name} is {shapes[0]} where {CONFIG} makes it {shapes[1]}; fetch both again")
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: {name} holds NaN or an infinite number; the weights are damaged")
    layer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return layer
