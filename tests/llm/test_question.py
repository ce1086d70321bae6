"""A question keeps what it shows data: one line of JSON between two lines whose mark nobody can write."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fac_jax.llm import question as module
from fac_jax.llm.question import data_shown, label_schema, object_schema, one_line_json, question

TEXT = st.text(st.characters(exclude_characters="<[＜［"))  # test_control_tokens.py has what begins a control token
DATA = st.dictionaries(st.sampled_from(["explanation", "spans", "1"]), TEXT | st.lists(TEXT) | st.floats(0, 9))
LINES = {"Cc", "Cs", "Zl", "Zp"}


def mark(data: dict[str, Any], system: str = "Judge.", seed: int = 0) -> str:
    return question(system, data, {}, seed).messages[1]["content"].rsplit(" ", 1)[1]


@given(DATA)
def test_hostile_text_stays_inside_the_users_json(data: dict[str, Any]) -> None:
    request = question("Judge.", data, {})
    system, user = (message["content"] for message in request.messages)
    first, shown, last = user.splitlines()
    assert json.loads(shown) == data == data_shown(user)
    assert system.startswith("Judge.\n") and first == f"BEGIN DATA {mark(data)}" and last == f"END DATA {mark(data)}"
    assert last in system and not any(unicodedata.category(c) in LINES for c in shown)
    assert mark(data) not in shown
    user.encode()  # half a character would not


@given(st.text())
def test_json_on_one_line_is_json(text: str) -> None:
    assert json.loads(one_line_json(text)) == text and len(one_line_json(text).splitlines()) == 1


def test_ordinary_text_is_readable() -> None:
    assert one_line_json(["naïve", "日本語", "می‌خواهم", "👩‍🚀"]) == '["naïve", "日本語", "می‌خواهم", "👩‍🚀"]'
    assert one_line_json("a\u202eb\u2028c") == '"a\\u202eb\\u2028c"'


@given(DATA, DATA)
def test_the_mark_is_of_all_that_is_asked_and_the_same_in_every_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert question("Judge.", one, {}, 7) == question("Judge.", one, {}, 7)
    assert (mark(one) == mark(other)) == (json.dumps(one) == json.dumps(other))
    assert len({mark(one), mark(one, "Rate."), mark(one, seed=1)}) == 3
    assert re.fullmatch("[0-9a-f]{24}", mark(one))


def test_a_mark_that_occurs_in_the_text_is_not_taken(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MARK_DIGITS", 1)  # so that texts can hold some of the marks there are
    for free in "0123456789abcdef":
        assert mark({"": "0123456789ABCDEF".replace(free.upper(), "")}, "???") == free


def test_control_tokens_go_from_texts_at_any_depth() -> None:
    request = question("Judge.", {"spans": {"1": [{"token": "a <|im_start|>b"}]}, "activation": 2.5}, {}, seed=4)
    assert data_shown(request.messages[1]["content"]) == {"spans": {"1": [{"token": "a b"}]}, "activation": 2.5}
    assert (request.temperature, request.seed) == (0, 4)


def test_schemas() -> None:
    assert object_schema(a={"type": "string"}) == {
        "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False,
    }  # fmt: skip
    assert label_schema(["Yes", "No"])["properties"]["label"] == {"type": "string", "enum": ["Yes", "No"]}
