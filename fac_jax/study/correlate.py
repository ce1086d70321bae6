"""Does a metric go with what a trained model does? Pearson's and Spearman's correlation over cells, with intervals.

More samples raise most metrics and detection alike, which says nothing of the samples; so beside the correlation over
all cells stands one at equal budget, of what is left when the mean of a budget is taken off. Intervals are 95%
bootstraps that draw cells and seeds anew. Cells of one arm share documents, so even these are too narrow. Pure
functions of arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

RESAMPLES = 2_000
FEWEST = 4
"""Cells below which nothing is said."""


@dataclass(frozen=True)
class Correlation:
    """A correlation with its 95% interval, None where too many resamples leave it undefined."""

    value: float
    low: float | None
    high: float | None
    cells: int


def pearson(x_rc: Float[np.ndarray, "r c"], y_rc: Float[np.ndarray, "r c"]) -> Float[np.ndarray, " r"]:
    """Row by row; NaN where either is constant."""
    x_rc, y_rc = (one - one.mean(axis=1, keepdims=True) for one in (x_rc, y_rc))
    size_r = np.sqrt((x_rc**2).sum(axis=1) * (y_rc**2).sum(axis=1))
    tiny = 1e-12 * max(1.0, float(size_r.max(initial=0)))
    return np.where(size_r > tiny, (x_rc * y_rc).sum(axis=1) / np.where(size_r > tiny, size_r, 1), np.nan)


def spearman(x_rc: Float[np.ndarray, "r c"], y_rc: Float[np.ndarray, "r c"]) -> Float[np.ndarray, " r"]:
    """Pearson's of the ranks, ties at their mean."""
    return pearson(rankdata(x_rc, axis=1), rankdata(y_rc, axis=1))


def at_equal_budget(x_rc: Float[np.ndarray, "r c"], budget_rc: Int[np.ndarray, "r c"]) -> Float[np.ndarray, "r c"]:
    """What is left of each value when the mean of its row's values at that budget is taken off."""
    left_rc = x_rc.astype(np.float64)
    for budget in np.unique(budget_rc):
        there = budget_rc == budget
        count = there.sum(axis=1, keepdims=True)
        mean = (x_rc * there).sum(axis=1, keepdims=True) / np.maximum(count, 1)
        left_rc -= np.where(there, mean, 0)
    return left_rc


def correlation(
    how: Callable[[np.ndarray, np.ndarray], np.ndarray],
    x_cs: Float[np.ndarray, "c s"],
    y_cs: Float[np.ndarray, "c s"],
    budget_c: Int[np.ndarray, " c"] | None = None,
    seed: int = 0,
) -> Correlation | None:
    """Of two figures' means over seeds, by cell; with budgets, at equal budget. None of too few cells or a constant."""
    count, seeds = x_cs.shape
    if count < FEWEST:
        return None
    random = np.random.default_rng(seed)
    cell_rc = np.concatenate([np.arange(count)[None], random.integers(count, size=(RESAMPLES, count))])
    seed_rs = np.concatenate([np.arange(seeds)[None], random.integers(seeds, size=(RESAMPLES, seeds))])

    def drawn(value_cs: np.ndarray) -> np.ndarray:
        mean_rc = value_cs[cell_rc[:, :, None], seed_rs[:, None, :]].mean(axis=2)
        return mean_rc if budget_c is None else at_equal_budget(mean_rc, budget_c[cell_rc])

    value_r = how(drawn(x_cs), drawn(y_cs))
    if np.isnan(value_r[0]):
        return None
    there = value_r[1:][~np.isnan(value_r[1:])]
    if len(there) < RESAMPLES / 2:
        return Correlation(float(value_r[0]), None, None, count)
    low, high = np.quantile(there, [0.025, 0.975]).tolist()
    return Correlation(float(value_r[0]), low, high, count)
