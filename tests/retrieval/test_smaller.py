"""Smaller embeddings, against sentence-transformers' quantisation, scikit-learn's projection, and by hand."""

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings
from sklearn.decomposition import TruncatedSVD

from sgpt.retrieval.smaller import SizeConfig, Sizing, unit_length
from sgpt.runtime.errors import InputError


@pytest.fixture
def embeddings() -> np.ndarray:
    """[200, 16] of length 1, longer in some directions than in others."""
    random = np.random.default_rng(0)
    return unit_length((random.standard_normal((200, 16)) * np.linspace(3, 0.1, 16) + 0.5).astype(np.float32))


def fitted(embeddings: np.ndarray, **size) -> Sizing:
    """Given in parts of 64."""
    return Sizing.fit(SizeConfig(**size), True, lambda: iter(np.array_split(embeddings, 4)))


def test_int8_and_binary_are_bitwise_those_of_sentence_transformers(embeddings):
    queries = embeddings[::-1][:7] * np.float32(1.3)  # some beyond the ranges
    int8 = fitted(embeddings, precision="int8")
    assert np.array_equal(int8.encode(embeddings), quantize_embeddings(embeddings, "int8"))
    assert np.array_equal(int8.encode(queries), quantize_embeddings(queries, "int8", ranges=int8.ranges))
    assert np.array_equal(fitted(embeddings, precision="binary").encode(embeddings),
                          quantize_embeddings(embeddings, "ubinary"))  # fmt: skip


def test_int8_is_decoded_to_within_half_a_step_and_binary_to_its_signs(embeddings):
    int8 = fitted(embeddings, precision="int8")
    step = (embeddings.max(0) - embeddings.min(0)) / 255
    assert (np.abs(int8.decode(int8.encode(embeddings)) - embeddings) <= 0.5001 * step).all()
    binary = fitted(embeddings, precision="binary")
    assert np.array_equal(binary.decode(binary.encode(embeddings)), np.where(embeddings > 0, 1.0, -1.0))


def test_a_dimension_that_never_changes_is_no_division_by_zero(embeddings):
    embeddings[:, 3] = 0.25
    int8 = fitted(embeddings, precision="int8")
    assert np.array_equal(int8.encode(embeddings), quantize_embeddings(embeddings, "int8"))


def test_pca_is_the_projection_of_scikit_learn_without_a_mean(embeddings):
    sizing = fitted(embeddings, reduce="pca", dimensions=5)
    theirs = TruncatedSVD(5, algorithm="arpack").fit(embeddings.astype(np.float64)).components_.T
    cosines = np.abs((sizing.directions * theirs).sum(0))
    assert np.abs(cosines - 1).max() < 1e-6
    projected = sizing.project(embeddings)
    assert np.abs(np.linalg.norm(projected, axis=1) - 1).max() < 1e-6
    by_hand = embeddings.astype(np.float64) @ (theirs * np.sign((sizing.directions * theirs).sum(0)))
    assert np.abs(projected - by_hand / np.linalg.norm(by_hand, axis=1, keepdims=True)).max() < 1e-5


def test_pca_to_all_dimensions_keeps_every_cosine(embeddings):
    projected = fitted(embeddings, reduce="pca", dimensions=16).project(embeddings)
    assert np.abs(projected @ projected.T - embeddings @ embeddings.T).max() < 1e-5


def test_a_prefix_is_the_first_dimensions_of_length_1(embeddings):
    sizing = Sizing(SizeConfig("prefix", 4))
    first = embeddings[:, :4].astype(np.float64)
    assert np.abs(sizing.project(embeddings) - first / np.linalg.norm(first, axis=1, keepdims=True)).max() < 1e-6
    whole = Sizing(SizeConfig("prefix", 4), normalize=False)
    assert np.array_equal(whole.project(embeddings), embeddings[:, :4])
    assert not Sizing(SizeConfig("prefix", 4)).project(np.zeros((1, 16), np.float32)).any()


def test_precision_is_of_what_is_projected(embeddings):
    sizing = fitted(embeddings, reduce="pca", dimensions=8, precision="int8")
    assert np.array_equal(sizing.encode(embeddings), quantize_embeddings(sizing.project(embeddings), "int8"))
    assert fitted(embeddings, reduce="prefix", dimensions=8, precision="binary").encode(embeddings).shape == (200, 1)
    assert fitted(embeddings, precision="float16").encode(embeddings).dtype == np.float16


def test_what_was_fitted_is_the_same_when_it_is_loaded(embeddings, tmp_path):
    config = SizeConfig("pca", 8, "int8")
    sizing = fitted(embeddings, reduce="pca", dimensions=8, precision="int8")
    sizing.save(tmp_path)
    loaded = Sizing.load(tmp_path, config, True, 16)
    assert np.array_equal(loaded.encode(embeddings), sizing.encode(embeddings))
    with pytest.raises(InputError, match=r"directions is \(16, 8\), and \(32, 8\) is right; encode the texts again"):
        Sizing.load(tmp_path, config, True, 32)
    (tmp_path / "_reduction.safetensors").write_bytes(b"\1\0\0\0\0\0\0\0{")
    with pytest.raises(InputError, match=r"_reduction\.safetensors: cannot be read \(.*\); encode the texts again"):
        Sizing.load(tmp_path, config, True, 16)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"reduce": "umap"}, "reduce='umap' is unknown; choose prefix or pca"),
        ({"reduce": "pca"}, "reduce=pca needs dimensions="),
        ({"dimensions": 8}, "dimensions=8 needs reduce=prefix or reduce=pca"),
        ({"reduce": "pca", "dimensions": 0}, "dimensions=0 must be 1 or more, or null for all"),
        ({"precision": "int4"}, "precision='int4' is unknown; choose float32, float16, int8 or binary"),
        ({"reduce": "prefix", "dimensions": 12, "precision": "binary"}, "dimensions=12: .*; take a multiple of 8"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size, message):
    with pytest.raises(InputError, match=message):
        SizeConfig(**size)


def test_too_few_texts_to_fit_are_refused():
    with pytest.raises(InputError, match="reduce=pca: 5 texts span no 8 dimensions; lower dimensions, or give more"):
        SizeConfig("pca", 8).check_texts(5)
    with pytest.raises(InputError, match="precision=int8: one text has no range"):
        SizeConfig(precision="int8").check_texts(1)
