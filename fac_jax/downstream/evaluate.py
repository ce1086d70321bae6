"""How well scores rank positives above negatives (AUPRC, AUROC), means over held-out rows, and how sure one may be of
either.

Two sources of chance are kept apart. The spread over training seeds (initialisation and order) is the standard
deviation the paper reports; the spread over held-out documents is larger on small sets and is measured by a paired
bootstrap: both arms are scored on the same resampled documents, so what they share cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Spread:
    """One metric over training seeds."""

    mean: float
    sd: float
    """Sample standard deviation over seeds (n - 1); 0.0 with a single seed."""
    values: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """AUPRC of one arm minus another's, with a 95% bootstrap interval over held-out documents."""

    mean: float
    low: float
    high: float
    resamples: int


@dataclass(frozen=True)
class Estimate:
    """A weighted mean over held-out rows, with a 95% bootstrap interval over them."""

    mean: float
    low: float
    high: float
    resamples: int


def auprc(positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float:
    """Area under the precision-recall curve (average precision); a random scorer gets the base rate."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(positive, scores))


def auroc(positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> float:
    """Area under the ROC curve; a random scorer gets 0.5."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, scores))


def spread(values: list[float]) -> Spread:
    """Mean and sample standard deviation of `values`."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Spread(float(np.mean(values)), sd, tuple(values))


def bootstrap_mean(
    values: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """sum(w v) / sum(w), rows resampled whole; without weights all count the same. A difference between two arms is
    that of paired values: what both share cancels."""
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    generator, n = np.random.default_rng(seed), len(values)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
    found = counts @ (weights * values) / (counts @ weights)
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(float(weights @ values / weights.sum()), float(low), float(high), resamples)


def paired_bootstrap(
    positive: Bool[np.ndarray, " n"],
    scores: Float[np.ndarray, "s n"],
    other: Float[np.ndarray, "s n"],
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """AUPRC of `scores` minus AUPRC of `other` (rows are training seeds, columns held-out documents).

    Positives and negatives are resampled apart, so that every resample has the base rate of the held-out set.
    """
    counts = _resample(positive, resamples, seed)
    gap = np.mean([_weighted_auprc(positive, row, counts) for row in scores], axis=0)
    gap -= np.mean([_weighted_auprc(positive, row, counts) for row in other], axis=0)
    observed = np.mean([auprc(positive, row) for row in scores]) - np.mean([auprc(positive, row) for row in other])
    low, high = np.quantile(gap, [0.025, 0.975])
    return Difference(float(observed), float(low), float(high), resamples)


def _resample(positive: Bool[np.ndarray, " n"], resamples: int, seed: int) -> Float[np.ndarray, "r n"]:
    """How often each document is drawn in each resample."""
    generator = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(positive)))
    for group in (np.flatnonzero(positive), np.flatnonzero(~positive)):
        counts[:, group] = generator.multinomial(len(group), np.full(len(group), 1 / len(group)), size=resamples)
    return counts


def _weighted_auprc(
    positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"], counts: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    """Average precision of every resample at once; equal scores share one threshold, as in scikit-learn."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last place of each run of ties
    hits = np.cumsum(counts[:, order] * positive[order], axis=1)[:, ends]
    seen = np.cumsum(counts[:, order], axis=1)[:, ends]
    precision = hits / np.maximum(seen, 1)
    gained = np.diff(hits, axis=1, prepend=0.0)
    return (precision * gained).sum(axis=1) / hits[:, -1]
