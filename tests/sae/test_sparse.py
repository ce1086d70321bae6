"""The gradient by hand against autodiff through a few plain lines, and what memory it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fac_jax.sae import sparse
from fac_jax.sae.decode import Way, decode_selected
from fac_jax.sae.sparse import Decoded, Selected, Weights

F, D, B = 96, 24, 40
ROWS = Way(dense=False)


@dataclasses.dataclass(frozen=True)
class Arrays:
    weights: Weights
    x_bd: jax.Array


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    w_fd, b_enc_f, b_dec_d, x_bd = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((F, D), (F,), (D,), (B, D))
    )
    return Arrays(Weights(w_fd, None, b_enc_f, b_dec_d), x_bd)


def chosen(seed: int, k: int, groups: int) -> Selected:
    """k distinct features a row, not all of which count."""
    rng = np.random.default_rng(seed)
    idx_bk = np.stack([rng.permutation(F)[:k] for _ in range(B)])
    group_bk = jnp.asarray(idx_bk * groups // F) if groups > 1 else None
    return Selected(jnp.asarray(idx_bk), jnp.asarray(rng.random((B, k)) < 0.8), jnp.zeros((B, k)), group_bk)


def plain(weights: Weights, x_bd: jax.Array, one: Selected, groups: int) -> Decoded:
    """The reference: a few lines, [b, k, d] and all."""
    e_fd = weights.w_fd if weights.w_enc_fd is None else weights.w_enc_fd
    pre_bk = jnp.einsum("bkd,bd->bk", e_fd[one.idx_bk], x_bd - weights.b_dec_d) + weights.b_enc_f[one.idx_bk]
    acts_bk = jnp.where(one.kept_bk, jax.nn.relu(pre_bk), 0)
    group_bk = jnp.zeros_like(one.idx_bk) if one.group_bk is None else one.group_bk
    parts = [jnp.einsum("bk,bkd->bd", acts_bk * (group_bk == p), weights.w_fd[one.idx_bk]) for p in range(groups)]
    return Decoded(acts_bk, jnp.stack(parts, axis=1))


@pytest.mark.parametrize("any_dead", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, B])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("tied", "groups"), [(True, 1), (False, 1), (True, 3), (False, 3)])
def test_gradient_by_hand_is_autodiffs(
    any_dead: bool,
    platform: str,
    rows_per_chunk: int,
    tied: bool,
    groups: int,
    arrays: Arrays,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In every parameter, through the sums; the dead selection counts only when there is one.

    In chunks of rows as on CPUs and GPUs, and these by columns as on TPUs.
    """
    monkeypatch.setattr(sparse, "CHUNK_BYTES", {"cpu": rows_per_chunk * 6 * D * 4, "tpu": rows_per_chunk * D * 4})
    live, dead = chosen(1, 6, groups), chosen(2, 9, 1)
    weights = arrays.weights if tied else arrays.weights._replace(w_enc_fd=jnp.roll(arrays.weights.w_fd, 1, axis=0))
    goal_bd = jnp.asarray(np.random.default_rng(4).standard_normal((B, D)), jnp.float32)

    def loss(decode: Callable[[Weights], tuple[Decoded, Decoded]], weights: Weights) -> jax.Array:
        found, revived = decode(weights)
        scale_p = jnp.arange(1.0, groups + 1)[:, None]
        of_live = jnp.sum((found.sum_bpd - goal_bd[:, None] * scale_p) ** 2)
        return of_live + jnp.sum((revived.sum_bpd[:, 0] - 2 * goal_bd) ** 2)

    way = ROWS._replace(platform=platform)

    def by_hand(weights: Weights) -> tuple[Decoded, Decoded]:
        found, revived = decode_selected(
            way._replace(groups=groups), way, weights, arrays.x_bd, live, dead, jnp.bool_(any_dead)
        )
        assert found is not None and revived is not None
        return found, revived

    def autodiff(weights: Weights) -> tuple[Decoded, Decoded]:
        revived = plain(weights, arrays.x_bd, dead, 1)
        revived = revived if any_dead else jax.tree.map(jnp.zeros_like, revived)
        return plain(weights, arrays.x_bd, live, groups), revived

    (got, got_gradient), (want, want_gradient) = (
        jax.jit(jax.value_and_grad(partial(loss, how)))(weights) for how in (by_hand, autodiff)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_no_array_of_batch_k_width(platform: str) -> None:
    """Nothing in the compiled forward and gradient is as large as [b, k, d]: temporaries are a fraction of it."""
    b, k, d, f = 4096, 32, 64, 1024
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((f, d), (f,), (d,), (b, d))]
    weights = Weights(like[0], None, like[1], like[2])  # type: ignore[arg-type]
    kinds = (jnp.int32, jnp.bool_, jnp.float32)
    live = Selected(*(jax.ShapeDtypeStruct((b, k), kind) for kind in kinds))  # type: ignore[arg-type]

    def loss(weights: Weights, x_bd: jax.Array, live: Selected) -> jax.Array:
        way = ROWS._replace(platform=platform)
        found = decode_selected(way, way, weights, x_bd, live, None, jnp.bool_(False))[0]
        assert found is not None
        return jnp.sum(found.sum_bpd**2)

    compiled = jax.jit(jax.grad(loss)).lower(weights, like[3], live).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < b * k * d * 4 / 2
