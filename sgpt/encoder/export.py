"""Export: one folder that others open, markers included, in each of `FORMATS`.

The first of them is opened by `Encoder.from_pretrained` and `SentenceTransformer`, weights merged; the others are for
readers that know no roles, with a tokenizer for each (sgpt/text/role_tokenizer.py).

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
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from sgpt.decoder.added_biases import has_a_class, with_biases
from sgpt.decoder.base_folder import path_for_others
from sgpt.decoder.model_files import CONFIG
from sgpt.decoder.quantised import quantised_dtype
from sgpt.decoder.trunk import ModelConfig, open_model
from sgpt.encoder import contract as contracts
from sgpt.encoder.adapter import CHANGE, DELTA, PEFT, TRAINED, is_adapter, is_cut, read_delta, trained_shapes
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.model_folder import GRAPH, OPENVINO
from sgpt.encoder.onnx import require, write_graph, write_int8_graph, write_openvino
from sgpt.encoder.probes import Encode, measure
from sgpt.encoder.sentence_transformers import (
    WRITTEN,
    is_sentence_transformers,
    save_tokenizer,
    write_json,
    write_modules,
    write_tokenizer,
)
from sgpt.encoder.verify import first_loader, verify
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import lock, may_be_hub_id, replace_folder, unlock
from sgpt.runtime.values import COUNT_OR_NONE, check_choice, check_ranges
from sgpt.text.markers import ROLES
from sgpt.text.role_tokenizer import role_tokenizer

log = logging.getLogger(__name__)
DEFAULT = "sentence-transformers"  # of FORMATS
HALF_TYPES = {torch.bfloat16, torch.float16}
OVER_THE_BASE = """
The weights are an adapter of PEFT over `{base}`, whose class has no place for the trained biases: keep the base at that
path, and install peft.
"""
CARD = "README.md"
WRITTEN_FOR_OTHERS = {CARD, *WRITTEN}  # by our reader: whoever changes these changes what others read
Card = Callable[[dict, Encode], str]  # of what `verify` found, and of what embeds as the folder does


def export(
    encoder: Encoder, folder: Path, *, card: str | Card, adapter: Path | None = None, form: str = DEFAULT
) -> dict:
    """Writes `folder` and returns what `verify` found.

    card: the text of its README.md, or what makes it. adapter: of the encoder, saved before. form: one of FORMATS.

    Replaces an export of ours, and raises InputError for any other folder that is not empty, for a format that cannot
    hold the encoder, when a reader disagrees with it, and while another process writes to it. Written and verified
    under a temporary name, then renamed.
    """
    folder = Path(folder)
    check_formats([form])
    if encoder.head is not None:
        raise InputError("this model of others has modules behind its pooling, which no export holds; copy its folder")
    _refuse_foreign(folder)
    encoder = encoder.alone()  # what is written is the trunk as it stands
    if quantised_dtype(encoder.trunk):
        encoder = encoder.in_dtype(torch.float32)  # once, and not by each of those who compare in float32
    temporary = folder.with_name(f".{folder.name}.tmp")
    taken = lock(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(encoder, temporary, form, adapter)
        verified = verify(temporary, encoder)
        assert verified["readers"], f"{form}: nothing that is installed has opened it"
        text = card if isinstance(card, str) else card(verified, _embedding(verified, temporary, encoder))
        if form == DEFAULT and is_adapter(temporary):
            text += OVER_THE_BASE.format(base=path_for_others(encoder.contract.base))
        (temporary / CARD).write_text(text, encoding="utf-8")
        log.info("export %s", agreement(verified))
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        unlock(taken)
    return verified


def agreement(verified: dict) -> str:
    """What `verify` found, the end of a sentence."""
    *others, last = verified["readers"]
    readers = f"{', '.join(others)} and {last}" if others else last
    if "min_cosine" in verified:
        agrees = f"is at a cosine of {rounded_down(verified['min_cosine'])} or more to the encoder"
    else:
        agrees = f"agrees with the encoder to {verified['max_difference']:.1e}"
    return f"{agrees} on {verified['texts']} texts, read by {readers}"


def rounded_down(cosine: float) -> str:
    """To four digits, never up: it is said to be the lowest one."""
    return f"{math.floor(cosine * 10_000) / 10_000:.4f}"


def _embedding(verified: dict, folder: Path, encoder: Encoder) -> Encode:
    """The encoder's in float32; of an export in int8, which gives other numbers, its own."""
    if "min_cosine" not in verified:
        return encoder.encode_in(torch.float32)
    return first_loader(folder, encoder).embed


def check_formats(formats: list[str]) -> None:
    """InputError for a format that is unknown, or cannot say what an encoder computes: then with the nearest way."""
    for form in formats:
        if form in IMPOSSIBLE:
            raise InputError(f"formats=[{form}]: {IMPOSSIBLE[form]}")
        check_choice("formats", form, FORMATS)


def folder_of(form: str, folder: Path) -> Path:
    """Where an export of this format lies: in the folder itself, or in one next to it with the format in its name.

    InputError for a folder without a name.
    """
    if folder.name in ("", ".."):
        raise InputError(f"output={folder} has no name, to which a format could be added; name the folder itself")
    return folder if form == DEFAULT else folder.with_name(f"{folder.name}-{form}")


def repository_of(form: str, repository: str) -> str:
    """The hub id for this format: the id itself, or with the format behind it."""
    return repository if form == DEFAULT else f"{repository}-{form}"


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
    has_card = (folder / contracts.FILE).is_file() and (folder / CARD).is_file()
    ours = has_card and (is_sentence_transformers(folder) or not is_adapter(folder))
    if folder.exists() and not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no export of this framework; choose another folder or remove it")


def _write(encoder: Encoder, folder: Path, form: str, adapter: Path | None) -> None:
    """All but the card."""
    half = {parameter.dtype for parameter in encoder.trunk.parameters()} & HALF_TYPES
    source = _Source(_whole(encoder), next(iter(half), None), adapter)
    FORMATS[form](source, folder)
    read = [file.name for file in folder.iterdir() if file.is_file() and file.name not in WRITTEN_FOR_OTHERS]
    contract = source.encoder.contract.of_model(source.encoder.tokenizer, **measure(source.encoder))
    contract.save(folder, read)


@dataclass(frozen=True)
class _Source:
    """What is exported. encoder: in float32, low-rank adapters merged. half: the type that frozen weights had."""

    encoder: Encoder
    half: torch.dtype | None
    adapter: Path | None


def _write_sentence_transformers(source: _Source, folder: Path) -> None:
    encoder, trunk = source.encoder, with_biases(source.encoder.trunk)
    if trunk is None:
        _copy_adapter(encoder, source.adapter, folder)
        log.info(
            "no class of transformers holds all biases of this %s: the export is the adapter, over %s",
            type(encoder.trunk).__name__, encoder.contract.base,
        )  # fmt: skip
    else:
        _write_weights(trunk, folder, source.half)
    write_tokenizer(encoder.tokenizer, encoder.contract.markers, folder)
    write_modules(encoder.contract, encoder.tokenizer, encoder.embedding_size, folder, adapter=trunk is None)


def _write_transformers(source: _Source, folder: Path) -> None:
    """The untouched tokenizer at the root, which our own reader takes, and one for each role."""
    encoder, trunk = source.encoder, with_biases(source.encoder.trunk)
    if trunk is None:
        raise InputError(
            f"formats=[transformers]: no class of transformers holds the biases that training added to "
            f"{type(encoder.trunk).__name__}; use formats=[peft], or formats=[onnx], whose graph holds them"
        )
    _write_weights(trunk, folder, source.half)
    write_tokenizer(encoder.tokenizer, replace(encoder.contract.markers, name="none"), folder)
    _write_role_tokenizers(encoder, folder)


def _write_peft(source: _Source, folder: Path) -> None:
    """As the first format, with the adapter in place of the weights, and a tokenizer for each role."""
    encoder = source.encoder
    _copy_adapter(encoder, source.adapter, folder)
    write_tokenizer(encoder.tokenizer, encoder.contract.markers, folder)
    write_modules(encoder.contract, encoder.tokenizer, encoder.embedding_size, folder, adapter=True)
    _write_role_tokenizers(encoder, folder)


def _write_onnx(source: _Source, folder: Path) -> None:
    require("onnx", "onnxruntime")
    write_graph(source.encoder, folder / GRAPH)
    _write_around_graph(source.encoder, folder)


def _write_onnx_int8(source: _Source, folder: Path) -> None:
    require("onnx", "onnxruntime")
    exact = folder / "float32.onnx"
    write_graph(source.encoder, exact)
    write_int8_graph(source.encoder, exact, folder / GRAPH)
    exact.unlink()
    _write_around_graph(source.encoder, folder)


def _write_openvino(source: _Source, folder: Path) -> None:
    require("onnx", "openvino")
    exact = folder / "float32.onnx"
    write_graph(source.encoder, exact)
    write_openvino(exact, folder / OPENVINO)
    exact.unlink()
    _write_around_graph(source.encoder, folder)


def _write_around_graph(encoder: Encoder, folder: Path) -> None:
    """config.json, and tokenizers: of each role, and at the root, where servers look for one, the documents'."""
    encoder.trunk.config.save_pretrained(folder)
    _complete_config(encoder.trunk, folder, pad_token_id=encoder.tokenizer.pad_token_id)
    frame = encoder.frames["document"]
    save_tokenizer(role_tokenizer(encoder.tokenizer, frame), folder, frame.length)
    _write_role_tokenizers(encoder, folder)
    if encoder.frames["query"] == frame:  # otherwise sentence-transformers' own ONNX reader would take one for both
        write_modules(encoder.contract, encoder.tokenizer, encoder.embedding_size, folder)


def _write_role_tokenizers(encoder: Encoder, folder: Path) -> None:
    for role in ROLES:
        frame = encoder.frames[role]
        save_tokenizer(role_tokenizer(encoder.tokenizer, frame), folder / role, frame.length)


def _complete_config(trunk: nn.Module, folder: Path, **stated: int) -> None:
    """What config.json has to say besides what the class writes. stated: more of its keys."""
    config = json.loads((folder / CONFIG).read_text()) | stated
    config["dtype"] = "float32"
    # text-embeddings-inference reads these two, and GPT-2's and GPT-Neo's configurations call them otherwise
    config.setdefault("hidden_size", trunk.config.hidden_size)
    config.setdefault("num_hidden_layers", trunk.config.num_hidden_layers)
    write_json(folder / CONFIG, config)


def _write_weights(trunk: nn.Module, folder: Path, half: torch.dtype | None = None) -> None:
    """config.json and model.safetensors."""
    trunk.save_pretrained(folder, state_dict=_stored(trunk, half))
    _complete_config(trunk, folder)


def _copy_adapter(encoder: Encoder, adapter: Path | None, folder: Path) -> None:
    """InputError where there is none, it is in no form that other readers open, or they would open another base."""
    if adapter is None or not (adapter / PEFT).is_file():
        family, base = type(encoder.trunk).__name__, encoder.contract.base
        if is_cut(encoder.trunk):
            raise InputError(
                f"{family}: its adapter is over the first blocks of {base} (model.layers), and PEFT would open all of "
                "them; use formats=[onnx]" + (", or a whole model" if has_a_class(encoder.trunk) else "")
            )
        if has_a_class(encoder.trunk):
            raise InputError(
                f"formats=[peft]: the adapter of this {family} is in no form of PEFT, which has none for what was "
                "trained; use formats=[sentence-transformers] or formats=[transformers], which are whole models"
            )
        raise InputError(
            f"{family}: no class of transformers holds the biases that training added to {base}, and there is no "
            "adapter in PEFT's form to export in their place; use the adapter, formats=[onnx], or train with "
            "tuning.add_biases=attention"
        )
    stated = read_delta(adapter)
    if stated["form"] != "peft":  # low rank changes the weights, so only `verify` can tell
        _refuse_rounded_base(encoder, stated["dtype"], {*trained_shapes(adapter)})
    for name in (CHANGE, PEFT, TRAINED, DELTA):
        if (adapter / name).is_file():
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
            rounded = f"{encoder.contract.base}: its weights were rounded to {dtype} for training, and "
            if has_a_class(encoder.trunk):
                raise InputError(
                    f"{rounded}PEFT would open the base unrounded; use formats=[sentence-transformers] or "
                    "formats=[transformers], which are whole models, or train with model.dtype=float32, int8 or nf4"
                )
            raise InputError(
                f"{rounded}as no class of transformers holds the biases added to this {type(encoder.trunk).__name__}, "
                "other readers would open the base unrounded; use the adapter, or train with model.dtype=float32, int8 "
                "or nf4"
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


FORMATS: dict[str, Callable[[_Source, Path], None]] = {
    "sentence-transformers": _write_sentence_transformers,
    "transformers": _write_transformers,
    "peft": _write_peft,
    "onnx": _write_onnx,
    "onnx-int8": _write_onnx_int8,
    "openvino": _write_openvino,
}
IMPOSSIBLE = {
    "gguf": (
        "llama.cpp has no position-weighted mean and puts no markers around a text, so another vector would be served "
        "than the trained one; use formats=[onnx], whose graph pools"
    ),
    "vllm": (
        "vLLM has no position-weighted mean and puts no markers around a text, so another vector would be served than "
        "the trained one; use formats=[onnx], whose graph pools, with text-embeddings-inference or ONNX Runtime"
    ),
}


@dataclass
class ExportConfig:
    """Which run is exported again, and where to."""

    run: str = ""
    """Folder of a run."""
    output: str | None = None
    """Folder of the export; null is the run's own. A format but sentence-transformers gets a folder next to it, with
    the format in its name: export-onnx."""
    formats: list[str] = field(default_factory=lambda: [DEFAULT])
    """Of sentence-transformers, transformers, peft, onnx, onnx-int8 and openvino."""
    push_to_hub: str | None = None
    """Hub id that the export is uploaded to, new or of an earlier export, whose other files are deleted; null for none.
    Each format but sentence-transformers goes to a repository of its own, with the format in its name."""
    dry_run: bool = True
    """With push_to_hub: shows what would be uploaded, and uploads nothing."""
    examples: int = 0
    """So many training examples are shown in the card; 0 shows none, as they may be private."""

    def __post_init__(self) -> None:
        check_formats(self.formats)
        check_ranges(self, "", examples=COUNT_OR_NONE)
        if not self.formats or len({*self.formats}) < len(self.formats):
            raise InputError(f"formats={self.formats} must name one or more different ones of {', '.join(FORMATS)}")
        if self.push_to_hub is not None and not may_be_hub_id(self.push_to_hub):
            raise InputError(f"push_to_hub={self.push_to_hub!r:.80} is no hub id; give one like owner/name")
        if self.push_to_hub is None and not self.dry_run:
            raise InputError("dry_run=false has no effect without push_to_hub=<owner/name>; set it, or leave it out")
