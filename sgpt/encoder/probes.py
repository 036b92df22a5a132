"""Probes: a few texts and what a model made of them when it was saved, by which whoever opens it knows that it still
does.

They are computed in float32. Weights that are opened in half precision give other numbers, by as much as these very
weights make of a rounding: that is measured when the model is saved and kept with the probes (`rounding`), and some of
it is allowed.

The texts are those that have broken servers and exports: of equal lengths (a batch without padding), of one token, of
none, longer than the limit, with brackets, special tokens, emoji and letters of other scripts. Token ids are compared
for all of them on opening, embeddings for the short ones, which takes a fraction of a second; verifying a folder
compares all.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from sgpt.encoder.contract import Contract
from sgpt.runtime.errors import InputError
from sgpt.runtime.provenance import computing_versions
from sgpt.text.markers import ROLES, Role
from sgpt.text.tokens import TokenLists

EQUAL_LENGTHS = ("x sort the list", "x list the sort", "x the sort list", "x the list sort")  # for any tokenizer
PROBE_TEXTS = (
    "parse a date from a string", "", " [[1]]{}\n?", "naïve 東京 🙂",
    *EQUAL_LENGTHS, "a", "the quick brown fox " * 100, "[what?]", "{why}", "]", "end<|endoftext|>", "</s> [SEP]",
    "👩\u200d👧🙂", "東京タワーの高さ",
)  # fmt: skip
NUMBERS = 32  # of each embedding: any wrong weight, token or pooling shows in every number
SHORT_PROBE = 64  # tokens of a probe that is embedded on opening, next to those that all have
TOLERANCE = 1e-3  # of the largest entry, in float32: other machines sum in another order
# times the measured rounding is allowed: other machines round elsewhere, and a wrong weight shows by far more
ROUNDINGS = 3
HALVES = ("bfloat16", "float16")
Encode = Callable[[Sequence[str], Role], np.ndarray]  # as `Encoder.encode`: embeddings [texts, D]
TokenIds = Callable[[Sequence[str], Role], TokenLists]  # as `Encoder.token_ids`


class Probed(Protocol):
    """What is asked of an encoder here."""

    contract: Contract
    encode: Encode
    token_ids: TokenIds

    def encode_in(self, dtype: torch.dtype) -> Encode: ...


def measure(encoder: Probed) -> dict[str, dict]:
    """The fields `probes` and `rounding` of the contract that is saved with the encoder's weights."""
    exact = encoder.encode_in(torch.float32)
    return {"probes": probes(exact, encoder.token_ids), "rounding": rounding(encoder.encode_in)}


def probes(encode: Encode, token_ids: TokenIds | None = None) -> dict[str, list]:
    """{"texts", "query", "document"}, of each embedding the first NUMBERS numbers; encode: in float32.

    token_ids: adds the ids of each text, "query_ids" and "document_ids".
    """
    measured: dict[str, list] = {"texts": list(PROBE_TEXTS)}
    for role in ROLES:
        rows = encode(PROBE_TEXTS, role)[:, :NUMBERS].tolist()
        measured[role] = [[float(f"{number:.7g}") for number in row] for row in rows]
        if token_ids is not None:
            measured[f"{role}_ids"] = token_ids(PROBE_TEXTS, role)
    return measured


def probe_difference(encode: Encode, stored: dict[str, list], longest: int | None = None) -> float:
    """Largest difference to the stored probes, as a share of their largest entry; 0 without any.

    longest: texts with more tokens than that beyond the shortest, which holds what a prompt adds, are left out.
    """
    if not stored:
        return 0.0
    rows = range(len(stored["texts"]))
    if longest is not None and "query_ids" in stored:
        lengths = [max(len(stored[f"{role}_ids"][row]) for role in ROLES) for row in rows]
        rows = [row for row in rows if lengths[row] - min(lengths) <= longest]
    texts = [stored["texts"][row] for row in rows]
    expected = {role: np.array([stored[role][row] for row in rows]) for role in ROLES}
    given = {role: encode(texts, role)[:, :NUMBERS] for role in ROLES}
    if any(given[role].shape != expected[role].shape for role in ROLES):
        return math.inf
    largest = max(np.abs(rows).max() for rows in expected.values())
    difference = max(np.abs(given[role] - expected[role]).max() for role in ROLES)  # NaN stays one
    return float(difference) / max(float(largest), 1e-9)


def rounding(
    encode_in: Callable[[torch.dtype], Encode], dtypes: tuple[str, ...] = HALVES
) -> dict[str, float | None]:
    """dtype -> probe difference of the weights in it to the same in float32; None where they overflow it.

    encode_in: of a dtype, `encode` of a model whose weights are held and computed in it.
    """
    exact = probes(encode_in(torch.float32))
    measured: dict[str, float | None] = {}
    for name in dtypes:
        try:
            measured[name] = float(f"{probe_difference(encode_in(getattr(torch, name)), exact):.3g}")
        except InputError:  # `encode` gives finite numbers or none
            measured[name] = None
    return measured


def allowed_difference(encoder: Probed, dtype: torch.dtype, source: str) -> float:
    """Of the probes, for a model that was opened in this dtype. InputError where its weights overflow it."""
    name = str(dtype).removeprefix("torch.")
    if name not in HALVES:
        return TOLERANCE
    known = encoder.contract.rounding
    measured = known[name] if name in known else rounding(encoder.encode_in, (name,))[name]
    if measured is None:
        raise InputError(
            f"{source}: its embeddings are no numbers in {name}, which the weights overflow; open it in float32 or "
            "bfloat16"
        )
    return max(TOLERANCE, ROUNDINGS * measured)


def check_probe_ids(encoder: Probed, source: str) -> None:
    """InputError when the probes no longer have their token ids: tokenizer or library changed under the contract.

    source: the model's folder, for the message.
    """
    contract = encoder.contract
    if contract.probes and (changed := changed_ids(encoder, contract.probes)):
        raise InputError(
            f"{source}: {changed}; the tokenizer or its library changed since ({_versions_changed(contract)}): put it "
            "back, or train again"
        )


def check_probe_embeddings(encoder: Probed, dtype: torch.dtype, source: str) -> None:
    """InputError when a model no longer gives its probes, at equal token ids: weights or library changed.

    dtype: in which it was opened. source: its folder, for the message.
    """
    contract = encoder.contract
    if not contract.probes:
        return
    allowed = allowed_difference(encoder, dtype, source)
    difference = probe_difference(encoder.encode, contract.probes, SHORT_PROBE)
    if not difference <= allowed:  # also refuses NaN
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{source}: its embeddings differ by {difference:.1e} of the largest entry from those it was saved with, "
            f"where {allowed:.1e} is allowed in {name}, at equal token ids; the weights or a library changed since "
            f"({_versions_changed(contract)}). Export the run again: python train/export.py run=<run folder>"
        )


def changed_ids(encoder: Probed, stored: dict[str, list]) -> str | None:
    """Says of the first probe that has other token ids than stored which they are; None where all are equal."""
    for role in ROLES:
        before = stored.get(f"{role}_ids")
        if before is None:  # of a format before 3
            continue
        for text, then, now in zip(stored["texts"], before, encoder.token_ids(stored["texts"], role), strict=True):
            if then != now:
                return f"the {role} {text!r:.60} is {len(now)} tokens {now[:12]} and was {len(then)} {then[:12]}"
    return None


def _versions_changed(contract: Contract) -> str:
    """Which of the libraries that compute have another version now than when the model was saved."""
    then = contract.origin.versions
    if not then:
        return "it was saved without the versions of libraries"
    now = computing_versions()
    changed = [f"{name} {version} -> {now.get(name)}" for name, version in then.items() if now.get(name) != version]
    return ", ".join(changed) or "all libraries have the versions of then"
