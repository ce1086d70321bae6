"""Nucleus sampling against the sorted definition, and the cache against a forward pass without one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fac_jax.backbone import decode
from fac_jax.backbone.decode import sample


def nucleus(logits_v: np.ndarray, top_p: float) -> np.ndarray:
    """Probabilities within the nucleus, from the definition."""
    p_v = np.exp(logits_v - logits_v.max())
    p_v /= p_v.sum()
    order = np.argsort(-p_v, kind="stable")
    size = int(np.sum(np.cumsum(p_v[order]) < top_p)) + 1
    kept = np.zeros_like(p_v)
    kept[order[:size]] = p_v[order[:size]]
    return kept / kept.sum()


@pytest.mark.parametrize("head", [256, 4], ids=["narrow", "wide"])
@pytest.mark.parametrize("top_p", [0.35, 0.9, 1.0])
def test_frequencies_are_those_of_the_nucleus(head: int, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "HEAD", head)
    draws, logits_v = 4000, 1.5 * np.random.default_rng(0).standard_normal(40).astype(np.float32)
    expected_v = nucleus(logits_v, top_p)
    keys_b = jax.vmap(jax.random.key)(jnp.arange(draws))
    tokens_b = sample(jnp.tile(logits_v, (draws, 1)), jnp.float32(top_p), keys_b, jnp.zeros(draws, bool))
    counts_v = np.bincount(np.asarray(tokens_b), minlength=40)
    assert not counts_v[expected_v == 0].any()
    spread_v = np.sqrt(draws * expected_v * (1 - expected_v))
    assert (np.abs(counts_v - draws * expected_v) <= 4.5 * spread_v + 1e-9).all()


def test_a_rows_choice_does_not_depend_on_a_wide_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "HEAD", 4)
    peaked, flat = jnp.array([4.0, 3.5, 0.0, -9, -9, -9, -9, -9]), jnp.zeros(8)
    keys_b = jax.vmap(jax.random.key)(jnp.arange(50))
    alone_b = sample(jnp.tile(peaked, (50, 1)), jnp.float32(0.9), keys_b, jnp.zeros(50, bool))
    mixed_b = sample(jnp.stack([peaked, flat] * 25), jnp.float32(0.9), keys_b, jnp.zeros(50, bool))
    assert np.array_equal(np.asarray(alone_b)[::2], np.asarray(mixed_b)[::2])
    assert len(set(np.asarray(mixed_b)[1::2].tolist())) > 4


def test_equal_logits_at_the_edge_are_not_lost() -> None:
    keys_b = jax.vmap(jax.random.key)(jnp.arange(400))
    tokens_b = sample(jnp.zeros((400, 4)), jnp.float32(1.0), keys_b, jnp.zeros(400, bool))
    assert set(np.asarray(tokens_b).tolist()) == {0, 1, 2, 3}
