"""Selecting in tiles, and the threshold of a batch: each against a few plain lines."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fac_jax.mesh import DATA, FEATURE
from fac_jax.sae import select as module
from fac_jax.sae.select import Among, batch_threshold, select

F, D, B = 96, 24, 40


@dataclasses.dataclass(frozen=True)
class Arrays:
    w_fd: jax.Array
    b_enc_f: jax.Array
    centred_bd: jax.Array


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Values of few digits, so that many pre-activations tie."""
    rng = np.random.default_rng(0)
    shapes = ((F, D), (F,), (B, D))
    return Arrays(*(jnp.asarray(np.round(rng.standard_normal(shape)), jnp.float32) for shape in shapes))


@pytest.mark.parametrize("tile_features", [F, F // 2, F // 4, 8])
@pytest.mark.parametrize("k", [1, 7, 16, F])
def test_tiles_change_nothing(tile_features: int, k: int, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and indices are lax.top_k's, ties included, with and without a mask, however the features are cut."""
    monkeypatch.setattr(module, "TILE_ELEMENTS", {"cpu": tile_features * B})
    mask_f = jnp.asarray(np.random.default_rng(3).random(F) < 0.4)
    pre_bf = arrays.centred_bd @ arrays.w_fd.T + arrays.b_enc_f
    found = jax.jit(lambda a: select(*a, "float32", [Among(k), Among(5, mask_f)]))(dataclasses.astuple(arrays))
    for best, (scores_bf, count) in zip(found, ((pre_bf, k), (jnp.where(mask_f, pre_bf, -jnp.inf), 5)), strict=True):
        val_bk, idx_bk = jax.lax.top_k(scores_bf, count)
        np.testing.assert_array_equal(best.val_bk, val_bk)
        np.testing.assert_array_equal(best.idx_bk, idx_bk)


def test_memory_does_not_grow_with_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the features, the same temporaries: [batch, features] never exists."""
    monkeypatch.setattr(module, "TILE_ELEMENTS", {"cpu": 64 * 1024})

    def temporary_bytes(features: int) -> int:
        like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((features, 32), (features,), (64, 32))]
        compiled = jax.jit(lambda *a: select(*a, "float32", [Among(16)])).lower(*like).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    narrow, wide = temporary_bytes(4096), temporary_bytes(32768)
    assert wide - narrow < 0.1 * 64 * 32768 * 4, (narrow, wide)
    monkeypatch.setattr(module, "TILE_ELEMENTS", {"cpu": 2**40})
    assert temporary_bytes(32768) > 64 * 32768 * 4, "untiled, the same call holds all pre-activations"


@pytest.mark.parametrize("k", [1, 3, 6, 40])
def test_threshold_of_a_batch_is_the_nk_th_value(k: int, mesh: Mesh) -> None:
    """Against a sort of all positive values of the rows that count; over shards of rows and of features."""
    rng = np.random.default_rng(k)
    val_bk = (rng.standard_normal((16, 24)) * 10.0 ** rng.integers(-30, 30, (16, 24))).astype(np.float32)
    counted_b = rng.random(16) < 0.7
    axes = tuple(axis for axis in (DATA, FEATURE) if mesh.shape[axis] > 1)
    specs = (P(DATA, FEATURE), P(DATA)) if axes else (P(), P())
    run = jax.shard_map(lambda v, c: batch_threshold(v, c, k, axes), mesh=mesh, in_specs=specs, out_specs=P())
    positive = np.sort(val_bk[counted_b][val_bk[counted_b] > 0])[::-1]
    wanted = k * counted_b.sum()
    want = positive[wanted - 1] if wanted <= len(positive) else np.float32(1e-45)
    assert float(jax.jit(run)(val_bk, counted_b)) == want
