"""Replies are read strictly, kept raw, and never asked for twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fac_jax.features.ask import ask, read_answer
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from fac_jax.llm.question import label_schema, question

SCHEMA = label_schema(["Yes", "Probably", "Maybe", "No"])
GOOD = '{"label": "Maybe", "reason": "could\u2028be"}'


@pytest.mark.parametrize("text", [GOOD, f"  {GOOD}\n", f"```json\n{GOOD}\n```", f"```\n{GOOD}\n```\n"])
def test_good_replies(text: str) -> None:
    answer = read_answer(text, SCHEMA)
    assert answer.value == {"label": "Maybe", "reason": "could\u2028be"} and answer.raw == text and answer.error is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("Yes", "not JSON"),
        (f"Sure! {GOOD}", "not JSON"),
        (f"{GOOD} {GOOD}", "not JSON"),
        ('"Yes"', "a JSON str, not an object"),
        ('{"label": "Yes"}', "'reason' is a required property"),
        ('{"label": "Yes", "reason": "", "more": 1}', "'more' was unexpected"),
        ('{"label": "yes", "reason": ""}', "$.label: 'yes' is not one of ['Yes', "),
        ('{"label": ["Yes"], "reason": ""}', "$.label: ['Yes'] is not"),
        ('{"label": "Yes", "reason": "' + "x" * 600 + '"}', "$.reason: 'xxx"),
        ('{"label": "No", "label": "Yes", "reason": ""}', "occurs twice"),
        ('{"label": "Yes", "reason": NaN}', "NaN is no JSON number"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_replies_are_failures(text: str, why: str) -> None:
    answer = read_answer(text, SCHEMA)
    assert answer.value is None and answer.error is not None and why in answer.error and answer.raw == text


def questions(count: int) -> dict[str, Request]:
    return {f"judge:{i}": question("Judge.", {"feature": i}, SCHEMA) for i in range(count)}


def test_an_interrupted_round_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "replies.jsonl"

    def dies_at_three(request: Request) -> str:
        if '"feature": 3' in request.messages[1]["content"]:
            raise ConnectionError("gone")
        return GOOD

    with pytest.raises(ConnectionError):
        ask(FakeGenerator(dies_at_three), questions(8), log, "judge")
    kept = log.read_text().count("\n")
    assert kept == 4, "replies arrive last first; 7, 6, 5 and 4 came before the failure"
    log.write_bytes(log.read_bytes() + b'{"mark": "torn')
    again = FakeGenerator(lambda request: GOOD)
    answers = ask(again, questions(8), log, "judge")
    assert len(again.requests) == 4 and all(answer.value for answer in answers.values()) and len(answers) == 8
    assert all(json.loads(line) for line in log.read_text().splitlines())
    silent = FakeGenerator(lambda request: "not asked")
    assert ask(silent, questions(8), log, "judge") == answers and not silent.requests


def test_another_model_or_prompt_is_asked_anew(tmp_path: Path) -> None:
    log = tmp_path / "replies.jsonl"
    ask(FakeGenerator(lambda request: GOOD), questions(2), log, "judge")
    other = FakeGenerator(lambda request: GOOD, name="another")
    ask(other, questions(2), log, "judge")
    assert len(other.requests) == 2
