"""Cohen's kappa against scikit-learn's, and where it is undefined."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from fac_jax.features.agreement import Agreement, agreement, cohen_kappa

PLACES = st.integers(0, 3)


@given(st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=30))
def test_kappa_is_sklearns(pairs: list[tuple[int, int]]) -> None:
    first, second = map(np.array, zip(*pairs, strict=True))
    for weights in (None, "linear"):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # it divides 0 by 0 where both give one and the same label
            theirs = cohen_kappa_score(first, second, labels=range(4), weights=weights)
        ours = cohen_kappa(first, second, 4, weights)
        one_label = len({*first.tolist(), *second.tolist()}) == 1
        assert (ours is None) == math.isnan(theirs) == one_label
        assert ours is None or ours == pytest.approx(theirs, abs=1e-12)


def test_by_hand() -> None:
    # Half agree. By chance: (3/4 x 3/4) + (1/4 x 1/4) = 5/8, so kappa = 1 - (1/2) / (3/8).
    found = agreement([[0, 0], [0, 3], [3, 0], [0, 0]], 4, lowest=2)
    assert found.features == 4 and found.same_label == found.same_relevance == 0.5
    assert found.kappa == pytest.approx(-1 / 3) and found.kappa_linear == pytest.approx(-1 / 3)


def test_near_labels_are_forgiven_by_weights_alone() -> None:
    near = agreement([[0, 1], [1, 0], [3, 3], [3, 3]], 4, lowest=2)
    assert near.same_label == 0.5 and near.same_relevance == 1.0
    assert near.kappa is not None and near.kappa_linear is not None and near.kappa < near.kappa_linear


def test_undefined() -> None:
    assert agreement([], 4, 2) == agreement([[1], [2]], 4, 2) == Agreement(0, None, None, None, None)
    all_alike = agreement([[3, 3]] * 5, 4, 2)
    assert all_alike == Agreement(5, 1.0, 1.0, None, None), "chance explains it: there is no kappa, and it is not 1"


def test_three_passes_are_the_mean_over_pairs() -> None:
    random = np.random.default_rng(0)
    passes = random.integers(0, 4, (40, 3))
    pairs = [(0, 1), (0, 2), (1, 2)]
    found = agreement([*passes.tolist(), [0]], 4, 1)  # one feature had one order only
    assert found.kappa == pytest.approx(np.mean([cohen_kappa_score(passes[:, a], passes[:, b]) for a, b in pairs]))
    assert found.features == 40 and found.same_label == np.mean([len(set(row)) == 1 for row in passes.tolist()])
