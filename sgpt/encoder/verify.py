"""Proof of an export: every library that opens it must give the encoder's token ids and embeddings.

`LOADERS` has a row for each way to open a folder. A new one is a function of the folder and the encoder that returns a
`Loader`, or None where the library is not installed or the folder is of another form.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from sgpt.decoder.base_folder import local_folder
from sgpt.decoder.model_files import TOKENIZER, first_line
from sgpt.encoder.adapter import DELTA, PEFT, base_of
from sgpt.encoder.encoder import Encoder
from sgpt.encoder.model_folder import GRAPH, OPENVINO, is_graph
from sgpt.encoder.onnx import LEAST_COSINE, RunGraph, is_here, open_onnx_runtime, open_openvino
from sgpt.encoder.sentence_transformers import installed_version, is_installed, is_sentence_transformers
from sgpt.runtime.errors import InputError
from sgpt.text.markers import ROLES, Role
from sgpt.text.template import SEAM
from sgpt.text.tokens import TokenLists

TOLERANCE = 1e-5  # of a row's largest entry, in float32: another order of summation
ROUNDINGS = 2  # times what these very weights make of a rounding is allowed, where that is more


@dataclass(frozen=True)
class Loader:
    """A folder as one library has opened it.

    name: of the library, with its version. token_ids: of each text, marked and cut. embed: [texts, D], of length 1
    where the contract says so. least_cosine: what is asked in place of float32's bound where the arithmetic is another,
    as int8.
    """

    name: str
    token_ids: Callable[[list[str], Role], TokenLists]
    embed: Callable[[list[str], Role], np.ndarray]
    least_cosine: float | None = None


@dataclass(frozen=True)
class Deviation:
    """How far a loader is from the encoder, at worst, over the texts of one role.

    role: "both" where they are measured together. difference: of an embedding from the encoder's, as a share of the
    largest entry of that one; NaN where there is none to compare. bound: what is allowed of it, None where cosines are
    asked for. cosine: the lowest. error: what is wrong, as a sentence; None where all is well.
    """

    loader: str
    role: Role | Literal["both"]
    texts: int
    difference: float
    bound: float | None
    cosine: float
    error: str | None = None


def verify(folder: Path, encoder: Encoder) -> dict:
    """Opens the folder anew with every loader that can, and compares it with `encoder`.

    In float32: token ids must be equal, embeddings within 1e-5 of the row's largest entry, or within what rounding
    comes to with these weights. Raises InputError with the text and both id lists. Returns {"max_difference": float,
    "texts": int, "readers": [names]}; of a loader that computes in int8 "min_cosine" in place of the first.
    """
    differences, cosines, names = [], [], []
    for deviation in deviations(folder, encoder):
        if deviation.error is not None:
            raise InputError(deviation.error)
        if deviation.bound is not None:
            differences.append(deviation.difference)
        else:
            cosines.append(deviation.cosine)
        if deviation.loader not in names:
            names.append(deviation.loader)
    worst = {"max_difference": max(differences)} if differences else {}
    lowest = {"min_cosine": min(cosines)} if cosines else {}
    return {**worst, **lowest, "texts": len(hostile_texts(encoder)), "readers": names}


def deviations(folder: Path, encoder: Encoder) -> Iterator[Deviation]:
    """Of each loader that can open the folder, for hostile texts in both roles, against the encoder in float32."""
    texts = hostile_texts(encoder)
    exact = encoder.in_dtype(torch.float32)
    expected = {role: _with_tokens(texts, exact, role) for role in ROLES}
    del exact  # and its weights, where they are a copy
    for name, load in LOADERS.items():
        # one after the other, so that one copy of the weights is held at a time
        try:
            loader = load(folder, encoder)
            if loader is not None:
                for role in ROLES:
                    yield _compare(loader, role, *expected[role], encoder)
        except InputError as error:
            yield Deviation(name, "both", 0, np.nan, TOLERANCE, np.nan, str(error))
        except Exception as error:  # of another library, which may raise anything at what it cannot read
            reason = f"{type(error).__name__}: {first_line(error):.160}"
            yield Deviation(name, "both", 0, np.nan, TOLERANCE, np.nan, f"{name} cannot open {folder} ({reason})")


def first_loader(folder: Path, encoder: Encoder) -> Loader:
    """The first one that opens the folder."""
    return next(loader for load in LOADERS.values() if (loader := load(folder, encoder)) is not None)


def hostile_texts(encoder: Encoder) -> list[str]:
    """Texts that have broken an export, ours or another's; some are made for this tokenizer and these limits."""
    tokenizer = encoder.tokenizer
    texts = [
        "", "[", "]", "[]", "{}", "[[1]]", "{{a}}", "[a] {b}", "what?", "what?]", "why?}", "}{", '"quoted"', "f(x)[0]",
        SEAM, f"[{SEAM}x{SEAM}]", " leading", "trailing ", "  both  ", " ", "\n", "\n\na\nb\n\n", "\tx\r\n",
        "naïve café ﬁ", "e\u0301", "\u0301", "東京タワー", "🙂👩\u200d👧", "{🙂}",
        "the quick brown fox " * 500,
    ]  # fmt: skip
    for special in dict.fromkeys((tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token)):
        if special:
            texts += [special, f"[a]{special}[b]", f"{{{special}}}", f"end {special}"]
    for role in ROLES:
        texts += _around(encoder.frames[role].content_tokens, tokenizer)
    return list(dict.fromkeys(texts))


def _sgpt(folder: Path, encoder: Encoder) -> Loader | None:
    if is_graph(folder):
        return None
    opened = Encoder.from_pretrained(folder).to(encoder.device)
    if opened.contract.fingerprint() != encoder.contract.fingerprint():
        raise InputError(f"{folder}: its contract {opened.contract} is not the encoder's; export again")
    return Loader("sgpt", opened.token_ids, opened.encode)


def _sentence_transformers(folder: Path, encoder: Encoder) -> Loader | None:
    if not is_installed() or not is_sentence_transformers(folder) or is_graph(folder):
        return None
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        # of PEFT, for biases that the base has not: they are not merged here
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias term")
        model = SentenceTransformer(str(folder), device=str(encoder.device), trust_remote_code=False)

    def token_ids(texts: list[str], role: Role) -> TokenLists:
        batch = model.preprocess(texts, task=role)
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in rows]

    def embed(texts: list[str], role: Role) -> np.ndarray:
        call = model.encode_query if role == "query" else model.encode_document
        return call(texts, batch_size=8, show_progress_bar=False, convert_to_tensor=True).float().cpu().numpy()

    return Loader(f"sentence-transformers {installed_version('sentence-transformers')}", token_ids, embed)


def _transformers(folder: Path, encoder: Encoder) -> Loader | None:
    """As somebody would without this framework, who has the folder and reads the JSON files in it."""
    from transformers import AutoModel

    here = all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
    if is_graph(folder) or not here or not _says_its_roles(folder):
        return None
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).to(encoder.device).eval()
    return _by_hand(f"transformers {installed_version('transformers')}", model, folder, folder)


def _peft(folder: Path, encoder: Encoder) -> Loader | None:
    """An adapter in PEFT's form over its base, which is opened in the dtype that it had in training."""
    if not (folder / PEFT).is_file() or not _says_its_roles(folder):
        return None
    from peft import PeftModel
    from transformers import AutoModel

    base = local_folder(base_of(folder))
    tokenizer = folder if (folder / "tokenizer.json").is_file() else base
    if not (tokenizer / "tokenizer.json").is_file():
        return None
    delta = json.loads((folder / DELTA).read_text()) if (folder / DELTA).is_file() else {}
    dtype = getattr(torch, delta.get("dtype", "float32"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias term")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for what PEFT calls
        trunk = AutoModel.from_pretrained(base, dtype=dtype, trust_remote_code=False).float()
        model = PeftModel.from_pretrained(trunk, folder).float().to(encoder.device).eval()
    return _by_hand(f"peft {installed_version('peft')}", model, folder, tokenizer)


def _says_its_roles(folder: Path) -> bool:
    """Whether there is a contract to go by; those of formats before 3 do not say which ids the markers are."""
    file = folder / "sgpt.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("roles"))


def _by_hand(name: str, model: nn.Module, folder: Path, tokenizer_folder: Path) -> Loader:
    """Token ids, mask and pooling by what sgpt.json says, and by no code of ours: a second opinion on the contract.

    Where the folder has a tokenizer for each role, token ids are what these give.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": tokenizer.convert_ids_to_tokens(0)})
    contract = json.loads((folder / "sgpt.json").read_text(encoding="utf-8"))
    device = next(model.parameters()).device

    def token_ids(texts: list[str], role: Role) -> TokenLists:
        rule, prompt = contract["roles"][role], contract["prompts"].get(role, "")
        before, after, room = rule["ids_before"], rule["ids_after"], rule["content_tokens"]
        rows = []
        for text in texts:
            if tokenizer.chat_template:  # markers and text in one, as this tokenizer cuts them apart again
                text = tokenizer.apply_chat_template([{"role": "user", "content": text}], task=role, tokenize=False)
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][len(before) :]
                ids = ids[: len(ids) - len(after)]
            else:
                ids = tokenizer(prompt + text, add_special_tokens=False, verbose=False)["input_ids"]
            rows.append(before + ids[:room] + after)
        return rows

    @torch.no_grad()
    def embed(texts: list[str], role: Role) -> np.ndarray:
        rows, embeddings = token_ids(texts, role), []
        for start in range(0, len(rows), 8):
            batch = {"input_ids": rows[start : start + 8]}
            padded = tokenizer.pad(batch, padding_side="right", return_tensors="pt").to(device)
            hidden = model(**padded).last_hidden_state  # [8, T, D]
            for of_text, mask in zip(hidden, padded["attention_mask"], strict=True):
                pooled = POOLED_BY_HAND[contract["pooling"]](of_text[mask.bool()])
                embeddings.append(pooled / pooled.norm() if contract["normalize"] else pooled)
        return torch.stack(embeddings).cpu().numpy()

    if (of_roles := _role_tokenizers(folder)) is not None:
        return Loader(name, lambda texts, role: of_roles(texts, role)["input_ids"], embed)
    return Loader(name, token_ids, embed)


POOLED_BY_HAND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of one text [T, D], not by our own poolings
    "weighted_mean": lambda hidden: sum(i * h for i, h in enumerate(hidden, 1)) / sum(range(1, len(hidden) + 1)),
    "mean": lambda hidden: hidden.mean(0),
    "last_token": lambda hidden: hidden[-1],
    "cls": lambda hidden: hidden[0],
    "max": lambda hidden: hidden.amax(0),
}


def _onnx_runtime(folder: Path, encoder: Encoder) -> Loader | None:
    if not (folder / GRAPH).is_file() or not is_here("onnxruntime"):
        return None
    run, weights = open_onnx_runtime(folder / GRAPH)
    least_cosine = None if weights == "float32" else LEAST_COSINE
    return _of_graph(f"ONNX Runtime {installed_version('onnxruntime')}", folder, run, least_cosine)


def _openvino(folder: Path, encoder: Encoder) -> Loader | None:
    if not (folder / OPENVINO).is_file() or not is_here("openvino"):
        return None
    return _of_graph(f"OpenVINO {installed_version('openvino')}", folder, open_openvino(folder / OPENVINO))


def _of_graph(name: str, folder: Path, run: RunGraph, least_cosine: float | None = None) -> Loader:
    """Rows of like lengths together, padded a few at a time as the tokenizer of the role does."""
    token_ids = _role_tokenizers(folder)

    def embed(texts: list[str], role: Role) -> np.ndarray:
        lengths = [len(ids) for ids in token_ids(texts, role)["input_ids"]]
        by_length = np.argsort(lengths, kind="stable")
        parts = []
        for start in range(0, len(texts), 8):
            rows = [texts[number] for number in by_length[start : start + 8]]
            batch = token_ids(rows, role, padding=True, return_tensors="np")
            parts.append(run(batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64)))
        return np.concatenate(parts)[np.argsort(by_length)]

    return Loader(name, lambda texts, role: token_ids(texts, role)["input_ids"], embed, least_cosine)


def _role_tokenizers(folder: Path) -> Callable[..., Mapping] | None:
    """The tokenizer of each role as it is called plainly; None where the folder has none."""
    from transformers import PreTrainedTokenizerFast

    if not all((folder / role / TOKENIZER).is_file() for role in ROLES):
        return None
    tokenizers = {role: PreTrainedTokenizerFast.from_pretrained(folder / role) for role in ROLES}
    return lambda texts, role, **options: tokenizers[role](texts, truncation=True, **options)


LOADERS: dict[str, Callable[[Path, Encoder], Loader | None]] = {
    "sgpt": _sgpt,
    "sentence-transformers": _sentence_transformers,
    "transformers": _transformers,
    "peft": _peft,
    "onnxruntime": _onnx_runtime,
    "openvino": _openvino,
}


def _compare(
    loader: Loader, role: Role, texts: list[str], ids: TokenLists, embeddings: np.ndarray, encoder: Encoder
) -> Deviation:  # fmt: skip
    """texts, ids, embeddings [texts, D]: of the encoder, in float32."""
    bound = None if loader.least_cosine is not None else TOLERANCE
    if error := _other_ids(loader, role, texts, ids, encoder):
        return Deviation(loader.name, role, len(texts), np.nan, bound, np.nan, error)
    given = loader.embed(texts, role)
    differences, cosines = _difference(given, embeddings), row_cosines(given, embeddings)
    # a row that is no number is the worst of all
    if loader.least_cosine is not None:
        row = int(np.nan_to_num(cosines, nan=-np.inf).argmin())
        is_wrong = not cosines[row] >= loader.least_cosine
    else:
        row = int(np.nan_to_num(differences, nan=np.inf).argmax())
        if not differences[row] <= TOLERANCE:
            bound = max(TOLERANCE, ROUNDINGS * _rounding(encoder, role, texts, embeddings))
        is_wrong = not differences[row] <= bound
    worst = Deviation(loader.name, role, len(texts), float(differences[row]), bound, float(cosines[row]))
    return replace(worst, error=_other_embedding(loader, worst, texts[row], encoder)) if is_wrong else worst


def _other_ids(loader: Loader, role: Role, texts: list[str], expected: TokenLists, encoder: Encoder) -> str | None:
    """A sentence on the first text that has other token ids."""
    for text, ours, theirs in zip(texts, expected, loader.token_ids(texts, role), strict=True):
        if ours != theirs:
            tokenizer, markers = type(encoder.tokenizer).__name__, encoder.contract.markers.name
            return (
                f"the export is wrong: {loader.name} gives the {role} {text!r:.80} other token ids than the encoder, "
                f"{_shown(theirs, ours)} instead of {_shown(ours, theirs)}. If nobody changed the folder, {tokenizer} "
                f"with markers={markers} cannot be expressed there; use the adapter, or train with markers=none"
            )
    return None


def _other_embedding(loader: Loader, worst: Deviation, text: str, encoder: Encoder) -> str:
    (ids,) = encoder.token_ids([text], worst.role)
    if worst.bound is None:
        return (
            f"the export is wrong: {loader.name} embeds the {worst.role} {text!r:.80} at a cosine of "
            f"{worst.cosine:.4f} to the encoder, where {loader.least_cosine} is asked, from equal token ids "
            f"{_shown(ids, [])}"
        )
    return (
        f"the export is wrong: {loader.name} embeds the {worst.role} {text!r:.80} differently from the encoder, both "
        f"in float32, by {worst.difference:.1e} of its largest entry, from equal token ids {_shown(ids, [])}. It is "
        f"not rounding, for which {worst.bound:.1e} is allowed with these weights. If nobody changed the folder, "
        f"{type(encoder.trunk).__name__} cannot be expressed there; use the adapter"
    )


@torch.no_grad()
def _rounding(encoder: Encoder, role: Role, texts: list[str], expected: np.ndarray) -> float:
    """What rounding in float32 can come to with these weights, which are moved by as much, three times at random.

    A sum of D products is rounded D times, up or down, so its error grows as the root of D.
    """
    last_digit = torch.finfo(torch.float32).eps
    worst = 0.0
    for seed in range(3):
        moved = copy.deepcopy(encoder.in_dtype(torch.float32))
        random = torch.Generator(encoder.device).manual_seed(seed)
        for weight in moved.trunk.parameters():
            noise = torch.rand(weight.shape, generator=random, device=weight.device)
            weight.mul_(1 + last_digit * encoder.embedding_size**0.5 * noise)
        worst = max(worst, float(_difference(moved.encode(texts, role), expected).max()))
    return worst


def _difference(given: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each row, relative to its largest entry."""
    return np.abs(given - expected).max(1) / np.abs(expected).max(1).clip(min=1e-9)


def row_cosines(given: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each pair of rows [rows], in float64; 0 where one is zeros, NaN where one is no number."""
    given, expected = given.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(given, axis=1) * np.linalg.norm(expected, axis=1)
    return (given * expected).sum(1) / lengths.clip(min=1e-30)


def _with_tokens(texts: list[str], encoder: Encoder, role: Role) -> tuple[list[str], TokenLists, np.ndarray]:
    """The texts that have any token in this role, with the encoder's ids and embeddings."""
    compared = [text for text, ids in zip(texts, encoder.token_ids(texts, role), strict=True) if ids]
    return compared, encoder.token_ids(compared, role), encoder.encode(compared, role)


def _around(limit: int, tokenizer) -> list[str]:
    """Texts of limit - 1, limit and limit + 1 tokens, as far as a repeated word of the tokenizer makes them."""
    for word in (" a", " the", "a", "1"):
        by_length: dict[int, str] = {}
        for times in range(max(1, limit - 3), limit + 3):
            text = word * times
            by_length[len(tokenizer(text, add_special_tokens=False)["input_ids"])] = text
        texts = [by_length[length] for length in (limit - 1, limit, limit + 1) if length in by_length]
        if texts:
            return texts
    return []


def _shown(ids: list[int], other: list[int]) -> str:
    """A long list is shown from shortly before the first difference."""
    if len(ids) <= 40:
        return str(ids)
    difference = min(len(ids), len(other))
    for index, (one, another) in enumerate(zip(ids, other, strict=False)):
        if one != another:
            difference = index
            break
    start = max(0, difference - 5)
    return f"{len(ids)} ids, from place {start}: {ids[start : start + 20]}"
