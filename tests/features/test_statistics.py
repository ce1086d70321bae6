"""Rank tests against scipy's and scikit-learn's, with ties and zeros; and that they hold where counts are small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, fisher_exact, mannwhitneyu
from sklearn.metrics import roc_auc_score

from fac_jax.features.statistics import active_excess, association, benjamini_hochberg, mann_whitney

FEATURES = 4


@st.composite
def labelled(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(2, 25))
    peaks = draw(arrays(np.float32, (n, FEATURES), elements=st.sampled_from([0, 0, 0.5, 1, 1, 2.5, 7])))
    positive = draw(arrays(bool, n))
    positive[0], positive[-1] = True, False
    return peaks, positive


@settings(max_examples=60, deadline=None)
@given(labelled())
def test_mann_whitney_is_scipys(data: tuple[np.ndarray, np.ndarray]) -> None:
    peaks, positive = data
    auroc_f, p_f = mann_whitney(csr_array(peaks), positive)
    for f in range(FEATURES):
        x = peaks[:, f].astype(float)
        assert auroc_f[f] == pytest.approx(roc_auc_score(positive, x))
        if len(set(x)) > 1:
            reference = mannwhitneyu(x[positive], x[~positive], alternative="greater", method="asymptotic")
            assert p_f[f] == pytest.approx(reference.pvalue, rel=1e-9)
        else:
            assert p_f[f] == 1.0


@settings(max_examples=40, deadline=None)
@given(labelled())
def test_active_excess_is_fishers(data: tuple[np.ndarray, np.ndarray]) -> None:
    peaks, positive = data
    found = active_excess(csr_array(peaks), positive)
    for f in range(FEATURES):
        a = peaks[:, f] > 0
        table = [[(a & positive).sum(), (~a & positive).sum()], [(a & ~positive).sum(), (~a & ~positive).sum()]]
        assert found[f] == pytest.approx(fisher_exact(table, alternative="greater").pvalue)


@settings(max_examples=60, deadline=None)
@given(labelled(), st.permutations(range(FEATURES)), st.randoms(use_true_random=False))
def test_association_ignores_order(data: tuple[np.ndarray, np.ndarray], columns: list[int], random: object) -> None:
    peaks, positive = data
    rows = list(range(len(peaks)))
    random.shuffle(rows)  # type: ignore[attr-defined]
    plain, moved = (
        association(csr_array(peaks), positive),
        association(csr_array(peaks[rows][:, columns]), positive[rows]),
    )
    for a, b in zip(plain, moved, strict=True):
        np.testing.assert_allclose(a[columns], b)


def test_few_active_documents_prove_little() -> None:
    """3 active documents, all positive, at 5% positives: chance does this once in ten thousand, not once in 1e14."""
    peaks, positive = np.zeros((400, 1), np.float32), np.arange(400) < 20
    peaks[:3] = 5
    assert mann_whitney(csr_array(peaks), positive)[1][0] < 1e-12
    assert association(csr_array(peaks), positive)[1][0] == pytest.approx((20 * 19 * 18) / (400 * 399 * 398))


def test_without_any_effect_p_is_not_too_small() -> None:
    """Random labels, features of every density: p below 0.01 in about 1% of the tests at most."""
    generator = np.random.default_rng(0)
    density = generator.choice([0.01, 0.03, 0.1, 0.5, 0.95], 4000)
    peaks = generator.exponential(size=(300, 4000)) * (generator.random((300, 4000)) < density)
    positive = generator.permutation(300) < 30
    p_f = association(csr_array(peaks.astype(np.float32)), positive)[1]
    assert (p_f < 0.01).mean() < 0.013 and (p_f < 0.001).mean() < 0.0025
    assert not (benjamini_hochberg(p_f) <= 0.05).any()


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)))
def test_benjamini_hochberg_is_scipys(p: np.ndarray) -> None:
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p, method="bh"))


def test_benjamini_hochberg_of_nothing() -> None:
    assert benjamini_hochberg(np.zeros(0)).shape == (0,)
