"""Choices against brute force: naive greedy, the best of all subsets, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_array

from fac_jax.config.coverage import SelectConfig
from fac_jax.coverage.choose import (
    TOP,
    Budget,
    coverable,
    covering,
    greed_select,
    greedy,
    greedy_cover,
    magnitude,
    random,
    sim_scale,
)
from fac_jax.coverage.pool import Pool
from fac_jax.coverage.select import pick

DOCUMENTS, FEATURES = 7, 9
ALL_F = np.ones(FEATURES, bool)
matrices = arrays(np.float32, (DOCUMENTS, FEATURES), elements=st.sampled_from([0, 0, 0, 1, 2, 2.5, 4]))
lengths = arrays(np.int64, DOCUMENTS, elements=st.integers(1, 6))
Method = Callable[[Pool, Budget], Iterable[int]]
BOUND = 1 - 1 / math.e


def pool_of(peaks: np.ndarray, ids: list[str] | None = None) -> Pool:
    count = len(peaks)
    names = np.array(ids or [f"{row:02d}" for row in range(count)])
    order = np.argsort(names)
    return Pool(csr_array(peaks[order]), order.astype(np.int64), names[order], np.full(count, 10, np.int64))


def budget(limit: int | None, cost_n: np.ndarray | None = None) -> Budget:
    return Budget(np.ones(DOCUMENTS, np.int64) if cost_n is None else cost_n, limit)


def levels(peaks: np.ndarray, method: Method) -> np.ndarray:
    """What `greedy` and `magnitude` sum the maxima of, dense and by their definition."""
    if method is greedy:
        return (peaks > 0).astype(np.int64)
    top_f = np.maximum(peaks.max(axis=0), np.float32(1e-9))
    scaled = np.rint((peaks / top_f).astype(np.float32) * np.float32(TOP)).astype(np.int64)
    return np.where(peaks > 0, np.maximum(scaled, 1), 0)


def reached(levels_nf: np.ndarray, rows: list[int]) -> int:
    return int(levels_nf[rows].max(axis=0, initial=0).sum())


def naive_greedy(levels_nf: np.ndarray, cost_n: np.ndarray, limit: int, by_cost: bool) -> list[int]:
    """Every gain anew for every choice, compared as fractions; the first of equal ones."""
    taken: list[int] = []
    while True:
        best, best_gain, best_cost = None, 0, 1
        for row in range(len(levels_nf)):
            gain = reached(levels_nf, [*taken, row]) - reached(levels_nf, taken)
            cost = int(cost_n[row]) if by_cost else 1
            fits = cost_n[taken].sum() + cost_n[row] <= limit
            if row not in taken and fits and gain * best_cost > best_gain * cost:
                best, best_gain, best_cost = row, gain, cost
        if best is None:
            return taken
        taken.append(best)


@pytest.mark.parametrize("method", [greedy, magnitude])
@settings(max_examples=80, deadline=None)
@given(peaks=matrices)
def test_it_is_naive_greedy_ties_included(method: Method, peaks: np.ndarray) -> None:
    wanted = naive_greedy(levels(peaks, method), np.ones(DOCUMENTS, np.int64), DOCUMENTS, by_cost=False)
    assert list(method(pool_of(peaks), budget(None))) == wanted


@pytest.mark.parametrize("method", [greedy, magnitude])
@settings(max_examples=80, deadline=None)
@given(peaks=matrices, cost_n=lengths, limit=st.integers(1, 20))
def test_with_costs_it_is_the_better_of_two_naive_ones(
    method: Method, peaks: np.ndarray, cost_n: np.ndarray, limit: int
) -> None:
    dense = levels(peaks, method)
    rows = list(method(pool_of(peaks), budget(limit, cost_n)))
    plain, by_cost = (naive_greedy(dense, cost_n, limit, by_cost) for by_cost in (False, True))
    if (cost_n == 1).all():
        assert rows == plain
    else:
        assert rows == (by_cost if reached(dense, by_cost) >= reached(dense, plain) else plain)


@pytest.mark.parametrize("method", [greedy, magnitude])
@settings(max_examples=60, deadline=None)
@given(peaks=matrices)
def test_at_every_budget_within_the_bound_of_the_best(method: Method, peaks: np.ndarray) -> None:
    dense = levels(peaks, method)
    whole = list(method(pool_of(peaks), budget(None)))
    for limit in range(1, DOCUMENTS + 1):
        rows = list(method(pool_of(peaks), budget(limit)))
        assert rows == whole[:limit], "a larger budget extends a smaller one"
        best = max(reached(dense, list(chosen)) for chosen in combinations(range(DOCUMENTS), limit))
        assert reached(dense, rows) >= BOUND * best
    assert reached(dense, whole) == reached(dense, list(range(DOCUMENTS))), "all that can be reached is"


@pytest.mark.parametrize("method", [greedy, magnitude])
@settings(max_examples=60, deadline=None)
@given(peaks=matrices, cost_n=lengths, limit=st.integers(1, 20))
def test_with_costs_within_the_bound_of_the_best(
    method: Method, peaks: np.ndarray, cost_n: np.ndarray, limit: int
) -> None:
    dense = levels(peaks, method)
    rows = list(method(pool_of(peaks), budget(limit, cost_n)))
    subsets = (list(some) for count in range(DOCUMENTS + 1) for some in combinations(range(DOCUMENTS), count))
    best = max(reached(dense, some) for some in subsets if cost_n[some].sum() <= limit)
    assert cost_n[rows].sum() <= limit and len(set(rows)) == len(rows)
    assert reached(dense, rows) >= BOUND / 2 * best


def test_features_a_token_alone_would_miss_the_bound() -> None:
    """One feature in one token against 50 in 100: the second document alone is the better choice for 100 tokens."""
    peaks = np.zeros((2, 51), np.float32)
    peaks[0, 0], peaks[1, 1:] = 1, 1
    assert list(greedy(pool_of(peaks), Budget(np.array([1, 100]), 100))) == [1]
    assert list(greedy(pool_of(peaks), Budget(np.array([1, 100]), 101))) == [0, 1]


@pytest.mark.parametrize("method", ["greedy", "magnitude", "greed_select", "sim_scale", "random"])
@settings(max_examples=30, deadline=None)
@given(peaks=matrices, order=st.permutations(range(DOCUMENTS)), limit=st.none() | st.integers(1, 9))
def test_order_of_documents_does_not_matter(
    method: str, peaks: np.ndarray, order: list[int], limit: int | None
) -> None:
    ids = [f"{index * 37 % 11:02d}" for index in range(DOCUMENTS)]
    config = SelectConfig(method=method, budget=limit)  # type: ignore[arg-type]
    target_f = np.arange(FEATURES) % 2 == 0

    def named(pool: Pool) -> list[tuple[str, list[int]]]:
        return [(str(pool.id_n[one.row]), one.features) for one in pick(pool, target_f, config, seed=3)]

    assert named(pool_of(peaks[order], [ids[row] for row in order])) == named(pool_of(peaks, ids))


@settings(max_examples=60, deadline=None)
@given(peaks=matrices, cost_n=lengths, limit=st.integers(1, 20), similarity=st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_sim_scale_takes_just_what_is_unlike_what_it_took(
    peaks: np.ndarray, cost_n: np.ndarray, limit: int, similarity: float
) -> None:
    hits = [set(np.flatnonzero(row).tolist()) for row in peaks]
    seen: set[int] = set()
    left, wanted = limit, []
    for row in sorted(range(DOCUMENTS), key=lambda row: (-len(hits[row]), row)):
        if hits[row] and cost_n[row] <= left and len(hits[row] & seen) / len(hits[row]) < similarity:
            wanted.append(row)
            seen |= hits[row]
            left -= cost_n[row]
    assert sim_scale(pool_of(peaks), budget(limit, cost_n), similarity) == wanted


def test_greed_select_looks_at_features_that_are_not_sought() -> None:
    peaks = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], np.float32)
    target_f = np.array([False, False, False, True, True])
    picks = covering(pool_of(peaks), greed_select(pool_of(peaks), Budget(np.ones(3, np.int64), None)), target_f, True)
    assert [(one.row, one.features) for one in picks] == [(0, []), (1, [3]), (2, [4])]
    assert [one.row for one in covering(pool_of(peaks), [2, 1, 0], target_f, True)] == [2, 1], "all is covered"
    assert [one.row for one in covering(pool_of(peaks), [2, 1, 0], target_f, False)] == [2, 1, 0]


@settings(max_examples=40, deadline=None)
@given(peaks=matrices, cost_n=lengths, limit=st.integers(1, 30), seed=st.integers(0, 5))
def test_random_takes_documents_as_long_as_they_fit(
    peaks: np.ndarray, cost_n: np.ndarray, limit: int, seed: int
) -> None:
    rows = random(pool_of(peaks), budget(limit, cost_n), seed)
    left = limit - cost_n[rows].sum()
    assert left >= 0 and len(set(rows)) == len(rows)
    assert all(cost_n[row] > left for row in range(DOCUMENTS) if row not in rows)
    assert rows == random(pool_of(peaks), budget(limit, cost_n), seed)
    assert len({tuple(random(pool_of(peaks), budget(None), seed)) for seed in range(6)}) > 1


@settings(max_examples=40, deadline=None)
@given(peaks=matrices, target=st.sets(st.integers(0, FEATURES - 1)))
def test_what_is_covered_is_counted_once(peaks: np.ndarray, target: set[int]) -> None:
    target_f = np.isin(np.arange(FEATURES), list(target))
    pool = pool_of(peaks)
    picks = covering(pool, range(DOCUMENTS), target_f, until_covered=False)
    counted = [feature for one in picks for feature in one.features]
    assert sorted(counted) == np.flatnonzero(target_f & coverable(pool)).tolist()
    assert all((peaks[one.row, one.features] > 0).all() for one in picks)


@settings(max_examples=40, deadline=None)
@given(peaks=matrices, features=st.sets(st.integers(0, FEATURES - 1)), threshold=st.sampled_from([0.0, 1.0, 2.0]))
def test_greedy_cover_of_documents_in_memory(peaks: np.ndarray, features: set[int], threshold: float) -> None:
    ids = [f"{index * 37 % 11:02d}" for index in range(DOCUMENTS)]
    columns = np.array(sorted(features), np.int64)
    before = csr_array(peaks)
    picks = greedy_cover(before, columns, threshold, ids)
    by_id = np.argsort(ids)
    active = np.where((peaks > threshold) & np.isin(np.arange(FEATURES), columns), 1, 0)
    wanted = naive_greedy(active[by_id], np.ones(DOCUMENTS, np.int64), DOCUMENTS, by_cost=False)
    assert [one.row for one in picks] == by_id[wanted].tolist()
    assert sorted(feature for one in picks for feature in one.features) == np.flatnonzero(active.any(axis=0)).tolist()
    np.testing.assert_array_equal(before.toarray(), peaks)


def test_an_empty_pool_gives_nothing() -> None:
    empty = pool_of(np.zeros((0, FEATURES), np.float32))
    for method in ("greedy", "magnitude", "greed_select", "sim_scale", "random"):
        assert pick(empty, ALL_F, SelectConfig(method=method, budget=3), 0) == []  # type: ignore[arg-type]
