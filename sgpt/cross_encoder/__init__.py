"""SGPT-CE: re-ranking by the log-probability of a query given a document."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgpt.cross_encoder.cross_encoder import CrossEncoder

__all__ = ["CrossEncoder"]


def __getattr__(name: str) -> object:
    """`from sgpt.cross_encoder import CrossEncoder` works, without loading torch for those who want another module."""
    if name == "CrossEncoder":
        from sgpt.cross_encoder.cross_encoder import CrossEncoder

        return CrossEncoder
    raise AttributeError(f"module 'sgpt.cross_encoder' has no attribute {name!r}")
