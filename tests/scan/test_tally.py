"""The device's statistics against numpy's over all peaks at once: ties, batches of any size, one device and eight."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.mesh import FEATURE
from fac_jax.scan.peaks import NOWHERE, Peaks
from fac_jax.scan.spans import EDGES, FeatureStats
from fac_jax.scan.tally import count, new_tally, places, positions, slots, stats
from tests.scan.reference_stats import stats_of

FEATURES = 32


def corpus(documents: int, seed: int, dense: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Peaks and positions [n, f], active tokens [f] and ids; scores tie, and some lie on edges of the histogram."""
    generator = np.random.default_rng(seed)
    values = np.array([0.25, 0.3, 1.0, 2**0.5, 5.0, 5000.0, 1e-6], np.float32)
    active = generator.random((documents, FEATURES)) < dense
    active[:, 3] = False
    peak_nf = np.where(active, generator.choice(values, active.shape), 0).astype(np.float32)
    position_nf = np.where(active, generator.integers(0, 500, active.shape), NOWHERE).astype(np.int32)
    ids = [f"{number:016x}" for number in generator.integers(0, 2**63, documents, dtype=np.uint64) * np.uint64(2)]
    return peak_nf, position_nf, generator.integers(0, 9, FEATURES).astype(np.int32), ids


def expected(
    peak_nf: np.ndarray, position_nf: np.ndarray, tokens_f: np.ndarray, ids: list[str], top: int
) -> FeatureStats:
    document, feature = np.nonzero(peak_nf)
    numbers = np.array([int(name, 16) for name in ids], np.uint64)
    position = position_nf[document, feature].astype(np.int64)
    peak = peak_nf[document, feature]
    return stats_of(feature, peak, position, document, numbers[document], tokens_f.astype(np.int64), top)


@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize("top", [3, 20])
@pytest.mark.parametrize("dense", [0.1, 0.9])
def test_equal_to_numpy(mesh: Mesh, size: int, top: int, dense: float) -> None:
    peak_nf, position_nf, tokens_f, ids = corpus(37, seed=size, dense=dense)
    tally, batches = new_tally(FEATURES, top, mesh), 0
    for first in range(0, len(ids), size):
        rows = slice(first, first + size)
        room = ((0, size - len(ids[rows])), (0, 0))
        table = Peaks(
            jnp.asarray(np.pad(peak_nf[rows], room)),
            jnp.asarray(np.pad(position_nf[rows], room, constant_values=NOWHERE)),
            jnp.asarray(tokens_f),
        )
        tally = count(tally, table, slots(ids[rows], first, size), mesh=mesh)
        batches += 1
    found = stats(tally)
    wanted = expected(peak_nf, position_nf, tokens_f * batches, ids, top)
    for field in dataclasses.fields(FeatureStats):
        if field.name != "span_fn":
            np.testing.assert_array_equal(getattr(found, field.name), getattr(wanted, field.name), field.name)
    there = found.span_fn >= 0
    np.testing.assert_array_equal(there, wanted.span_fn >= 0)
    np.testing.assert_array_equal(places(tally)[found.span_fn[there]], wanted.span_fn[there])
    np.testing.assert_array_equal(positions(tally)[found.span_fn[there]], wanted.position_fn[there])


def test_every_leaf_is_sharded_over_features(mesh_2x4: Mesh) -> None:
    def check(leaf: jax.Array) -> None:
        assert leaf.sharding.spec[0] == FEATURE, leaf.sharding
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {FEATURES // 4}

    tally = new_tally(FEATURES, 4, mesh_2x4)
    jax.tree.map(check, tally)
    table = Peaks(jnp.ones((8, FEATURES)), jnp.zeros((8, FEATURES), jnp.int32), jnp.ones(FEATURES, jnp.int32))
    which = slots([f"{i:016x}" for i in range(8)], 0, 8)
    jax.tree.map(check, count(tally, table, which, mesh=mesh_2x4))


def test_size_does_not_depend_on_the_corpus(mesh_1x1: Mesh) -> None:
    tally = new_tally(FEATURES, 4, mesh_1x1)
    before = [leaf.nbytes for leaf in jax.tree.leaves(tally)]
    assert sum(before) == FEATURES * (4 * (3 + len(EDGES)) + 4 * 5 * 4)
    table = Peaks(jnp.ones((8, FEATURES)), jnp.zeros((8, FEATURES), jnp.int32), jnp.ones(FEATURES, jnp.int32))
    for first in range(0, 80, 8):
        which = slots([f"{i:016x}" for i in range(first, first + 8)], first, 8)
        tally = count(tally, table, which, mesh=mesh_1x1)
    assert [leaf.nbytes for leaf in jax.tree.leaves(tally)] == before
    assert stats(tally).documents_f.tolist() == [80] * FEATURES
