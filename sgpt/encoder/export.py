"""Export: one folder that both `Encoder.from_pretrained` and `SentenceTransformer` open, weights merged, markers
included.

What was trained over a quantised trunk is merged into the weights that the trunk was opened from.

All is compared in float32, after any training: config.json says float32, so that every reader computes so, and what
half precision holds exactly, as the frozen weights of a base that was opened in it, is stored in it and takes half of
the disk.

Where no class of transformers holds all of the biases (sgpt/decoder/added_biases.py), the folder has the adapter in
PEFT's form in place of the weights, and the same readers open its base by the name that it has in the contract.

No custom code is needed: a chat template and one pre-tokenizer carry the markers (`template.py`), per-task lengths cut
the content, pooling is written in the keys that every version and server reads. Only a folder that gives the same token
ids and embeddings as the encoder, for hostile texts in both roles, gets its name; otherwise nothing is written.

Decided here: plain `SentenceTransformer.encode`, which states no task, uses no markers and the document's limit. A text
without any token (empty, markers=none, a tokenizer without special tokens) is zeros in our encoder, and in
sentence-transformers as one of a batch; alone it fails there, so it is not compared.
"""

import copy
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from sgpt.decoder.added_biases import has_a_class, with_biases
from sgpt.decoder.base_folder import path_for_others
from sgpt.decoder.quantised import quantised_dtype
from sgpt.decoder.trunk import ModelConfig, open_model
from sgpt.encoder import contract as contracts
from sgpt.encoder.adapter import CHANGE, DELTA, PEFT, TRAINED, is_cut, read_delta
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.probes import measure
from sgpt.encoder.sentence_transformers import (
    WRITTEN,
    is_sentence_transformers,
    write_json,
    write_modules,
    write_tokenizer,
)
from sgpt.encoder.verify import verify
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import replace_folder

log = logging.getLogger(__name__)
HALF_TYPES = {torch.bfloat16, torch.float16}
OVER_THE_BASE = """
The weights are an adapter of PEFT over `{base}`, whose class has no place for the trained biases: keep the base at that
path, and install peft.
"""
WRITTEN_FOR_OTHERS = {"README.md", *WRITTEN}  # by our reader: whoever changes these changes what others read


def export(encoder: Encoder, folder: Path, *, card: str, adapter: Path | None = None) -> dict:
    """Writes `folder` and returns what `verify` found. card: its README.md. adapter: of the encoder, saved before.

    Replaces an export of ours, and raises InputError for any other folder that is not empty, or when a reader disagrees
    with the encoder. Written and verified under a temporary name, then renamed.
    """
    folder = Path(folder)
    _refuse_foreign(folder)
    if quantised_dtype(encoder.trunk):
        encoder = encoder.in_dtype(torch.float32)  # once, and not by each of those who compare in float32
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(encoder, temporary, card, adapter)
        verified = verify(temporary, encoder)
        readers = " and ".join(verified["readers"])
        difference, texts = verified["max_difference"], verified["texts"]
        log.info("export agrees with the encoder to %.1e on %d texts, read by %s", difference, texts, readers)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return verified


def announce_export(encoder: Encoder) -> None:
    """Says before training where the export will be no whole model; InputError where it could not be made at all."""
    if has_a_class(encoder.trunk):
        return
    family, base = type(encoder.trunk).__name__, encoder.contract.base
    remedy = "tuning.add_biases=attention may have one (docs/families.md)"
    if is_cut(encoder.trunk):
        raise InputError(
            f"model.layers: no class of transformers holds the biases added to this {family}, and an adapter in "
            f"PEFT's form would be opened over all blocks of {base}, so there could be no export; {remedy}, or leave "
            "model.layers out"
        )
    log.warning(
        "no class of transformers holds all biases of this %s: the export will be an adapter over %s; %s",
        family, base, remedy,
    )  # fmt: skip
    learning = {name for name, parameter in encoder.trunk.named_parameters() if parameter.requires_grad}
    _refuse_rounded_base(encoder, str(encoder.trunk.config.dtype).removeprefix("torch."), learning)


def _refuse_foreign(folder: Path) -> None:
    ours = (folder / contracts.FILE).is_file() and is_sentence_transformers(folder)
    if folder.exists() and not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no export of this framework; choose another folder or remove it")


def _write(encoder: Encoder, folder: Path, card: str, adapter: Path | None) -> None:
    half = {parameter.dtype for parameter in encoder.trunk.parameters()} & HALF_TYPES
    encoder = _whole(encoder)
    trunk = with_biases(encoder.trunk)
    if trunk is None:
        _copy_adapter(encoder, adapter, folder)
        card += OVER_THE_BASE.format(base=path_for_others(encoder.contract.base))
    else:
        _write_weights(trunk, folder, *half)
    write_tokenizer(encoder.tokenizer, encoder.contract.markers, folder)
    write_modules(encoder.contract, encoder.tokenizer, encoder.embedding_size, folder, adapter=trunk is None)
    (folder / "README.md").write_text(card, encoding="utf-8")
    read = [file.name for file in folder.iterdir() if file.is_file() and file.name not in WRITTEN_FOR_OTHERS]
    encoder.contract.of_model(encoder.tokenizer, **measure(encoder)).save(folder, read)


def _write_weights(trunk: nn.Module, folder: Path, half: torch.dtype | None = None) -> None:
    """config.json and model.safetensors."""
    trunk.save_pretrained(folder, state_dict=_stored(trunk, half))
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    # text-embeddings-inference reads these two, and GPT-2's and GPT-Neo's configurations call them otherwise
    config.setdefault("hidden_size", trunk.config.hidden_size)
    config.setdefault("num_hidden_layers", trunk.config.num_hidden_layers)
    write_json(folder / "config.json", config)


def _copy_adapter(encoder: Encoder, adapter: Path | None, folder: Path) -> None:
    """InputError where there is none, it is in no form that other readers open, or they would open another base."""
    if adapter is None or not (adapter / PEFT).is_file():
        raise InputError(
            f"{type(encoder.trunk).__name__}: no class of transformers holds the biases that training added to "
            f"{encoder.contract.base}, and there is no adapter in PEFT's form to export in their place; use the "
            "adapter, or train with tuning.add_biases=attention"
        )
    with safe_open(adapter / TRAINED, "pt") as opened:
        _refuse_rounded_base(encoder, read_delta(adapter)["dtype"], {*opened.keys()})
    log.info(
        "no class of transformers holds all biases of this %s: the export is the adapter, over %s",
        type(encoder.trunk).__name__, encoder.contract.base,
    )  # fmt: skip
    for name in (CHANGE, PEFT, TRAINED, DELTA):
        shutil.copyfile(adapter / name, folder / name)


def _refuse_rounded_base(encoder: Encoder, dtype: str, trained: set[str]) -> None:
    """InputError where half precision, in which the base is opened for training, does not hold it exactly.

    dtype: of the base in training. trained: names of the parameters that learn.
    """
    if dtype == "float32":
        return
    held = dict(encoder.trunk.named_parameters())  # but for quantised weights, which are made of the stored ones
    for name, stored in open_model(ModelConfig(encoder.contract.base)).named_parameters():
        if name in held.keys() - trained and not torch.equal(held[name].cpu().float(), stored):
            raise InputError(
                f"{encoder.contract.base}: its weights were rounded to {dtype} for training, and as no class of "
                f"transformers holds the biases added to this {type(encoder.trunk).__name__}, other readers would open "
                "the base unrounded; use the adapter, or train with model.dtype=float32, int8 or nf4"
            )


def _whole(encoder: Encoder) -> Encoder:
    """In float32 and a plain trunk: low-rank adapters merged. A copy, where anything is to be changed."""
    exact = encoder.in_dtype(torch.float32)
    if not hasattr(exact.trunk, "merge_and_unload"):
        return exact
    trunk = exact.trunk if exact is not encoder else copy.deepcopy(exact.trunk)
    merged = trunk.merge_and_unload()
    return Encoder(merged, encoder.tokenizer, encoder.contract, tokens_per_pack=encoder.tokens_per_pack)


def _stored(trunk: nn.Module, half: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The weights by name, those in `half` which it holds exactly."""
    weights = trunk.state_dict()
    if half is not None:
        for name, weight in weights.items():
            if weight.is_floating_point() and torch.equal(weight.to(half).to(weight.dtype), weight):
                weights[name] = weight.to(half)
    return weights


@dataclass
class ExportConfig:
    """Which run is exported again, and where to."""

    run: str = ""
    """Folder of a run."""
    output: str | None = None
    """Folder of the export; null is the run's own."""
