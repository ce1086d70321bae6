"""The fast half of a training step: which features a row selects, and all that follows from the selected rows of W.

`select` finds the K best features in tiles with a running top-k: [batch, features] never exists, so memory does not
grow with the width. `decode_selected` gathers the chosen rows of W, a few rows of the batch at a time, and has its
gradient by hand. With c = x - b_dec, and g the gradient of the reconstruction y:

    pre_j = W[i_j] . c + b_enc[i_j]      a_j = ReLU(pre_j)      y = sum_j a_j W[i_j]
    v_j   = (W[i_j] . g) 1[a_j > 0]
    dW[i_j] += a_j g + v_j c             db_enc[i_j] += v_j     dc = sum_j v_j W[i_j]

That is 5 products of K rows where the dense form has 6 of all features, and no [batch, K, d] array: only a chunk of it,
which stays in the cache. The matmul that selects may run in bfloat16; every value and gradient is float32.

Call both inside `shard_map`: this shard's rows of the batch, and its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fac_jax.sae.topk import top_k

# True float32 on accelerators too: their default would round the inputs to 10 bits or fewer.
HIGHEST = jax.lax.Precision.HIGHEST
TILE_ELEMENTS = 2**26
"""Pre-activations that exist at a time: 256 MiB."""
CHUNK_BYTES = {"cpu": 2**22}
"""Gathered rows of W that exist at a time: what a core's caches hold, or 256 MiB where nothing is said."""


class Best(NamedTuple):
    """The best features of each row, best first, equal values by index."""

    val_bk: Float[Array, "b k"]
    idx_bk: Int[Array, "b k"]


class Among(NamedTuple):
    """How many features are wanted, and among which (all, where nothing is said)."""

    k: int
    mask_f: Bool[Array, " f"] | None = None


class Selected(NamedTuple):
    """Features of each row, and which of them count."""

    idx_bk: Int[Array, "b k"]
    kept_bk: Bool[Array, "b k"]


class Decoded(NamedTuple):
    """Activations of selected features, and what they add up to (without b_dec)."""

    acts_bk: Float[Array, "b k"]
    sum_bd: Float[Array, "b d"]


def select(
    w_fd: Float[Array, "f d"],
    b_enc_f: Float[Array, " f"],
    centred_bd: Float[Array, "b d"],
    dtype: str,
    wanted: Sequence[Among],
) -> tuple[Best, ...]:
    """The features with the largest pre-activations, as often as `wanted` says from one matmul; without a gradient.

    `dtype` is the input type of the matmul, which accumulates in float32. Features outside a mask count as -inf.
    """
    w_fd, b_enc_f, centred_bd = jax.lax.stop_gradient((w_fd, b_enc_f, centred_bd))
    features = len(w_fd)
    sizes = [min(one.k, features) for one in wanted]
    masks = [one.mask_f for one in wanted]
    x_bd = centred_bd.astype(dtype)
    precision = HIGHEST if dtype == "float32" else None

    tiles = _tiles(features, len(centred_bd), max(sizes))
    width = features // tiles

    def best(tile: Array | int) -> tuple[Best, ...]:
        def cut(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, tile * width, width)

        pre_bf = jnp.einsum(
            "bd,fd->bf", x_bd, cut(w_fd).astype(dtype), precision=precision, preferred_element_type=jnp.float32
        )
        pre_bf = pre_bf + cut(b_enc_f)
        masked = (pre_bf if mask_f is None else jnp.where(cut(mask_f), pre_bf, -jnp.inf) for mask_f in masks)
        found = (top_k(one_bf, k) for one_bf, k in zip(masked, sizes, strict=True))
        return tuple(Best(val_bk, idx_bk + tile * width) for val_bk, idx_bk in found)

    def merge(tile: Array, found: tuple[Best, ...]) -> tuple[Best, ...]:
        return tuple(_better(old, new) for old, new in zip(found, best(tile), strict=True))

    return jax.lax.fori_loop(1, tiles, merge, best(0)) if tiles > 1 else best(0)


def _better(old: Best, new: Best) -> Best:
    """As many of both together. `old` has the lower indices and stands first, so equal values keep their order."""
    val_bk, idx_bk = (jnp.concatenate(pair, axis=1) for pair in zip(old, new, strict=True))
    val_bk, at_bk = jax.lax.top_k(val_bk, old.val_bk.shape[1])
    return Best(val_bk, jnp.take_along_axis(idx_bk, at_bk, axis=1))


def _tiles(features: int, rows: int, k: int) -> int:
    """Fewest equal tiles of at most TILE_ELEMENTS pre-activations; 1 where such a tile would hold less than k."""
    least = -(-features * rows // TILE_ELEMENTS)
    tiles = next(n for n in range(least, features + 1) if features % n == 0)
    return tiles if tiles * k <= features else 1


def selecting_dtype() -> str:
    """Input type in which the selecting matmul is fastest here: bfloat16 wherever the hardware multiplies it."""
    if jax.default_backend() != "cpu":
        return "bfloat16"
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


@jax.custom_vjp
def decode_selected(
    w_fd: Float[Array, "f d"],
    b_enc_f: Float[Array, " f"],
    centred_bd: Float[Array, "b d"],
    live: Selected,
    dead: Selected | None,
    any_dead: Bool[Array, ""],
) -> tuple[Decoded, Decoded | None]:
    """Decode two selections, which share one gradient of W; the second costs nothing unless `any_dead`.

    Differentiable in the first three arguments.
    """
    return _decode_both(w_fd, b_enc_f, centred_bd, live, dead, any_dead)


def _decode_both(
    w_fd: Array, b_enc_f: Array, centred_bd: Array, live: Selected, dead: Selected | None, any_dead: Array
) -> tuple[Decoded, Decoded | None]:
    found = _decode(w_fd, b_enc_f, centred_bd, live)
    if dead is None:
        return found, None
    nothing = Decoded(jnp.zeros_like(dead.kept_bk, jnp.float32), jnp.zeros_like(centred_bd))
    return found, jax.lax.cond(any_dead, lambda: _decode(w_fd, b_enc_f, centred_bd, dead), lambda: nothing)


def _forward(
    w_fd: Array, b_enc_f: Array, centred_bd: Array, live: Selected, dead: Selected | None, any_dead: Array
) -> tuple[tuple[Decoded, Decoded | None], tuple[Any, ...]]:
    found = _decode_both(w_fd, b_enc_f, centred_bd, live, dead, any_dead)
    acts = tuple(one if one is None else one.acts_bk for one in found)
    return found, (w_fd, centred_bd, live, dead, any_dead, acts)


def _backward(kept: tuple[Any, ...], cotangents: tuple[Decoded, Decoded | None]) -> tuple[Any, ...]:
    w_fd, centred_bd, live, dead, any_dead, (acts_bk, dead_acts_bk) = kept
    of_live, of_dead = cotangents
    gradient = (jnp.zeros_like(w_fd), jnp.zeros_like(w_fd[:, 0]), jnp.zeros_like(centred_bd))
    gradient = _add_gradient(gradient, w_fd, centred_bd, live.idx_bk, acts_bk, of_live)
    if dead is not None:
        more = partial(_add_gradient, w_fd=w_fd, centred_bd=centred_bd, idx_bk=dead.idx_bk, acts_bk=dead_acts_bk)
        gradient = jax.lax.cond(any_dead, partial(more, given=of_dead), lambda same: same, gradient)
    return *gradient, None, None, None


decode_selected.defvjp(_forward, _backward)


def _decode(w_fd: Array, b_enc_f: Array, centred_bd: Array, chosen: Selected) -> Decoded:
    def chunk(_: None, part: tuple[Array, ...]) -> tuple[None, Decoded]:
        centred_bd, idx_bk, kept_bk = part
        w_bkd = w_fd[idx_bk]
        pre_bk = jnp.einsum("bkd,bd->bk", w_bkd, centred_bd, precision=HIGHEST) + b_enc_f[idx_bk]
        acts_bk = jnp.where(kept_bk, jax.nn.relu(pre_bk), 0)
        return None, Decoded(acts_bk, jnp.einsum("bkd,bk->bd", w_bkd, acts_bk, precision=HIGHEST))

    parts = _chunks((centred_bd, *chosen), w_fd)
    return jax.tree.map(partial(_whole, rows=len(centred_bd)), jax.lax.scan(chunk, None, parts)[1])


def _add_gradient(
    gradient: tuple[Array, Array, Array],
    w_fd: Array,
    centred_bd: Array,
    idx_bk: Array,
    acts_bk: Array,
    given: Decoded,
) -> tuple[Array, Array, Array]:
    """`gradient` with respect to (W, b_enc, c), and what one selection adds to it. W's grows in place."""

    def chunk(sums: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        dw_fd, db_f = sums
        centred_bd, idx_bk, acts_bk, of_acts_bk, g_bd = part
        w_bkd = w_fd[idx_bk]
        v_bk = jnp.einsum("bkd,bd->bk", w_bkd, g_bd, precision=HIGHEST) + of_acts_bk
        v_bk = jnp.where(acts_bk > 0, v_bk, 0)
        dw_bkd = acts_bk[:, :, None] * g_bd[:, None] + v_bk[:, :, None] * centred_bd[:, None]
        flat = idx_bk.reshape(-1)
        sums = dw_fd.at[flat].add(dw_bkd.reshape(-1, dw_bkd.shape[-1])), db_f.at[flat].add(v_bk.reshape(-1))
        return sums, jnp.einsum("bkd,bk->bd", w_bkd, v_bk, precision=HIGHEST)

    dw_fd, db_f, dc_bd = gradient
    parts = _chunks((centred_bd, idx_bk, acts_bk, *given), w_fd)
    sums, more_bd = jax.lax.scan(chunk, (dw_fd, db_f), parts)
    return *sums, dc_bd + _whole(more_bd, rows=len(centred_bd))


def _chunks(arrays: tuple[Array, ...], w_fd: Array) -> tuple[Array, ...]:
    """[b, ...] as [chunks, rows, ...], filled up with zeros: kept is then False and every activation 0."""
    b, k = arrays[1].shape
    most = CHUNK_BYTES.get(jax.default_backend(), 2**28)
    rows = max(1, min(b, most // (k * w_fd.shape[1] * w_fd.dtype.itemsize)))
    chunks = -(-b // rows)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, chunks * rows - b)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(chunks, rows, *array.shape[1:])

    return tuple(map(split, arrays))


def _whole(array: Array, rows: int) -> Array:
    return array.reshape(-1, *array.shape[2:])[:rows]
