"""Probes: a few texts and what a model made of them when it was saved, by which whoever opens it knows that it still does."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from sgpt.errors import InputError
from sgpt.markers import ROLES

if TYPE_CHECKING:
    from sgpt.encoder import Encoder

TEXTS = ("parse a date from a string", "", " [[1]]{}\n?", "naïve 東京 🙂")
NUMBERS = 32  # of each embedding: any wrong weight, token or pooling shows in every number
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest entry; other machines sum in another order
HALF_TOLERANCE = 0.1


def probes(encoder: "Encoder") -> dict[str, list]:
    """{"texts", "query", "document"}: the first NUMBERS numbers of each embedding, for the contract."""
    made: dict[str, list] = {"texts": list(TEXTS)}
    for role in ROLES:
        made[role] = [[float(f"{number:.7g}") for number in row] for row in encoder.encode(TEXTS, role)[:, :NUMBERS].tolist()]
    return made


def probe_difference(encoder: "Encoder") -> float:
    """Largest difference to the probes in the contract, as a share of their largest entry; 0 when it has none."""
    stored = encoder.contract.probes
    if not stored:
        return 0.0
    largest = max(np.abs(stored[role]).max() for role in ROLES)
    return max(float(np.abs(encoder.encode(stored["texts"], role)[:, :NUMBERS] - np.array(stored[role])).max()) for role in ROLES) / largest


def check(encoder: "Encoder", source: str) -> "Encoder":
    """The encoder, if it still gives its probes; InputError when weights, tokenizer or library changed under the contract."""
    difference = probe_difference(encoder)
    if difference > TOLERANCE.get(encoder.trunk.dtype, HALF_TOLERANCE):
        raise InputError(
            f"{source}: its embeddings differ by {difference:.1e} of the largest entry from those it was saved with; "
            "the weights, the tokenizer or a library changed since. Export the run again"
        )
    return encoder
