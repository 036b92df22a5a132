"""Export: one folder that both `Encoder.from_pretrained` and `SentenceTransformer` open, weights merged, markers included.

All is compared in float32, after any training: config.json says float32, so that every reader computes so, and what half
precision holds exactly, as the frozen weights of a base that was opened in it, is stored in it and takes half of the disk.

No custom code is needed: a chat template and one pre-tokenizer carry the markers (`template.py`), per-task lengths cut the
content, pooling is written in the keys that every version and server reads. Only a folder that gives the same token ids and
embeddings as the encoder, for hostile texts in both roles, gets its name; otherwise nothing is written.

Decided here: plain `SentenceTransformer.encode`, which states no task, uses no markers and the document's limit. A text
without any token (empty, markers=none, a tokenizer without special tokens) is zeros in our encoder, and in
sentence-transformers as one of a batch; alone it fails there, so it is not compared.
"""

import copy
import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sgpt.encoder import contract as contracts
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.probes import in_dtype, probes, rounding
from sgpt.encoder.sentence_transformers import write_json, write_modules, write_tokenizer
from sgpt.encoder.verify import verify
from sgpt.runtime.errors import InputError
from sgpt.runtime.files import replace_folder

log = logging.getLogger(__name__)
HALVES = {torch.bfloat16, torch.float16}
NOT_READ = {  # by our reader: whoever changes these changes what others read
    "README.md", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "chat_template.jinja",
}  # fmt: skip


def export(encoder: Encoder, folder: Path, *, card: str) -> dict:
    """Writes `folder` and returns what `verify` found. card: its README.md.

    Replaces an export of ours, and raises InputError for any other folder that is not empty, or when a reader disagrees
    with the encoder. Written and verified under a temporary name, then renamed.
    """
    folder = Path(folder)
    _refuse_foreign(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(encoder, temporary, card)
        verified = verify(temporary, encoder)
        readers = " and ".join(verified["readers"])
        log.info("export agrees with the encoder to %.1e on %d texts, read by %s", verified["max_difference"], verified["texts"], readers)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return verified


def _refuse_foreign(folder: Path) -> None:
    ours = (folder / contracts.FILE).is_file() and (folder / "modules.json").is_file()
    if folder.exists() and not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no export of this framework; choose another folder or remove it")


def _write(encoder: Encoder, folder: Path, card: str) -> None:
    half = {parameter.dtype for parameter in encoder.trunk.parameters()} & HALVES
    encoder = _whole(encoder)
    encoder.trunk.save_pretrained(folder, state_dict=_stored(encoder.trunk, *half))
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    # text-embeddings-inference reads these two, and GPT-2's and GPT-Neo's configurations call them otherwise
    config.setdefault("hidden_size", encoder.trunk.config.hidden_size)
    config.setdefault("num_hidden_layers", encoder.trunk.config.num_hidden_layers)
    write_json(folder / "config.json", config)
    write_tokenizer(encoder, folder)
    write_modules(encoder, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    read = [file.name for file in folder.iterdir() if file.is_file() and file.name not in NOT_READ]
    replace(encoder.contract, probes=probes(encoder), rounding=rounding(encoder)).save(folder, read)


def _whole(encoder: Encoder) -> Encoder:
    """In float32 and a plain trunk: low-rank adapters merged. A copy, where anything is to be changed."""
    exact = in_dtype(encoder, torch.float32)
    if not hasattr(exact.trunk, "merge_and_unload"):
        return exact
    trunk = exact.trunk if exact is not encoder else copy.deepcopy(exact.trunk)
    return Encoder(trunk.merge_and_unload(), encoder.tokenizer, encoder.contract, tokens_per_pack=encoder.tokens_per_pack)


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
    """run: folder of a run. output: folder of the export; null is the run's own."""

    run: str = ""
    output: str | None = None
