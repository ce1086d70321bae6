"""Greedy selection against brute force over all subsets, and its tie rule."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_array

from fac_jax.coverage.select import greedy_cover

DOCUMENTS, FEATURES = 6, 8
matrices = arrays(np.float32, (DOCUMENTS, FEATURES), elements=st.sampled_from([0, 0, 0, 1, 2]))
wanted = st.sets(st.integers(0, FEATURES - 1)).map(lambda s: np.array(sorted(s), np.int64))
IDS = [f"{index * 37 % 11:02d}" for index in range(DOCUMENTS)]


@settings(max_examples=80, deadline=None)
@given(matrices, wanted)
def test_at_every_budget_within_the_bound_of_the_best(peaks: np.ndarray, features: np.ndarray) -> None:
    picks = greedy_cover(csr_array(peaks), features, 1.0, IDS)
    hits = [set(features[row[features] > 1.0].tolist()) for row in peaks]
    covered: set[int] = set()
    for budget, pick in enumerate(picks, 1):
        assert set(pick.features) == hits[pick.row] - covered and pick.features
        # lazy greedy is greedy: no document left would have added more
        assert len(pick.features) == max(len(hit - covered) for hit in hits)
        covered |= hits[pick.row]
        best = max(len(set().union(*chosen)) for chosen in combinations(hits, budget))
        assert len(covered) >= (1 - 1 / math.e) * best
    assert covered == set().union(*hits), "it stops only when nothing more can be covered"


@settings(max_examples=50, deadline=None)
@given(matrices, wanted, st.permutations(range(DOCUMENTS)))
def test_order_of_documents_does_not_matter(peaks: np.ndarray, features: np.ndarray, order: list[int]) -> None:
    plain = [(IDS[p.row], p.features) for p in greedy_cover(csr_array(peaks), features, 0.0, IDS)]
    ids = [IDS[row] for row in order]
    assert [(ids[p.row], p.features) for p in greedy_cover(csr_array(peaks[order]), features, 0.0, ids)] == plain
