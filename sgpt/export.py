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
import importlib.metadata
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sgpt import contract as contracts
from sgpt.data.collate import Rows
from sgpt.encoder import Encoder
from sgpt.errors import InputError
from sgpt.files import replace_folder
from sgpt.markers import ROLES, Frame, Role
from sgpt.probes import in_dtype, probes, rounding
from sgpt.sentence_transformers_format import LEGACY_POOLINGS
from sgpt.template import SEAM, wrap

log = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of a row's largest entry, in float32: another order of summation
ROUNDINGS = 2  # times what these very weights make of a rounding is allowed, where that is more
HALVES = {torch.bfloat16, torch.float16}
NOT_READ = {  # by our reader: whoever changes these changes what others read
    "README.md", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "chat_template.jinja",
}  # fmt: skip
MODULE = "sentence_transformers.models"  # the old spelling of the types opens in sentence-transformers 2 to 6
# Makes transformers read tokenizer.json as it stands. For qwen2, phi3 and others it would else build its own class' pre-tokenizer,
# whatever tokenizer_class says. (Saving the model anew by sentence-transformers drops this key: then only those families break.)
TOKENIZER_TYPE = "gpt_bigcode"


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


def verify(folder: Path, encoder: Encoder) -> dict:
    """Opens the folder anew with our reader, and with sentence-transformers if it is installed, and compares them with `encoder`.

    In float32: token ids must be equal, embeddings within 1e-5 of the row's largest entry, or within what rounding comes to
    with these weights. Raises InputError with the text and both id lists.
    Returns {"max_difference": float, "texts": int, "readers": [names]}.
    """
    texts, exact = hostile_texts(encoder), in_dtype(encoder, torch.float32)
    expected = {role: _with_tokens(texts, exact, role) for role in ROLES}
    del exact  # and its weights, where they are a copy
    worst, names = 0.0, []
    for reader in _readers(folder, encoder):
        names.append(reader.name)
        for role, (compared, ids, embeddings) in expected.items():
            _compare_ids(reader, role, compared, ids, encoder)
            worst = max(worst, _compare_embeddings(reader, role, compared, embeddings, encoder))
        del reader  # and its weights, before the next one loads its own
    return {"max_difference": worst, "texts": len(texts), "readers": names}


def hostile_texts(encoder: Encoder) -> list[str]:
    """Texts that have broken an export, ours or another's; some are made to measure for the tokenizer and the limits."""
    tokenizer = encoder.tokenizer
    texts = [
        "", "[", "]", "[]", "{}", "[[1]]", "{{a}}", "[a] {b}", "what?", "what?]", "why?}", "}{", '"quoted"', "f(x)[0]", SEAM, f"[{SEAM}x{SEAM}]",
        " leading", "trailing ", "  both  ", " ", "\n", "\n\na\nb\n\n", "\tx\r\n", "naïve café ﬁ", "e\u0301", "\u0301", "東京タワー", "🙂👩\u200d👧", "{🙂}",
        "the quick brown fox " * 500,
    ]  # fmt: skip
    for special in dict.fromkeys((tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token)):
        if special:
            texts += [special, f"[a]{special}[b]", f"{{{special}}}", f"end {special}"]
    for role in ROLES:
        texts += _around(encoder.frames[role].content_tokens, tokenizer)
    return list(dict.fromkeys(texts))


# --- writing ---


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
    _write_json(folder / "config.json", config)
    _write_tokenizer(encoder, folder)
    _write_sentence_transformers(encoder, folder)
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


def _write_tokenizer(encoder: Encoder, folder: Path) -> None:
    markers, tokenizer = encoder.contract.markers, encoder.tokenizer
    if markers.name != "none":
        tokenizer = wrap(tokenizer, markers.name)
    else:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = None  # of an instruct base: sentence-transformers would render texts through it
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("is_local", "local_files_only"):  # how the tokenizer was opened here
        config.pop(key, None)
    if (folder / "tokenizer.json").is_file():
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # GPT2Tokenizer would build its own pre-tokenizer and drop ours
    _write_json(
        folder / "tokenizer_config.json",
        config
        | {
            "padding_side": "right",
            "truncation_side": "right",
            "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add token_type_ids as if they were words
            "model_max_length": _length(encoder.frames["document"]),
        },
    )


def _length(frame: Frame) -> int:
    return len(frame.before) + frame.content_tokens + len(frame.after)


def _write_sentence_transformers(encoder: Encoder, folder: Path) -> None:
    query_length, document_length = (_length(encoder.frames[role]) for role in ROLES)
    marked = encoder.contract.markers.name != "none"
    read = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer: dict = {"max_seq_length": document_length, "do_lower_case": False}
    if marked or query_length != document_length:  # otherwise the old form, which every version reads
        transformer |= {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": read, **({"message": {**read, "format": "flat"}} if marked else {})},
            "module_output_name": "token_embeddings",
            "processor_kwargs": {"tokenizer_type": TOKENIZER_TYPE},
            "query_length": query_length,
            "document_length": document_length,
        }
    settings = {
        "model_type": "SentenceTransformer",
        "__version__": {
            name: _version(package)
            for name, package in (("sentence_transformers", "sentence-transformers"), ("transformers", "transformers"), ("pytorch", "torch"))
        },
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    if "query_length" in transformer:  # 5.6 refuses by itself, with a TypeError for these keys
        settings["requirements"] = {"sentence-transformers": ">=6.0"}
    pooling = {
        "word_embedding_dimension": encoder.embedding_size,
        "pooling_mode_mean_sqrt_len_tokens": False,
        **{key: name == encoder.contract.pooling for key, name in LEGACY_POOLINGS.items()},
        "include_prompt": True,
    }
    places = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] if encoder.contract.normalize else [])]
    for _, place in places[1:]:
        (folder / place).mkdir()
    _write_json(folder / "sentence_bert_config.json", transformer)
    _write_json(folder / "config_sentence_transformers.json", settings)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_json(folder / "modules.json", [{"idx": i, "name": str(i), "path": place, "type": f"{MODULE}.{kind}"} for i, (kind, place) in enumerate(places)])


def _version(package: str) -> str:
    """Installed version; of sentence-transformers, which need not be installed, the one this form was measured with."""
    return importlib.metadata.version(package) if package != "sentence-transformers" or _has_sentence_transformers() else "6.2.0"


def _write_json(file: Path, content: dict | list) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- verifying ---


@dataclass(frozen=True)
class _Reader:
    name: str
    token_ids: Callable[[list[str], Role], Rows]
    embed: Callable[[list[str], Role], np.ndarray]


def _readers(folder: Path, encoder: Encoder) -> Iterator[_Reader]:
    """One after the other, so that one copy of the weights is held at a time."""
    yield _our_reader(folder, encoder)
    if _has_sentence_transformers():
        yield _sentence_transformers_reader(folder, encoder)


def _our_reader(folder: Path, encoder: Encoder) -> _Reader:
    opened = Encoder.from_pretrained(folder).to(encoder.device)
    if opened.contract.fingerprint() != encoder.contract.fingerprint():
        raise InputError(f"{folder}: its contract {opened.contract} is not the encoder's; export again")
    return _Reader("sgpt", opened.token_ids, opened.encode)


def _sentence_transformers_reader(folder: Path, encoder: Encoder) -> _Reader:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device=str(encoder.device), trust_remote_code=False)

    def token_ids(texts: list[str], role: Role) -> Rows:
        batch = model.preprocess(texts, task=role)
        return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

    def embed(texts: list[str], role: Role) -> np.ndarray:
        call = model.encode_query if role == "query" else model.encode_document
        return call(texts, batch_size=8, show_progress_bar=False, convert_to_tensor=True).float().cpu().numpy()

    return _Reader(f"sentence-transformers {_version('sentence-transformers')}", token_ids, embed)


def _compare_ids(reader: _Reader, role: Role, texts: list[str], expected: Rows, encoder: Encoder) -> None:
    for text, ours, theirs in zip(texts, expected, reader.token_ids(texts, role), strict=True):
        if ours != theirs:
            raise InputError(
                f"the export is wrong: {reader.name} reads {text!r:.80} as another {role} than the encoder, {_shown(theirs, ours)} instead of "
                f"{_shown(ours, theirs)}. If nobody changed it, {type(encoder.tokenizer).__name__} with markers={encoder.contract.markers.name} "
                "cannot be expressed there; use the adapter, or train with markers=none"
            )


def _compare_embeddings(reader: _Reader, role: Role, texts: list[str], expected: np.ndarray, encoder: Encoder) -> float:
    """The largest difference, relative to the row's largest entry."""
    difference = _difference(reader.embed(texts, role), expected)
    row = int(np.nan_to_num(difference, nan=np.inf).argmax())
    if difference[row] <= TOLERANCE:  # NaN is not
        return float(difference[row])
    rounded = _rounding(encoder, role, texts, expected)
    if difference[row] <= ROUNDINGS * rounded:
        return float(difference[row])
    raise InputError(
        f"the export is wrong: {reader.name} embeds {texts[row]!r:.80} as a {role} otherwise than the encoder, both in float32, by "
        f"{difference[row]:.1e} of its largest entry, from equal token ids {_shown(encoder.token_ids([texts[row]], role)[0], [])}. It is not "
        f"rounding, which comes to {rounded:.1e} with these weights. If nobody changed it, {type(encoder.trunk).__name__} cannot be "
        "expressed there; use the adapter"
    )


@torch.no_grad()
def _rounding(encoder: Encoder, role: Role, texts: list[str], expected: np.ndarray) -> float:
    """What rounding in float32 can come to with these weights: the largest difference, of three, after moving each by as much.

    A sum of D products is rounded D times, up or down, so its error grows as the root of D.
    """
    last_digit, worst = torch.finfo(torch.float32).eps, 0.0
    for seed in range(3):
        moved = copy.deepcopy(in_dtype(encoder, torch.float32))
        random = torch.Generator(encoder.device).manual_seed(seed)
        for weight in moved.trunk.parameters():
            noise = torch.rand(weight.shape, generator=random, device=weight.device)
            weight.mul_(1 + last_digit * encoder.embedding_size**0.5 * noise)
        worst = max(worst, float(_difference(moved.encode(texts, role), expected).max()))
    return worst


def _difference(given: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each row, relative to its largest entry."""
    return np.abs(given - expected).max(1) / np.abs(expected).max(1).clip(min=1e-9)


def _has_sentence_transformers() -> bool:
    return importlib.util.find_spec("sentence_transformers") is not None


def _with_tokens(texts: list[str], encoder: Encoder, role: Role) -> tuple[list[str], Rows, np.ndarray]:
    """The texts that have any token in this role, with the encoder's ids and embeddings."""
    compared = [text for text, ids in zip(texts, encoder.token_ids(texts, role), strict=True) if ids]
    return compared, encoder.token_ids(compared, role), encoder.encode(compared, role)


def _around(limit: int, tokenizer) -> list[str]:
    """Texts of limit - 1, limit and limit + 1 tokens, as far as a repeated word of the tokenizer makes them."""
    for word in (" a", " the", "a", "1"):
        by_length = {len(tokenizer(word * n, add_special_tokens=False)["input_ids"]): word * n for n in range(max(1, limit - 3), limit + 3)}
        if found := [by_length[n] for n in (limit - 1, limit, limit + 1) if n in by_length]:
            return found
    return []


def _shown(ids: list[int], other: list[int]) -> str:
    """A long list is shown from shortly before the first difference."""
    if len(ids) <= 40:
        return str(ids)
    start = max(0, next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other))) - 5)
    return f"{len(ids)} ids, from place {start}: {ids[start : start + 20]}"
