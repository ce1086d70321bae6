"""Decoding what was selected, by the selected rows or through all features, with one gradient for live and dead ones.

The gradient of W is as large as W. Live and dead features add to the same one, and where no feature is dead, nothing
is added, written or read for them: two gradients that are summed would cost a quarter of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fac_jax.sae.dense import add_all_gradient, decode_all
from fac_jax.sae.sparse import Decoded, Selected, Weights, add_rows_gradient, decode_rows

T = TypeVar("T")
WIDTHS = 4  # at most: all, a half, a quarter, an eighth of the columns


class Way(NamedTuple):
    """How a selection is decoded: all that is static about it."""

    dense: bool
    """Through all features, whose matmuls take their inputs in `dtype`; else by the selected rows, in float32."""
    dtype: str = "float32"
    groups: int = 1
    """Groups of features that are summed apart; 1 where it is dense."""
    platform: str = "cpu"
    """Of the devices that run it."""
    shards: int = 1
    """Shards whose best features compete: most of what one of them selected is then not kept, and left out."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def decode_selected(
    live_way: Way,
    dead_way: Way,
    weights: Weights,
    x_bd: Float[Array, "b d"],
    live: Selected | None,
    dead: Selected | None,
    any_dead: Bool[Array, ""],
) -> tuple[Decoded | None, Decoded | None]:
    """Decode two selections; either may be absent, and the second costs nothing unless `any_dead`.

    Differentiable in the weights. Call it inside `shard_map`: this shard's rows of the batch, and its features.
    """
    return _forward(live_way, dead_way, weights, x_bd, live, dead, any_dead)[0]


def _forward(
    live_way: Way,
    dead_way: Way,
    weights: Weights,
    x_bd: Array,
    live: Selected | None,
    dead: Selected | None,
    any_dead: Array,
) -> tuple[tuple[Decoded | None, Decoded | None], tuple[Any, ...]]:
    found = None if live is None else _decode(live_way, weights, x_bd, live)
    revived = None
    if dead is not None:
        nothing = Decoded(jnp.zeros_like(dead.val_bk), jnp.zeros_like(x_bd)[:, None])
        revived = jax.lax.cond(any_dead, partial(_decode, dead_way, weights, x_bd, dead), lambda: nothing)
    acts = tuple(one if one is None else one.acts_bk for one in (found, revived))
    return (found, revived), (weights, x_bd, live, dead, any_dead, acts)


def _backward(
    live_way: Way, dead_way: Way, kept: tuple[Any, ...], given: tuple[Decoded | None, Decoded | None]
) -> tuple[Any, ...]:
    weights, x_bd, live, dead, any_dead, (acts_bk, dead_acts_bk) = kept
    of_live, of_dead = given
    gradient = jax.tree.map(jnp.zeros_like, weights)
    if live is not None and of_live is not None:
        gradient = _add_gradient(live_way, weights, x_bd, live, acts_bk, of_live.sum_bpd, gradient)
    if dead is not None and of_dead is not None:
        more = partial(_add_gradient, dead_way, weights, x_bd, dead, dead_acts_bk, of_dead.sum_bpd)
        gradient = jax.lax.cond(any_dead, more, lambda same: same, gradient)
    return gradient, None, None, None, None


decode_selected.defvjp(_forward, _backward)


def _decode(way: Way, weights: Weights, x_bd: Array, chosen: Selected) -> Decoded:
    if way.dense:
        return decode_all(weights, x_bd, chosen, way.dtype)

    def rows(width: int) -> Decoded:
        found = decode_rows(weights, x_bd, _leading(chosen, width), way.groups, way.platform)
        missing = chosen.idx_bk.shape[1] - width
        return found._replace(acts_bk=jnp.pad(found.acts_bk, ((0, 0), (0, missing))))

    return _narrowed(way, chosen, rows)


def _add_gradient(
    way: Way, weights: Weights, x_bd: Array, chosen: Selected, acts_bk: Array, given_bpd: Array, gradient: Weights
) -> Weights:
    if way.dense:
        return add_all_gradient(gradient, weights, x_bd, chosen, acts_bk, given_bpd, way.dtype)

    def rows(width: int) -> Weights:
        few, acts_bw = _leading((chosen, acts_bk), width)
        return add_rows_gradient(gradient, weights, x_bd, few, acts_bw, given_bpd, way.platform)

    return _narrowed(way, chosen, rows)


def _narrowed(way: Way, chosen: Selected, rows: Callable[[int], T]) -> T:
    """`rows` of as few leading columns as hold all that is kept: what a row keeps are the best that it selected."""
    k = chosen.idx_bk.shape[1]
    first, *narrower = widths(k, way.shards)
    if not narrower:
        return rows(first)
    needed = chosen.kept_bk.sum(axis=1).max()
    branch = sum((needed <= width).astype(jnp.int32) for width in narrower)
    return jax.lax.switch(branch, [partial(rows, width) for width in (first, *narrower)])


def widths(k: int, shards: int) -> list[int]:
    """Numbers of columns that a selection of k is decoded by: halves of it, down to twice a shard's even share."""
    found = [k]
    while len(found) < WIDTHS and found[-1] * shards > 2 * k and found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


def _leading(arrays: T, width: int) -> T:
    return jax.tree.map(lambda array: array[:, :width], arrays)
