"""Sentences claim what the numbers allow and nothing more."""

import copy
import dataclasses
from typing import Any

import pytest

from fac_jax.report.products import RunView
from fac_jax.report.verdict import compare, headline, key_numbers, verdict
from tests.report.sample_run import arm


def two_arms(kept: float, low: float, high: float) -> dict[str, Any]:
    arms = {"seed": arm(10, 0, 0.5, 0.5), "seed+kept": arm(12, 2, kept, 0.5)}
    return {"arms": arms, "differences": [{"arm": "seed+kept", "minus": "seed", "low": low, "high": high}]}


@pytest.mark.parametrize(
    ("kept", "low", "high", "says"),
    [
        (0.60, 0.02, 0.15, "higher than"),
        (0.40, -0.15, -0.02, "lower than"),
        (0.60, -0.01, 0.15, "not shown to differ from"),  # documents: the interval holds zero
        (0.51, 0.001, 0.02, "not shown to differ from"),  # seeds: mean +- sd overlap
        (0.50, 0.0, 0.0, "not shown to differ from"),
    ],
)
def test_a_difference_is_claimed_only_when_both_intervals_allow_it(
    kept: float, low: float, high: float, says: str
) -> None:
    found = compare(two_arms(kept, low, high), "seed+kept", "seed")
    assert found is not None and found.says == says


def test_an_arm_that_was_not_trained_is_not_compared() -> None:
    assert compare(two_arms(0.6, 0, 1), "seed+random", "seed") is None


def test_sentences_hold_the_products_numbers(view: RunView) -> None:
    gap, gain, classifier = verdict(view)
    assert "Of 71 features" in gap and "misses 23" in gap and "61.0%" in gap
    assert "12 synthetic samples" in gain and "from 61.0% to 76.5%" in gain and "67.0%" in gain
    assert "0.604 ± 0.012" in classifier and classifier.count("not shown to differ") == 2
    assert headline(view) == "The seed set misses 23 of 59 toxicity features"
    assert [k.name for k in key_numbers(view)] == [
        "Missing features",
        "Coverage (FAC)",
        "Missing features hit",
        "Held-out AUPRC",
    ]


def test_no_kept_sample_is_said(view: RunView) -> None:
    finetune = copy.deepcopy(view.finetune)
    assert finetune is not None
    finetune["arms"]["seed+kept"]["added"] = 0
    sentences = verdict(dataclasses.replace(view, kept=[], finetune=finetune))
    assert sentences[1] == "No generation passed the filter, so coverage stays at 61.0%."
    assert "none were kept" in sentences[2]


def test_undefined_coverage_is_said(view: RunView) -> None:
    coverage = copy.deepcopy(view.coverage)
    assert coverage is not None
    coverage["chosen"] |= {"fac": None, "anchor_features": 0, "missing_features": 0}
    assert "covers undefined of these" not in verdict(dataclasses.replace(view, coverage=coverage))[0]
    assert "none of them" in verdict(dataclasses.replace(view, coverage=coverage))[0]
    undefined = verdict(dataclasses.replace(view, coverage=coverage, missing=[], kept=[]))
    assert undefined[1].startswith("The anchor activates no relevant feature at this threshold, so there was nothing")
