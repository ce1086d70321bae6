"""Decoding through all features: for JumpReLU, whose rows keep no fixed number, and where K is a large share of them.

    y = A W      V = (G W^T) 1[A > 0]      dW = A^T G      dE = V^T c      db_enc = sum_b V      db_dec = - db_enc E

with A the activations [batch, features], G the gradient of y, and c = x - b_dec. The last line is the pre-bias
identity: what b_dec receives through the encoder is a sum over the batch already, so it needs no product over it. The
matmuls take their inputs in the type of the selection and accumulate in float32.

JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): a = pre 1[pre > t]. The steps have no gradient, so t receives
that of a rectangle of width e around it: da/dt = - t/e 1[|pre - t| < e/2], and dL0/dt = - 1/e 1[|pre - t| < e/2].

`dense_pays` says when the sparse form is dearer. All of it works inside `shard_map`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fac_jax.sae.select import HIGHEST
from fac_jax.sae.sparse import Decoded, Selected, Weights, over_chunks, split_rows

DENSE_SHARE = {"cpu": 0.025, "gpu": 0.003, "tpu": 0.0004}
"""Share of a shard's features from which on dense is faster. CPU: measured on 2 cores with avx512_bf16 (2026-11-24),
where whole steps cost the same at 2.4% (d 576, 4,096 features, batch 2,048), 3.1% (768, 16,384, 1,024) and beyond 1.6%
(2,048, 32,768, 512). GPU: measured on an H200 (2026-11-26) in steps of 4,096 rows: d 2,048, 65,536 features, 7.2 ms
sparse at K 32 and 12.6 at 128, where dense takes 15.5, so the same at .27%; d 4,096, 16,384 features, 6.2 and 8.1 at K
32, so .3%. (By arithmetic K / F = bytes per second / (2 operations per second), the sparse form moving 16 K d bytes a
row and the dense one computing 8 F d operations: .0024.) TPU: predicted from the programs that its compiler makes for
a v5e, where the sparse form's reductions cost more than its bytes: .46 us a row and feature, against .18 ns times F a
row."""
DENSE_ELEMENTS = 2**29
"""Of [rows, features] at a time: 2 GiB in float32."""


def dense_share(platform: str) -> float:
    """Share of the features from which on decoding through all of them is faster, on devices of this platform."""
    return DENSE_SHARE[platform]


def dense_pays(k: int, features: int, platform: str) -> bool:
    """Whether decoding k of this many features is faster through all of them."""
    return k > dense_share(platform) * features


class Jumped(NamedTuple):
    """What JumpReLU makes of the rows."""

    sum_bd: Float[Array, "b d"]
    """Reconstruction without b_dec."""
    l0_b: Float[Array, " b"]
    """Active features; differentiable in the thresholds."""
    on_bf: Bool[Array, "b f"]


def decode_all(weights: Weights, x_bd: Float[Array, "b d"], chosen: Selected, dtype: str) -> Decoded:
    """`sparse.decode_rows` through all features, in one group; the activations are the values that selected."""
    features = len(weights.w_fd)

    def part(chosen: Selected) -> Decoded:
        acts_bk = jnp.where(chosen.kept_bk, jax.nn.relu(chosen.val_bk), 0)
        sum_bd = _product("bf,fd->bd", _spread(acts_bk, chosen, features, dtype), weights.w_fd, dtype)
        return Decoded(acts_bk, sum_bd[:, None])

    if (chunks := _chunks(len(x_bd), features)) == 1:
        return part(chosen)
    return over_chunks(part, split_rows(chosen, chunks), len(x_bd))


def add_all_gradient(
    gradient: Weights,
    weights: Weights,
    x_bd: Float[Array, "b d"],
    chosen: Selected,
    acts_bk: Array,
    given_bpd: Float[Array, "b p d"],
    dtype: str,
) -> Weights:
    """`gradient`, and what `decode_all` adds to it where `given_bpd` is the gradient of its sum."""
    features = len(weights.w_fd)

    def add_part(sums: Weights, arrays: tuple[Array, Selected, Array, Array]) -> tuple[Weights, None]:
        x_bd, chosen, acts_bk, g_bd = arrays
        acts_bf = _spread(acts_bk, chosen, features, dtype)
        v_bf = _product("bd,fd->bf", g_bd, weights.w_fd, dtype)
        more = _gradient(dtype, weights, x_bd, acts_bf, jnp.where(acts_bf > 0, v_bf, 0), g_bd)
        return jax.tree.map(jnp.add, sums, more), None

    arrays = x_bd, chosen, acts_bk, given_bpd[:, 0]
    if (chunks := _chunks(len(x_bd), features)) == 1:
        return add_part(gradient, arrays)[0]
    return jax.lax.scan(add_part, gradient, split_rows(arrays, chunks))[0]


def _chunks(rows: int, features: int) -> int:
    return -(-rows * features // DENSE_ELEMENTS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def decode_jump(
    dtype: str, width: float, weights: Weights, threshold_f: Float[Array, " f"], x_bd: Float[Array, "b d"]
) -> Jumped:
    """JumpReLU and its reconstruction; `width` is that of the rectangle. Differentiable in weights and thresholds."""
    return _jump_forward(dtype, width, weights, threshold_f, x_bd)[0]


def _jump_forward(
    dtype: str, width: float, weights: Weights, threshold_f: Array, x_bd: Array
) -> tuple[Jumped, tuple[Any, ...]]:
    pre_bf = _product("bd,fd->bf", x_bd - weights.b_dec_d, weights.encoder_fd, dtype) + weights.b_enc_f
    on_bf = (pre_bf > threshold_f) & (pre_bf > 0)
    sum_bd = _product("bf,fd->bd", jnp.where(on_bf, pre_bf, 0), weights.w_fd, dtype)
    return Jumped(sum_bd, on_bf.sum(axis=1).astype(jnp.float32), on_bf), (weights, threshold_f, x_bd, pre_bf, on_bf)


def _jump_backward(dtype: str, width: float, kept: tuple[Any, ...], given: Jumped) -> tuple[Any, ...]:
    weights, threshold_f, x_bd, pre_bf, on_bf = kept
    v_bf = _product("bd,fd->bf", given.sum_bd, weights.w_fd, dtype)
    near_bf = jnp.abs(pre_bf - threshold_f) < width / 2
    of_threshold_f = -jnp.sum(jnp.where(near_bf, threshold_f * v_bf + given.l0_b[:, None], 0), axis=0) / width
    acts_bf = jnp.where(on_bf, pre_bf, 0)
    gradient = _gradient(dtype, weights, x_bd, acts_bf, jnp.where(on_bf, v_bf, 0), given.sum_bd)
    return gradient, of_threshold_f, None


decode_jump.defvjp(_jump_forward, _jump_backward)


def _gradient(dtype: str, weights: Weights, x_bd: Array, acts_bf: Array, v_bf: Array, g_bd: Array) -> Weights:
    dw_fd = _product("bf,bd->fd", acts_bf, g_bd, dtype)
    de_fd = _product("bf,bd->fd", v_bf, x_bd - weights.b_dec_d, dtype)
    db_enc_f = v_bf.sum(axis=0)
    tied = weights.w_enc_fd is None
    return Weights(
        w_fd=dw_fd + de_fd if tied else dw_fd,
        w_enc_fd=None if tied else de_fd,
        b_enc_f=db_enc_f,
        b_dec_d=-jnp.einsum("f,fd->d", db_enc_f, weights.encoder_fd, precision=HIGHEST),
    )


def _spread(values_bk: Array, chosen: Selected, features: int, dtype: str) -> Array:
    """Values of selected features as [b, features], 0 elsewhere, in the type that the matmuls take."""
    rows_b1 = jnp.arange(len(values_bk))[:, None]
    return jnp.zeros((len(values_bk), features), dtype).at[rows_b1, chosen.idx_bk].add(values_bk.astype(dtype))


def _product(spec: str, a: Array, b: Array, dtype: str) -> Array:
    precision = HIGHEST if dtype == "float32" else None
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)
