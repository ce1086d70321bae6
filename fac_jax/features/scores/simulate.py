"""Ratings of held-out spans from tokens alone: the embedded explanations' own prediction, no language model.

An embedded explanation names the tokens that a feature fires on, surest first. Simulated by it, the feature is active
at a named token the more, the earlier the token is named, and nowhere else; a span is rated by its strongest token
(detection), or by the marked one (fuzzing). Reads nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from fac_jax.features.scores.heldout import Kind, Trials
from fac_jax.features.spans import Passages


def simulated(
    passages: Passages, trials: Trials, kind: Kind, named: Mapping[int, Sequence[int]]
) -> Float64[np.ndarray, " r"]:
    """A rating of each trial from the tokens `named` for its feature; 0 where none of them is found."""
    if kind == "fuzzing":
        length_r = np.ones(len(trials.feature_r), np.int64)
        at = passages.start_n[trials.document_r] + trials.position_r
    else:
        length_r = trials.stop_r - trials.start_r
        within = np.arange(length_r.sum()) - np.repeat(np.cumsum(length_r) - length_r, length_r)
        at = np.repeat(trials.start_r, length_r) + within
    row = np.repeat(np.arange(len(length_r)), length_r)
    strength = _strength(trials.feature_r[row], passages.token_t[at], named)
    rating_r = np.zeros(len(length_r))
    np.maximum.at(rating_r, row, strength)
    return rating_r


def _strength(feature_m: np.ndarray, token_m: np.ndarray, named: Mapping[int, Sequence[int]]) -> np.ndarray:
    """How early each token is named for its feature: the first of eight 8, the last 1, others 0."""
    pairs = [(feature, token, len(tokens) - i) for feature, tokens in named.items() for i, token in enumerate(tokens)]
    if not pairs:
        return np.zeros(len(feature_m))
    feature, token, strength = np.array(pairs, np.int64).T
    width = max(int(token.max()), int(token_m.max(initial=0))) + 1
    keys = feature * width + token
    order = np.argsort(keys)
    asked = feature_m * width + token_m
    place = np.minimum(np.searchsorted(keys[order], asked), len(keys) - 1)
    return np.where(keys[order][place] == asked, strength[order][place], 0).astype(np.float64)
