"""Decoding from the rows of W that were selected, with the gradient by hand: no [batch, features], no [batch, K, d].

With c = x - b_dec, E the rows that encode (W itself where tied), and g the gradient of the reconstruction y:

    pre_j = E[i_j] . c + b_enc[i_j]      a_j = ReLU(pre_j)      y = sum_j a_j W[i_j]
    v_j   = (W[i_j] . g) 1[a_j > 0]
    dW[i_j] += a_j g      dE[i_j] += v_j c      db_enc[i_j] += v_j      db_dec = - sum_b sum_j v_j E[i_j]

That is 5 products of K rows where the dense form has 6 of all features. A few rows of the batch are taken at a time,
so that what is gathered stays in the cache; on a TPU of those one feature at a time: [b, d], where [b, k, d] would be
copied and padded (predicted for a v5e, 2,048 rows, K 10, 16,384 features of width 4,096: 3.5 ms forward and 4.3 back
instead of 10.5 and 23.2). Every value and gradient is float32, whatever selected the features.

On a GPU the rows are added to dW by atomic operations, in no fixed order: two runs differ in the last bits.

Matryoshka: features fall into groups, y_p sums group p only, and a feature's g is that of its group.

For use by `decode.py`, inside `shard_map`: this shard's rows of the batch, and its features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fac_jax.sae.select import HIGHEST

CHUNK_BYTES = {"cpu": 2**22, "gpu": 2**28, "tpu": 2**25}
"""Gathered rows of W that exist at a time. CPU: what a core's caches hold. GPU: measured on an H200 (2026-11-26; 4,096
rows, K 32, 65,536 features of width 2,048), 1.2 ms forward and 1.4 back; 1.8 and 2.6 with 2^25, and one feature at a
time, as on a TPU, 1.6 and 3.0 with either."""
T = TypeVar("T")


class Weights(NamedTuple):
    """Parameters of this shard's features; their gradients have the same form."""

    w_fd: Float[Array, "f d"]
    w_enc_fd: Float[Array, "f d"] | None
    """None where W encodes as well."""
    b_enc_f: Float[Array, " f"]
    b_dec_d: Float[Array, " d"]

    @property
    def encoder_fd(self) -> Array:
        """Rows that encode."""
        return self.w_fd if self.w_enc_fd is None else self.w_enc_fd


class Selected(NamedTuple):
    """Features of each row, and which of them count."""

    idx_bk: Int[Array, "b k"]
    kept_bk: Bool[Array, "b k"]
    val_bk: Float[Array, "b k"]
    """Pre-activations as the selection saw them."""
    group_bk: Int[Array, "b k"] | None = None
    """Group of each feature; None where there is but one."""


class Decoded(NamedTuple):
    """Activations of selected features, and what each group adds up to (without b_dec)."""

    acts_bk: Float[Array, "b k"]
    """To be counted: only the sums have a gradient."""
    sum_bpd: Float[Array, "b p d"]


def decode_rows(
    weights: Weights, x_bd: Float[Array, "b d"], chosen: Selected, groups: int, platform: str = "cpu"
) -> Decoded:
    """Activations in float32 of the selected features, and the sum of each of `groups`; without a gradient."""

    def part(x_bd: Array, chosen: Selected) -> Decoded:
        e_bkd, w_bkd = _rows(weights, chosen.idx_bk)
        pre_bk = jnp.einsum("bkd,bd->bk", e_bkd, x_bd - weights.b_dec_d, precision=HIGHEST)
        acts_bk = jnp.where(chosen.kept_bk, jax.nn.relu(pre_bk + weights.b_enc_f[chosen.idx_bk]), 0)
        if chosen.group_bk is None:
            return Decoded(acts_bk, jnp.einsum("bkd,bk->bd", w_bkd, acts_bk, precision=HIGHEST)[:, None])
        acts_bkp = acts_bk[:, :, None] * (chosen.group_bk[:, :, None] == jnp.arange(groups))
        return Decoded(acts_bk, jnp.einsum("bkd,bkp->bpd", w_bkd, acts_bkp, precision=HIGHEST))

    def by_columns(x_bd: Array, chosen: Selected) -> Decoded:
        def column(sum_bpd: Array, chosen: Selected) -> tuple[Array, Array]:
            found = part(x_bd, chosen)
            return sum_bpd + found.sum_bpd, found.acts_bk

        columns = _columns(chosen)
        first = part(x_bd, jax.tree.map(lambda array: array[0], columns))
        rest = jax.tree.map(lambda array: array[1:], columns)
        sum_bpd, acts_kb1 = jax.lax.scan(column, first.sum_bpd, rest)
        return Decoded(jnp.concatenate([first.acts_bk[None], acts_kb1])[:, :, 0].T, sum_bpd)

    of_chunk = by_columns if platform == "tpu" else part
    return over_chunks(lambda arrays: of_chunk(*arrays), _chunks((x_bd, chosen), weights, platform), len(x_bd))


def add_rows_gradient(
    gradient: Weights,
    weights: Weights,
    x_bd: Float[Array, "b d"],
    chosen: Selected,
    acts_bk: Array,
    given_bpd: Float[Array, "b p d"],
    platform: str = "cpu",
) -> Weights:
    """`gradient`, and what `decode_rows` adds to it where `given_bpd` is the gradient of its sums; in place."""
    tied = weights.w_enc_fd is None

    def add_part(sums: Weights, x_bd: Array, chosen: Selected, acts_bk: Array, given_bpd: Array) -> Weights:
        e_bkd, w_bkd = _rows(weights, chosen.idx_bk)
        centred_bd = x_bd - weights.b_dec_d
        if chosen.group_bk is None:
            g_bkd = given_bpd
            v_bk = jnp.einsum("bkd,bd->bk", w_bkd, given_bpd[:, 0], precision=HIGHEST)
        else:
            g_bkd = jnp.take_along_axis(given_bpd, chosen.group_bk[:, :, None], axis=1)
            v_bk = jnp.einsum("bkd,bkd->bk", w_bkd, g_bkd, precision=HIGHEST)
        v_bk = jnp.where(acts_bk > 0, v_bk, 0)
        dw_bkd, de_bkd = acts_bk[:, :, None] * g_bkd, v_bk[:, :, None] * centred_bd[:, None]

        def add(sum_fd: Array, rows_bkd: Array) -> Array:
            return sum_fd.at[chosen.idx_bk.reshape(-1)].add(rows_bkd.reshape(-1, *rows_bkd.shape[2:]))

        return Weights(
            w_fd=add(sums.w_fd, dw_bkd + de_bkd if tied else dw_bkd),
            w_enc_fd=None if sums.w_enc_fd is None else add(sums.w_enc_fd, de_bkd),
            b_enc_f=add(sums.b_enc_f, v_bk),
            b_dec_d=sums.b_dec_d - jnp.einsum("bkd,bk->d", e_bkd, v_bk, precision=HIGHEST),
        )

    def by_columns(sums: Weights, x_bd: Array, chosen: Selected, acts_bk: Array, given_bpd: Array) -> Weights:
        def column(sums: Weights, arrays: tuple[Selected, Array]) -> tuple[Weights, None]:
            return add_part(sums, x_bd, *arrays, given_bpd), None

        return jax.lax.scan(column, sums, _columns((chosen, acts_bk)))[0]

    add_chunk: Callable[..., Weights] = by_columns if platform == "tpu" else add_part

    def chunk(sums: Weights, arrays: tuple[Any, ...]) -> tuple[Weights, None]:
        return add_chunk(sums, *arrays), None

    return jax.lax.scan(chunk, gradient, _chunks((x_bd, chosen, acts_bk, given_bpd), weights, platform))[0]


def _rows(weights: Weights, idx_bk: Array) -> tuple[Array, Array]:
    """Rows that encode and rows that decode, [b, k, d] of a chunk; the same ones where tied."""
    w_bkd = weights.w_fd[idx_bk]
    return (w_bkd if weights.w_enc_fd is None else weights.w_enc_fd[idx_bk]), w_bkd


def _chunks(arrays: tuple[Any, ...], weights: Weights, platform: str) -> tuple[Any, ...]:
    """[b, ...] as [chunks, rows, ...], filled up with zeros: kept is then False and every activation 0."""
    b, k = arrays[1].idx_bk.shape
    row_bytes = weights.w_fd.shape[1] * weights.w_fd.dtype.itemsize * (1 if platform == "tpu" else k)
    return split_rows(arrays, -(-b // max(1, CHUNK_BYTES[platform] // row_bytes)))


def over_chunks(part: Callable[[Any], Decoded], chunks: Any, rows: int) -> Decoded:
    """What `part` makes of each chunk, one after the other, as [rows, ...] again."""
    found = jax.lax.scan(lambda _, arrays: (None, part(arrays)), None, chunks)[1]
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:rows], found)


def split_rows(arrays: T, chunks: int) -> T:
    """[b, ...] as [chunks, rows, ...], filled up with zeros."""

    def split(array: Array) -> Array:
        rows = -(-len(array) // chunks)
        padded = jnp.pad(array, [(0, chunks * rows - len(array))] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(chunks, rows, *array.shape[1:])

    return jax.tree.map(split, arrays)


def _columns(arrays: T) -> T:
    """[b, k] as [k, b, 1]: one selected feature of every row at a time."""
    return jax.tree.map(lambda array: array.T[:, :, None], arrays)
