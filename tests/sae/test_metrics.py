"""Validation figures against numpy on the whole set."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.errors import UserError
from fac_jax.sae.metrics import DENSITY_EDGES, Validation, validate
from fac_jax.sae.model import SAE


def _validate(sae: SAE, k: int | None, *rest: Any, **settings: Any) -> Validation:
    (found,) = validate([(sae, k)], *rest, **settings)
    return found


@pytest.mark.parametrize("kind", ["topk", "threshold"])
def test_equal_numpy_over_uneven_blocks(kind: str, mesh: Mesh) -> None:
    rng = np.random.default_rng(0)
    w_fd = (rng.standard_normal((64, 16)) / 4).astype(np.float32)
    b_enc_f = rng.standard_normal(64).astype(np.float32) - 1
    b_enc_f[:7] = -100
    b_dec_d = (rng.standard_normal(16) + 50).astype(np.float32)
    x_bd = (rng.standard_normal((103, 16)) + 50).astype(np.float32)
    x_bd[::10] *= 100  # 11 rows beyond the limit
    blocks = np.split(x_bd, [1, 30, 31, 90])
    w_enc_fd = (w_fd + rng.standard_normal((64, 16)) / 9).astype(np.float32) if kind == "threshold" else None
    threshold_f = rng.exponential(size=64).astype(np.float32) if kind == "threshold" else None
    arrays = (None if a is None else jnp.asarray(a) for a in (w_fd, b_enc_f, b_dec_d, w_enc_fd, threshold_f))
    k = 5 if kind == "topk" else None
    found = _validate(SAE(*arrays), k, blocks, 32, mesh, norm_limit=1000.0)  # type: ignore[arg-type]

    x_bd = np.delete(x_bd, np.s_[::10], axis=0).astype(np.float64)
    pre_bf = (x_bd - b_dec_d) @ (w_fd if w_enc_fd is None else w_enc_fd).T + b_enc_f
    kept_bf = pre_bf >= np.sort(pre_bf, axis=1)[:, -5:-4] if threshold_f is None else pre_bf > threshold_f
    acts_bf = np.where(kept_bf, np.maximum(pre_bf, 0), 0)
    error_bd = x_bd - (acts_bf @ w_fd + b_dec_d)
    assert (found.rows, found.rows_left_out) == (92, 11)
    np.testing.assert_allclose(found.fvu, np.sum(error_bd**2) / np.sum((x_bd - x_bd.mean(axis=0)) ** 2), rtol=1e-5)
    np.testing.assert_allclose(found.normalised_loss, np.mean(np.sum(error_bd**2, 1) / np.sum(x_bd**2, 1)), rtol=1e-4)
    np.testing.assert_allclose(found.l0, np.mean(np.sum(acts_bf > 0, axis=1)))
    np.testing.assert_allclose(found.dead_fraction, np.mean((acts_bf == 0).all(axis=0)))
    assert found.dead_fraction >= 7 / 64
    x_hat_bd, share_f = x_bd - error_bd, np.mean(acts_bf > 0, axis=0)
    cosine_b = np.sum(x_bd * x_hat_bd, 1) / np.linalg.norm(x_bd, axis=1) / np.linalg.norm(x_hat_bd, axis=1)
    np.testing.assert_allclose(found.cosine, cosine_b.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.dense_fraction, np.mean(share_f > 0.1))
    edges = [0, *DENSITY_EDGES, 1.1]
    assert found.density == tuple(np.histogram(share_f[share_f > 0], edges)[0].tolist())
    assert sum(found.density) == 64 - round(64 * found.dead_fraction)


def test_the_mean_explains_nothing(mesh_1x1: Mesh) -> None:
    x_bd = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    silent = SAE(jnp.ones((8, 16)), jnp.full(8, -1e9), jnp.asarray(x_bd.mean(axis=0)))
    found = _validate(silent, 2, [x_bd], 64, mesh_1x1, norm_limit=np.inf)
    np.testing.assert_allclose([found.fvu, found.l0, found.dead_fraction], [1, 0, 1], rtol=1e-6)


def test_nothing_to_validate_on(mesh_1x1: Mesh) -> None:
    sae = SAE(jnp.ones((8, 16)), jnp.zeros(8), jnp.zeros(16))
    with pytest.raises(
        UserError, match=r"no held-out row can be validated on \(4 exceed norm 1\): raise train.norm_filter"
    ):
        _validate(sae, 2, [np.ones((4, 16), np.float32)], 8, mesh_1x1, norm_limit=1.0)
