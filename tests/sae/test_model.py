"""The autoencoder's dense forward pass against the published code's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fac_jax.sae.model import SAE, decode, encode, encode_relu, pre_activations


def test_dense_forward_is_the_official_one(golden: dict[str, np.ndarray], sae: SAE, mesh: Mesh) -> None:
    acts_bf = encode(sae, golden["x"], int(golden["k"]), mesh=mesh)
    for got, want in (
        (pre_activations(sae, golden["x"]), "pre"),
        (acts_bf, "acts"),
        (decode(sae, acts_bf), "recon"),
        (encode_relu(sae, golden["x"]), "acts_dense"),
    ):
        np.testing.assert_allclose(got, golden[want], rtol=1e-5, atol=1e-5)


def test_traced_k_is_static_k(golden: dict[str, np.ndarray], sae: SAE) -> None:
    traced = jax.jit(lambda sae, x_bd, k: encode(sae, x_bd, k, k_max=64))
    for k in (1, 20, 64):
        got, want = traced(sae, golden["x"], jnp.int32(k)), encode(sae, golden["x"], k)
        np.testing.assert_array_equal(got > 0, want > 0)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert traced._cache_size() == 1  # type: ignore[attr-defined]


def test_permuting_features_permutes_activations(golden: dict[str, np.ndarray], sae: SAE) -> None:
    order = np.random.default_rng(1).permutation(256)
    permuted = SAE(sae.w_fd[...][order], sae.b_enc_f[...][order], sae.b_dec_d[...])
    np.testing.assert_allclose(
        encode(permuted, golden["x"], 20), encode(sae, golden["x"], 20)[:, order], rtol=1e-6, atol=1e-6
    )
