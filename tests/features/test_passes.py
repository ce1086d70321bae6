"""A model's verdicts: passes in different orders, the less sure label, failures that stay failures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fac_jax.config.features import ExplainConfig, JudgeConfig
from fac_jax.config.file import Config
from fac_jax.config.machine import RunConfig
from fac_jax.errors import UserError
from fac_jax.features import passes as module
from fac_jax.features.passes import judge_with, orders
from fac_jax.features.task import load_task
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from fac_jax.llm.question import data_shown
from fac_jax.scan.product import Scan

Make = Callable[..., Scan]
ON_VILE, ON_ANIMALS, ON_EVERYTHING, ON_ONE = range(4)  # as in conftest.py
EXPLAINED = [
    {"feature": ON_VILE, "method": "llm", "status": "explained", "explanation": "vile words", "verified": "Yes"},
    {"feature": ON_ANIMALS, "method": "llm", "status": "explained", "explanation": "animals", "verified": "Maybe"},
    {"feature": ON_EVERYTHING, "method": "llm", "status": "explained", "explanation": "words", "verified": "No"},
    {"feature": ON_ONE, "method": "llm", "status": "failed", "explanation": None, "verified": None},
]
Answer = Callable[[str, list[dict[str, Any]]], str]


def label(name: str) -> str:
    return json.dumps({"label": name, "reason": f"it is {name}"})


def answering(answer: Answer) -> FakeGenerator:
    """A generator that answers from the explanation and the spans."""

    def write(request: Request) -> str:
        data = data_shown(request.messages[1]["content"])
        return answer(data["explanation"], data["spans"])

    return FakeGenerator(write)


def judged(
    generator: FakeGenerator, scan: Scan, log: Path, explained: list[dict[str, Any]] = EXPLAINED, **judge: Any
) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    config = Config(judge=JudgeConfig(**judge), explain=ExplainConfig(spans=3), run=RunConfig(seed=5))
    rows, summary = judge_with(generator, load_task("toxicity"), scan, explained, config, log)
    return {row["feature"]: row for row in rows}, summary


@pytest.fixture
def three_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every feature has three spans of different activations."""
    spans = [{"before": "the", "token": f" dog{score}", "after": "", "activation": score} for score in (3.0, 2.0, 1.0)]
    monkeypatch.setattr(module, "top_spans", lambda scan, features, count: dict.fromkeys(features, spans))


def best_first(spans: list[dict[str, Any]]) -> bool:
    scores = [span["activation"] for span in spans]
    return scores == sorted(scores, reverse=True)


def test_a_models_answers(make_scan: Make, tmp_path: Path) -> None:
    log, scan = tmp_path / "replies.jsonl", make_scan()
    generator = answering(lambda text, _: label("Probably") if text == "vile words" else "I cannot help with that.")
    rows, summary = judged(generator, scan, log)
    assert len(generator.requests) == 4, "what is not explained, or explained wrongly, is not judged"
    assert all(request.temperature == 0 and request.seed == 5 for request in generator.requests)
    vile, animals = rows[ON_VILE], rows[ON_ANIMALS]
    assert vile["relevant"] and vile["label"] == "Probably" and vile["reason"] == "it is Probably" and vile["agreed"]
    assert vile["labels"] == ["Probably"] * 2 and vile["raw"] == [label("Probably")] * 2
    assert animals["status"] == "failed" and animals["raw"] == ["I cannot help with that."] * 2
    assert "label" not in animals and not animals["relevant"] and animals["error"].startswith("not JSON")
    assert rows[ON_EVERYTHING]["reason"] == "its explanation does not fit its spans"
    assert rows[ON_ONE]["reason"] == "no explanation: failed"
    assert summary["agreement"]["features"] == 1 and summary["agreement"]["kappa"] is None
    stricter, _ = judged(generator, scan, log, relevant_label="Yes")
    assert not stricter[ON_VILE]["relevant"] and len(generator.requests) == 4, "another bar asks nothing again"
    keys = [json.loads(line)["key"] for line in log.read_text().splitlines()]
    assert keys == [f"judge:{feature}:{number}" for feature in (ON_VILE, ON_ANIMALS) for number in (0, 1)]


def test_passes_that_disagree_give_the_less_sure_label(make_scan: Make, tmp_path: Path, three_spans: None) -> None:
    """A judge that goes by the order: it is seen, and the feature is not taken for relevant."""
    generator = answering(lambda _, spans: label("Yes" if best_first(spans) else "No"))
    rows, summary = judged(generator, make_scan(), tmp_path / "replies.jsonl")
    row = rows[ON_ANIMALS]
    assert row["labels"] == ["Yes", "No"] and row["reasons"] == ["it is Yes", "it is No"] and row["agreed"] is False
    assert (row["label"], row["reason"], row["relevant"]) == ("No", "it is No", False)
    assert summary["disagreed"] == 2 and summary["agreement"]["same_label"] == 0
    assert summary["agreement"]["kappa"] == 0, "one pass says yes to all, the other no: what chance gives"


def test_one_unreadable_pass_is_a_failure(make_scan: Make, tmp_path: Path, three_spans: None) -> None:
    generator = answering(lambda _, spans: label("Yes") if best_first(spans) else '{"label": "Certainly"}')
    rows, summary = judged(generator, make_scan(), tmp_path / "replies.jsonl", EXPLAINED[1:2])
    row = rows[ON_ANIMALS]
    assert row["status"] == "failed" and not row["relevant"] and "label" not in row
    assert row["labels"] == ["Yes", None] and row["raw"][1] == '{"label": "Certainly"}', "nothing is hidden"
    assert summary["agreement"]["features"] == 0


def test_one_pass_asks_once_and_knows_no_agreement(make_scan: Make, tmp_path: Path) -> None:
    generator = answering(lambda *_: label("Yes"))
    rows, summary = judged(generator, make_scan(), tmp_path / "replies.jsonl", passes=1)
    assert len(generator.requests) == 2 and rows[ON_VILE]["agreed"] is None
    assert summary["agreement"] == dict.fromkeys(["same_label", "same_relevance", "kappa", "kappa_linear"]) | {
        "features": 0
    }


def test_a_feature_with_one_span_has_one_order(make_scan: Make, tmp_path: Path) -> None:
    explained = [{**EXPLAINED[0], "feature": ON_ONE}]
    generator = answering(lambda *_: label("Maybe"))
    rows, _ = judged(generator, make_scan(), tmp_path / "replies.jsonl", explained)
    assert len(generator.requests) == 1 and rows[ON_ONE]["labels"] == ["Maybe"] and rows[ON_ONE]["relevant"]


@pytest.mark.parametrize(("count", "passes"), [(0, 2), (1, 2), (2, 5), (3, 6), (10, 4)])
def test_orders(count: int, passes: int) -> None:
    found = orders(count, passes, 0, 7)
    assert len(set(found)) == len(found) == min(passes, math.factorial(count))
    assert found[0] == tuple(range(count)) and all(sorted(order) == list(range(count)) for order in found)
    assert found == orders(count, passes, 0, 7) and orders(count, passes + 1, 0, 7)[: len(found)] == found


def test_a_killed_round_goes_on_to_the_same_bytes(make_scan: Make, tmp_path: Path) -> None:
    scan, calm, torn = make_scan(), tmp_path / "calm.jsonl", tmp_path / "torn.jsonl"
    undisturbed = judged(answering(lambda text, _: label("Yes" if "vile" in text else "No")), scan, calm)
    left = [3]

    def dies(text: str, _: list[dict[str, Any]]) -> str:
        left[0] -= 1
        if not left[0]:
            raise ConnectionError("gone")
        return label("Yes" if "vile" in text else "No")

    with pytest.raises(ConnectionError):
        judged(answering(dies), scan, torn)
    again = answering(lambda text, _: label("Yes" if "vile" in text else "No"))
    assert judged(again, scan, torn) == undisturbed and len(again.requests) == 2
    assert torn.read_bytes() == calm.read_bytes()


def test_a_label_that_the_task_lacks(make_scan: Make, tmp_path: Path) -> None:
    task = load_task("toxicity")
    other = dataclasses.replace(task, description=dataclasses.replace(task.description, labels=("High", "Low")))
    with pytest.raises(UserError, match="judge.relevant_label is 'Maybe'; task 'toxicity' has the labels High, Low"):
        judge_with(answering(lambda *_: ""), other, make_scan(count=12), EXPLAINED, Config(), tmp_path / "log")


def test_no_passes_are_refused() -> None:
    with pytest.raises(UserError, match="judge.passes is 0; it must be at least 1"):
        JudgeConfig(passes=0)
