"""Probes: a few texts and what a model made of them when it was saved, by which whoever opens it knows that it still does.

They are computed in float32. Weights that are opened in half precision give other numbers, by as much as these very weights
make of a rounding: that is measured when the model is saved and kept with the probes (`rounding`), and some of it is allowed.
"""

import copy
import math

import numpy as np
import torch

from sgpt.encoder.contract import EncoderLike
from sgpt.runtime.errors import InputError
from sgpt.text.markers import ROLES

TEXTS = ("parse a date from a string", "", " [[1]]{}\n?", "naïve 東京 🙂")
NUMBERS = 32  # of each embedding: any wrong weight, token or pooling shows in every number
TOLERANCE = 1e-3  # of the largest entry, in float32: other machines sum in another order
ROUNDINGS = 3  # times the measured rounding is allowed: other machines round elsewhere, and a wrong weight shows by far more
HALVES = ("bfloat16", "float16")


def probes(encoder: EncoderLike) -> dict[str, list]:
    """{"texts", "query", "document"}: the first NUMBERS numbers of each embedding, for the contract."""
    made: dict[str, list] = {"texts": list(TEXTS)}
    for role in ROLES:
        made[role] = [[float(f"{number:.7g}") for number in row] for row in encoder.encode(TEXTS, role)[:, :NUMBERS].tolist()]
    return made


def probe_difference(encoder: EncoderLike, stored: dict[str, list] | None = None) -> float:
    """Largest difference to the probes, those in the contract by default, as a share of their largest entry; 0 without any."""
    stored = encoder.contract.probes if stored is None else stored
    if not stored:
        return 0.0
    expected = {role: np.array(stored[role]) for role in ROLES}
    given = {role: encoder.encode(stored["texts"], role)[:, :NUMBERS] for role in ROLES}
    if any(given[role].shape != expected[role].shape for role in ROLES):
        return math.inf
    largest = max(np.abs(rows).max() for rows in expected.values())
    difference = max(np.abs(given[role] - expected[role]).max() for role in ROLES)  # NaN stays one
    return float(difference) / max(float(largest), 1e-9)


def in_dtype(encoder: EncoderLike, dtype: torch.dtype) -> EncoderLike:
    """A copy that holds and computes all weights in `dtype`; the encoder itself when it does so already.

    Buffers are left as they are, as loading in this dtype leaves them: rotary frequencies stay float32.
    """
    if all(parameter.dtype == dtype for parameter in encoder.trunk.parameters()):
        return encoder
    with encoder.weights:
        trunk = copy.deepcopy(encoder.trunk)
    for parameter in trunk.parameters():
        parameter.data = parameter.data.to(dtype)
    return type(encoder)(trunk, encoder.tokenizer, encoder.contract, tokens_per_pack=encoder.tokens_per_pack)


def rounding(encoder: EncoderLike, dtypes: tuple[str, ...] = HALVES) -> dict[str, float | None]:
    """dtype -> probe difference of these weights in it to the same in float32; None where they overflow it."""
    exact = probes(in_dtype(encoder, torch.float32))
    found: dict[str, float | None] = {}
    for name in dtypes:
        try:
            found[name] = float(f"{probe_difference(in_dtype(encoder, getattr(torch, name)), exact):.3g}")
        except InputError:  # `encode` gives finite numbers or none
            found[name] = None
    return found


def check(encoder: EncoderLike, source: str) -> EncoderLike:
    """The encoder, if it still gives its probes; InputError when weights, tokenizer or library changed under the contract."""
    if not encoder.contract.probes:
        return encoder
    allowed, name = TOLERANCE, str(encoder.trunk.dtype).removeprefix("torch.")
    if name in HALVES:
        known = encoder.contract.rounding
        measured = known[name] if name in known else rounding(encoder, (name,))[name]
        if measured is None:
            raise InputError(f"{source}: its embeddings are no numbers in {name}, which the weights overflow; open it in float32 or bfloat16")
        allowed = max(TOLERANCE, ROUNDINGS * measured)
    difference = probe_difference(encoder)
    if not difference <= allowed:  # also refuses NaN
        raise InputError(
            f"{source}: its embeddings differ by {difference:.1e} of the largest entry from those it was saved with, "
            f"where {allowed:.1e} is allowed in {name}; the weights, the tokenizer or a library changed since. Export the run again: "
            "python train/export.py run=<run folder>"
        )
    return encoder
