"""The tied Top-K sparse autoencoder (arXiv 2602.10388, section 3; the official code's TopKSAE).

    pre   = (x - b_dec) W^T + b_enc          W is `w_fd`: row f encodes and decodes feature f
    acts  = ReLU(the K largest of pre, the rest 0)      top-k comes before ReLU, so L0 can be below K
    x_hat = acts W + b_dec

`encode` and `decode` are the dense forms, for inference and as reference. `reconstruct` is the form that training
differentiates: features are *selected* densely, without a gradient, and the few that were selected are computed again
from their gathered rows of W. Gathers and scatters of K rows then replace five of the six dense matmuls, plain autodiff
gives the exact gradient, and the selecting matmul may run in bfloat16 while every value and gradient stays float32.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fac_jax.mesh import DATA, FEATURE
from fac_jax.sae.topk import top_k, winners

# True float32 on accelerators too: their default would round the inputs to 10 bits or fewer.
HIGHEST = jax.lax.Precision.HIGHEST


class TopKSAE(nnx.Module):
    """Parameters, float32. `w_fd` is sharded over features."""

    SPECS = {"w_fd": P(FEATURE, None), "b_enc_f": P(FEATURE), "b_dec_d": P()}

    def __init__(self, w_fd: Float[Array, "f d"], b_enc_f: Float[Array, " f"], b_dec_d: Float[Array, " d"]) -> None:
        self.w_fd = nnx.Param(w_fd)
        self.b_enc_f = nnx.Param(b_enc_f)
        self.b_dec_d = nnx.Param(b_dec_d)


def pre_activations(sae: TopKSAE, x_bd: Float[Array, "b d"]) -> Float[Array, "b f"]:
    """(x - b_dec) W^T + b_enc, float32."""
    centred_bd = x_bd.astype(jnp.float32) - sae.b_dec_d[...]
    return jnp.einsum("bd,fd->bf", centred_bd, sae.w_fd[...], precision=HIGHEST) + sae.b_enc_f[...]


def encode(
    sae: TopKSAE,
    x_bd: Float[Array, "b d"],
    k: Int[Array, ""] | int,
    k_max: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "b f"]:
    """Dense Top-K activations. A traced `k` needs its static bound `k_max`; `mesh` keeps rows split over features."""
    if k_max is None:
        k_max = int(k)
    val_bk, idx_bk = top_k(pre_activations(sae, x_bd), k_max, mesh)
    val_bk = jnp.where(jnp.arange(k_max) < k, jax.nn.relu(val_bk), 0)
    return jnp.zeros((len(x_bd), sae.w_fd.shape[0])).at[jnp.arange(len(x_bd))[:, None], idx_bk].set(val_bk)


def encode_relu(sae: TopKSAE, x_bd: Float[Array, "b d"]) -> Float[Array, "b f"]:
    """Activations with top-k off, as the official code collects its spans."""
    return jax.nn.relu(pre_activations(sae, x_bd))


def decode(sae: TopKSAE, acts_bf: Float[Array, "b f"]) -> Float[Array, "b d"]:
    """acts W + b_dec, float32."""
    return jnp.einsum("bf,fd->bd", acts_bf, sae.w_fd[...], precision=HIGHEST) + sae.b_dec_d[...]


class Reconstruction(NamedTuple):
    """What `reconstruct` returns."""

    x_hat_bd: Float[Array, "b d"]
    dead_hat_bd: Float[Array, "b d"]
    """Sum over the best dead features, without b_dec: what they make of the residual (zero when none is dead)."""
    active_f: Int[Array, " f"]
    """Rows on which each feature is active."""
    l0_b: Int[Array, " b"]
    """Active features of each row."""


class Dead(NamedTuple):
    """Which features are dead, and how many of them share in the auxiliary reconstruction."""

    dead_f: Array
    k: int


def reconstruct(
    sae: TopKSAE,
    x_bd: Float[Array, "b d"],
    counted_b: Array,
    k: Int[Array, ""] | int,
    *,
    k_max: int,
    mesh: Mesh,
    dead: Dead | None = None,
    select_dtype: str = "float32",
) -> Reconstruction:
    """Reconstruct the rows with the k best features (k may be traced, k <= k_max); differentiable in the parameters.

    Rows are split over `data`, features over `feature`. `active_f` counts the rows where the bool `counted_b` holds.
    `select_dtype` is the input type of the matmul that selects the features; it accumulates in float32.
    """
    core = partial(
        _reconstruct_shard, k_max=k_max, dead_k=dead.k if dead else None, select_dtype=select_dtype, mesh=mesh
    )
    dead_f = dead.dead_f if dead else jnp.zeros(sae.w_fd.shape[0], bool)
    sharded = jax.shard_map(
        core,
        mesh=mesh,
        in_specs=(
            *(TopKSAE.SPECS[name] for name in ("w_fd", "b_enc_f", "b_dec_d")),
            P(DATA),
            P(DATA),
            P(),
            P(FEATURE),
            P(),
        ),
        out_specs=Reconstruction(P(DATA), P(DATA), P(FEATURE), P(DATA)),
    )
    arrays = sae.w_fd[...], sae.b_enc_f[...], sae.b_dec_d[...]
    return sharded(*arrays, x_bd, counted_b, jnp.asarray(k, jnp.int32), dead_f, dead_f.any())


def _reconstruct_shard(
    w_fd: Array,
    b_enc_f: Array,
    b_dec_d: Array,
    x_bd: Array,
    counted_b: Array,
    k: Array,
    dead_f: Array,
    any_dead: Array,
    *,
    k_max: int,
    dead_k: int | None,
    select_dtype: str,
    mesh: Mesh,
) -> Reconstruction:
    """One shard's rows and features; only kept values and partial reconstructions cross shards."""
    stop = jax.lax.stop_gradient
    axis = FEATURE if mesh.shape[FEATURE] > 1 else None
    centred_bd = stop(x_bd - b_dec_d)
    # b_dec reaches the pre-activations of all rows in the same way, so its gradient there is one vector-matrix product
    # of the gradient of b_enc instead of a matmul over the batch. The added term is zero in value.
    bias_f = b_enc_f + jnp.einsum("d,fd->f", stop(b_dec_d) - b_dec_d, stop(w_fd), precision=HIGHEST)
    pre_bf = stop(_select(centred_bd, w_fd, select_dtype) + b_enc_f)
    decode = partial(_decode_selected, w_fd, bias_f, centred_bd)

    val_bk, idx_bk = top_k(pre_bf, min(k_max, pre_bf.shape[1]))
    kept_bk = jnp.arange(val_bk.shape[1]) < winners(val_bk, k, k_max, axis)[:, None]
    part_bd, acts_bk = decode(idx_bk, kept_bk)
    on_bk = stop(acts_bk) > 0
    active_f = jnp.zeros(len(w_fd), jnp.int32).at[idx_bk].add((on_bk & counted_b[:, None]).astype(jnp.int32))
    x_hat_bd = jax.lax.psum(part_bd, FEATURE) + b_dec_d
    l0_b = jax.lax.psum(on_bk.sum(axis=1), FEATURE)

    dead_hat_bd = jnp.zeros_like(x_bd)
    if dead_k is not None:

        def revive() -> Array:
            val_bk, idx_bk = top_k(jnp.where(dead_f, pre_bf, -jnp.inf), min(dead_k, pre_bf.shape[1]))
            kept_bk = jnp.arange(val_bk.shape[1]) < winners(val_bk, dead_k, dead_k, axis)[:, None]
            return jax.lax.psum(decode(idx_bk, kept_bk & (val_bk > -jnp.inf))[0], FEATURE)

        dead_hat_bd = jax.lax.cond(any_dead, revive, lambda: dead_hat_bd)
    return Reconstruction(x_hat_bd, dead_hat_bd, jax.lax.psum(active_f, DATA), l0_b)


def _select(centred_bd: Array, w_fd: Array, dtype: str) -> Array:
    """Pre-activations without bias. XLA's CPU matmul is fastest from bfloat16 inputs to a float32 output."""
    inputs = centred_bd.astype(dtype), w_fd.astype(dtype)
    precision = HIGHEST if dtype == "float32" else None
    return jnp.einsum("bd,fd->bf", *inputs, precision=precision, preferred_element_type=jnp.float32)


def _decode_selected(
    w_fd: Array, bias_f: Array, centred_bd: Array, idx_bk: Array, kept_bk: Array
) -> tuple[Array, Array]:
    """Sum of the kept features' contributions (without b_dec) and their activations, a few rows at a time."""

    # Checkpointed: the backward pass gathers again instead of keeping [b, k, d].
    @jax.checkpoint
    def chunk(carry: None, part: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        centred_bd, idx_bk, kept_bk = part
        w_bkd = w_fd[idx_bk]
        pre_bk = jnp.einsum("bkd,bd->bk", w_bkd, centred_bd, precision=HIGHEST) + bias_f[idx_bk]
        acts_bk = jnp.where(kept_bk, jax.nn.relu(pre_bk), 0)
        return carry, (jnp.einsum("bkd,bk->bd", w_bkd, acts_bk, precision=HIGHEST), acts_bk)

    # As many elements at a time as W has: memory grows by about one W, and adding up the chunks' gradients of W, which
    # costs a pass over W each, stays small beside the gathering (measured: half as much makes a step 1.2 times longer).
    (b, k), d = idx_bk.shape, w_fd.shape[1]
    chunks = -(-b * k * d // w_fd.size)
    rows = -(-b // chunks)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, chunks * rows - b)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(chunks, rows, *array.shape[1:])

    _, (part_bd, acts_bk) = jax.lax.scan(chunk, None, (split(centred_bd), split(idx_bk), split(kept_bk)))
    return part_bd.reshape(-1, d)[:b], acts_bk.reshape(-1, k)[:b]
