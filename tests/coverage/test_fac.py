"""Coverage arithmetic: computed by hand, and the properties that must hold for any peaks."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_array, vstack

from fac_jax.coverage import fac as fac_module
from fac_jax.coverage.fac import (
    active,
    active_documents,
    bootstrap_fac,
    curve_sizes,
    draws_of_length,
    expected_covered,
    fac,
    fac_freq,
    fac_magnitude,
    missing,
    raw_fac_ratio,
    target_hit_rate,
)
from fac_jax.errors import UserError

FEATURES = 7
peaks = st.integers(0, 5).flatmap(
    lambda n: arrays(np.float32, (n, FEATURES), elements=st.sampled_from([0, 0, 0.5, 1, 1.5, 3]))
)
masks = arrays(bool, FEATURES)
thresholds = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def mask(*features: int) -> np.ndarray:
    return np.isin(np.arange(FEATURES), features)


def not_below(a: float | None, b: float | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and a >= b)


def test_by_hand() -> None:
    relevant, anchor, seed = mask(0, 1, 2, 3, 4), mask(0, 1, 2, 3, 6), mask(0, 5)
    gen = csr_array(np.array([[2, 0, 0, 0, 9, 9, 9], [2, 3, 1, 0, 0, 0, 0]], np.float32))
    gen_active = active(gen, 1.0)
    assert gen_active.tolist() == mask(0, 1, 4, 5, 6).tolist(), "a peak of exactly the threshold is not active"
    gap = missing(relevant, anchor, seed)
    assert gap.tolist() == mask(1, 2, 3).tolist()
    assert fac(relevant, anchor, gen_active) == 2 / 4
    assert raw_fac_ratio(relevant, anchor, gen_active) == 3 / 4
    assert target_hit_rate(gap, gen_active) == pytest.approx(1 / 3)
    assert fac_freq(relevant, anchor, gen, 1.0) == (2 + 1) / (4 * 2)
    assert fac_magnitude(relevant, anchor, gen, 1.0) == (2 + 2 + 3) / (4 * 2)


def test_raw_ratio_may_exceed_one_and_fac_may_not() -> None:
    assert raw_fac_ratio(mask(0, 1), mask(0), mask(0, 1)) == 2.0
    assert fac(mask(0, 1), mask(0), mask(0, 1)) == 1.0


def test_undefined_is_none() -> None:
    empty, some = mask(), mask(1)
    assert fac(empty, some, some) is None
    assert raw_fac_ratio(some, empty, some) is None
    assert target_hit_rate(empty, some) is None
    assert fac_freq(some, some, csr_array((0, FEATURES), dtype=np.float32), 0.0) is None


def test_negative_threshold_is_refused() -> None:
    with pytest.raises(UserError, match="threshold is -1"):
        active(csr_array((1, FEATURES), dtype=np.float32), -1.0)


@given(peaks, peaks, masks, masks, thresholds)
def test_superset_never_lowers(
    small: np.ndarray, more: np.ndarray, relevant: np.ndarray, anchor: np.ndarray, t: float
) -> None:
    a, both = active(csr_array(small), t), active(vstack([csr_array(small), csr_array(more)], format="csr"), t)
    for metric in (fac, raw_fac_ratio):
        before, after = metric(relevant, anchor, a), metric(relevant, anchor, both)
        assert not_below(after, before)
    gap = missing(relevant, anchor, a)
    assert not (missing(relevant, anchor, both) & ~gap).any()


@given(peaks, masks, masks, thresholds, st.permutations(range(FEATURES)), st.randoms())
def test_order_of_features_and_documents_does_not_matter(
    values: np.ndarray, relevant: np.ndarray, anchor: np.ndarray, t: float, order: list[int], random: object
) -> None:
    rows = list(range(len(values)))
    random.shuffle(rows)  # type: ignore[attr-defined]
    moved, plain = csr_array(values[rows][:, order]), csr_array(values)
    assert (active(moved, t) == active(plain, t)[order]).all()
    for metric in (fac, raw_fac_ratio):
        assert metric(relevant, anchor, active(plain, t)) == metric(relevant[order], anchor[order], active(moved, t))
    for weighted in (fac_freq, fac_magnitude):
        assert weighted(relevant, anchor, plain, t) == pytest.approx(weighted(relevant[order], anchor[order], moved, t))


@given(peaks, masks, masks)
def test_threshold_above_every_peak_gives_zero(values: np.ndarray, relevant: np.ndarray, anchor: np.ndarray) -> None:
    top = float(values.max(initial=0))
    matrix = csr_array(values)
    for number in (fac(relevant, anchor, active(matrix, top)), fac_freq(relevant, anchor, matrix, top)):
        assert number in (0.0, None)
    assert (active_documents(matrix, top) == 0).all()


@given(peaks, masks, masks, thresholds, thresholds)
def test_a_higher_threshold_never_raises(
    values: np.ndarray, relevant: np.ndarray, anchor: np.ndarray, a: float, b: float
) -> None:
    low, high = (fac(relevant, anchor, active(csr_array(values), t)) for t in sorted((a, b)))
    assert not_below(low, high)


@settings(max_examples=40)
@given(arrays(np.int64, st.integers(1, 20), elements=st.integers(1, 50)), st.integers(0, 400), st.integers(0, 9))
def test_draws_stay_within_the_budget(tokens: np.ndarray, budget: int, seed: int) -> None:
    drawn = draws_of_length(tokens, budget, 3, seed)
    assert all(tokens[chosen].sum() <= budget and len(set(chosen)) == len(chosen) for chosen in drawn)
    if tokens.sum() <= budget:
        assert len(drawn) == 1 and len(drawn[0]) == len(tokens)
    again = draws_of_length(tokens, budget, 3, seed)
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))


@settings(max_examples=40)
@given(st.integers(1, 6), st.data())
def test_expected_coverage_is_the_mean_over_all_subsets(total: int, data: st.DataObject) -> None:
    active_nf = data.draw(arrays(bool, (total, FEATURES)))
    for size in range(total + 1):
        subsets = [active_nf[list(chosen)].any(axis=0).sum() for chosen in combinations(range(total), size)]
        found = expected_covered(active_nf.sum(axis=0), total, np.array([size]))
        assert found == pytest.approx([np.mean(subsets)])


def test_expected_coverage_of_millions_is_finite() -> None:
    found = expected_covered(np.array([1, 10_000_000, 5]), 10_000_000, np.array([1, 1000, 10_000_000]))
    assert np.isfinite(found).all() and found[-1] == 3 and (np.diff(found) > 0).all()
    assert found[0] == pytest.approx(1 + 6e-7)


def test_expected_coverage_of_many_different_counts_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    total, documents_f, sizes = 10**6, np.arange(1, 30_001) * 20, curve_sizes(10**6, 100)
    tracemalloc.start()
    found = expected_covered(documents_f, total, sizes)
    assert tracemalloc.get_traced_memory()[1] < 10 * 8 * fac_module.AT_ONCE
    tracemalloc.stop()
    monkeypatch.setattr(fac_module, "AT_ONCE", 10**9)
    np.testing.assert_allclose(found, expected_covered(documents_f, total, sizes), rtol=1e-12)


def test_bootstrap_interval() -> None:
    """Of features that half of the documents activate there is no doubt; rare ones make the interval wide."""
    generator = np.random.default_rng(0)
    every = np.ones(40, bool)
    common = csr_array((generator.random((300, 40)) < 0.5).astype(np.float32))
    assert bootstrap_fac(every, every, common, 0.0, 50, 0) == (1.0, 1.0)
    rare = csr_array((generator.random((300, 40)) < 0.003).astype(np.float32))
    found = fac(every, every, active(rare, 0.0))
    interval = bootstrap_fac(every, every, rare, 0.0, 200, 0)
    assert found is not None and interval is not None
    assert interval[0] < found < interval[1] and interval[1] - interval[0] > 0.1
    assert interval == bootstrap_fac(every, every, rare, 0.0, 200, 0), "fixed by the seed"
    assert bootstrap_fac(every, ~every, rare, 0.0, 20, 0) is None
    assert bootstrap_fac(every, every, csr_array((0, 40), dtype=np.float32), 0.0, 20, 0) == (0.0, 0.0)


@settings(max_examples=60)
@given(peaks, masks, masks, thresholds)
def test_bootstrap_by_brute_force(
    values: np.ndarray, relevant: np.ndarray, anchor: np.ndarray, threshold: float
) -> None:
    found = bootstrap_fac(relevant, anchor, csr_array(values), threshold, 20, 3)
    could = relevant & anchor
    if not could.any():
        assert found is None
        return
    generator, shares = np.random.default_rng(3), []
    for _ in range(20):
        rows = generator.integers(0, len(values), len(values)) if len(values) else []
        shares.append((values[rows] > threshold).any(axis=0)[could].mean())
    whole = (values > threshold).any(axis=0)[could].mean()
    low, high = np.quantile(np.array(shares) - np.mean(shares), [0.025, 0.975]) + whole
    assert found == pytest.approx((max(low, 0), min(high, 1)))


def test_a_threshold_above_every_peak_covers_nothing() -> None:
    values = csr_array(np.full((3, FEATURES), 5.0, np.float32))
    every = np.ones(FEATURES, bool)
    assert fac(every, every, active(values, 5.0)) == 0 and fac_freq(every, every, values, 5.0) == 0
    assert fac_magnitude(every, every, values, 5.0) == 0 and target_hit_rate(every, active(values, 5.0)) == 0
