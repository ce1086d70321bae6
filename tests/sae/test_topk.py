"""Exact top-k against jax.lax.top_k on one shard and four, with ties, skew and every k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fac_jax.config.machine import MeshConfig
from fac_jax.mesh import DATA, FEATURE, make_mesh
from fac_jax.sae import topk
from fac_jax.sae.topk import top_k, winners


def rows(kind: str, b: int, features: int) -> jax.Array:
    """Random rows: without ties, with many, and with all large values on one shard."""
    rng = np.random.default_rng([b, features, *kind.encode()])
    x_bf = rng.standard_normal((b, features))
    if kind == "ties":
        x_bf = np.round(x_bf * 2) / 2
    if kind == "equal":
        x_bf[:] = 1.5
    if kind == "skew":
        x_bf[:, : features // 4] += 10
    return jnp.asarray(x_bf, jnp.float32)


@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "skew"])
@pytest.mark.parametrize(
    ("features", "k"), [(64, 1), (64, 20), (64, 64), (4096, 3), (4096, 32), (4100, 20), (65536, 20)]
)
def test_equals_lax_top_k(kind: str, features: int, k: int, mesh_2x4: Mesh) -> None:
    x_bf = rows(kind, 4, features)
    expected = jax.lax.top_k(x_bf, k)
    for mesh in (None, mesh_2x4):
        for got, want in zip(jax.jit(top_k, static_argnums=(1, 2))(x_bf, k, mesh), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_bfloat16_keeps_type_and_order() -> None:
    x_bf = rows("plain", 4, 512).astype(jnp.bfloat16)
    for got, want in zip(top_k(x_bf, 20), jax.lax.top_k(x_bf, 20), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_groups_are_used_where_they_pay() -> None:
    """A row of 65,536 is never sorted whole: the largest top-k in the program is over the groups' maxima."""
    text = jax.jit(top_k, static_argnums=1).lower(rows("plain", 2, 65536), 20).as_text()
    assert "chlo.top_k" in text
    assert not [line for line in text.splitlines() if "chlo.top_k" in line and "2x65536xf32" in line]


@pytest.fixture(params=["2x4", "1x8", "1x8 in two levels"])
def sharded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mesh:
    """Meshes of 4 and 8 feature shards; in two levels, 8 shards gather as 4 groups of 2."""
    shape, *levels = request.param.split(maxsplit=1)
    if levels:
        monkeypatch.setattr(topk, "TWO_LEVELS", 8)
    return make_mesh(MeshConfig(*map(int, shape.split("x"))))


@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "skew"])
def test_winners_are_the_global_top_k(kind: str, sharded: Mesh) -> None:
    x_bf, k_max = rows(kind, 4, 64), 12

    @jax.jit
    def kept(x_bf: jax.Array, k: jax.Array) -> jax.Array:
        def core(x_bf: jax.Array, k: jax.Array) -> jax.Array:
            val_bk, idx_bk = jax.lax.top_k(x_bf, min(k_max, x_bf.shape[1]))
            keep_bk = jnp.arange(val_bk.shape[1]) < winners(val_bk, k, k_max, (FEATURE,))[:, None]
            return jnp.zeros(x_bf.shape, bool).at[jnp.arange(len(x_bf))[:, None], idx_bk].set(keep_bk)

        return jax.shard_map(core, mesh=sharded, in_specs=(P(DATA, FEATURE), P()), out_specs=P(DATA, FEATURE))(x_bf, k)

    for k in (1, 5, k_max):
        expected = np.zeros(x_bf.shape, bool)
        np.put_along_axis(expected, np.asarray(jax.lax.top_k(x_bf, k)[1]), True, axis=1)
        np.testing.assert_array_equal(kept(x_bf, jnp.int32(k)), expected)


@pytest.mark.parametrize("kind", ["ties", "skew"])
def test_two_levels_equal_lax_top_k(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "TWO_LEVELS", 8)
    x_bf, mesh = rows(kind, 4, 1024), make_mesh(MeshConfig(1, 8))
    text = jax.jit(top_k, static_argnums=(1, 2)).lower(x_bf, 20, mesh).as_text()
    assert "4x40xf32" in text and "4x160xf32" not in text  # lists of 2 shards, never of 8
    for got, want in zip(jax.jit(top_k, static_argnums=(1, 2))(x_bf, 20, mesh), jax.lax.top_k(x_bf, 20), strict=True):
        np.testing.assert_array_equal(got, want)
