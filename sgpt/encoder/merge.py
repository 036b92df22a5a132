"""One tuned model out of several: averages, interpolations with the base, task arithmetic.

Models that were tuned by their biases over one base differ in kilobytes, and what is between them is a model as well:
base + the sum of weight · (trained - base). Equal weights average (Wortsman et al. 2022, model soups, arXiv
2203.05482), one model with a weight of 0.7 keeps some of the base's general quality (WiSE-FT, arXiv 2109.01903), and
weights of any sign add and take away tasks (Ilharco et al. 2023, arXiv 2212.04089). Of biases this is free.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from sgpt.decoder.families import BLOCK_NUMBER, block_of
from sgpt.decoder.trunk import load_tokenizer, load_trunk
from sgpt.encoder.adapter import (
    base_config,
    check_tokenizer,
    is_adapter,
    read_delta,
    read_trained,
    refuse_other_base,
    save_adapter,
)
from sgpt.encoder.contract import Contract
from sgpt.encoder.delta import bias_delta_folder, moved
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.probes import measure
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import lock, unlock

MERGE = "merge.json"  # in the new adapter's folder: models and weights


def merge(models: Sequence[str], weights: Sequence[float], output: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Writes the adapter `output`; returns of each tensor its value in the base and in the merged model, by name.

    models: runs or adapter folders, with a weight each. Their contracts must agree, in all that decides how a text is
    embedded, and so must their bases; else, where `output` is anything but an earlier merge, and while another process
    writes to it, InputError.
    """
    folders = [bias_delta_folder(model) for model in models]
    _refuse_output(output, folders)
    contract = _common_contract(folders)
    widest = max(folders, key=lambda folder: getattr(torch, read_delta(folder)["dtype"]).itemsize)
    trunk = load_trunk(base_config(widest, "float32"))
    tokenizer = load_tokenizer(contract.base)
    for folder in folders:  # before any of them adds biases
        refuse_other_base(trunk, folder)
        check_tokenizer(tokenizer, folder)
    trained = [read_trained(folder, trunk) for folder in folders]
    parameters = dict(trunk.named_parameters())
    before: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for tensors in trained for name in tensors):
        before[name] = parameters[name].detach().clone()
        changes = [(tensors[name], weight) for tensors, weight in zip(trained, weights, strict=True) if name in tensors]
        parameters[name].data = moved(before[name], changes).to(changes[0][0].dtype)
    measured = measure(Encoder(trunk, tokenizer, contract))
    record = {"models": [str(folder) for folder in folders], "weights": list(weights)}
    more = {MERGE: json.dumps(record, indent=2) + "\n"}
    taken = lock(output, "set output=<another folder>")
    try:
        save_adapter(trunk, tokenizer, contract, before, output, measured=measured, more=more)
    finally:
        unlock(taken)
    return {name: (value.float(), parameters[name].detach()) for name, value in before.items()}


def merged_encoder(folder: Path, device: torch.device | str = "cpu") -> Encoder:
    """The base of a merged model, with the model's markers, limits and pooling, and the model as its delta "merged"."""
    trunk = load_trunk(base_config(folder, "float32"))
    contract = Contract.load(folder)
    encoder = Encoder(trunk.to(device), load_tokenizer(contract.base), contract)
    encoder.load_delta("merged", folder)
    return encoder


def _common_contract(folders: Sequence[Path]) -> Contract:
    """What all models agree in; InputError names the first thing in which one does not."""
    first, *others = [_rules(Contract.load(folder)) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        for key, value in first.items():
            if other[key] != value:
                raise InputError(
                    f"{folders[0]} and {folder} cannot be merged: {key} is {value!r} and {other[key]!r}; "
                    "merge models that were trained alike in it"
                )
    contract = Contract.load(folders[0])
    origin = replace(contract.origin, tuning="", training_data="")  # those of each model, which MERGE names
    return replace(contract, probes={}, rounding={}, files={}, origin=origin)


def _rules(contract: Contract) -> dict[str, object]:
    markers = {f"markers.{key}": value for key, value in asdict(contract.markers).items()}
    return {"pooling": contract.pooling, "normalize": contract.normalize, "prompts": contract.prompts, **markers}


def _refuse_output(output: Path, folders: Sequence[Path]) -> None:
    """InputError where the new adapter would replace anything but an earlier merge."""
    if any(output.resolve() in (folder.resolve(), folder.resolve().parent) for folder in folders):
        raise InputError(f"output={output} is one of the models; choose another folder")
    if is_adapter(output) and not (output / MERGE).is_file():
        raise InputError(f"output={output} is an adapter that was trained, not merged; choose another folder")


def bias_change(values: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[int | None, float]]:
    """Module -> block -> root mean square of its tensors' change; block None where the module is in no block.

    values: of each parameter, by name, its value in the base and in the tuned model, as `merge` returns them. Not
    relative to the base, which is 0 where biases were added.
    """
    change: dict[str, dict[int | None, float]] = {}
    for name, (before, after) in values.items():
        block = BLOCK_NUMBER.search(name)
        module = (name[block.end() :] if block else name).removesuffix(".bias")
        size = (after.double() - before.double()).square().mean().sqrt()
        change.setdefault(module, {})[block_of(name)] = float(size)
    return change
