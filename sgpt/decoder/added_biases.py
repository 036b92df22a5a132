"""Biases for decoders that have none: Llama, Qwen3, Gemma, Mistral and most others of today.

BitFit (Ben Zaken et al. 2021) trains what is there. Where a block's linear layers have no bias they are given one of
zeros, which changes nothing until it is trained: the logits are equal bit for bit (tests/decoder/test_added_biases.py).
It is `tune` that makes norms float32 in a trunk of half precision, which does move the last digits.

On disk the biases are a change over the base that has none (sgpt/encoder/adapter.py). A whole model can hold them where
transformers has a class for it: `with_biases` finds out which.
"""

import copy
import re
from collections.abc import Collection, Iterator

import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, PretrainedConfig

from sgpt.decoder.families import block_of, family_of
from sgpt.decoder.quantised import unquantised_weights

PLACES = ("all", "attention", "mlp", "none")
ATTENTION = re.compile(r"attn|attention")  # in the path of a projection of any family


def add_biases(trunk: nn.Module, where: str = "all", first_block: int = 0) -> list[str]:
    """Gives linear layers of the blocks that have no bias one of zeros, in place; returns the new parameters' names.

    where: one of PLACES. first_block: number of the first block that is given any. Layers that have a bias keep it.
    """
    names = []
    for path, _ in _without_bias(trunk):
        if where in ("all", place_of(path)) and block_of(path) >= first_block:
            names.append(f"{path}.bias")
    add_named_biases(trunk, names)
    return names


def add_named_biases(trunk: nn.Module, names: Collection[str]) -> None:
    """The same by parameter name; those that the trunk has, by its class or as they were added before, are left as they
    are.
    """
    missing = dict(_without_bias(trunk))
    added = set(added_biases(trunk))
    for name in names:
        path = name.removesuffix(".bias")
        if path in missing:
            layer = missing[path]
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
            added.add(name)
    trunk.added_biases = sorted(added)


def remove_biases(trunk: nn.Module, names: Collection[str]) -> None:
    """Takes biases that were added off again, by parameter name."""
    for name in names:
        trunk.get_submodule(name.removesuffix(".bias")).bias = None
    trunk.added_biases = sorted({*added_biases(trunk)} - {*names})


def added_biases(trunk: nn.Module) -> list[str]:
    """Names of the parameters that `add_biases` gave the trunk: its base has none of them."""
    return getattr(trunk, "added_biases", [])


def place_of(path: str) -> str:
    """attention or mlp: where in its block a linear layer, or its bias, lies."""
    return "attention" if ATTENTION.search(path) else "mlp"


def _without_bias(trunk: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in trunk.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and block_of(path) is not None:
            yield path, module


def with_biases(trunk: nn.Module) -> nn.Module | None:
    """The same function as a model that transformers makes from a config alone, added biases included.

    The trunk itself where nothing was added. Weights are shared, not copied; biases that the class has besides are
    zeros. None where no class has all of these biases.
    """
    if not added_biases(trunk):
        return trunk
    model = _model_with_biases(trunk)
    if model is not None:
        weights = trunk.state_dict()
        missing = model.state_dict().keys() - weights.keys()
        zeros = {name: torch.zeros_like(model.get_parameter(name), device=trunk.device) for name in missing}
        model.load_state_dict(weights | zeros, assign=True)
    return model


def has_a_class(trunk: nn.Module) -> bool:
    """Whether `with_biases` will give a model of this trunk, which may be quantised still."""
    return not added_biases(trunk) or _model_with_biases(trunk) is not None


def _model_with_biases(trunk: nn.Module) -> nn.Module | None:
    """Of the first class that has all parameters of the trunk, and besides them biases alone; without memory."""
    names = unquantised_weights(trunk).keys()
    for config in _configs_with_biases(trunk.config):
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        of_class = dict(model.named_parameters()).keys()
        if names <= of_class and all(name.endswith(".bias") for name in of_class - names):
            return model
    return None


def _configs_with_biases(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Of the own family with its switches for biases on, one alone and then all; else of Llama, where that is equal."""
    switches = [key for key, value in config.to_dict().items() if key.endswith("bias") and value is False]
    for keys in [*([key] for key in switches), switches]:
        yield _switched(config, keys)
    if family_of(config.model_type).like_llama and not getattr(config, "sliding_window", None):
        stated = {key: value for key, value in config.to_dict().items() if key in LlamaConfig().to_dict()}
        del stated["model_type"]
        yield _switched(LlamaConfig(**stated), ["attention_bias", "mlp_bias"])


def _switched(config: PretrainedConfig, keys: Collection[str]) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    for key in keys:
        setattr(changed, key, True)
    return changed
