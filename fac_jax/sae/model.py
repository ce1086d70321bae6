"""The sparse autoencoder and its forward pass (tied Top-K: arXiv 2602.10388, section 3; the official code's TopKSAE).

    pre   = (x - b_dec) E^T + b_enc          E is `w_enc_fd`, or W itself where the two are tied
    acts  = ReLU(the K largest of pre, the rest 0)      top-k comes before ReLU, so L0 can be below K
         or ReLU(pre) where pre > threshold, the rest 0      JumpReLU; BatchTopK once it is trained
    x_hat = acts W + b_dec                   row f of W, `w_fd`, is the direction of feature f

These are the dense forms, for inference and as reference; training differentiates `reconstruct.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fac_jax.mesh import FEATURE
from fac_jax.sae.select import HIGHEST
from fac_jax.sae.topk import top_k


class SAE(nnx.Module):
    """Parameters, float32, sharded over features. A threshold says which are active; without one, top-k does."""

    SPECS = {
        "w_fd": P(FEATURE, None),
        "b_enc_f": P(FEATURE),
        "b_dec_d": P(),
        "w_enc_fd": P(FEATURE, None),
        "threshold_f": P(FEATURE),
    }

    def __init__(
        self,
        w_fd: Float[Array, "f d"],
        b_enc_f: Float[Array, " f"],
        b_dec_d: Float[Array, " d"],
        w_enc_fd: Float[Array, "f d"] | None = None,
        threshold_f: Float[Array, " f"] | None = None,
    ) -> None:
        self.w_fd = nnx.Param(w_fd)
        self.b_enc_f = nnx.Param(b_enc_f)
        self.b_dec_d = nnx.Param(b_dec_d)
        self.w_enc_fd = None if w_enc_fd is None else nnx.Param(w_enc_fd)
        self.threshold_f = None if threshold_f is None else nnx.Param(threshold_f)

    @property
    def encoder_fd(self) -> Float[Array, "f d"]:
        """Rows that encode: those of W where nothing else is said."""
        return self.w_fd[...] if self.w_enc_fd is None else self.w_enc_fd[...]


def pre_activations(sae: SAE, x_bd: Float[Array, "b d"]) -> Float[Array, "b f"]:
    """(x - b_dec) E^T + b_enc, float32."""
    centred_bd = x_bd.astype(jnp.float32) - sae.b_dec_d[...]
    return jnp.einsum("bd,fd->bf", centred_bd, sae.encoder_fd, precision=HIGHEST) + sae.b_enc_f[...]


def above_threshold(sae: SAE, pre_bf: Float[Array, "b f"]) -> Float[Array, "b f"]:
    """Activations of an SAE with a threshold, from its pre-activations."""
    assert sae.threshold_f is not None
    return jnp.where(pre_bf > sae.threshold_f[...], jax.nn.relu(pre_bf), 0)


def encode(
    sae: SAE,
    x_bd: Float[Array, "b d"],
    k: Int[Array, ""] | int | None,
    k_max: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "b f"]:
    """Dense activations: above the SAE's threshold if it has one, else Top-K.

    A traced `k` needs its static bound `k_max`; `mesh` keeps rows split over features.
    """
    pre_bf = pre_activations(sae, x_bd)
    if sae.threshold_f is not None:
        return above_threshold(sae, pre_bf)
    assert k is not None
    if k_max is None:
        k_max = int(k)
    val_bk, idx_bk = top_k(pre_bf, k_max, mesh)
    val_bk = jnp.where(jnp.arange(k_max) < k, jax.nn.relu(val_bk), 0)
    return jnp.zeros(pre_bf.shape).at[jnp.arange(len(x_bd))[:, None], idx_bk].set(val_bk)


def encode_relu(sae: SAE, x_bd: Float[Array, "b d"]) -> Float[Array, "b f"]:
    """Activations with top-k off, as the official code collects its spans."""
    return jax.nn.relu(pre_activations(sae, x_bd))


def decode(sae: SAE, acts_bf: Float[Array, "b f"]) -> Float[Array, "b d"]:
    """acts W + b_dec, float32."""
    return jnp.einsum("bf,fd->bd", acts_bf, sae.w_fd[...], precision=HIGHEST) + sae.b_dec_d[...]
