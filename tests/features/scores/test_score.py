"""Scores of explanations: right ones near 1, shuffled and unreadable ones at 0.5, whoever rates."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fac_jax.config.features import ExplainConfig
from fac_jax.features.scores.heldout import choose_trials
from fac_jax.features.scores.score import Scores, drawn, partners, score_embedded, score_with
from fac_jax.features.scores.simulate import simulated
from fac_jax.features.spans import Passages
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from tests.features.topics import TOPIC_WORDS, WORDS, decoder, topics_tokenizer

COUNT = 40
"""Features that have an explanation."""
EXPLANATIONS = {feature: f"the word {word}" for feature, word in enumerate(TOPIC_WORDS[:COUNT])}
NAMED = {
    feature: [WORDS.index(word), WORDS.index(other)]
    for feature, (word, other) in enumerate(zip(TOPIC_WORDS[:COUNT], TOPIC_WORDS[COUNT : 2 * COUNT], strict=True))
}
CHOICE = ExplainConfig(scored_spans=8, control_features=COUNT)


def asked(request: Request) -> dict[str, Any]:
    """The data of a question, wherever in the user's turn its JSON stands."""
    content = request.messages[1]["content"]
    found: dict[str, Any] = json.loads(content[content.index("{") : content.rindex("}") + 1])
    return found


def oracle(request: Request) -> str:
    """Believes the explanation: a span holds its word, or the marked token is its word."""
    data = asked(request)
    word = data["explanation"].split()[-1]
    shown = {number: span["token"] if isinstance(span, dict) else span for number, span in data["spans"].items()}
    return json.dumps({number: "Yes" if word in text.split() else "No" for number, text in shown.items()})


def score(generator: FakeGenerator, passages: Passages, folder: Path, choice: ExplainConfig = CHOICE) -> Scores:
    log = folder / "replies.jsonl"
    return score_with(generator, passages, topics_tokenizer(), EXPLANATIONS, decoder(), choice, 0, log)


def test_right_explanations_score_one_and_shuffled_ones_one_half(passages: Passages, tmp_path: Path) -> None:
    generator = FakeGenerator(oracle)
    found = score(generator, passages, tmp_path)
    assert list(found.columns) == list(range(COUNT))
    for columns in found.columns.values():
        assert columns["detection_auroc"] == columns["fuzzing_auroc"] == 1
        assert columns["detection_low"] == columns["fuzzing_high"] == 1 and columns["unread_ratings"] == 0
    for kind in ("detection", "fuzzing"):
        control = found.summary[f"control_{kind}_auroc"]
        assert control["features"] == COUNT and control["mean_low"] <= 0.5 <= control["mean_high"]
        assert control["mean_high"] - control["mean_low"] < 0.1, "a test that could fail"
        assert found.summary[f"{kind}_auroc"]["median"] == 1
    # 16 spans in 2 requests, detection and fuzzing, and both again for the control.
    assert found.summary["rating_replies"] == len(generator.requests) == COUNT * 8
    assert found.summary["rating_replies_unreadable"] == 0


def test_questions_are_named_and_show_no_span_twice(passages: Passages, tmp_path: Path) -> None:
    generator = FakeGenerator(oracle)
    score(generator, passages, tmp_path, ExplainConfig(scored_spans=8, scored_features=5, control_features=2))
    lines = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    purposes = Counter(re.sub(r"\d+", "F", line["key"]) for line in lines)
    assert purposes == {"detect:F:F": 10, "fuzz:F:F": 10, "control:F:detect:F": 4, "control:F:fuzz:F": 4}
    for request in generator.requests:
        spans = [
            span if isinstance(span, str) else " ".join(span.values()) for span in asked(request)["spans"].values()
        ]
        words = [tuple(span.split()) for span in spans]
        assert len(words) == len(set(words)) == 8
        assert request.temperature == 0 and request.schema is not None
        assert list(request.schema["properties"]) == [str(number) for number in range(1, 9)]


def test_garbage_scores_as_a_coin_would_and_is_counted(passages: Passages, tmp_path: Path) -> None:
    found = score(FakeGenerator(lambda request: "Yes to all of them!"), passages, tmp_path)
    for columns in found.columns.values():
        assert columns["detection_auroc"] == columns["fuzzing_auroc"] == 0.5
        assert columns["unread_ratings"] == 2 * (16 + 16), "of detection, fuzzing and the controls of both"
    assert found.summary["rating_replies_unreadable"] == found.summary["rating_replies"] == COUNT * 8
    assert found.spans["rating"].null_count == found.spans.num_rows


def test_half_of_the_replies_unreadable(passages: Passages, tmp_path: Path) -> None:
    """Two batches of 4 active and 4 silent spans: pairs within the one read are won, all others are a coin's."""
    replies = iter(range(10**6))

    def every_other(request: Request) -> str:
        return oracle(request) if next(replies) % 2 else '{"1": "Yes"}'

    found = score(FakeGenerator(every_other), passages, tmp_path)
    assert all(columns["fuzzing_auroc"] == 0.625 for columns in found.columns.values())
    assert all(columns["detection_auroc"] == 0.625 for columns in found.columns.values())
    assert found.summary["rating_replies_unreadable"] * 2 == found.summary["rating_replies"]


def test_a_run_that_goes_on_ends_alike(passages: Passages, tmp_path: Path) -> None:
    whole = score(FakeGenerator(oracle), passages, tmp_path / "whole")
    left = iter(range(100))

    def stops(request: Request) -> str:
        next(left)  # StopIteration is what a server that goes away amounts to
        return oracle(request)

    with pytest.raises(StopIteration):
        score(FakeGenerator(stops), passages, tmp_path / "cut")
    again = FakeGenerator(oracle)
    found = score(again, passages, tmp_path / "cut")
    assert len(again.requests) == COUNT * 8 - 100
    assert found.columns == whole.columns and found.summary == whole.summary and found.spans.equals(whole.spans)
    assert (tmp_path / "cut/replies.jsonl").read_bytes() == (tmp_path / "whole/replies.jsonl").read_bytes()


def test_tokens_simulate_a_rating(passages: Passages) -> None:
    trials = choose_trials(passages, range(COUNT), decoder(), 8, seed=0)
    for kind, some in trials.items():
        found = simulated(passages, some, kind, NAMED)
        for row, feature in enumerate(some.feature_r):
            tokens = passages.token_t[some.start_r[row] : some.stop_r[row]].tolist()
            if kind == "fuzzing":
                tokens = [int(passages.token_t[passages.start_n[some.document_r[row]] + some.position_r[row]])]
            first, second = NAMED[int(feature)]
            assert found[row] == (2 if first in tokens else 1 if second in tokens else 0)
        assert not simulated(passages, some, kind, {}).any()


def test_embedded_explanations_are_scored_on_the_same_spans(passages: Passages, tmp_path: Path) -> None:
    by_model = score(FakeGenerator(oracle), passages, tmp_path)
    found = score_embedded(passages, NAMED, decoder(), CHOICE, 0)
    places = ["feature", "test", "document_id", "position", "origin", "active"]
    assert found.spans.select(places).equals(by_model.spans.select(places))
    assert found.summary["detection_auroc"]["median"] == found.summary["fuzzing_auroc"]["median"] == 1
    for kind in ("detection", "fuzzing"):
        control = found.summary[f"control_{kind}_auroc"]
        assert control["mean_low"] <= 0.5 <= control["mean_high"] and control["features"] == COUNT
    explaining = set(passages.scan.ids_n[passages.explaining_n].tolist())
    assert not explaining & set(found.spans["document_id"].to_pylist())


def test_only_some_features(passages: Passages) -> None:
    found = score_embedded(passages, NAMED, decoder(), ExplainConfig(scored_features=7), 0)
    fewer = score_embedded(passages, NAMED, decoder(), ExplainConfig(scored_features=3), 0)
    assert len(found.columns) == 7 and set(fewer.columns) < set(found.columns)
    none = score_embedded(passages, NAMED, decoder(), ExplainConfig(scored_features=0), 0)
    assert not none.columns and none.summary["detection_auroc"] is None and none.spans.num_rows == 0
    one = score_embedded(passages, NAMED, decoder(), ExplainConfig(scored_features=1), 0)
    assert len(one.columns) == 1 and "control_detection_auroc" not in one.summary, "nobody to swap with"


def test_partners_and_draws() -> None:
    features = list(range(10, 60, 3))
    found = partners(features, seed=0)
    assert set(found) == set(found.values()) == set(features) and all(f != other for f, other in found.items())
    assert partners([4], seed=0) == {} and partners([], seed=0) == {}
    assert drawn(features, None, 0) == features and drawn(features, 0, 0) == []
    assert set(drawn(features, 4, 1)) < set(drawn(features, 9, 1)) and drawn(features, 9, 1) != drawn(features, 9, 2)
    assert np.isin(drawn(features, 9, 1), features).all()
