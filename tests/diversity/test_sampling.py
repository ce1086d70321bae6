"""Draws that depend on contents alone, and intervals against the spread over many draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fac_jax.diversity.sampling import drawn, interval, within
from fac_jax.diversity.words import Coded, coded, distinct, ngram_entropy
from fac_jax.text import Turn, make_document


def test_a_draw_depends_on_contents_and_seed_alone() -> None:
    documents = [make_document([Turn("user", f"text {i}")], None, "here") for i in range(50)]
    order = [document.id for document in drawn(documents, 0)]
    assert order == [document.id for document in drawn(documents[::-1], 0)]
    assert order != [document.id for document in drawn(documents, 1)] and sorted(order) != order
    left = [document for document in documents if document.id != order[7]]
    assert [document.id for document in drawn(left, 0)] == order[:7] + order[8:]


def test_the_budget_is_kept_but_for_a_first_row_that_exceeds_it() -> None:
    assert [within([3, 4, 5], budget) for budget in (2, 3, 6, 7, 11, 12, 99)] == [1, 1, 1, 2, 2, 3, 3]
    assert within([], 5) == 0


def test_all_rows_need_no_interval() -> None:
    assert interval(lambda rows: float(len(rows)), 40, 40) is None


def test_of_a_mean_it_is_students() -> None:
    """The jackknife of a mean over one row a group is the textbook's standard error."""
    values = np.array([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    found = interval(lambda rows: float(values[rows].mean()), 10, 40)
    reach = 2.262157 * values.std(ddof=1) / np.sqrt(10) * np.sqrt(1 - 10 / 40)
    assert found == pytest.approx((values.mean() - reach, values.mean() + reach), rel=1e-5)


@pytest.mark.parametrize(
    "figure", [lambda c: distinct(c, 2), lambda c: ngram_entropy(c, 1), lambda c: ngram_entropy(c, 2)]
)
def test_it_is_the_spread_over_draws(figure: Callable[[Coded], float]) -> None:
    """Of 200 draws of 100 rows from 400 that differ in length and words, most intervals hold the mean of the draws."""
    random = np.random.default_rng(0)
    vocabulary = 1 / np.arange(1, 201)
    texts = [
        random.choice(200, size=random.integers(2, 30), p=vocabulary / vocabulary.sum()).astype(str).tolist()
        for _ in range(400)
    ]
    corpus, held, values, between = coded(texts), 0, [], []
    for _ in range(200):
        chosen = corpus.only(random.choice(400, 100, replace=False))
        # The figure of `chosen` and of parts of it: rows were drawn at random, so any tenth of them is.
        values.append(figure(chosen))
        found = interval(lambda rows, chosen=chosen: figure(chosen.only(rows)), 100, 400)
        assert found is not None
        between.append(found)
    held = sum(low <= np.mean(values) <= high for low, high in between) / 200
    reach = np.mean([high - low for low, high in between]) / 2
    assert 0.88 <= held <= 1
    assert reach == pytest.approx(2.262 * np.std(values), rel=0.3)
