"""The made-up scan is one that the stage reads, and the table says what the stage says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fac_jax.config.coverage import SelectConfig
from fac_jax.scale import select_bench, select_table
from fac_jax.scan.tables import DOCUMENTS, PEAKS

COUNT, FEATURES = 300, 2_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    peaks, above = select_bench.write_scan(folder, COUNT, FEATURES)
    assert peaks > above > 30 * COUNT
    return folder


def test_the_scan_is_as_a_real_one(folder: Path) -> None:
    peaks = pq.read_table(folder / "scan/peaks.parquet")
    documents = pq.read_table(folder / "scan/documents.parquet")
    assert peaks.schema.equals(PEAKS) and documents.schema.equals(DOCUMENTS)
    document, feature = peaks["document"].to_numpy(), peaks["feature"].to_numpy()
    assert (np.diff(document * FEATURES + feature) > 0).all(), "sorted by document and feature, each pair once"
    assert peaks["document_id"].to_pylist() == documents["id"].take(peaks["document"]).to_pylist()
    assert (peaks["position"].to_numpy() < documents["content_tokens"].to_numpy()[document]).all()
    above = peaks["peak"].to_numpy() > select_bench.THRESHOLD
    hits_f = np.bincount(feature[above], minlength=FEATURES)
    assert hits_f.max() > 8 * np.median(hits_f) > 0, "a long tail"


def test_a_line_is_what_the_stage_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select_bench.main(["--one", str(folder), "0"])
    found = json.loads(capsys.readouterr().out)
    assert found["features"] == FEATURES // 10 and found["covered"] == found["coverable"] > 100
    assert found["seconds"] > 0 and 0.05 < found["gb"] < 64


def test_the_table_of_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/anchor").symlink_to(folder / "scan")
    (tmp_path / "coverage").symlink_to(folder / "coverage")
    (tmp_path / "evaluation").mkdir()
    kept = {"documents": 7, "tokens": 900}
    row = {"threshold": 1.0, "set": "seed+kept", "target_hit_rate": 0.25}
    product = {"sets": {"kept": kept}, "rows": [row, {**row, "threshold": 2.0}]}
    (tmp_path / "evaluation/coverage.json").write_text(json.dumps(product))
    (tmp_path / "config.yaml").write_text(f"run: {{dir: {tmp_path}}}\n")
    select_table.main([str(tmp_path / "config.yaml")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "seed+kept: 7 documents, 900 tokens, target hit rate 25.0%"
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ")[1:] for line in lines if " | " in line
    }
    assert rows["method"] == [f"{n} documents" for n in (5, 10, 25, 50, 7)] + ["900 tokens"]
    for method, cells in rows.items():
        for column, (budget, cost) in {0: (5, "documents"), 4: (7, "documents"), 5: (900, "tokens")}.items():
            if method not in ("method", "random"):
                case = SelectConfig(method=method, budget=budget, cost=cost)  # type: ignore[arg-type]
                found = select_bench.measure(folder, case)
                assert cells[column] == f"{found['covered']} ({found['tokens']:,})", (method, column)
    assert float(rows["random"][3].split()[0]) < float(rows["greedy"][3].split()[0])
