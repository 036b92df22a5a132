"""Token embeddings to one embedding a row.

Every function takes token_embeddings [rows, T, D] and attention_mask [rows, T] (1 on real tokens, padding on either
side) and returns [rows, D] in the input's dtype, computed in float32 or wider: bfloat16 cannot hold a position past
256. A row without any token gives zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sgpt.runtime.values import check_choice


def weighted_mean(token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """Position-weighted mean: token i of n weighs i / (1 + … + n); in a causal decoder later tokens have seen more.

    Source: Muennighoff 2022, SGPT, arXiv 2202.08904, section 4.1.
    """
    mask = attention_mask.long()
    return _weighted(token_embeddings, mask.cumsum(1) * mask)  # cumsum, not arange: left padding shifts the columns


def mean(token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """Every real token weighs the same."""
    return _weighted(token_embeddings, attention_mask)


def last_token(token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """The last real token.

    The original takes the first one in rows without padding, as argmin of an all-ones mask is 0.
    """
    mask = attention_mask.long()
    return _weighted(token_embeddings, (mask.cumsum(1) == mask.sum(1, keepdim=True)) * mask)


def cls(token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """The first real token."""
    mask = attention_mask.long()
    return _weighted(token_embeddings, (mask.cumsum(1) == 1) * mask)


def maximum(token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
    """Of each of the D numbers the largest over the real tokens."""
    hidden = token_embeddings.masked_fill(attention_mask.unsqueeze(-1) == 0, float("-inf")).amax(1)
    return torch.where(attention_mask.any(1, keepdim=True), hidden, torch.zeros_like(hidden))


def _weighted(token_embeddings: Tensor, weights: Tensor) -> Tensor:
    wide = torch.promote_types(token_embeddings.dtype, torch.float32)
    weights = weights.to(wide)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    with torch.autocast(weights.device.type, enabled=False):  # else bmm would take both to bfloat16
        pooled = torch.bmm(weights.unsqueeze(1), token_embeddings.to(wide))
    return pooled.squeeze(1).to(token_embeddings.dtype)


Pooling = Callable[[Tensor, Tensor], Tensor]
POOLINGS: dict[str, Pooling] = {
    "weighted_mean": weighted_mean,
    "mean": mean,
    "last_token": last_token,
    "cls": cls,
    "max": maximum,
}


@dataclass
class PoolingConfig:
    """How token embeddings become one embedding."""

    name: str = "weighted_mean"
    """A row of POOLINGS."""

    def __post_init__(self) -> None:
        check_choice("pooling.name", self.name, POOLINGS)
