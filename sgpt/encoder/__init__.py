"""Texts to embeddings: pooling, the contract, adapters, exports and their proof."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgpt.encoder.encoder import Encoder

__all__ = ["Encoder"]


def __getattr__(name: str) -> object:
    """`from sgpt.encoder import Encoder` works, without loading torch for those who want another module."""
    if name == "Encoder":
        from sgpt.encoder.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'sgpt.encoder' has no attribute {name!r}")
