"""Which features are relevant: by labels, and by a model's answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax.config.features import JudgeConfig
from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.features import judge as module
from fac_jax.features.judge import judge, relevant_features
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from fac_jax.llm.question import data_shown
from fac_jax.scan.product import Scan
from tests.scan.written_scan import altered

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
    with pytest.raises(UserError, match=r"judge needs labels: data.anchor has none; set label/constant_label, or let"):
        judge(Config(), tmp_path, {"scan:anchor": make_scan(labels=False).folder})


def test_labels_of_one_kind(make_scan: Make, tmp_path: Path) -> None:
    scan = make_scan()
    one_kind = altered(scan, labels_n=scan.labels_n * 0)
    with pytest.raises(UserError, match="data.anchor has 0 positive and 120 negative documents"):
        module.judge_embedded(one_kind, JudgeConfig())


def test_beside_a_server_the_embedded_method_judges_where_it_is_asked_to(make_scan: Make, tmp_path: Path) -> None:
    scan = make_scan()
    for folder, config in {
        "alone": Config(),
        "beside": Config(llm=LlmConfig(url="http://127.0.0.1:9/v1"), judge=JudgeConfig(method="embedded")),
    }.items():
        (tmp_path / folder).mkdir()
        assert judge(config, tmp_path / folder, {"scan:anchor": scan.folder})["method"] == "embedded"
    files = [(tmp_path / folder / "relevance.parquet").read_bytes() for folder in ("alone", "beside")]
    assert files[0] == files[1]


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
    text = data_shown(request.messages[1]["content"])["explanation"]
    return {"vile words": '{"label": "Probably", "reason": "insults"}', "animals": "I cannot help with that."}[text]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    """A config whose server answers, with explanations in `tmp_path`."""
    monkeypatch.setattr(module, "open_generator", lambda config, mesh: FakeGenerator(answers))
    monkeypatch.setattr(module, "make_mesh", lambda config: None)
    pq.write_table(pa.Table.from_pylist(EXPLAINED), tmp_path / "explanations.parquet")
    return Config(llm=LlmConfig(url="http://127.0.0.1:1/v1"))


def test_the_stage_with_a_server(make_scan: Make, tmp_path: Path, asked: Config) -> None:
    scan = make_scan()
    summary = judge(asked, tmp_path, {"scan:anchor": scan.folder, "explanations": tmp_path})
    one = {"features": 1, "same_label": 1.0, "same_relevance": 1.0, "kappa": None, "kappa_linear": None}
    assert summary == {
        "method": "llm", "task": "toxicity", "harmful": True, "metric": "auprc",
        "features": 4, "judged": 1, "not_judged": 2, "failed": 1,
        "relevant": 1,
        "labels": {"Probably": 1}, "passes": 2, "disagreed": 0, "agreement": one, "spans_shown": 8, "suspect_spans": 0,
    }  # fmt: skip
    assert json.loads((tmp_path / "relevance.json").read_text()) == {**summary, "sae": "sae-1"}
    rows = {row["feature"]: row for row in pq.read_table(tmp_path / "relevance.parquet").to_pylist()}
    assert rows[ON_VILE]["labels"] == ["Probably", "Probably"] and rows[ON_VILE]["reasons"] == ["insults"] * 2
    assert rows[ON_VILE]["agreed"] and rows[ON_VILE]["suspect_spans"] == 0
    assert rows[ON_ANIMALS]["labels"] == [None, None] and rows[ON_ANIMALS]["label"] is None
    assert rows[ON_EVERYTHING]["labels"] is None and rows[ON_ONE]["status"] == "not judged"
    assert relevant_features(tmp_path, scan).tolist() == [True] + [False] * 5
    before = (tmp_path / "relevance.parquet").read_bytes()
    judge(asked, tmp_path, {"scan:anchor": scan.folder, "explanations": tmp_path})
    assert (tmp_path / "relevance.parquet").read_bytes() == before
