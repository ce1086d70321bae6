"""Step 2: what prompts show, and which samples are kept (against brute force)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from fac_jax.synthesis.contrast import Pair, Target
from fac_jax.synthesis.cover import assign, jobs
from fac_jax.synthesis.generations import Sampling
from fac_jax.synthesis.prompt import Example, Prompt

PROMPT = Prompt("p", "s", "about $about, score $score:", "ask $about above $score")


def test_prompts_show_weak_strong_and_an_anchor_text_from_low_to_high():
    target = Target(3, "guns", (Example("anchor a", 9.0), Example("anchor b", 4.0)))
    pair = Pair(3, strong=1, strong_peak=6.0, weak=0, weak_peak=0.5, reason=None)
    made = jobs(PROMPT, [target], {3: pair}, ["weak", "strong"], 3, Sampling(40, 0.8, 0.9, 0))
    shown = [[m["content"] for m in job.request.messages] for job in made]
    assert shown[0][1:] == [
        "about guns, score 0.5:", "weak", "about guns, score 6.0:", "strong", "about guns, score 9.0:", "anchor a",
        "ask guns above 9.0",
    ]  # fmt: skip
    assert shown[1] == shown[0]
    assert shown[2][4:] == ["anchor b", "about guns, score 6.0:", "strong", "ask guns above 6.0"]
    assert [job.id for job in made] == ["f3-s2-0", "f3-s2-1", "f3-s2-2"]


def test_a_feature_without_a_pair_is_not_written_for():
    pair = Pair(3, None, 0.4, None, 0.0, "no candidate exceeds 1")
    assert jobs(PROMPT, [Target(3, "x", ())], {3: pair}, [], 4, Sampling(40, 0.8, 0.9, 0)) == []


def test_the_widest_sample_comes_first_then_every_feature_gets_its_clearest():
    peaks = np.zeros((5, 12), np.float32)
    peaks[0, [3, 5]] = 2.0, 3.0  # covers both
    peaks[1, 3] = 9.0
    peaks[2, 5] = 8.0
    peaks[3, 5] = 4.0
    peaks[4, [3, 5, 9]] = 1.0, 0.9, 20.0  # not above the threshold where it counts, and 9 is not missing
    kept = assign(csr_array(peaks), np.array([3, 5, 7]), 1.0, 1)
    assert [(one.row, one.feature, one.peak, one.adds) for one in kept] == [(0, 5, 3.0, (3, 5)), (1, 3, 9.0, ())]
    kept = assign(csr_array(peaks), np.array([3, 5, 7]), 1.0, 2)
    assert [(one.row, one.feature) for one in kept] == [(0, 5), (1, 3), (2, 5)]


def test_equal_gains_go_to_the_larger_margin_then_to_the_earlier():
    peaks = csr_array(np.array([[2.0], [5.0], [5.0]], np.float32))
    assert [one.row for one in assign(peaks, np.array([0]), 1.0, 1)] == [1]
    assert [one.row for one in assign(peaks, np.array([0]), 1.0, 3)] == [1, 2, 0]


def test_nothing_above_the_threshold_keeps_nothing():
    assert assign(csr_array(np.ones((3, 2), np.float32)), np.array([0, 1]), 1.0, 1) == []
    assert assign(csr_array((0, 2), dtype=np.float32), np.array([0, 1]), 1.0, 1) == []
    assert assign(csr_array(np.ones((3, 2), np.float32)), np.array([], np.int64), 0.0, 1) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_what_is_kept_covers_all_that_can_be_and_breaks_no_rule(seed: int, keep_per_feature: int):
    random = np.random.default_rng(seed)
    peaks = (random.random((10, 8)) * 4 * (random.random((10, 8)) > 0.6)).astype(np.float32)
    missing = np.flatnonzero(random.random(8) > 0.3)
    kept = assign(csr_array(peaks), missing, 1.0, keep_per_feature)
    rows = [one.row for one in kept]
    assert len(set(rows)) == len(rows)
    assert all(one.feature in missing and peaks[one.row, one.feature] == one.peak > 1 for one in kept)
    reachable = {int(f) for f in missing if (peaks[:, f] > 1).any()}
    assert {f for one in kept for f in one.adds} == reachable
    for feature in missing:
        held = [one for one in kept if one.feature == feature]
        left = [row for row in range(10) if row not in rows and peaks[row, feature] > 1]
        assert len([one for one in held if not one.adds]) <= keep_per_feature
        assert len(held) >= keep_per_feature or not left
