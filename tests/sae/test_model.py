"""The autoencoder against the published code's numbers, and its two forms against each other."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.sae.model import Dead, TopKSAE, decode, encode, encode_relu, pre_activations, reconstruct

GOLDEN = Path(__file__).parents[1] / "data" / "official_topk_sae.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def sae(golden: dict[str, np.ndarray]) -> TopKSAE:
    return TopKSAE(jnp.asarray(golden["W_enc"].T), jnp.asarray(golden["b_enc"]), jnp.asarray(golden["b_dec"]))


def test_dense_forward_is_the_official_one(golden: dict[str, np.ndarray], sae: TopKSAE, mesh: Mesh) -> None:
    acts_bf = encode(sae, golden["x"], int(golden["k"]), mesh=mesh)
    for got, want in (
        (pre_activations(sae, golden["x"]), "pre"),
        (acts_bf, "acts"),
        (decode(sae, acts_bf), "recon"),
        (encode_relu(sae, golden["x"]), "acts_dense"),
    ):
        np.testing.assert_allclose(got, golden[want], rtol=1e-5, atol=1e-5)


def test_traced_k_is_static_k(golden: dict[str, np.ndarray], sae: TopKSAE) -> None:
    traced = jax.jit(lambda sae, x_bd, k: encode(sae, x_bd, k, k_max=64))
    for k in (1, 20, 64):
        got, want = traced(sae, golden["x"], jnp.int32(k)), encode(sae, golden["x"], k)
        np.testing.assert_array_equal(got > 0, want > 0)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert traced._cache_size() == 1  # type: ignore[attr-defined]


def test_reconstruct_is_the_dense_form(golden: dict[str, np.ndarray], sae: TopKSAE, mesh: Mesh) -> None:
    """Values, counts and gradients of the selected-rows form equal autodiff through the dense one, on both meshes."""
    target_bd = np.roll(golden["x"], 1)
    counted_b = jnp.arange(64) % 3 > 0

    def dense(sae: TopKSAE, x_bd: jax.Array) -> tuple[jax.Array, jax.Array]:
        acts_bf = encode(sae, x_bd, 20)
        return jnp.sum((decode(sae, acts_bf) - target_bd) ** 2), acts_bf

    def selected(sae: TopKSAE, x_bd: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        found = reconstruct(sae, x_bd, counted_b, jnp.int32(20), k_max=48, mesh=mesh)
        return jnp.sum((found.x_hat_bd - target_bd) ** 2), (found.active_f, found.l0_b)

    (loss, acts_bf), gradient = jax.value_and_grad(dense, has_aux=True)(sae, golden["x"])
    (loss_2, (active_f, l0_b)), gradient_2 = jax.jit(jax.value_and_grad(selected, has_aux=True))(sae, golden["x"])
    np.testing.assert_allclose(loss_2, loss, rtol=1e-5)
    np.testing.assert_array_equal(active_f, ((acts_bf > 0) & counted_b[:, None]).sum(axis=0))
    np.testing.assert_array_equal(l0_b, (acts_bf > 0).sum(axis=1))
    for got, want in zip(jax.tree.leaves(gradient_2), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("dead_count", [0, 5, 100])
def test_dead_features_reconstruct_without_bias(
    dead_count: int, golden: dict[str, np.ndarray], sae: TopKSAE, mesh: Mesh
) -> None:
    dead_f = np.zeros(256, bool)
    dead_f[np.random.default_rng(0).permutation(256)[:dead_count]] = True
    every_b = jnp.ones(64, bool)
    run = jax.jit(
        lambda sae, x_bd, dead_f: reconstruct(sae, x_bd, every_b, 20, k_max=20, mesh=mesh, dead=Dead(dead_f, 16))
    )
    found = run(sae, golden["x"], dead_f)
    pre_bf = np.where(dead_f, golden["pre"], -np.inf)
    best_bk = np.argsort(-pre_bf, axis=1, kind="stable")[:, :16]
    acts_bf = np.zeros_like(pre_bf)
    np.put_along_axis(acts_bf, best_bk, np.maximum(np.take_along_axis(pre_bf, best_bk, axis=1), 0), axis=1)
    np.testing.assert_allclose(found.dead_hat_bd, acts_bf @ golden["W_enc"].T, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(found.x_hat_bd, golden["recon"], rtol=1e-5, atol=2e-5)


def test_permuting_features_permutes_activations(golden: dict[str, np.ndarray], sae: TopKSAE) -> None:
    order = np.random.default_rng(1).permutation(256)
    permuted = TopKSAE(sae.w_fd[...][order], sae.b_enc_f[...][order], sae.b_dec_d[...])
    np.testing.assert_allclose(
        encode(permuted, golden["x"], 20), encode(sae, golden["x"], 20)[:, order], rtol=1e-6, atol=1e-6
    )
