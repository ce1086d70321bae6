"""Ratings of held-out spans to AUROC with an interval, and many features' scores to one figure with an interval.

AUROC is the share of (active, silent) pairs of a feature's spans in which the active one is rated higher, ties counting
one half. A pair with a span whose rating could not be read counts one half too: a coin's share. So what a reader leaves
unreadable is never dropped, which would let it choose its questions, and a reader of whom nothing can be read scores
0.5.

Intervals are 95% percentile intervals of a seeded bootstrap: over a feature's spans, active and silent ones apart; over
features for the figures of many. With ten spans of each an interval is wide; where no pair is lost it has no width.

Reads nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from fac_jax.features.scores.heldout import Trials

DRAWS = 1_000
"""Bootstrap samples."""
LEVELS = (2.5, 97.5)
BLOCK = 2**22  # numbers held at a time


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


def feature_aurocs(trials: Trials, rating_r: Float64[np.ndarray, " r"], seed: int) -> dict[int, Estimate]:
    """AUROC of each feature's trials; `rating_r` is NaN where a rating could not be read."""
    rated: dict[tuple[int, int], list[tuple[int, np.ndarray, np.ndarray]]] = {}
    cuts = np.flatnonzero(np.diff(trials.feature_r, prepend=-1, append=-1))
    active_r = trials.active_r
    for first, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        active = active_r[first:stop]
        high, low = rating_r[first:stop][active], rating_r[first:stop][~active]
        rated.setdefault((len(high), len(low)), []).append((int(trials.feature_r[first]), high, low))
    found = {}
    for alike in rated.values():
        wins_fpn = wins(np.stack([high for _, high, _ in alike]), np.stack([low for _, _, low in alike]))
        auroc_f = wins_fpn.mean(axis=(1, 2))
        low_f, high_f = auroc_intervals(wins_fpn, seed)
        for (feature, _, _), *numbers in zip(alike, auroc_f.tolist(), low_f.tolist(), high_f.tolist(), strict=True):
            found[feature] = Estimate(*numbers)
    return dict(sorted(found.items()))


def wins(high_fp: Float[np.ndarray, "f p"], low_fn: Float[np.ndarray, "f n"]) -> Float64[np.ndarray, "f p n"]:
    """1 where the active span is rated higher, 0 where lower, one half at ties and where a rating is missing."""
    high_fpn, low_fpn = high_fp[:, :, None], low_fn[:, None, :]
    return np.where(high_fpn > low_fpn, 1.0, np.where(high_fpn < low_fpn, 0.0, 0.5))  # NaN is neither


def auroc_intervals(wins_fpn: Float64[np.ndarray, "f p n"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the bootstrapped AUROC of each feature; the same resampling serves all features of one shape."""
    features, active, silent = wins_fpn.shape
    random = np.random.default_rng([seed, active, silent])
    active_kp = random.multinomial(active, np.full(active, 1 / active), DRAWS).astype(np.float64)
    silent_kn = random.multinomial(silent, np.full(silent, 1 / silent), DRAWS)
    step = max(1, BLOCK // (DRAWS * silent))
    ends = [np.empty((2, 0))]
    for first in range(0, features, step):
        rows_fkn = active_kp @ wins_fpn[first : first + step]
        won_fk = (rows_fkn * silent_kn).sum(axis=2) / (active * silent)  # exact up to here: halves
        ends.append(np.percentile(won_fk, LEVELS, axis=1))
    low_f, high_f = np.concatenate(ends, axis=1)
    return low_f, high_f


def over_features(values: Sequence[float], seed: int) -> dict[str, Any] | None:
    """Median and mean over features, each with its interval, as they stand in a stage's summary; None without any."""
    if not values:
        return None
    value_f = np.asarray(values, np.float64)
    random = np.random.default_rng([seed, len(value_f)])
    step = max(1, BLOCK // len(value_f))
    drawn = [
        value_f[random.integers(0, len(value_f), (min(step, DRAWS - first), len(value_f)))]
        for first in range(0, DRAWS, step)
    ]
    found: dict[str, Any] = {"features": len(value_f)}
    for name, figure in (("median", np.median), ("mean", np.mean)):
        low, high = np.percentile(np.concatenate([figure(part, axis=1) for part in drawn]), LEVELS).tolist()
        found |= {name: float(figure(value_f)), f"{name}_low": low, f"{name}_high": high}
    return found
