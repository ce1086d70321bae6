"""Metrics of embeddings against numpy over all pairs (n x n), scikit-learn, and values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import NearestNeighbors

from fac_jax.diversity.bert import unit
from fac_jax.diversity.vectors import (
    cluster_centres,
    cluster_entropy,
    cosine_distance,
    covariance_trace,
    density,
    novel_sum,
    vendi_score,
)


def normal(rows: int, width: int = 12, seed: int = 0) -> np.ndarray:
    """Vectors around three centres."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(rows, width)) + 2 * np.eye(width)[random.integers(3, size=rows)]).astype(np.float32)


VECTORS = normal(60)
UNIT = unit(VECTORS)


def test_unit_rows() -> None:
    np.testing.assert_allclose(np.linalg.norm(UNIT, axis=1), 1, rtol=1e-6)
    assert (unit(np.zeros((2, 3), np.float32)) == 0).all()


def test_cosine_distance_is_the_mean_over_pairs() -> None:
    pairs = cosine_distances(VECTORS)[np.triu_indices(len(VECTORS), 1)]
    assert cosine_distance(UNIT) == pytest.approx(pairs.mean(), rel=1e-5)
    assert cosine_distance(np.float32([[1, 0], [0, 1], [-1, 0]])) == pytest.approx((1 + 1 + 2) / 3)


def test_trace_is_that_of_numpys_covariance() -> None:
    assert covariance_trace(VECTORS) == pytest.approx(np.trace(np.cov(VECTORS, rowvar=False)), rel=1e-5)
    assert covariance_trace(UNIT) == pytest.approx(cosine_distance(UNIT), rel=1e-5), (
        "why it is not taken from unit rows"
    )


def test_vendi_score_is_that_of_the_kernel() -> None:
    values = np.linalg.eigvalsh(UNIT.astype(np.float64) @ UNIT.T.astype(np.float64) / len(UNIT))
    values = values[values > 1e-12]
    assert vendi_score(UNIT) == pytest.approx(math.exp(-(values * np.log(values)).sum()), rel=1e-5)


def test_vendi_score_counts_different_documents() -> None:
    assert vendi_score(np.eye(7, dtype=np.float32)) == pytest.approx(7)
    assert vendi_score(np.repeat(np.eye(7, dtype=np.float32)[:3], 5, axis=0)) == pytest.approx(3), "copies add nothing"
    assert vendi_score(np.repeat(UNIT[:1], 9, axis=0)) == pytest.approx(1, abs=1e-5)


def restated(unit_nd: np.ndarray, reference_rd: np.ndarray, neighbours: int, beta: float, alpha: float) -> float:
    """NovelSum, pair by pair."""
    novelties = []
    for i, x in enumerate(unit_nd):
        squared = sorted(float(((x - y) ** 2).sum()) for y in reference_rd if not np.allclose(x, y))[:neighbours]
        sigma = 1 / (sum(squared) / neighbours)
        distances = sorted(1 - float(x @ y) for j, y in enumerate(unit_nd) if j != i)
        weights = [1 / rank**alpha for rank in range(1, len(distances) + 1)]
        novelties.append(sigma**beta * sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights))
    return sum(novelties) / len(novelties)


@pytest.mark.parametrize(("neighbours", "beta", "alpha"), [(10, 0.5, 1.0), (5, 0.25, 2.0), (3, 0.0, 0.0)])
def test_novel_sum_pair_by_pair(neighbours: int, beta: float, alpha: float) -> None:
    other = unit(normal(40, seed=1))
    for reference in (UNIT, other):
        expected = restated(UNIT.astype(np.float64), reference.astype(np.float64), neighbours, beta, alpha)
        assert novel_sum(UNIT, reference, neighbours, beta, alpha) == pytest.approx(expected, rel=1e-5)


def test_novel_sum_without_weights_is_the_mean_cosine_distance() -> None:
    assert novel_sum(UNIT, UNIT, density_power=0, proximity_power=0) == pytest.approx(cosine_distance(UNIT), rel=1e-5)


def test_density_is_of_the_neighbours_that_are_no_copies() -> None:
    squared = NearestNeighbors(n_neighbors=6).fit(UNIT).kneighbors(UNIT)[0][:, 1:] ** 2
    found = density(np.repeat(UNIT, 2, axis=0), np.concatenate([UNIT[30:], UNIT[:30]]), 5)
    assert found is not None
    np.testing.assert_allclose(found[::2], 1 / squared.mean(axis=1), rtol=1e-4)
    np.testing.assert_array_equal(found[::2], found[1::2])
    assert density(UNIT, UNIT[:5], 5) is None, "five rows, of which one is itself"


def test_cluster_entropy_counts_the_nearest_centres() -> None:
    centres = np.float32([[1, 0], [0, 1], [-1, 0], [0, -1]])
    rows = unit(np.float32([[1, 0.1], [0.9, -0.2], [0.1, 1], [-1, 0.3]]))
    assert cluster_entropy(rows, centres) == pytest.approx(0.5 * 1 + 0.25 * 2 * 2), "two in one, one in two others each"
    assert cluster_entropy(rows[:2], centres) == 0.0


def test_clusters_are_found_again() -> None:
    """Three clusters that do not overlap, of 30, 20 and 10 rows."""
    random = np.random.default_rng(3)
    rows = unit((np.eye(5)[np.repeat([0, 1, 2], [30, 20, 10])] + random.normal(0, 0.05, (60, 5))).astype(np.float32))
    centres = cluster_centres(rows, 3, seed=0)
    assert centres is not None
    shares = np.array([1 / 2, 1 / 3, 1 / 6])
    assert cluster_entropy(rows, centres) == pytest.approx(-(shares * np.log2(shares)).sum(), rel=1e-6)
    assert cluster_centres(np.repeat(rows[:2], 5, axis=0), 3, seed=0) is None, (
        "two different rows make no three clusters"
    )


def test_the_order_of_documents_does_not_matter() -> None:
    mixed = np.random.default_rng(0).permutation(len(UNIT))
    centres = cluster_centres(UNIT, 4, seed=0)
    assert centres is not None
    for figure in (cosine_distance, vendi_score, lambda x: novel_sum(x, UNIT), lambda x: cluster_entropy(x, centres)):
        assert figure(UNIT[mixed]) == pytest.approx(figure(UNIT), rel=1e-5)
    assert covariance_trace(VECTORS[mixed]) == pytest.approx(covariance_trace(VECTORS), rel=1e-5)


def test_copies_do_not_raise_diversity() -> None:
    twice = np.concatenate([UNIT, UNIT])
    assert vendi_score(twice) == pytest.approx(vendi_score(UNIT), rel=1e-5)
    for figure in (cosine_distance, lambda x: novel_sum(x, UNIT)):
        less, more = figure(twice), figure(UNIT)
        assert less is not None and more is not None and less < more


def test_what_is_undefined() -> None:
    one, none = UNIT[:1], UNIT[:0]
    assert cosine_distance(one) is None and covariance_trace(VECTORS[:1]) is None and vendi_score(none) is None
    assert novel_sum(one, UNIT) is None and novel_sum(UNIT, UNIT[:3]) is None and cluster_entropy(none, UNIT) is None
