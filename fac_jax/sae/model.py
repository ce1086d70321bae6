"""The tied Top-K sparse autoencoder (arXiv 2602.10388, section 3; the official code's TopKSAE).

    pre   = (x - b_dec) W^T + b_enc          W is `w_fd`: row f encodes and decodes feature f
    acts  = ReLU(the K largest of pre, the rest 0)      top-k comes before ReLU, so L0 can be below K
    x_hat = acts W + b_dec

`encode` and `decode` are the dense forms, for inference and as reference. `reconstruct` is the form that training
differentiates: features are selected without a gradient, and all else is made from the few rows of W that were selected
(`sparse.py`). Rows are split over the mesh's `data` axis and features over its `feature` axis; what crosses feature
shards is kept values and partial reconstructions.
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
from fac_jax.sae.sparse import HIGHEST, Among, Best, Selected, decode_selected, select
from fac_jax.sae.topk import top_k, winners


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
    # An axis of one device is not named: a sum over it would still copy what it sums, the gradient of W among it.
    rows, features = (P(axis) if mesh.shape[axis] > 1 else P() for axis in (DATA, FEATURE))
    sharded = jax.shard_map(
        core,
        mesh=mesh,
        in_specs=(features, features, P(), rows, rows, P(), features, P()),
        out_specs=Reconstruction(rows, rows, features, rows),
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
    over_data, over_features = ((axis,) if mesh.shape[axis] > 1 else () for axis in (DATA, FEATURE))
    vary = partial(jax.lax.pcast, to="varying")  # the gradient of what devices share is summed over them

    def everywhere_zero(like: jax.ShapeDtypeStruct) -> Array:
        return vary(jnp.zeros(like.shape, like.dtype), over_data + over_features)

    w_fd, b_enc_f = vary((w_fd, b_enc_f), over_data)
    centred_bd = vary(x_bd, over_features) - vary(b_dec_d, over_data + over_features)
    best = partial(select, w_fd, b_enc_f, centred_bd, select_dtype)

    def of_all_shards(found: Best, k: Array | int, k_max: int) -> Selected:
        wins_b = winners(found.val_bk, k, k_max, over_features)
        places_k = jnp.arange(found.val_bk.shape[1])
        return Selected(found.idx_bk, (places_k < wins_b[:, None]) & (found.val_bk > -jnp.inf))

    def live_only() -> Selected:
        (found,) = best([Among(k_max)])
        return of_all_shards(found, k, k_max)

    if dead_k is None:
        live, dead = live_only(), None
    else:

        def live_and_dead() -> tuple[Selected, Selected]:
            found, dead = best([Among(k_max), Among(dead_k, dead_f)])
            return of_all_shards(found, k, k_max), of_all_shards(dead, dead_k, dead_k)

        nobody = jax.tree.map(everywhere_zero, jax.eval_shape(lambda: live_and_dead()[1]))
        live, dead = jax.lax.cond(any_dead, live_and_dead, lambda: (live_only(), nobody))

    found, revived = decode_selected(w_fd, b_enc_f, centred_bd, live, dead, any_dead)
    on_bk = found.acts_bk > 0
    counted_bk = (on_bk & counted_b[:, None]).astype(jnp.int32)
    active_f = everywhere_zero(jax.ShapeDtypeStruct(b_enc_f.shape, jnp.int32)).at[live.idx_bk].add(counted_bk)
    return Reconstruction(
        x_hat_bd=jax.lax.psum(found.sum_bd, over_features) + b_dec_d,
        dead_hat_bd=jnp.zeros_like(x_bd) if revived is None else jax.lax.psum(revived.sum_bd, over_features),
        active_f=jax.lax.psum(active_f, over_data),
        l0_b=jax.lax.psum(on_bk.sum(axis=1), over_features),
    )
