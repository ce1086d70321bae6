"""The coverage and evaluation stages on scans written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fac_jax.config.coverage import CoverageConfig
from fac_jax.config.file import Config
from fac_jax.coverage.measure import coverage, evaluate
from fac_jax.errors import UserError

CONFIG = Config(coverage=CoverageConfig(threshold=1.0, sweep=(0.0, 2.0), length_match_draws=5))
ANCHOR = np.array(
    [[3, 0, 0, 0, 0, 9], [0, 2, 2, 0, 0, 0], [0, 0, 4, 5, 0, 0], [0, 0, 4, 1, 0, 0]], np.float32
)  # fmt: skip
SEED = np.array([[2, 0, 0, 0, 0, 9]], np.float32)


@pytest.fixture
def inputs(write_scan: Callable[..., Path], write_features: Callable[..., dict[str, Path]]) -> dict[str, Path]:
    scans = {"scan:anchor": write_scan("anchor", ANCHOR), "scan:seed": write_scan("seed", SEED)}
    return {**scans, **write_features([0, 1, 2, 3, 4])}


def made(stage: Any, tmp_path: Path, inputs: dict[str, Path], config: Config = CONFIG) -> tuple[dict[str, Any], Path]:
    out = tmp_path / stage.__name__
    out.mkdir(exist_ok=True)
    return stage(config, out, inputs), out


def test_coverage(tmp_path: Path, inputs: dict[str, Path]) -> None:
    summary, out = made(coverage, tmp_path, inputs)
    assert summary["relevant_features"] == 5 and summary["anchor_features"] == 4 and summary["seed_features"] == 1
    assert summary["missing_features"] == 3 and summary["fac"] == 1 / 4 and summary["raw_fac_ratio"] == 1 / 4
    product = json.loads((out / "coverage.json").read_text())
    assert [row["threshold"] for row in product["sweep"]] == [0.0, 1.0, 2.0]
    assert [row["anchor_features"] for row in product["sweep"]] == [4, 4, 3]
    assert [row["fac"] for row in product["sweep"]] == [1 / 4, 1 / 4, 0.0]
    assert product["chosen"] == product["sweep"][1]
    matched = product["chosen"]["length_matched"]  # one document of the anchor at a time: it covers 1 or 2 of 4
    assert (
        matched["tokens"] == 10
        and matched["draws"] == 5
        and 0.25 <= matched["low"] <= matched["fac"] <= matched["high"] <= 0.5
    )
    assert pq.read_table(out / "coverage.parquet")["fac"].to_pylist() == [1 / 4, 1 / 4, 0.0]


def test_missing(tmp_path: Path, inputs: dict[str, Path]) -> None:
    _, out = made(coverage, tmp_path, inputs)
    rows = pq.read_table(out / "missing.parquet").to_pylist()
    assert [(r["feature"], r["anchor_peak"], r["anchor_documents"], r["top_document"]) for r in rows] == [
        (3, 5.0, 1, "anchor-2"), (2, 4.0, 3, "anchor-2"), (1, 2.0, 1, "anchor-1"),
    ]  # fmt: skip
    assert [row["explanation"] for row in rows] == ["fires on: 3", "fires on: 2", "fires on: 1"]


def test_evaluate(tmp_path: Path, inputs: dict[str, Path], write_scan: Callable[..., Path]) -> None:
    kept, random = np.array([[0, 3, 0, 3, 0, 0]], np.float32), np.array([[0, 0, 0, 0, 7, 0]] * 3, np.float32)
    inputs["scan:kept"] = write_scan("kept", kept)
    inputs["scan:random"] = write_scan("random", random)
    summary, out = made(evaluate, tmp_path, inputs)
    assert summary["seed"] == {"documents": 1, "fac": 0.25, "raw_fac_ratio": 0.25, "target_hit_rate": None}
    assert summary["seed+random"] == {"documents": 4, "fac": 0.25, "raw_fac_ratio": 0.5, "target_hit_rate": 0.0}
    assert summary["seed+kept"]["fac"] == 0.75 and summary["seed+kept"]["target_hit_rate"] == pytest.approx(2 / 3)
    rows = {(row["set"], row["threshold"]): row for row in json.loads((out / "coverage.json").read_text())["rows"]}
    assert len(rows) == 9
    assert rows["seed+random", 1.0]["length_matched"] == {
        "tokens": 10,
        "draws": 5,
        "fac": 0.25,
        "low": 0.25,
        "high": 0.25,
    }
    assert rows["seed+kept", 1.0]["length_matched"]["draws"] == 1, "the shorter set is not cut"
    assert rows["seed+kept", 1.0]["fac_freq"] == 3 / (4 * 2)


def test_evaluate_when_nothing_was_kept(
    tmp_path: Path, inputs: dict[str, Path], write_scan: Callable[..., Path]
) -> None:
    for name in ("kept", "random"):
        inputs[f"scan:{name}"] = write_scan(name, np.zeros((0, 6), np.float32))
    summary, _ = made(evaluate, tmp_path, inputs)
    assert summary["seed+kept"]["fac"] == summary["seed"]["fac"] and summary["seed+kept"]["target_hit_rate"] == 0.0


def test_nothing_missing(tmp_path: Path, inputs: dict[str, Path], write_scan: Callable[..., Path]) -> None:
    inputs["scan:seed"] = write_scan("whole", ANCHOR)
    _, out = made(coverage, tmp_path, inputs)
    assert pq.read_table(out / "missing.parquet").num_rows == 0


def test_scans_of_different_saes(tmp_path: Path, inputs: dict[str, Path], write_scan: Callable[..., Path]) -> None:
    inputs["scan:seed"] = write_scan("other", SEED, sae="sae-2")
    with pytest.raises(
        UserError, match="was made with sae sae-2, that in .* with sae-1, .*: run `fac scan CONFIG --data other`"
    ):
        made(coverage, tmp_path, inputs)


def test_relevance_of_another_sae(tmp_path: Path, inputs: dict[str, Path]) -> None:
    (inputs["relevance"] / "relevance.json").write_text('{"sae": "sae-2"}')
    with pytest.raises(
        UserError, match="judged for SAE sae-2, the scan in .* was made with sae-1: run `fac judge CONFIG`"
    ):
        made(coverage, tmp_path, inputs)


@pytest.mark.parametrize(
    ("judged", "advice"),
    [
        ({"method": "embedded"}, "raise judge.false_discovery_rate"),
        (
            {"method": "llm", "features": 9, "judged": 1, "not_judged": 3, "failed": 5},
            r"of 9 features the model judged 1 \(3 had no explanation that held, 5 answers could.*llm.model",
        ),
    ],
)
def test_nothing_relevant(
    tmp_path: Path,
    write_scan: Callable[..., Path],
    write_features: Callable[..., dict[str, Path]],
    judged: dict[str, object],
    advice: str,
) -> None:
    scans = {"scan:anchor": write_scan("anchor", ANCHOR), "scan:seed": write_scan("seed", SEED)}
    features = write_features([4])
    table = pq.read_table(features["relevance"] / "relevance.parquet")
    pq.write_table(table.slice(1), features["relevance"] / "relevance.parquet")
    (features["relevance"] / "relevance.json").write_text(json.dumps({"sae": "sae-1", **judged}))
    with pytest.raises(UserError, match=f"no feature is relevant to the task 'toxicity'.*{advice}"):
        made(coverage, tmp_path, {**scans, **features})


@pytest.mark.parametrize(("draws", "least"), [({"bootstrap_draws": 0}, 1), ({"length_match_draws": -1}, 0)])
def test_draws_that_give_no_figure(draws: dict[str, int], least: int) -> None:
    ((name, value),) = draws.items()
    with pytest.raises(UserError, match=f"coverage.{name} is {value}; it must be at least {least}"):
        CoverageConfig(**draws)
