"""Step 1: what prompts show, and pairs against the definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from fac_jax.synthesis.contrast import Target, jobs, pairs
from fac_jax.synthesis.generations import Sampling
from fac_jax.synthesis.prompt import Example, Prompt

PROMPT = Prompt("p", "s", "about $about:", "ask $about")
SAMPLING = Sampling(40, 0.8, 0.9, 0)


def test_candidates_of_a_feature_are_shown_different_anchor_texts_in_turn():
    target = Target(7, "guns", tuple(Example(text, 5.0) for text in "abc"))
    made = jobs(PROMPT, [target], 5, SAMPLING)
    shown = [[m["content"] for m in job.request.messages if m["role"] == "assistant"] for job in made]
    assert shown == [["a", "b"], ["a", "b"], ["c", "a"], ["c", "a"], ["b", "c"]]
    assert [job.id for job in made] == [f"f7-s1-{i}" for i in range(5)]
    assert len({job.request.seed for job in made}) == 5
    assert len({job.prompt_digest for job in made}) == 3  # the seed is no part of a prompt
    assert {(job.request.max_tokens, job.request.temperature, job.request.top_p) for job in made} == {(40, 0.8, 0.9)}


def test_a_feature_with_one_anchor_text_shows_it_once_and_one_without_shows_none():
    targets = [Target(1, "x", (Example("only", 5.0),)), Target(2, "y", ())]
    lengths = [len(job.request.messages) for job in jobs(PROMPT, targets, 1, SAMPLING)]
    assert lengths == [4, 2]


def test_seeds_depend_on_the_runs_seed_and_the_place_only():
    target = Target(7, "guns", ())
    seeds = [job.request.seed for job in jobs(PROMPT, [target], 2, SAMPLING)]
    assert seeds == [job.request.seed for job in jobs(PROMPT, [Target(3, "", ()), target], 2, SAMPLING)][2:]
    assert seeds != [job.request.seed for job in jobs(PROMPT, [target], 2, Sampling(40, 0.8, 0.9, 1))]


def test_strong_may_be_anybodys_candidate_and_weak_is_its_own():
    peaks = csr_array(np.array([[0, 0, 3.0], [0, 0, 0.5], [0, 0, 0.2], [0, 0, 0.0]], np.float32))
    (pair,) = pairs([2], peaks, np.array([1, 2, 2, 1]), 1.0)
    assert (pair.strong, pair.strong_peak, pair.weak, pair.reason) == (0, 3.0, 2, None)
    assert np.isclose(pair.weak_peak, 0.2)


def test_weak_is_anybodys_when_the_feature_has_no_other_of_its_own():
    peaks = csr_array(np.array([[2.0], [0.7], [0.1]], np.float32))
    (pair,) = pairs([0], peaks, np.array([0, 5, 5]), 1.0)
    assert (pair.strong, pair.weak) == (0, 2)


def test_a_feature_without_a_strong_candidate_says_so():
    peaks = csr_array(np.array([[1.0, 0], [0.4, 0]], np.float32))
    first, second = pairs([0, 1], peaks, np.array([0, 0]), 1.0)
    assert first.strong is None and first.reason == "no candidate exceeds 1; the best of 2 reached 1"  # strictly above
    assert second.strong is None and second.strong_peak == 0
    (alone,) = pairs([0], csr_array(np.array([[2.0]], np.float32)), np.array([0]), 1.0)
    assert alone.strong is None and alone.reason == "the strong candidate is the only sample there is"
    (none,) = pairs([0], csr_array((0, 2), dtype=np.float32), np.array([], np.int64), 1.0)
    assert none.reason == "no candidate is a sample"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_pairs_equal_the_definition(seed: int):
    random = np.random.default_rng(seed)
    peaks = random.integers(0, 6, (random.integers(2, 9), 4)) * (random.random((1, 4)) > 0.2)
    own = random.integers(0, 4, len(peaks))
    for pair in pairs(range(4), csr_array(peaks.astype(np.float32)), own, 2.0):
        column = peaks[:, pair.feature]
        if column.max() <= 2:
            assert pair.reason is not None and pair.strong is pair.weak is None
            continue
        assert pair.strong == int(np.argmax(column))
        assert pair.weak is not None and pair.weak != pair.strong
        others = [i for i in range(len(column)) if i != pair.strong]
        choice = [i for i in others if own[i] == pair.feature] or others
        assert pair.weak == min(choice, key=lambda i: (column[i], i))
