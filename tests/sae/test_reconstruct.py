"""What training differentiates, for every kind of SAE, both decodings and both meshes, against plain dense autodiff."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.sae import dense
from fac_jax.sae.model import SAE, decode, encode
from fac_jax.sae.reconstruct import Choice, Dead, Reconstruction, reconstruct

B, F, D, K = 64, 256, 32, 20
COUNTED = np.arange(B) % 3 > 0


def untied(sae: SAE) -> SAE:
    noise_fd = np.random.default_rng(5).standard_normal((F, D)).astype(np.float32) / 20
    return SAE(sae.w_fd[...], sae.b_enc_f[...], sae.b_dec_d[...], sae.w_fd[...] + noise_fd)


def active(pre_bf: jax.Array, choice: Choice) -> jax.Array:
    """Which features are kept, by sorting everything."""
    if choice.kind == "topk":
        best_bk = jax.lax.top_k(pre_bf, K)[1]
        return jnp.zeros(pre_bf.shape, bool).at[jnp.arange(B)[:, None], best_bk].set(True)
    counted_bf = jnp.where(jnp.asarray(COUNTED)[:, None], jax.nn.relu(pre_bf), 0)
    return pre_bf >= jnp.sort(counted_bf.reshape(-1))[-K * int(COUNTED.sum())]


def dense_prefixes(sae: SAE, x_bd: jax.Array, choice: Choice) -> tuple[jax.Array, jax.Array]:
    """(reconstruction of each prefix, activations): the five-line reference."""
    pre_bf = (x_bd - sae.b_dec_d[...]) @ sae.encoder_fd.T + sae.b_enc_f[...]
    acts_bf = jnp.where(active(jax.lax.stop_gradient(pre_bf), choice), jax.nn.relu(pre_bf), 0)
    ends = choice.prefixes or (F,)
    hats = [acts_bf[:, :end] @ sae.w_fd[...][:end] + sae.b_dec_d[...] for end in ends]
    return jnp.stack(hats, axis=1), acts_bf


KINDS = {
    "topk": Choice("topk", 48),
    "batchtopk": Choice("batchtopk", 48, row_cap=F),
    "matryoshka": Choice("topk", 48, prefixes=(16, 100, F)),
    "matryoshka on batchtopk": Choice("batchtopk", 48, row_cap=F, prefixes=(16, 100, F)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", ["tied", "untied"])
def test_equals_autodiff_through_the_dense_form(
    kind: str, ties: str, golden: dict[str, np.ndarray], sae: SAE, mesh: Mesh, decoding: str
) -> None:
    """Values, counts and gradients to 1e-5; K is 20 under a static bound of 48."""
    choice, target_bd, x_bd = KINDS[kind], np.roll(golden["x"], 1), jnp.asarray(golden["x"])
    sae = sae if ties == "tied" else untied(sae)

    def reference(sae: SAE) -> tuple[jax.Array, Any]:
        hat_bpd, acts_bf = dense_prefixes(sae, x_bd, choice)
        return jnp.sum((hat_bpd - target_bd[:, None]) ** 2), acts_bf

    def ours(sae: SAE) -> tuple[jax.Array, Any]:
        found = reconstruct(sae, x_bd, jnp.asarray(COUNTED), jnp.int32(K), choice=choice, mesh=mesh)
        return jnp.sum((found.x_hat_bpd - target_bd[:, None]) ** 2), found

    (want, acts_bf), want_gradient = jax.jit(jax.value_and_grad(reference, has_aux=True))(sae)
    (got, found), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(sae)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(found.active_f, ((acts_bf > 0) & COUNTED[:, None]).sum(axis=0))
    np.testing.assert_array_equal(found.l0_b, (acts_bf > 0).sum(axis=1))
    for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    if choice.kind == "batchtopk":
        assert found.l0_b[COUNTED].sum() == K * COUNTED.sum() and len(set(found.l0_b.tolist())) > 5
        np.testing.assert_allclose(found.threshold, acts_bf[COUNTED][acts_bf[COUNTED] > 0].min(), rtol=1e-5)


def test_a_row_at_its_cap_is_counted(golden: dict[str, np.ndarray], sae: SAE, mesh: Mesh, decoding: str) -> None:
    """A cap of 24 under a mean of 20: the rows that want more get 24 and are reported."""
    choice = Choice("batchtopk", K, row_cap=24)
    every_b = jnp.ones(B, bool)
    compiled = jax.jit(partial(reconstruct, choice=choice, mesh=mesh))
    found = compiled(sae, jnp.asarray(golden["x"]), every_b, jnp.int32(K))
    assert found.at_cap == (found.l0_b == 24).sum() > 0 and found.l0_b.max() == 24


@pytest.mark.parametrize("ties", ["tied", "untied"])
def test_jumprelu_is_the_papers(ties: str, golden: dict[str, np.ndarray], sae: SAE, mesh: Mesh) -> None:
    """Values and gradients of W, E and biases through the mask, thresholds by the paper's formula in a loop."""
    width, x_bd = 0.4, jnp.asarray(golden["x"])
    threshold_f = jnp.asarray(np.random.default_rng(2).exponential(size=F), jnp.float32)
    sae = sae if ties == "tied" else untied(sae)
    sae = SAE(*(None if p is None else p[...] for p in (sae.w_fd, sae.b_enc_f, sae.b_dec_d, sae.w_enc_fd)), threshold_f)
    goal_bd, of_l0_b = jnp.roll(x_bd, 1), jnp.asarray(np.random.default_rng(3).standard_normal(B), jnp.float32)

    def ours(sae: SAE) -> tuple[jax.Array, Reconstruction]:
        choice = Choice("jumprelu", K, width=width)
        found = reconstruct(sae, x_bd, jnp.asarray(COUNTED), K, choice=choice, mesh=mesh)
        return jnp.sum((found.x_hat_bpd[:, 0] - goal_bd) ** 2) + jnp.sum(of_l0_b * found.l0_b), found

    def reference(sae: SAE) -> jax.Array:
        return jnp.sum((decode(sae, encode(sae, x_bd, None)) - goal_bd) ** 2)

    (_, found), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(sae)
    acts_bf = np.asarray(encode(sae, x_bd, None))
    np.testing.assert_allclose(found.x_hat_bpd[:, 0], decode(sae, jnp.asarray(acts_bf)), rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(found.active_f, ((acts_bf > 0) & COUNTED[:, None]).sum(axis=0))
    np.testing.assert_array_equal(found.l0_b, (acts_bf > 0).sum(axis=1))
    want = jax.jit(jax.grad(reference))(sae)
    for name in ("w_fd", "b_enc_f", "b_dec_d", "w_enc_fd"):
        if (theirs := getattr(want, name)) is not None:
            mine = getattr(gradient, name)[...]
            np.testing.assert_allclose(mine, theirs[...], rtol=1e-5, atol=1e-5 * np.abs(theirs[...]).max())
    pre_bf = np.asarray((x_bd - sae.b_dec_d[...]) @ sae.encoder_fd.T + sae.b_enc_f[...])
    of_acts_bf = np.asarray(2 * (found.x_hat_bpd[:, 0] - goal_bd) @ sae.w_fd[...].T)
    threshold_f, of_l0_b, by_hand_f = np.asarray(threshold_f), np.asarray(of_l0_b), np.zeros(F)
    for row in range(B):
        for feature in range(F):
            if abs(pre_bf[row, feature] - threshold_f[feature]) < width / 2:
                kernel = 1 / width
                by_hand_f[feature] -= kernel * (threshold_f[feature] * of_acts_bf[row, feature] + of_l0_b[row])
    np.testing.assert_allclose(gradient.threshold_f[...], by_hand_f, rtol=1e-4, atol=1e-4 * np.abs(by_hand_f).max())


def test_the_rectangle_estimates_the_true_derivative(mesh_1x1: Mesh) -> None:
    """pre ~ N(0, 1): the expected activation falls by t phi(t) with the threshold t, the expected L0 by phi(t)."""
    x_bd = jax.random.normal(jax.random.key(0), (400_000, 1))
    sae = SAE(jnp.ones((1, 1)), jnp.zeros(1), jnp.zeros(1), None, jnp.ones(1))
    choice = Choice("jumprelu", 1, width=0.1)

    def means(sae: SAE, which: int) -> jax.Array:
        found = reconstruct(sae, x_bd, jnp.ones(len(x_bd), bool), 1, choice=choice, mesh=mesh_1x1)
        return jnp.mean((found.x_hat_bpd[:, 0, 0], found.l0_b)[which])

    for which in (0, 1):
        slope = jax.jit(jax.grad(partial(means, which=which)))(sae).threshold_f[...]
        np.testing.assert_allclose(slope, -np.exp(-0.5) / np.sqrt(2 * np.pi), rtol=0.03)


@pytest.mark.parametrize("dead_count", [0, 5, 100])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_dead_features_reconstruct_without_bias(
    kind: str, dead_count: int, golden: dict[str, np.ndarray], sae: SAE, mesh: Mesh, decoding: str
) -> None:
    dead_f = np.zeros(F, bool)
    dead_f[np.random.default_rng(0).permutation(F)[:dead_count]] = True
    every_b, choice = jnp.ones(B, bool), Choice("topk", K) if kind == "topk" else Choice("jumprelu", K)
    if kind == "jumprelu":
        sae = SAE(sae.w_fd[...], sae.b_enc_f[...], sae.b_dec_d[...], None, jnp.full(F, 1e9))
    run = jax.jit(
        lambda sae, x_bd, dead_f: reconstruct(sae, x_bd, every_b, K, choice=choice, mesh=mesh, dead=Dead(dead_f, 16))
    )
    found = run(sae, golden["x"], dead_f)
    pre_bf = np.where(dead_f, golden["pre"], -np.inf)
    best_bk = np.argsort(-pre_bf, axis=1, kind="stable")[:, :16]
    acts_bf = np.zeros_like(pre_bf)
    np.put_along_axis(acts_bf, best_bk, np.maximum(np.take_along_axis(pre_bf, best_bk, axis=1), 0), axis=1)
    np.testing.assert_allclose(found.dead_hat_bd, acts_bf @ golden["W_enc"].T, rtol=1e-5, atol=2e-5)
    want = golden["recon"] if kind == "topk" else np.broadcast_to(golden["b_dec"], (B, D))
    np.testing.assert_allclose(found.x_hat_bpd[:, 0], want, rtol=1e-5, atol=2e-5)


def test_gradients_of_the_dead_are_shared_whatever_decodes_them(
    golden: dict[str, np.ndarray], sae: SAE, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live rows by the selected rows and dead ones through all features, or the other way: the same gradient."""
    every_b, dead_f = jnp.ones(B, bool), jnp.arange(F) % 2 == 0

    def loss(sae: SAE) -> jax.Array:
        found = reconstruct(
            sae, jnp.asarray(golden["x"]), every_b, 8, choice=Choice("topk", 8), mesh=mesh, dead=Dead(dead_f, 30)
        )
        return jnp.sum((found.x_hat_bpd[:, 0] - 1) ** 2) + jnp.sum((found.dead_hat_bd - 2) ** 2)

    shards = mesh.shape["feature"]
    gradients = []
    for share in (2.0, 20 * shards / F, 0.0):  # neither, only the 30 dead, both through all features
        monkeypatch.setattr(dense, "DENSE_SHARE", {"cpu": share})
        gradients.append(jax.jit(jax.grad(lambda sae: loss(sae)))(sae))
    for other in gradients[1:]:
        for mine, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(gradients[0]), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_choice_says_how_it_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "DENSE_SHARE", {"cpu": 0.1})
    choice = Choice("topk", 10)
    assert choice.dense(99) and not choice.dense(100)
    assert not dataclasses.replace(choice, prefixes=(50, 99)).dense(99)
    assert Choice("batchtopk", 10, row_cap=40).dense(399) and Choice("jumprelu").dense(10**6)
