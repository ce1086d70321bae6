"""Exact top-k over features, on one device or across feature shards; equal values by index, as `jax.lax.top_k` has it.

One shard: the k largest of a row lie in the k groups with the largest maxima, so rows are cut into contiguous groups,
the best groups are found (again so, while it pays), and only their members are sorted. Groups keep index order, which
keeps the tie rule; strided groups would break it.

Several shards: each finds its own k, and only those values are gathered. Shards hold consecutive features, so the order
of the gathered list is index order for equal values, and what a shard contributes to the global top k is always a
prefix of its own sorted list: `winners` is the length of that prefix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fac_jax.mesh import DATA, FEATURE

# Measured on 2 CPU cores: groups of 16 win from 4,096 features and k=20 on, and lose when the members of the chosen
# groups are more than an eighth of the row. On a GPU lax.top_k with k > 16 sorts whole rows, so there it matters more.
GROUP = 16
GAIN = 8


def top_k(x_bf: Float[Array, "b f"], k: int, mesh: Mesh | None = None) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The k largest of each row and their indices, largest first, equal values by index.

    With `mesh`, rows are split over `data` and features over `feature`, and no device ever holds a whole row.
    """
    if mesh is None or mesh.shape[FEATURE] == 1:
        return _top_k(x_bf, k)

    def core(x_bf: Array) -> tuple[Array, Array]:
        offset = jax.lax.axis_index(FEATURE) * x_bf.shape[1]
        val_bk, idx_bk = _top_k(x_bf, min(k, x_bf.shape[1]))
        val_bk = jax.lax.all_gather(val_bk, FEATURE, axis=1, tiled=True)
        idx_bk = jax.lax.all_gather(idx_bk + offset, FEATURE, axis=1, tiled=True)
        val_bk, at_bk = jax.lax.top_k(val_bk, k)
        return val_bk, jnp.take_along_axis(idx_bk, at_bk, axis=1)

    # Every feature shard computes the same result, which the checker cannot see.
    sharded = jax.shard_map(core, mesh=mesh, in_specs=P(DATA, FEATURE), out_specs=P(DATA, None), check_vma=False)
    return sharded(x_bf)


def winners(
    val_bk: Float[Array, "b k"], k: Int[Array, ""] | int, k_max: int, axis: tuple[str, ...]
) -> Int[Array, " b"]:
    """How many of this shard's best, sorted values are among the k best of all shards along mesh axis `axis`.

    Call it inside `shard_map`; an empty `axis` means that this shard is the only one. `k` may be traced, `k_max` is its
    bound; where the shards together offer fewer than k values, all of them win.
    """
    b, width = val_bk.shape
    if not axis:
        return jnp.full(b, jnp.minimum(k, width))
    gathered_bk = jax.lax.all_gather(val_bk, axis, axis=1, tiled=True)
    # Positions in the gathered list, best first: lax.top_k's tie rule prefers the lower shard, as it must.
    _, at_bk = jax.lax.top_k(gathered_bk, min(k_max, gathered_bk.shape[1]))
    mine_bk = (at_bk // width == jax.lax.axis_index(axis)) & (jnp.arange(at_bk.shape[1]) < k)
    return mine_bk.sum(axis=1)


def _top_k(x_bf: Array, k: int) -> tuple[Array, Array]:
    b, features = x_bf.shape
    if x_bf.dtype == jnp.bfloat16:  # exact in float32 too, and XLA's CPU top-k is 30 times slower in bfloat16
        val_bk, idx_bk = _top_k(x_bf.astype(jnp.float32), k)
        return val_bk.astype(jnp.bfloat16), idx_bk
    if features % GROUP or features < GAIN * GROUP * k:
        return jax.lax.top_k(x_bf, k)
    grouped_bgm = x_bf.reshape(b, features // GROUP, GROUP)
    _, group_bk = _top_k(grouped_bgm.max(axis=2), k)
    group_bk = jnp.sort(group_bk, axis=1)
    member_bm = jnp.take_along_axis(grouped_bgm, group_bk[:, :, None], axis=1).reshape(b, k * GROUP)
    val_bk, at_bk = jax.lax.top_k(member_bm, k)
    return val_bk, jnp.take_along_axis(group_bk, at_bk // GROUP, axis=1) * GROUP + at_bk % GROUP
