"""Proof of an export: every installed reader must give the encoder's token ids and embeddings."""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sgpt.encoder.encoder import Encoder
from sgpt.encoder.sentence_transformers import installed_version, is_installed
from sgpt.runtime.errors import InputError
from sgpt.text.markers import ROLES, Role
from sgpt.text.template import SEAM
from sgpt.text.tokens import TokenLists

TOLERANCE = 1e-5  # of a row's largest entry, in float32: another order of summation
ROUNDINGS = 2  # times what these very weights make of a rounding is allowed, where that is more


def verify(folder: Path, encoder: Encoder) -> dict:
    """Opens the folder anew with our reader, and with sentence-transformers if it is installed, and compares them with
    `encoder`.

    In float32: token ids must be equal, embeddings within 1e-5 of the row's largest entry, or within what rounding
    comes to with these weights. Raises InputError with the text and both id lists. Returns {"max_difference": float,
    "texts": int, "readers": [names]}.
    """
    texts = hostile_texts(encoder)
    exact = encoder.in_dtype(torch.float32)
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


@dataclass(frozen=True)
class _Reader:
    name: str
    token_ids: Callable[[list[str], Role], TokenLists]
    embed: Callable[[list[str], Role], np.ndarray]


def _readers(folder: Path, encoder: Encoder) -> Iterator[_Reader]:
    """One after the other, so that one copy of the weights is held at a time."""
    yield _our_reader(folder, encoder)
    if is_installed():
        yield _sentence_transformers_reader(folder, encoder)


def _our_reader(folder: Path, encoder: Encoder) -> _Reader:
    opened = Encoder.from_pretrained(folder).to(encoder.device)
    if opened.contract.fingerprint() != encoder.contract.fingerprint():
        raise InputError(f"{folder}: its contract {opened.contract} is not the encoder's; export again")
    return _Reader("sgpt", opened.token_ids, opened.encode)


def _sentence_transformers_reader(folder: Path, encoder: Encoder) -> _Reader:
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

    return _Reader(f"sentence-transformers {installed_version('sentence-transformers')}", token_ids, embed)


def _compare_ids(reader: _Reader, role: Role, texts: list[str], expected: TokenLists, encoder: Encoder) -> None:
    for text, ours, theirs in zip(texts, expected, reader.token_ids(texts, role), strict=True):
        if ours != theirs:
            tokenizer, markers = type(encoder.tokenizer).__name__, encoder.contract.markers.name
            raise InputError(
                f"the export is wrong: {reader.name} gives the {role} {text!r:.80} other token ids than the encoder, "
                f"{_shown(theirs, ours)} instead of {_shown(ours, theirs)}. If nobody changed the folder, {tokenizer} "
                f"with markers={markers} cannot be expressed there; use the adapter, or train with markers=none"
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
    (ids,) = encoder.token_ids([texts[row]], role)
    raise InputError(
        f"the export is wrong: {reader.name} embeds the {role} {texts[row]!r:.80} differently from the encoder, both "
        f"in float32, by {difference[row]:.1e} of its largest entry, from equal token ids {_shown(ids, [])}. It is not "
        f"rounding, which comes to {rounded:.1e} with these weights. If nobody changed the folder, "
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
