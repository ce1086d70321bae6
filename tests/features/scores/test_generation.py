"""Texts written from explanations: scored by what they activate, against texts written for other features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from fac_jax.features.scores.generation import score_generated
from fac_jax.llm.client import Reply, Request
from fac_jax.llm.fake import FakeGenerator

EXPLANATIONS = {3: "the word red", 8: "the word green", 5: "the word blue"}
WORDS = {3: "red", 8: "green", 5: "blue"}
MARKS = ["<pad>", "<user>"]


def score(texts: Sequence[str]) -> csr_array:
    """Each feature's peak is how often its word occurs."""
    peaks = np.zeros((len(texts), 10), np.float32)
    for feature, word in WORDS.items():
        peaks[:, feature] = [text.split().count(word) for text in texts]
    return csr_array(peaks)


def explanation(request: Request) -> str:
    content = request.messages[1]["content"]
    return str(json.loads(content[content.index("{") : content.rindex("}") + 1])["explanation"])


def test_right_texts_score_one_and_their_control_nothing(tmp_path: Path) -> None:
    generator = FakeGenerator(lambda request: f"a {explanation(request).split()[-1]} door {request.seed}")
    found = score_generated(generator, EXPLANATIONS, score, MARKS, 4, 0.5, 1, tmp_path / "replies.jsonl")
    for columns in found.columns.values():
        assert columns["generation_score"] == columns["generation_any"] == 1
        assert columns["generation_control"] == columns["generation_control_any"] == 0
    assert found.summary["texts"] == 12 and found.summary["unusable"] == 0
    assert found.summary["generation_score"]["features"] == 3
    assert len({(explanation(r), r.seed) for r in generator.requests}) == 12, "each text is another draw"
    assert {r.temperature for r in generator.requests} == {0.8} and {r.schema for r in generator.requests} == {None}
    keys = [json.loads(line)["key"] for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert keys == [f"write:{feature}:{number}" for feature in EXPLANATIONS for number in range(4)]
    more = score_generated(generator, EXPLANATIONS, score, MARKS, 4, 1.0, 1, tmp_path / "replies.jsonl")
    assert more.columns[3]["generation_score"] == 0 and more.columns[3]["generation_any"] == 1, (
        "one word is a peak of 1"
    )
    assert len(generator.requests) == 12


def test_a_writer_that_does_not_read_scores_as_its_control(tmp_path: Path) -> None:
    generator = FakeGenerator(lambda request: "red green blue"[: 5 * (request.seed % 2) + 9])  # "red green", or all
    found = score_generated(generator, EXPLANATIONS, score, MARKS, 6, 0.0, 0, tmp_path / "replies.jsonl")
    for columns in found.columns.values():
        assert columns["generation_score"] == columns["generation_control"]
    assert found.columns[5]["generation_peaks"] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("written", ["", "  \n", "red <user> red"])
def test_what_is_no_text_activates_nothing_and_is_counted(written: str, tmp_path: Path) -> None:
    replies = [written, "red"]

    def write(request: Request) -> Reply:
        return Reply(replies[request.seed % 2], "stop", 1, 1, "fake")

    found = score_generated(FakeGenerator(write), {3: "x"}, score, MARKS, 4, 0.0, 0, tmp_path / "replies.jsonl")
    assert found.columns[3]["generation_score"] == 0.5 and found.summary["unusable"] == 2
    assert found.columns[3]["generation_control"] is None, "no other feature's texts"
    assert found.summary["generation_control"] is None
