"""Held-out spans: silent where they are said to be, hard where they should be, and alike but for the answer."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fac_jax.features.scores.heldout import (
    FEWEST,
    HARD,
    HARD_SHARE,
    NEIGHBOURS,
    RANDOM,
    RIGHT,
    WRONG,
    Kind,
    Trials,
    choose_trials,
    neighbours,
)
from fac_jax.features.spans import Passages
from tests.features.topics import FEATURES, FIRES_ON, decoder

SPANS = 6


@pytest.fixture(scope="module")
def trials(passages: Passages) -> dict[Kind, Trials]:
    return choose_trials(passages, range(FEATURES), decoder(), SPANS, seed=0)


def test_neighbours_by_brute_force() -> None:
    w = decoder()
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    among = np.ones(FEATURES, bool)
    among[[3, 4]] = False
    found = neighbours(w, [0, 3, 7], 5, among)
    for feature, mine in zip([0, 3, 7], found, strict=True):
        others = [g for g in range(FEATURES) if among[g] and g != feature]
        assert mine.tolist() == sorted(others, key=lambda g: -unit[feature] @ unit[g])[:5]
    assert neighbours(w, [0], 5, np.arange(FEATURES) == 0).shape == (1, 0), "alone"
    assert neighbours(w, [0], 5, np.zeros(FEATURES, bool)).shape == (1, 0)


def test_activating_spans_hold_the_peak_and_silent_documents_do_not(
    passages: Passages, trials: dict[Kind, Trials]
) -> None:
    some, peaks_nf = trials["detection"], passages.scan.peaks_nf
    assert some.features == list(range(len(FIRES_ON))), "features that never fire are not scored"
    peak_r = np.array([peaks_nf[n, f] for n, f in zip(some.document_r, some.feature_r, strict=True)])
    assert ((peak_r > 0) == some.active_r).all()
    assert not passages.explaining_n[some.document_r].any()
    for feature in some.features:
        mine = some.where(some.feature_r == feature)
        assert len(set(mine.document_r)) == len(mine.document_r), "each document once"
        heldout = passages.peak_p[passages.places(feature, explaining=False)]
        shown = peak_r[(some.feature_r == feature) & some.active_r]
        assert len(shown) == min(SPANS, len(heldout))
        assert shown.max() >= np.quantile(heldout, 0.75) and shown.min() <= np.quantile(heldout, 0.25)
        hard = int((mine.origin_r == HARD).sum())
        assert hard == round(HARD_SHARE * len(shown)) and int((mine.origin_r == RANDOM).sum()) == len(shown) - hard


def test_hard_spans_are_cut_around_a_neighbours_peak(passages: Passages, trials: dict[Kind, Trials]) -> None:
    some = trials["detection"]
    near = neighbours(decoder(), range(FEATURES), NEIGHBOURS, passages.heldout_f < passages.first_f[1:])
    for place in np.flatnonzero(some.origin_r == HARD):
        here = (passages.document_p == some.document_r[place]) & (passages.position_p == some.position_r[place])
        fires = np.repeat(np.arange(FEATURES), np.diff(passages.first_f))[here]
        assert set(fires) & set(near[some.feature_r[place]])


def test_length_gives_nothing_away(trials: dict[Kind, Trials]) -> None:
    some = trials["detection"]
    length = some.stop_r - some.start_r
    assert roc_auc_score(some.active_r, length) == pytest.approx(0.5, abs=0.05)


def test_wrong_marks_stand_at_other_tokens_of_the_same_spans(passages: Passages, trials: dict[Kind, Trials]) -> None:
    some = trials["fuzzing"]
    assert set(some.origin_r) == {RIGHT, WRONG}
    token_r = passages.token_t[passages.start_n[some.document_r] + some.position_r]
    for feature in some.features:
        right, wrong = (
            some.where((some.feature_r == feature) & (some.origin_r == origin)) for origin in (RIGHT, WRONG)
        )
        for name in ("document_r", "start_r", "stop_r"):
            assert getattr(right, name).tolist() == getattr(wrong, name).tolist()
        assert len(right.feature_r) >= FEWEST and (right.position_r != wrong.position_r).all()
        mine = token_r[some.feature_r == feature]
        assert not set(mine[: len(right.feature_r)]) & set(mine[len(right.feature_r) :])
    at = passages.start_n[some.document_r] + some.position_r
    assert ((at >= some.start_r) & (at < some.stop_r)).all()
    peaks = set(zip(passages.document_p.tolist(), passages.position_p.tolist(), strict=True))
    assert set(zip(some.document_r.tolist(), some.position_r.tolist(), strict=True)) <= peaks


def test_a_feature_has_the_same_trials_whoever_else_is_asked_for(
    passages: Passages, trials: dict[Kind, Trials]
) -> None:
    alone = choose_trials(passages, [11], decoder(), SPANS, seed=0)
    again = choose_trials(passages, [11], decoder(), SPANS, seed=1)
    for kind, every in trials.items():
        among = every.where(every.feature_r == 11)
        assert among.position_r.tolist() == alone[kind].position_r.tolist()
        assert among.document_r.tolist() == alone[kind].document_r.tolist()
        assert among.position_r.tolist() != again[kind].position_r.tolist()


def test_nothing_to_score(passages: Passages) -> None:
    none = choose_trials(passages, [], decoder(), SPANS, seed=0)
    assert all(len(some.feature_r) == 0 for some in none.values())
    none = choose_trials(passages, [FEATURES - 1], decoder(), SPANS, seed=0)
    assert all(len(some.feature_r) == 0 for some in none.values())
