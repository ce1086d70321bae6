"""Exact top-k over features, on one device or across feature shards; equal values by index, as `jax.lax.top_k` has it.

One shard: the k largest of a row lie in the k groups with the largest maxima, so rows are cut into contiguous groups,
the best groups are found (again so, while it pays), and only their members are sorted. Groups keep index order, which
keeps the tie rule; strided groups would break it.

Several shards: each finds its own k, and only those values are gathered, in two levels where the shards are many. As
shards hold consecutive features, the order of the gathered list is index order for equal values, and what a shard
contributes to the global top k is always a prefix of its own sorted list: `winners` is the length of that prefix.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fac_jax.mesh import DATA, FEATURE

# Measured on 2 CPU cores: groups of 16 win from 4,096 features and k=20 on, and lose when the members of the chosen
# groups are more than an eighth of the row. On a GPU lax.top_k with k > 16 sorts whole rows, so there it matters more.
GROUP = 16
GAIN = 8
TWO_LEVELS = 32
"""Shards from which on values are gathered in two levels."""


def top_k(
    x_bf: Float[Array, "b f"], k: int, mesh: Mesh | None = None, platform: str = "cpu"
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The k largest of each row and their indices, largest first, equal values by index.

    With `mesh`, rows are split over `data` and features over `feature`, and no device ever holds a whole row.
    `platform` is that of the devices.
    """
    if platform == "tpu":
        # lax.top_k is one custom call there; the groups cost three passes over x and a sort (by HLO, on a v5e).
        return jax.lax.top_k(x_bf, k)
    if mesh is None or mesh.shape[FEATURE] == 1:
        return _top_k(x_bf, k)

    def core(x_bf: Array) -> tuple[Array, Array]:
        val_bk, idx_bk = _top_k(x_bf, min(k, x_bf.shape[1]))
        idx_bk = idx_bk + jax.lax.axis_index(FEATURE) * x_bf.shape[1]
        for groups, _ in _levels((FEATURE,)):
            gather = partial(jax.lax.all_gather, axis_name=FEATURE, axis=1, tiled=True, axis_index_groups=groups)
            gathered_bk, idx_bk = gather(val_bk), gather(idx_bk)
            val_bk, at_bk = jax.lax.top_k(gathered_bk, min(k, gathered_bk.shape[1]))
            idx_bk = jnp.take_along_axis(idx_bk, at_bk, axis=1)
        return val_bk, idx_bk

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
    best_bk, steps = val_bk, []
    for groups, place in _levels(axis):
        gathered_bk = jax.lax.all_gather(best_bk, axis, axis=1, tiled=True, axis_index_groups=groups)
        # Positions in the gathered list, best first: lax.top_k's tie rule prefers the lower shard, as it must.
        width = best_bk.shape[1]
        best_bk, at_bk = jax.lax.top_k(gathered_bk, min(k_max, gathered_bk.shape[1]))
        steps.append(at_bk // width == place)
    wins_b = jnp.full(len(val_bk), jnp.minimum(k, best_bk.shape[1]))
    for mine_bk in reversed(steps):  # of a group's winners, those that came from here
        wins_b = (mine_bk & (jnp.arange(mine_bk.shape[1]) < wins_b[:, None])).sum(axis=1)
    return wins_b


def _levels(axis: tuple[str, ...]) -> list[tuple[list[list[int]] | None, Array]]:
    """Gathers in order: the groups of shards that gather from each other, and this shard's place in its group.

    Many shards gather in two levels: neighbours first, and then each group's best; of 256 shards every one then sorts
    twice 16 lists instead of one of 256.
    """
    if not axis:
        return []
    shards, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    side = max(n for n in range(1, math.isqrt(shards) + 1) if shards % n == 0)
    if shards < TWO_LEVELS or side == 1:
        return [(None, index)]
    near = np.arange(shards).reshape(-1, side)
    return [(near.tolist(), index % side), (near.T.tolist(), index // side)]


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
