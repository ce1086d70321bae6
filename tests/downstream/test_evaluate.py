"""Metrics against scikit-learn, and the bootstrap against what it must do on known input."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from fac_jax.downstream.evaluate import _weighted_auprc, auprc, auroc, paired_bootstrap, spread


def labelled(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    positive = generator.random(n) < 0.4
    positive[:2] = [True, False]
    return positive, generator.normal(size=n) + positive


@pytest.mark.parametrize("decimals", [8, 0])  # 0: many equal scores
def test_weighted_auprc_is_scikit_learns(decimals: int) -> None:
    positive, scores = labelled(60, 1)
    scores = scores.round(decimals)
    counts = np.random.default_rng(2).integers(0, 3, size=(20, 60)).astype(float)
    counts[:, :2] = 1
    expected = [average_precision_score(positive, scores, sample_weight=row) for row in counts]
    np.testing.assert_allclose(_weighted_auprc(positive, scores, counts), expected, rtol=1e-12)


def test_a_random_scorer_gets_the_base_rate_and_a_perfect_one_gets_one() -> None:
    positive, _ = labelled(4000, 3)
    assert auprc(positive, np.random.default_rng(4).random(4000)) == pytest.approx(positive.mean(), abs=0.03)
    assert auprc(positive, positive.astype(float)) == auroc(positive, positive.astype(float)) == 1.0


def test_bootstrap_of_equal_scores_is_exactly_nothing() -> None:
    positive, scores = labelled(80, 5)
    difference = paired_bootstrap(positive, scores[None], scores[None], resamples=50)
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_bootstrap_interval_holds_the_difference_and_excludes_zero_when_it_is_large() -> None:
    positive, scores = labelled(300, 6)
    better = np.stack([positive + 0.0, positive + 0.1])
    difference = paired_bootstrap(positive, better, np.stack([scores, scores]), resamples=300)
    assert difference.mean == pytest.approx(1 - auprc(positive, scores))
    assert 0 < difference.low <= difference.mean <= difference.high
    assert difference == paired_bootstrap(positive, better, np.stack([scores, scores]), resamples=300)


def test_spread_is_the_sample_deviation() -> None:
    assert spread([1.0, 2.0, 3.0]).sd == pytest.approx(1.0)
    assert spread([0.5]).sd == 0.0
