"""Probes: a few texts and what a model made of them when it was saved, by which whoever opens it knows that it still
does.

They are computed in float32. Weights that are opened in half precision give other numbers, by as much as these very
weights make of a rounding: that is measured when the model is saved and kept with the probes (`rounding`), and some of
it is allowed.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from sgpt.encoder.contract import Contract
from sgpt.runtime.errors import InputError
from sgpt.text.markers import ROLES, Role

PROBE_TEXTS = ("parse a date from a string", "", " [[1]]{}\n?", "naïve 東京 🙂")
NUMBERS = 32  # of each embedding: any wrong weight, token or pooling shows in every number
TOLERANCE = 1e-3  # of the largest entry, in float32: other machines sum in another order
# times the measured rounding is allowed: other machines round elsewhere, and a wrong weight shows by far more
ROUNDINGS = 3
HALVES = ("bfloat16", "float16")
Encode = Callable[[Sequence[str], Role], np.ndarray]  # as `Encoder.encode`: embeddings [texts, D]


def probes(encode: Encode) -> dict[str, list]:
    """{"texts", "query", "document"}: the first NUMBERS numbers of each embedding, for the contract."""
    measured: dict[str, list] = {"texts": list(PROBE_TEXTS)}
    for role in ROLES:
        rows = encode(PROBE_TEXTS, role)[:, :NUMBERS].tolist()
        measured[role] = [[float(f"{number:.7g}") for number in row] for row in rows]
    return measured


def probe_difference(encode: Encode, stored: dict[str, list]) -> float:
    """Largest difference to the stored probes, as a share of their largest entry; 0 without any."""
    if not stored:
        return 0.0
    expected = {role: np.array(stored[role]) for role in ROLES}
    given = {role: encode(stored["texts"], role)[:, :NUMBERS] for role in ROLES}
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


def check_probes(
    contract: Contract, dtype: torch.dtype, encode: Encode, encode_in: Callable[[torch.dtype], Encode], source: str
) -> None:
    """InputError when a model no longer gives its probes: weights, tokenizer or library changed under the contract.

    dtype: in which it was opened. source: its folder, for the message.
    """
    if not contract.probes:
        return
    allowed, name = TOLERANCE, str(dtype).removeprefix("torch.")
    if name in HALVES:
        known = contract.rounding
        measured = known[name] if name in known else rounding(encode_in, (name,))[name]
        if measured is None:
            raise InputError(
                f"{source}: its embeddings are no numbers in {name}, which the weights overflow; open it in float32 or "
                "bfloat16"
            )
        allowed = max(TOLERANCE, ROUNDINGS * measured)
    difference = probe_difference(encode, contract.probes)
    if not difference <= allowed:  # also refuses NaN
        raise InputError(
            f"{source}: its embeddings differ by {difference:.1e} of the largest entry from those it was saved with, "
            f"where {allowed:.1e} is allowed in {name}; the weights, the tokenizer or a library changed since. Export "
            "the run again: python train/export.py run=<run folder>"
        )
