"""Strengths of draws against their definition, and digests of requests."""

from __future__ import annotations

import dataclasses

import pytest

from fac_jax.llm.client import Steer
from fac_jax.plain import digest
from fac_jax.synthesis.generations import Sampling
from fac_jax.synthesis.steering import UNSTEERED, Strengths, next_factor


def test_draws_take_the_strengths_in_turn_as_multiples_of_the_anchor_peak():
    strengths = Strengths((0.0, 0.5, 2.0))
    assert [strengths.steer(7, 30.0, index) for index in range(5)] == [
        None, Steer(7, 15.0), Steer(7, 60.0), None, Steer(7, 15.0)
    ]  # fmt: skip
    assert UNSTEERED.steer(7, 30.0, 1) is None


@pytest.mark.parametrize(
    ("intact", "factor"),
    [([True, True, False], 3.0), ([True, False, False], 4 / 3), ([True, False], 2.0), ([], 2.0)],
    ids=["most are samples", "most are none", "as many", "not steered"],
)
def test_the_search_goes_up_while_samples_are_written_and_down_when_none_are(intact: list[bool], factor: float):
    assert next_factor(2.0, intact) == pytest.approx(factor)


def test_the_search_is_for_each_feature_alone():
    strengths = Strengths((1.0,)).searched({1: [True], 2: [False]}).searched({1: [True], 3: [False]})
    found = [strengths.steer(feature, 9.0, 0) for feature in (1, 2, 3, 4)]
    assert [one.strength for one in found if one is not None] == pytest.approx([9 * 1.5**2, 6, 6, 9])


def test_a_request_that_is_not_steered_has_the_digest_that_it_had_before_there_was_steering():
    job = Sampling(40, 0.8, 0.9, 0).job(7, 1, 0, ({"role": "user", "content": "a"},))
    sent = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 40, "temperature": 0.8, "top_p": 0.9}
    assert job.prompt_digest == digest({**sent, "seed": None, "schema": None}) == "11fb1d773a5c43f5"
    steered = [
        dataclasses.replace(job, request=dataclasses.replace(job.request, steer=Steer(7, s))) for s in (1.0, 2.0)
    ]
    assert len({one.prompt_digest for one in (job, *steered)}) == 3
