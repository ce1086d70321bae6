"""Which features of each row are active: the best K of a row, or the best of a whole batch.

`select` finds the best features in tiles with a running top-k: [batch, features] never exists, so memory does not grow
with the width. Its matmul may run in bfloat16, accumulated in float32; it has no gradient.

`batch_threshold` is BatchTopK's rule (Bussmann et al. 2024, arXiv 2412.06410): of n rows, the n K largest activations,
however they fall on the rows. It counts instead of sorting: 31 halvings of the range of positive float32, whose bits
are ordered like their values, find the exact one, and shards exchange one number each time.

Call them inside `shard_map`: this shard's rows of the batch, and its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fac_jax.mesh import DATA
from fac_jax.sae.topk import top_k

# True float32 on accelerators too: their default would round the inputs to 10 bits or fewer.
HIGHEST = jax.lax.Precision.HIGHEST
TILE_ELEMENTS = {"cpu": 2**26}
"""Pre-activations that exist at a time: 256 MiB, or 1 GiB where nothing is said."""

CAST_FIRST_ROWS = 3_000
"""Rows from which on a TPU casts W and x before the matmul. XLA would cast inside it, once for every tile of it: 16.1
ms instead of 13.2 for 16,384 rows and features of width 4,096, which are 11.2 (predicted for a v5e by its compiler)."""


class Best(NamedTuple):
    """The best features of each row, best first, equal values by index."""

    val_bk: Float[Array, "b k"]
    idx_bk: Int[Array, "b k"]


class Among(NamedTuple):
    """How many features are wanted, and among which (all, where nothing is said)."""

    k: int
    mask_f: Bool[Array, " f"] | None = None


def select(
    w_enc_fd: Float[Array, "f d"],
    b_enc_f: Float[Array, " f"],
    centred_bd: Float[Array, "b d"],
    dtype: str,
    wanted: Sequence[Among],
    platform: str = "cpu",
) -> tuple[Best, ...]:
    """The features with the largest pre-activations, as often as `wanted` says from one matmul; without a gradient.

    `dtype` is the input type of the matmul, which accumulates in float32. Features outside a mask count as -inf.
    """
    w_enc_fd, b_enc_f, centred_bd = jax.lax.stop_gradient((w_enc_fd, b_enc_f, centred_bd))
    features = len(w_enc_fd)
    sizes = [min(one.k, features) for one in wanted]
    masks = [one.mask_f for one in wanted]
    x_bd = centred_bd.astype(dtype)
    precision = HIGHEST if dtype == "float32" else None

    tiles = _tiles(features, len(centred_bd), max(sizes), TILE_ELEMENTS.get(platform, 2**28))
    width = features // tiles

    def best(tile: Array | int) -> tuple[Best, ...]:
        def cut(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, tile * width, width)

        w_td = cut(w_enc_fd).astype(dtype)
        if platform == "tpu" and len(x_bd) >= CAST_FIRST_ROWS:
            w_td, rows_bd = jax.lax.optimization_barrier((w_td, x_bd))
        else:
            rows_bd = x_bd
        pre_bf = jnp.einsum("bd,fd->bf", rows_bd, w_td, precision=precision, preferred_element_type=jnp.float32)
        pre_bf = pre_bf + cut(b_enc_f)
        masked = (pre_bf if mask_f is None else jnp.where(cut(mask_f), pre_bf, -jnp.inf) for mask_f in masks)
        found = (top_k(one_bf, k, platform=platform) for one_bf, k in zip(masked, sizes, strict=True))
        return tuple(Best(val_bk, idx_bk + tile * width) for val_bk, idx_bk in found)

    def merge(tile: Array, found: tuple[Best, ...]) -> tuple[Best, ...]:
        return tuple(_better(old, new) for old, new in zip(found, best(tile), strict=True))

    return jax.lax.fori_loop(1, tiles, merge, best(0)) if tiles > 1 else best(0)


def _better(old: Best, new: Best) -> Best:
    """As many of both together. `old` has the lower indices and stands first, so equal values keep their order."""
    val_bk, idx_bk = (jnp.concatenate(pair, axis=1) for pair in zip(old, new, strict=True))
    val_bk, at_bk = jax.lax.top_k(val_bk, old.val_bk.shape[1])
    return Best(val_bk, jnp.take_along_axis(idx_bk, at_bk, axis=1))


def _tiles(features: int, rows: int, k: int, most: int) -> int:
    """Fewest equal tiles of at most `most` pre-activations; 1 where such a tile would hold less than k."""
    least = -(-features * rows // most)
    tiles = next(n for n in range(least, features + 1) if features % n == 0)
    return tiles if tiles * k <= features else 1


def batch_threshold(
    val_bk: Float[Array, "b k"], counted_b: Bool[Array, " b"], k: Int[Array, ""] | int, axes: tuple[str, ...]
) -> Float[Array, ""]:
    """The smallest of the n k largest positive values, n being the counted rows of all shards along mesh `axes`.

    Where fewer are positive, the smallest positive float32.
    """
    bits_bk = jax.lax.bitcast_convert_type(jnp.where(counted_b[:, None], val_bk, 0.0), jnp.int32)
    wanted = k * jax.lax.psum(counted_b.sum(), tuple(axis for axis in axes if axis == DATA))

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jax.lax.psum((bits_bk >= middle).sum(), axes) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    infinity = jnp.asarray(jnp.inf, jnp.float32).view(jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(1), infinity))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
