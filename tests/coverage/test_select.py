"""The selection stage on scans written by hand: what it picks from, for what, and what it writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_array

from fac_jax.config.coverage import CoverageConfig, SelectConfig
from fac_jax.config.data import DataSet
from fac_jax.config.features import ScanConfig
from fac_jax.config.file import Config
from fac_jax.coverage.measure import coverage
from fac_jax.coverage.pool import read_documents_at, read_pool
from fac_jax.coverage.select import CURVE_POINTS, curve_ranks, select
from fac_jax.errors import UserError
from fac_jax.pipeline import pipeline, scan_stage
from fac_jax.plain import digest

CONFIG = Config(coverage=CoverageConfig(threshold=1.0, sweep=(), length_match_draws=1))
ANCHOR = np.array(
    [[3, 0, 0, 0, 0, 9], [0, 2, 2, 0, 0, 0], [0, 0, 4, 5, 0, 0], [0, 0, 4, 1, 0, 0]], np.float32
)  # fmt: skip
SEED = np.array([[2, 0, 0, 0, 0, 9]], np.float32)


@pytest.fixture
def inputs(
    tmp_path: Path, write_scan: Callable[..., Path], write_features: Callable[..., dict[str, Path]]
) -> dict[str, Path]:
    scans = {"scan:anchor": write_scan("anchor", ANCHOR, [10, 11, 12, 13]), "scan:seed": write_scan("seed", SEED)}
    found = {**scans, **write_features([0, 1, 2, 3, 4])}
    out = tmp_path / "coverage"
    out.mkdir()
    coverage(CONFIG, out, found)
    return {**found, "coverage": out}


def made(tmp_path: Path, inputs: dict[str, Path], **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out = tmp_path / "selection"
    out.mkdir(exist_ok=True)
    summary = select(dataclasses.replace(CONFIG, select=SelectConfig(**settings)), out, inputs)
    return summary, pq.read_table(out / "selected.parquet").to_pylist()


def test_by_default_it_covers_what_is_missing(tmp_path: Path, inputs: dict[str, Path]) -> None:
    summary, rows = made(tmp_path, inputs)
    assert summary == {
        "source": "anchor", "method": "greedy", "target": "missing", "features": 3, "coverable": 3, "covered": 3,
        "documents": 2, "tokens": 23, "documents_for_half": 1,
    }  # fmt: skip
    assert [(row["rank"], row["document_id"], row["features"], row["covered"]) for row in rows] == [
        (0, "anchor-1", [1, 2], 2), (1, "anchor-2", [3], 3),
    ]  # fmt: skip
    assert [(row["document"], row["text"]) for row in rows] == [(1, "text anchor 1"), (2, "text anchor 2")]
    lines = [json.loads(line) for line in (tmp_path / "selection/selected.jsonl").read_text().splitlines()]
    assert lines[0] == {"text": [{"role": "user", "content": "text anchor 1"}], "label": None} and len(lines) == 2
    product = json.loads((tmp_path / "selection/selection.json").read_text())
    assert product["curve"] == {"documents": [1, 2], "tokens": [11, 23], "covered": [2, 3]}
    assert (product["budget"], product["cost"], product["pool"], product["threshold"]) == (None, "documents", 4, 1.0)


@pytest.mark.parametrize(
    ("target", "features", "coverable", "names"),
    [("relevant", 5, 4, ["anchor-1", "anchor-0", "anchor-2"]), ("all", 6, 5, ["anchor-0", "anchor-1", "anchor-2"])],
)
def test_other_targets(
    tmp_path: Path, inputs: dict[str, Path], target: str, features: int, coverable: int, names: list[str]
) -> None:
    summary, rows = made(tmp_path, inputs, target=target)
    assert (summary["features"], summary["coverable"], summary["covered"]) == (features, coverable, coverable)
    assert [row["document_id"] for row in rows] == names


def test_a_budget_and_another_data_set(
    tmp_path: Path, inputs: dict[str, Path], write_scan: Callable[..., Path]
) -> None:
    other = np.array([[0, 9, 9, 0, 9, 0], [0, 0, 0, 2, 0, 0], [0, 3, 3, 1, 0, 0]], np.float32)
    inputs["scan:other"] = write_scan("other", other, [40, 5, 20])
    assert [row["document_id"] for row in made(tmp_path, inputs, source="other", budget=1)[1]] == ["other-0"]
    summary, rows = made(tmp_path, inputs, source="other", budget=25, cost="tokens")
    assert [row["document_id"] for row in rows] == ["other-1", "other-2"] and summary["tokens"] == 25
    assert made(tmp_path, inputs, source="other", budget=4, cost="tokens")[0]["documents"] == 0
    _, rows = made(tmp_path, inputs, source="other", method="magnitude", budget=1)
    assert [row["document_id"] for row in rows] == ["other-0"]


def test_when_nothing_is_missing(tmp_path: Path, inputs: dict[str, Path], write_scan: Callable[..., Path]) -> None:
    inputs["scan:seed"] = write_scan("whole", ANCHOR)
    coverage(CONFIG, inputs["coverage"], inputs)
    summary, rows = made(tmp_path, inputs)
    assert rows == [] and summary["documents"] == summary["documents_for_half"] == 0
    assert (tmp_path / "selection/selected.jsonl").read_text() == ""


def test_a_pool_holds_what_exceeds_the_threshold_however_the_scan_is_cut(
    tmp_path: Path, write_scan: Callable[..., Path]
) -> None:
    generator = np.random.default_rng(0)
    peaks = (generator.random((40, 12)) * (generator.random((40, 12)) < 0.4)).astype(np.float32)
    peaks[7] = peaks[39] = 0
    folder = write_scan("cut", peaks, list(range(40)))
    for name in ("peaks", "documents"):
        table = pq.read_table(folder / f"{name}.parquet")
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    wanted_f = np.arange(12) % 3 != 0
    pool = read_pool(folder, wanted_f, 0.5)
    assert pool.id_n.tolist() == sorted(f"cut-{row}" for row in range(40))
    wanted = np.where((peaks > 0.5) & wanted_f, peaks, 0)[pool.document_n]
    np.testing.assert_array_equal(pool.peaks_nf.toarray(), wanted)
    assert pool.tokens_n.tolist() == pool.document_n.tolist()
    assert pool.peaks_nf.indices.dtype == np.int32 and pool.peaks_nf.nnz == np.count_nonzero(wanted)
    rows = read_documents_at(folder, np.array([33, 2, 8]), ["text"])
    assert rows == [{"text": "text cut 33"}, {"text": "text cut 2"}, {"text": "text cut 8"}]
    assert isinstance(pool.peaks_nf, csr_array)


def test_the_curve_is_thinned_and_keeps_both_ends() -> None:
    assert curve_ranks(0).tolist() == [] and curve_ranks(3).tolist() == [0, 1, 2]
    many = curve_ranks(30_000)
    assert len(many) <= CURVE_POINTS and many[:5].tolist() == [0, 1, 2, 3, 4] and many[-1] == 29_999


def test_a_scan_that_cannot_be_picked_from(
    tmp_path: Path, inputs: dict[str, Path], write_scan: Callable[..., Path]
) -> None:
    inputs["scan:other"] = write_scan("other", ANCHOR, sae="sae-2")
    with pytest.raises(UserError, match="measured with SAE sae-1, the scan in .*/other was made with sae-2: run"):
        made(tmp_path, inputs, source="other")
    folder = inputs["scan:anchor"]
    table = pq.read_table(folder / "peaks.parquet")
    pq.write_table(pa.concat_tables([table.slice(4), table.slice(0, 4)]), folder / "peaks.parquet")
    with pytest.raises(UserError, match=r"peaks.parquet is not sorted by document \(row group 0\)"):
        made(tmp_path, inputs)
    (folder / "peaks.parquet").unlink()
    with pytest.raises(UserError, match="peaks.parquet is not there, .*: run `fac scan CONFIG --data anchor` again"):
        made(tmp_path, inputs)
    (folder / "scan.json").unlink()
    with pytest.raises(UserError, match="anchor holds no finished scan"):
        made(tmp_path, inputs)


def test_a_scan_that_kept_some_peaks(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Peaks of the features sought are enough; those of others would be missing without a word."""
    expected = made(tmp_path, inputs)
    file = inputs["scan:anchor"] / "scan.json"
    product = json.loads(file.read_text())

    def keep(peaks: str) -> None:
        file.write_text(json.dumps({**product, "identity": {**product["identity"], "peaks": peaks}}))

    keep(digest([1, 2, 3]))
    assert made(tmp_path, inputs) == expected
    with pytest.raises(UserError, match="kept the peaks of other features than the 6 sought: run `fac scan CONFIG"):
        made(tmp_path, inputs, target="all")
    keep(digest([1, 2]))
    with pytest.raises(UserError, match="kept the peaks of other features than the 3 sought"):
        made(tmp_path, inputs)
    keep("none")
    with pytest.raises(UserError, match="kept no single documents, .*--scan.peaks all"):
        made(tmp_path, inputs)


def test_the_command_for_a_scan_to_pick_from_keeps_its_peaks() -> None:
    config = Config(data={"web": DataSet()}, scan=ScanConfig(peaks="none"))
    picking = dataclasses.replace(config, select=SelectConfig(source="web"))
    stage = pipeline(picking)["scan:web"]
    assert stage.command == "fac scan CONFIG --data web --select.from web"
    assert scan_stage(picking, "web").settings["scan"].peaks == "all", "which that command asks for too"
    assert scan_stage(config, "web").settings["scan"].peaks == "none"
    every = dataclasses.replace(picking, scan=ScanConfig())
    assert pipeline(every)["scan:web"].command == "fac scan CONFIG --data web"


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"select.budget is 0; it must be at least 1 of select.cost \(tokens\)"):
        SelectConfig(budget=0, cost="tokens")
    with pytest.raises(UserError, match=r"select.similarity is 0; it must lie in \(0, 1\]"):
        SelectConfig(similarity=0)


def test_the_stage_hangs_on_what_it_reads(tmp_path: Path) -> None:
    def inputs_of(**settings: Any) -> tuple[str, ...]:
        return pipeline(Config(select=SelectConfig(**settings)))["selection"].inputs

    assert inputs_of() == ("scan:anchor", "coverage/missing.parquet")
    assert inputs_of(target="relevant", source="kept") == ("scan:kept", "relevance")
    assert inputs_of(target="all") == ("scan:anchor",)
    with pytest.raises(UserError, match="no data set is called 'web' under data:"):
        inputs_of(source="web")
