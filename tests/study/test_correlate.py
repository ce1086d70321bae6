"""Correlations against scipy's, budgets taken off by hand, intervals that hold what they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fac_jax.study.correlate import FEWEST, at_equal_budget, correlation, pearson, spearman


@given(st.integers(0, 2**32 - 1), st.integers(3, 30), st.booleans())
def test_rows_correlate_as_scipy_says(seed: int, cells: int, ties: bool):
    random = np.random.default_rng(seed)
    x_rc, y_rc = random.normal(size=(2, 4, cells))
    if ties:
        x_rc, y_rc = np.round(x_rc), np.round(y_rc)
    for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
        for found, x_c, y_c in zip(ours(x_rc, y_rc), x_rc, y_rc, strict=True):
            if np.ptp(x_c) == 0 or np.ptp(y_c) == 0:
                assert np.isnan(found)
            else:
                assert found == pytest.approx(theirs(x_c, y_c).statistic, abs=1e-9)


def test_what_all_budgets_share_goes_and_the_rest_stays():
    budget_c = np.array([25, 25, 50, 50])
    left = at_equal_budget(np.array([[1.0, 3.0, 10.0, 14.0]]), budget_c[None])
    assert left.tolist() == [[-1.0, 1.0, -2.0, 2.0]]


def test_growth_with_the_budget_alone_is_no_correlation_at_equal_budget():
    """More documents raise both figures; within a budget they have nothing to do with each other."""
    random = np.random.default_rng(1)
    budget_c = np.repeat([25, 50, 100, 200], 8)
    x_cs, y_cs = (np.log(budget_c)[:, None] + 0.05 * random.normal(size=(32, 5)) for _ in range(2))
    whole, equal = correlation(pearson, x_cs, y_cs), correlation(pearson, x_cs, y_cs, budget_c)
    assert whole is not None and whole.value > 0.95 and whole.low is not None and whole.low > 0.9
    assert equal is not None and equal.low is not None and equal.high is not None and equal.low < 0 < equal.high


def test_intervals_hold_the_true_correlation_about_as_often_as_they_say():
    random, held = np.random.default_rng(2), 0
    for trial in range(60):
        x_c, noise_c = random.normal(size=(2, 40))
        y_c = 0.6 * x_c + 0.8 * noise_c
        found = correlation(pearson, x_c[:, None], y_c[:, None], seed=trial)
        assert found is not None and found.low is not None and found.high is not None
        held += found.low <= 0.6 <= found.high
    assert held >= 50, "95% of 60 are 57"


def test_the_spread_over_seeds_widens_the_interval():
    random = np.random.default_rng(3)
    x_c = np.linspace(0, 1, 12)
    sure = np.repeat(x_c[:, None], 5, axis=1)
    unsure = sure + 0.5 * random.normal(size=sure.shape)
    narrow, wide = (correlation(pearson, np.repeat(x_c[:, None], 5, axis=1), y) for y in (sure, unsure))
    assert narrow is not None and wide is not None and None not in (narrow.low, wide.low, wide.high)
    assert narrow.value == pytest.approx(1) and narrow.high - narrow.low < 1e-9 < wide.high - wide.low


def test_of_few_cells_or_a_constant_nothing_is_said():
    some = np.random.default_rng(4).normal(size=(FEWEST, 2))
    assert correlation(pearson, some[:-1], some[:-1]) is None
    assert correlation(spearman, np.ones_like(some), some) is None
    assert correlation(pearson, some, some) is not None
