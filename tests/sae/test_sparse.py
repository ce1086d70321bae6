"""Selecting in tiles, and the gradient by hand: each against a few plain lines of jax.numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fac_jax.sae import sparse
from fac_jax.sae.sparse import Among, Decoded, Selected, decode_selected, select

F, D, B = 96, 24, 40


@dataclasses.dataclass(frozen=True)
class Arrays:
    w_fd: jax.Array
    b_enc_f: jax.Array
    centred_bd: jax.Array


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """Values of few digits, so that many pre-activations tie."""
    rng = np.random.default_rng(0)
    shapes = ((F, D), (F,), (B, D))
    return Arrays(*(jnp.asarray(np.round(rng.standard_normal(shape)), jnp.float32) for shape in shapes))


def chosen(seed: int, k: int) -> Selected:
    """k distinct features a row, not all of which count."""
    rng = np.random.default_rng(seed)
    idx_bk = np.stack([rng.permutation(F)[:k] for _ in range(B)])
    return Selected(jnp.asarray(idx_bk), jnp.asarray(rng.random((B, k)) < 0.8))


@pytest.mark.parametrize("tile_features", [F, F // 2, F // 4, 8])
@pytest.mark.parametrize("k", [1, 7, 16, F])
def test_tiles_change_nothing(tile_features: int, k: int, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and indices are lax.top_k's, ties included, with and without a mask, however the features are cut."""
    monkeypatch.setattr(sparse, "TILE_ELEMENTS", tile_features * B)
    mask_f = jnp.asarray(np.random.default_rng(3).random(F) < 0.4)
    pre_bf = arrays.centred_bd @ arrays.w_fd.T + arrays.b_enc_f
    found = jax.jit(lambda a: select(*a, "float32", [Among(k), Among(5, mask_f)]))(dataclasses.astuple(arrays))
    for best, (scores_bf, count) in zip(found, ((pre_bf, k), (jnp.where(mask_f, pre_bf, -jnp.inf), 5)), strict=True):
        val_bk, idx_bk = jax.lax.top_k(scores_bf, count)
        np.testing.assert_array_equal(best.val_bk, val_bk)
        np.testing.assert_array_equal(best.idx_bk, idx_bk)


def test_memory_does_not_grow_with_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the features, the same temporaries: [batch, features] never exists."""
    monkeypatch.setattr(sparse, "TILE_ELEMENTS", 64 * 1024)

    def temporary_bytes(features: int) -> int:
        like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((features, 32), (features,), (64, 32))]
        compiled = jax.jit(lambda *a: select(*a, "float32", [Among(16)])).lower(*like).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    narrow, wide = temporary_bytes(4096), temporary_bytes(32768)
    assert wide - narrow < 0.1 * 64 * 32768 * 4, (narrow, wide)
    monkeypatch.setattr(sparse, "TILE_ELEMENTS", 2**40)
    assert temporary_bytes(32768) > 64 * 32768 * 4, "untiled, the same call holds all pre-activations"


def plain(w_fd: jax.Array, b_enc_f: jax.Array, centred_bd: jax.Array, one: Selected) -> Decoded:
    """The reference: five lines, [b, k, d] and all."""
    w_bkd = w_fd[one.idx_bk]
    pre_bk = jnp.einsum("bkd,bd->bk", w_bkd, centred_bd) + b_enc_f[one.idx_bk]
    acts_bk = jnp.where(one.kept_bk, jax.nn.relu(pre_bk), 0)
    return Decoded(acts_bk, jnp.einsum("bk,bkd->bd", acts_bk, w_bkd))


@pytest.mark.parametrize("any_dead", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, B])
def test_gradient_by_hand_is_autodiffs(
    any_dead: bool, rows_per_chunk: int, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In W, b_enc and the rows, through activations and sums; the dead selection counts only when there is one."""
    monkeypatch.setattr(sparse, "CHUNK_BYTES", {"cpu": rows_per_chunk * 6 * D * 4})
    live, dead = chosen(1, 6), chosen(2, 9)
    goal_bd = jnp.asarray(np.random.default_rng(4).standard_normal((B, D)), jnp.float32)

    def loss(decode: Callable[..., tuple[Decoded, Decoded]], *inputs: jax.Array) -> jax.Array:
        found, revived = decode(*inputs)
        of_live = jnp.sum((found.sum_bd - goal_bd) ** 2) + jnp.sum(jnp.sin(found.acts_bk))
        return of_live + jnp.sum((revived.sum_bd - 2 * goal_bd) ** 2) + jnp.sum(revived.acts_bk**2)

    def by_hand(*inputs: jax.Array) -> tuple[Decoded, Decoded]:
        found, revived = decode_selected(*inputs, live, dead, jnp.bool_(any_dead))
        assert revived is not None
        return found, revived

    def autodiff(*inputs: jax.Array) -> tuple[Decoded, Decoded]:
        revived = plain(*inputs, dead)
        return plain(*inputs, live), revived if any_dead else jax.tree.map(jnp.zeros_like, revived)

    inputs = dataclasses.astuple(arrays)
    (got, got_gradient), (want, want_gradient) = (
        jax.jit(jax.value_and_grad(lambda *inputs, how=how: loss(how, *inputs), argnums=(0, 1, 2)))(*inputs)
        for how in (by_hand, autodiff)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for mine, theirs in zip(got_gradient, want_gradient, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_no_array_of_batch_k_width() -> None:
    """Nothing in the compiled forward and gradient is as large as [b, k, d]: temporaries are a fraction of it."""
    b, k, d, f = 4096, 32, 64, 1024
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((f, d), (f,), (b, d))]
    live = Selected(jax.ShapeDtypeStruct((b, k), jnp.int32), jax.ShapeDtypeStruct((b, k), jnp.bool_))

    def loss(w_fd: jax.Array, b_enc_f: jax.Array, centred_bd: jax.Array, live: Selected) -> jax.Array:
        return jnp.sum(decode_selected(w_fd, b_enc_f, centred_bd, live, None, jnp.bool_(False))[0].sum_bd ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*like, live).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < b * k * d * 4 / 2


def test_cpu_selects_in_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "flags : fpu avx512f avx512_bf16 gfni")
    assert sparse.selecting_dtype() == "bfloat16"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "flags : fpu avx512f")
    assert sparse.selecting_dtype() == "float32"
