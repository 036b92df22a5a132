"""Embeddings in fewer bytes: fewer dimensions, and fewer bits for each.

    reduce=prefix      the first dimensions, made length 1 again; a model that was trained so (Matryoshka) loses least
    reduce=pca         the directions in which the corpus' own embeddings are longest: the best projection of them there
                       is (Eckart and Young 1936). No mean is subtracted, so all D directions keep every cosine
    precision=float16  half the bytes, exact to 11 bits
    precision=int8     each dimension in 255 steps from its smallest to its largest value in the corpus, as
                       sentence_transformers.quantize_embeddings has it
    precision=binary   the sign of each dimension, eight of them a byte, as its "ubinary"

What belongs to a corpus (directions and ranges) is fitted on its embeddings, a part of them at a time, and stored with
them: queries are projected alike. They stay float32: what is compared with them are the documents' stored values, which
`decode` gives.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sgpt.runtime.errors import InputError
from sgpt.runtime.values import COUNT, check_choice, check_ranges

REDUCTIONS = ("prefix", "pca")
PRECISIONS = ("float32", "float16", "int8", "binary")
STEPS = 255  # of int8 between the ends of a range
FITTED = "_reduction.safetensors"
Parts = Callable[[], Iterable[np.ndarray]]  # the corpus' embeddings [rows, D], a part at a time, as often as called


@dataclass
class SizeConfig:
    """How many bytes an embedding takes."""

    reduce: str | None = None
    """prefix takes the first `dimensions`, pca those in which the corpus' embeddings are longest; null keeps all."""
    dimensions: int | None = None
    """Of a stored embedding, with `reduce`; null keeps all."""
    precision: str = "float32"
    """Of each dimension: float32, float16, int8 with ranges of the corpus, or binary: its sign, eight a byte."""

    def __post_init__(self) -> None:
        if self.reduce is not None:
            check_choice("reduce", self.reduce, REDUCTIONS)
        check_choice("precision", self.precision, PRECISIONS)
        check_ranges(self, dimensions=COUNT.or_null("for all"))
        if self.reduce and self.dimensions is None:
            raise InputError(f"reduce={self.reduce} needs dimensions=<how many>")
        if self.dimensions and self.reduce is None:
            raise InputError(f"dimensions={self.dimensions} needs reduce=prefix or reduce=pca")
        if self.precision == "binary" and (self.dimensions or 8) % 8:
            raise InputError(f"dimensions={self.dimensions}: precision=binary packs eight a byte; take a multiple of 8")

    def check_texts(self, texts: int) -> None:
        """InputError where so few texts cannot fit it."""
        if self.reduce == "pca" and texts < (self.dimensions or 0):
            raise InputError(
                f"reduce=pca: {texts} texts span no {self.dimensions} dimensions; lower dimensions, or give more texts"
            )
        if self.precision == "int8" and texts < 2:
            raise InputError("precision=int8: one text has no range; give more, or set precision=float16")

    @property
    def is_fitted(self) -> bool:
        """Whether it depends on the corpus, whose embeddings are then needed before the first is stored."""
        return self.reduce == "pca" or self.precision == "int8"


@dataclass(frozen=True)
class Sizing:
    """What makes embeddings [rows, D] smaller, and equal for documents and queries.

    directions [D, dimensions] of pca; ranges [2, dimensions], smallest and largest value, of int8. normalize: length 1,
    after the projection as before it.
    """

    config: SizeConfig
    normalize: bool = True
    directions: np.ndarray | None = None
    ranges: np.ndarray | None = None

    @classmethod
    def fit(cls, config: SizeConfig, normalize: bool, parts: Parts) -> "Sizing":
        """Of embeddings that are enough for it (`check_texts`)."""
        sizing = cls(config, normalize)
        if config.reduce == "pca":
            sizing = cls(config, normalize, _directions(parts, config.dimensions or 0))
        if config.precision == "int8":
            sizing = cls(config, normalize, sizing.directions, _ranges(map(sizing.project, parts())))
        return sizing

    def project(self, embeddings: np.ndarray) -> np.ndarray:
        """[rows, D] -> [rows, dimensions], float32, of documents or of queries."""
        if self.config.reduce is None:
            return np.asarray(embeddings, np.float32)
        projected = embeddings[:, : self.config.dimensions]
        if self.directions is not None:
            projected = embeddings @ self.directions
        return unit_length(projected) if self.normalize else np.ascontiguousarray(projected, np.float32)

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """[rows, D] of documents -> what is stored, [rows, dimensions], or [rows, dimensions / 8] bytes of binary."""
        projected = self.project(embeddings)
        if self.config.precision == "binary":
            return np.packbits(projected > 0, axis=1)
        if self.config.precision == "int8":
            start, step = self._steps()
            return (np.clip(np.floor((projected - start) / step), 0, STEPS) - 128).astype(np.int8)
        return projected.astype(self.config.precision)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """What is stored as float32 [rows, dimensions]: the middle of an int8's step; 1 or -1 for each bit of binary.

        Inner products with `project`ed queries rank the documents.
        """
        if self.config.precision == "binary":
            return np.unpackbits(stored, axis=1).astype(np.float32) * 2 - 1
        if self.config.precision == "int8":
            start, step = self._steps()
            return start + (stored.astype(np.float32) + 128.5) * step
        return stored.astype(np.float32)

    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Start of the range and size of a step, [dimensions] each."""
        assert self.ranges is not None, "int8 is fitted first"
        step = (self.ranges[1] - self.ranges[0]) / STEPS
        return self.ranges[0], np.where(step == 0, np.float32(1), step)

    def save(self, folder: Path) -> None:
        """What was fitted, if anything."""
        fitted = {"directions": self.directions, "ranges": self.ranges}
        tensors = {name: np.ascontiguousarray(value) for name, value in fitted.items() if value is not None}
        if tensors:
            save_file(tensors, folder / FITTED)

    @classmethod
    def load(cls, folder: Path, config: SizeConfig, normalize: bool, embedding_size: int) -> "Sizing":
        """What `save` wrote for such a configuration. InputError where it is missing or of another shape."""
        if not config.is_fitted:
            return cls(config, normalize)
        file = folder / FITTED
        try:
            tensors = load_file(file)
            directions = tensors["directions"] if config.reduce == "pca" else None
            ranges = tensors["ranges"] if config.precision == "int8" else None
        except (OSError, KeyError, SafetensorError) as error:
            raise InputError(f"{file}: cannot be read ({error}); encode the texts again") from error
        dimensions = config.dimensions or embedding_size
        for name, fitted, shape in (
            ("directions", directions, (embedding_size, dimensions)), ("ranges", ranges, (2, dimensions))
        ):  # fmt: skip
            if fitted is not None and fitted.shape != shape:
                raise InputError(f"{file}: {name} is {fitted.shape}, and {shape} is right; encode the texts again")
        return cls(config, normalize, directions, ranges)


def unit_length(embeddings: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; zeros stay."""
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.divide(embeddings, length, out=np.zeros_like(embeddings, np.float32), where=length > 0)


def _directions(parts: Parts, dimensions: int) -> np.ndarray:
    """[D, dimensions], orthonormal, longest first: eigenvectors of the second moments, summed in float64.

    Of the two signs that of which the number furthest from 0 is positive.
    """
    moments = np.zeros(())  # [D, D] from the first part on
    for part in parts():
        wide = part.astype(np.float64)
        moments = moments + wide.T @ wide
    _, vectors = np.linalg.eigh(moments)  # smallest first
    longest = vectors[:, ::-1][:, :dimensions]
    furthest = np.abs(longest).argmax(0)
    signs = np.sign(longest[furthest, np.arange(dimensions)])
    return (longest * signs).astype(np.float32)


def _ranges(parts: Iterable[np.ndarray]) -> np.ndarray:
    """[2, dimensions], float32: smallest and largest value of each."""
    smallest, largest = np.float32(np.inf), np.float32(-np.inf)
    for part in parts:
        smallest, largest = np.minimum(smallest, part.min(0)), np.maximum(largest, part.max(0))
    return np.stack([smallest, largest])
