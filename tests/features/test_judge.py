"""Which features are relevant: by labels, and by a model's answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fac_jax.config import Config, JudgeConfig, LlmConfig
from fac_jax.errors import UserError
from fac_jax.features import judge as module
from fac_jax.features.judge import judge, judge_with, relevant_features
from fac_jax.features.task import load_task
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from fac_jax.scan.scan import Scan

Make = Callable[..., Scan]
ON_VILE, ON_ANIMALS, ON_EVERYTHING, ON_ONE = range(4)  # as in conftest.py


def test_association_with_the_labels(make_scan: Make, tmp_path: Path) -> None:
    scan = make_scan()
    summary = judge(Config(), tmp_path, {"scan:anchor": scan.folder})
    assert summary["method"] == "embedded" and summary["relevant"] == 1 and summary["not_judged"] == 1
    rows = {row["feature"]: row for row in pq.read_table(tmp_path / "relevance.parquet").to_pylist()}
    assert set(rows) == {ON_VILE, ON_ANIMALS, ON_EVERYTHING, ON_ONE}
    assert rows[ON_VILE]["auroc"] == 1.0 and rows[ON_VILE]["q"] < 1e-9
    assert rows[ON_EVERYTHING]["auroc"] == 0.5 and not rows[ON_EVERYTHING]["relevant"]
    assert rows[ON_ONE]["status"] == "not judged" and rows[ON_ONE]["q"] is None
    assert all(row["label"] is None for row in rows.values()), "the embedded method gives no label it did not find"
    assert relevant_features(tmp_path, scan).tolist() == [True] + [False] * 5


def test_no_labels(make_scan: Make, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="judge needs labels: data.anchor has none; set label/constant_label or llm.url"
    ):
        judge(Config(), tmp_path, {"scan:anchor": make_scan(labels=False).folder})


def test_labels_of_one_kind(make_scan: Make, tmp_path: Path) -> None:
    scan = make_scan()
    one_kind = dataclasses.replace(scan, labels_n=scan.labels_n * 0)
    with pytest.raises(UserError, match="data.anchor has 0 positive and 120 negative documents"):
        module.judge_embedded(one_kind, JudgeConfig())


def test_unknown_task(make_scan: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="judge.task is 'tox'.*the tasks are: "):
        judge(Config(judge=JudgeConfig(task="tox")), tmp_path, {"scan:anchor": make_scan().folder})


def test_relevance_of_another_sae(make_scan: Make, tmp_path: Path) -> None:
    scan = make_scan()
    judge(Config(), tmp_path, {"scan:anchor": scan.folder})
    other = dataclasses.replace(scan, identity=dataclasses.replace(scan.identity, sae="sae-2"))
    with pytest.raises(UserError, match="judged for SAE sae-1, .* made with sae-2: run `fac judge CONFIG` again"):
        relevant_features(tmp_path, other)


EXPLAINED = [
    {"feature": ON_VILE, "method": "llm", "status": "explained", "explanation": "vile words", "verified": "Yes"},
    {"feature": ON_ANIMALS, "method": "llm", "status": "explained", "explanation": "animals", "verified": "Maybe"},
    {"feature": ON_EVERYTHING, "method": "llm", "status": "explained", "explanation": "words", "verified": "No"},
    {"feature": ON_ONE, "method": "llm", "status": "failed", "explanation": None, "verified": None},
]


def answers(request: Request) -> str:
    text = json.loads(request.messages[1]["content"])["explanation"]
    return {"vile words": '{"label": "Probably", "reason": "insults"}', "animals": "I cannot help with that."}[text]


def judged(generator: FakeGenerator, scan: Scan, log: Path, lowest: str = "Maybe") -> dict[int, dict[str, Any]]:
    rows = judge_with(generator, load_task("toxicity"), scan, EXPLAINED, lowest, 3, log)
    return {row["feature"]: row for row in rows}


def test_a_models_answers(make_scan: Make, tmp_path: Path) -> None:
    generator, scan = FakeGenerator(answers), make_scan()
    rows = judged(generator, scan, tmp_path / "replies.jsonl")
    assert len(generator.requests) == 2, "what is not explained, or explained wrongly, is not judged"
    assert rows[ON_VILE]["relevant"] and rows[ON_VILE]["label"] == "Probably" and rows[ON_VILE]["reason"] == "insults"
    assert rows[ON_ANIMALS]["status"] == "failed" and rows[ON_ANIMALS]["raw"] == "I cannot help with that."
    assert "label" not in rows[ON_ANIMALS] and not rows[ON_ANIMALS]["relevant"]
    assert rows[ON_EVERYTHING]["reason"] == "its explanation does not fit its spans"
    assert rows[ON_ONE]["reason"] == "no explanation: failed"
    assert not judged(generator, scan, tmp_path / "replies.jsonl", lowest="Yes")[ON_VILE]["relevant"]
    assert len(generator.requests) == 2, "a lower bar asks nothing again"


def test_the_stage_with_a_server(make_scan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_generator", lambda config, mesh: FakeGenerator(answers))
    monkeypatch.setattr(module, "make_mesh", lambda config: None)
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(EXPLAINED), tmp_path / "explanations.parquet")
    config = Config(llm=LlmConfig(url="http://127.0.0.1:1/v1"))
    summary = judge(config, tmp_path, {"scan:anchor": make_scan().folder, "explanations": tmp_path})
    assert summary == {
        "method": "llm", "task": "toxicity", "features": 4, "judged": 1, "not_judged": 2, "failed": 1, "relevant": 1,
        "labels": {"Probably": 1},
    }  # fmt: skip
