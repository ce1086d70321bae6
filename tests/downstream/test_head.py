"""The head against scikit-learn's logistic regression, and its batches against their definition."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fac_jax.config.downstream import FinetuneConfig
from fac_jax.downstream.head import fit, minibatches


def overlapping_classes(n: int = 160, d: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    positive = np.arange(n) < n // 4
    return generator.normal(size=(n, d)) + 0.8 * positive[:, None], positive


def test_converges_to_balanced_logistic_regression() -> None:
    x_nd, positive = overlapping_classes()
    config = FinetuneConfig(seeds=(1, 2), epochs=1500, learning_rate=5e-3, batch=160)
    head_sd, bias_s = fit(x_nd, positive, config)
    exact = LogisticRegression(C=1e6, class_weight="balanced", tol=1e-8).fit(x_nd, positive)
    for head_d, bias in zip(head_sd, bias_s, strict=True):
        np.testing.assert_allclose(head_d, exact.coef_[0], atol=2e-3)
        assert bias == pytest.approx(exact.intercept_[0], abs=2e-3)


def test_seed_fixes_the_head_and_other_seeds_differ() -> None:
    x_nd, positive = overlapping_classes()
    config = FinetuneConfig(seeds=(7, 7, 8), epochs=2, learning_rate=1e-2, batch=16)
    head_sd, _ = fit(x_nd, positive, config)
    np.testing.assert_array_equal(head_sd[0], head_sd[1])
    assert not np.allclose(head_sd[0], head_sd[2])


def test_every_epoch_visits_every_row_once() -> None:
    order = minibatches(n=10, batch=4, epochs=3, seed=0)
    assert order.shape == (9, 4)
    for epoch in order.reshape(3, 12):
        assert sorted(epoch) == [-1, -1, *range(10)]
    assert not np.array_equal(order[:3], order[3:6])


def test_padding_of_the_last_batch_changes_nothing() -> None:
    """One batch of 10 rows and the same rows padded to 16 give the same step."""
    x_nd, positive = overlapping_classes(n=10)
    settings = {"seeds": (1,), "epochs": 1, "learning_rate": 1e-2}
    whole, _ = fit(x_nd, positive, FinetuneConfig(batch=10, **settings))
    padded, _ = fit(x_nd, positive, FinetuneConfig(batch=16, **settings))
    np.testing.assert_allclose(whole, padded, atol=1e-6)
