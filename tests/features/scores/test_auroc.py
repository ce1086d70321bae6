"""AUROC of ratings and its intervals, against scikit-learn and the definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fac_jax.features.scores.auroc import DRAWS, LEVELS, feature_aurocs, over_features, wins
from fac_jax.features.scores.heldout import RANDOM, RIGHT, Trials


def trials(*shapes: tuple[int, int]) -> Trials:
    """Trials of features 0, 1, ... with so many active and silent spans each."""
    feature = np.repeat(np.arange(len(shapes)), [sum(shape) for shape in shapes])
    origin = np.concatenate([np.repeat([RIGHT, RANDOM], shape) for shape in shapes])
    nowhere = np.zeros(len(feature), np.int64)
    return Trials(feature, nowhere, nowhere, nowhere, nowhere, origin)


def test_auroc_with_ties_as_scikit_learn_counts_it() -> None:
    random = np.random.default_rng(0)
    shapes = [(10, 10), (3, 7), (10, 10), (5, 4), (3, 3)]
    some = trials(*shapes)
    rating = random.integers(0, 4, len(some.feature_r)).astype(float)
    found = feature_aurocs(some, rating, seed=1)
    assert list(found) == list(range(len(shapes)))
    for feature, one in found.items():
        mine = some.feature_r == feature
        assert one.value == pytest.approx(roc_auc_score(some.active_r[mine], rating[mine]))
        assert one.low <= one.value <= one.high


def test_what_could_not_be_read_counts_as_a_coin_would() -> None:
    some = trials((4, 4))
    right = np.array([3.0, 3, 3, 3, 0, 0, 0, 0])
    assert feature_aurocs(some, right, 0)[0].value == 1
    assert feature_aurocs(some, np.full(8, np.nan), 0)[0].value == 0.5
    half_read = np.array([3.0, 3, np.nan, np.nan, 0, 0, 0, 0])
    assert feature_aurocs(some, half_read, 0)[0].value == 0.75, "half of the pairs won, half of them a coin's"
    unread_silent = np.array([0.0, 0, 0, 0, np.nan, np.nan, 3, 3])
    assert feature_aurocs(some, unread_silent, 0)[0].value == 0.25, "leaving out the hard ones would have paid"
    assert wins(np.array([[np.nan]]), np.array([[2.0]])).item() == 0.5


def test_intervals_are_a_bootstrap_of_the_spans() -> None:
    """By the definition: spans drawn with replacement, AUROC again, its 2.5th and 97.5th percentile."""
    some = trials((10, 8))
    random = np.random.default_rng(2)
    rating = np.concatenate([random.integers(1, 4, 10), random.integers(0, 3, 8)]).astype(float)
    drawn = []
    for _ in range(8 * DRAWS):
        high, low = rating[random.choice(10, 10)], rating[10 + random.choice(8, 8)]
        drawn.append(np.mean((high[:, None] > low) + (high[:, None] == low) / 2))
    found = [feature_aurocs(some, rating, seed)[0] for seed in range(8)]
    ends = np.mean([[one.low, one.high] for one in found], axis=0)
    assert ends.tolist() == pytest.approx(np.percentile(drawn, LEVELS).tolist(), abs=0.01)
    assert feature_aurocs(some, rating, seed=0)[0] == found[0] and len({one.low for one in found}) > 1


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Ratings with a known AUROC: a normal one shifted by 1 exceeds another with probability Phi(1 / sqrt 2)."""
    random, count = np.random.default_rng(4), 400
    some = trials(*[(20, 20)] * count)
    rating = random.normal(size=len(some.feature_r)) + some.active_r
    found = feature_aurocs(some, rating, seed=0)
    held = np.mean([one.low <= 0.7602 <= one.high for one in found.values()])
    assert 0.88 < held < 0.98


def test_figures_over_features() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 500).tolist()
    found = over_features(values, seed=3)
    assert found is not None and found["features"] == 500
    assert found["median"] == np.median(values) and found["mean"] == np.mean(values)
    standard_error = np.std(values) / np.sqrt(500)
    assert found["mean_low"] == pytest.approx(np.mean(values) - 1.96 * standard_error, abs=standard_error / 4)
    assert found["mean_high"] == pytest.approx(np.mean(values) + 1.96 * standard_error, abs=standard_error / 4)
    assert found["median_low"] < found["median"] < found["median_high"]
    assert over_features([], seed=0) is None
