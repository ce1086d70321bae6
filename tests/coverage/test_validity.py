"""Validity checks: by hand, and where length alone decides."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import spearmanr

from fac_jax.coverage.validity import validity


def test_by_hand() -> None:
    #                 dense, both, short only, below, dead
    peaks = np.array([[3, 2, 0, 0.5, 0], [3, 0, 4, 0.5, 0], [1, 2, 0, 0.5, 0]], np.float32)
    tokens, tokens_f = np.array([10, 4, 30]), np.array([20, 4, 4, 3, 0])
    relevant = np.array([True, True, True, True, False])
    found = validity(relevant, csr_array(peaks), tokens, tokens_f, 0.5)
    assert found["features"] == 5 and found["dead_features"] == 1
    assert found["dense_features"] == found["relevant_dense_features"] == 1, "20 of 44 tokens, and 4 are not a tenth"
    assert found["only_in_short_text"] == 1 and found["short_documents"] == 1
    assert found["length_correlation"] is None, "every document activates two"


def test_length() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 200, 100)
    activated = tokens // 20 + generator.integers(0, 3, 100)
    peaks = (np.arange(20) < activated[:, None]).astype(np.float32)
    found = validity(np.ones(20, bool), csr_array(peaks), tokens, np.ones(20, int), 0.0)
    assert found["length_correlation"] == pytest.approx(spearmanr(tokens, activated).statistic)
    assert found["length_r2"] == pytest.approx(np.corrcoef(np.log1p(tokens), np.log1p(activated))[0, 1] ** 2)
    assert found["length_r2"] > 0.8


def test_no_documents() -> None:
    found = validity(np.ones(3, bool), csr_array((0, 3), dtype=np.float32), np.array([], int), np.zeros(3, int), 0.0)
    assert found["dead_features"] == 3 and found["length_r2"] is None and found["only_in_short_text"] == 0
