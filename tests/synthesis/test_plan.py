"""What prompts are made from: names for features, and anchor texts that show them."""

from typing import Any

import pytest

from fac_jax.scan.product import load_scans
from fac_jax.synthesis.plan import _example_text, about, make_plan
from fac_jax.synthesis.samples import normalised
from tests.synthesis.toy_world import SEEN, TOPICS, Toy, feature, message


def test_the_plan_holds_all_that_is_missing_with_texts_that_carry_the_label_first(toy: Toy):
    anchor, seed = load_scans(toy.inputs["scan:anchor"], toy.inputs["scan:seed"])
    plan = make_plan(toy.config, anchor, seed, toy.inputs)
    assert plan.features.tolist() == sorted(feature(word) for word in TOPICS if word not in SEEN)
    assert plan.targets == plan.missing
    target = next(target for target in plan.missing if target.feature == feature("guns"))
    assert target.about == "guns"
    assert target.examples[0].text == message("guns", 101)  # the only one of the three that is labelled 1
    assert {example.score for example in target.examples} == {3.0} and target.peak == 3.0
    assert normalised(message("ropes", 100)) in plan.known and normalised(message("guns", 100)) in plan.known


@pytest.mark.parametrize(
    ("before", "token", "after", "document", "shown"),
    [
        ("it was. now give me the", " gun", " or the knife. thanks", "w " * 30, "now give me the gun or the knife."),
        ("stop. I", " want", " it. Now", "w " * 30, "stop. I want it. Now"),  # too short a sentence: the whole span
        ("a\nb c d e", " f", "\ng", "w " * 30, "b c d e f"),
        ("x", "y", "z", "a short\ntext", "a short text"),
        ("broken \ufffd one two three", " four", " five", "w " * 30, "broken one two three four five"),
    ],
)
def test_an_anchor_text_is_shown_whole_or_by_the_sentence_that_activates(
    before: str, token: str, after: str, document: str, shown: str
):
    assert _example_text({"before": before, "token": token, "after": after}, document) == shown


@pytest.mark.parametrize(
    ("row", "tokens", "words"),
    [
        ({"fires_on": [" Kill", " kill", ",", " gun"], "explanation": "fires on: ..."}, [], "kill, gun"),
        ({"fires_on": None, "explanation": "asks\nfor weapons"}, [], "asks for weapons"),
        ({"fires_on": [], "explanation": None}, [" red", " blue", " red"], "red, blue"),
        ({}, ["?!"], "the same thing"),
        ({"fires_on": list("abcdef")}, [], "a, b, c, d"),
        ({"fires_on": ["orn", " a", " names", " 42", " call"]}, [], "names, call"),
    ],
)
def test_what_a_feature_is_called_in_prompts(row: dict[str, Any], tokens: list[str], words: str):
    assert about(row, [{"token": token} for token in tokens]) == words
