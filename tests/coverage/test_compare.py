"""Two scans compared: sides and counts by hand, document counts against the peaks, what is printed and refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_jax.cli import main
from fac_jax.coverage.compare import compare, documents_above
from fac_jax.errors import UserError
from fac_jax.scan.product import load_scan
from fac_jax.scan.spans import EDGES
from tests.scan.test_merge import FEATURES, make, peaks_of, texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("scans")
    return make(folder / "a", "a", texts(1, 4), peaks="none"), make(folder / "b", "b", texts(2, 30))


def test_sides_are_those_of_the_peaks(folders: tuple[Path, Path]) -> None:
    tops = [np.max([peaks_of(text) for text in texts(seed, count)], axis=0) for seed, count in ((1, 4), (2, 30))]
    for threshold in (0.0, 1.0, 2.5, 3.0):
        figures, table = compare(*folders, threshold, spans=2)
        covers = [top > threshold for top in tops]
        names = {(True, True): "both", (True, False): "only_a", (False, True): "only_b", (False, False): "neither"}
        expected = [names[pair] for pair in zip(*(one.tolist() for one in covers), strict=True)]
        assert table["side"].to_pylist() == expected
        assert {name: figures[name] for name in names.values()} == {n: expected.count(n) for n in names.values()}
        assert (figures["a"]["covered"], figures["b"]["covered"]) == tuple(int(one.sum()) for one in covers)
        assert figures["same_documents"]["documents"] == 4
        (level,) = [row for row in figures["sweep"] if row["threshold"] == threshold]
        assert level == {name: figures[name] for name in level}
        assert [row["neither"] for row in figures["sweep"]] == sorted(row["neither"] for row in figures["sweep"])
        for row in table.to_pylist():
            assert len(row["spans"]) == (0 if row["side"] == "neither" else min(2, len(row["spans"])))
            assert row["side"] == "neither" or row["spans"][0]["score"] == max(
                row["b_max"] if row["side"] == "only_b" else row["a_max"], 0
            )


def test_the_other_way_round(folders: tuple[Path, Path]) -> None:
    one, other = compare(*folders, 1.0)[0], compare(*reversed(folders), 1.0)[0]
    assert (one["only_a"], one["only_b"], one["both"]) == (other["only_b"], other["only_a"], other["both"])
    for side, curve in zip("ab", one["curves"], strict=True):
        assert curve["documents"][-1] == one[side]["documents"] and np.all(np.diff(curve["covered"]) >= 0)
        assert curve["covered"][-1] == pytest.approx(one[side]["covered"])
        assert curve["content_tokens"][-1] == pytest.approx(one[side]["content_tokens"])
    alone, _ = compare(folders[0], folders[0], 1.0)
    assert alone["only_a"] == alone["only_b"] == 0


@settings(max_examples=60, deadline=None)
@given(threshold=st.sampled_from([0.0, 0.5, 0.7, 1.0, 1.2, 2.0, 2.9, 3.0, 5000.0, float(EDGES[-1])]))
def test_document_counts_are_bounded_by_the_histogram(folders: tuple[Path, Path], threshold: float) -> None:
    scan = load_scan(folders[1])
    low_f, high_f = documents_above(scan, threshold)
    exact_f = (scan.peaks_nf.toarray() > threshold).sum(axis=0)
    assert (low_f <= exact_f).all() and (exact_f <= high_f).all()
    if threshold == 0 or threshold in EDGES:
        assert (low_f == high_f).all()


def test_relevant_features_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "relevance.json").write_text(json.dumps({"sae": "sae"}))
    flags = [feature in (1, 4) for feature in range(FEATURES)]
    pq.write_table(pa.table({"feature": range(FEATURES), "relevant": flags}), tmp_path / "relevance.parquet")
    figures, table = compare(*folders, 0.0, tmp_path)
    assert figures["features"] == 2 and table["feature"].to_pylist() == [1, 4]


def test_printed_and_written(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["coverage", str(folders[0]), "--vs", str(folders[1]), "--threshold", "2", "--out", str(tmp_path / "c")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "only b covers" in said and "word" not in said and "--show-unsafe" in said
    figures = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert figures["only_b"] > 0 and f"only b covers: {figures['only_b']}" in said
    assert pq.read_table(tmp_path / "c" / "compare.parquet").num_rows == FEATURES
    drawing = ElementTree.parse(tmp_path / "c" / "compare.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(drawing.findall("{http://www.w3.org/2000/svg}polyline")) == 2
    assert main([*arguments, "--show-unsafe"]) == 0 and "word" in capsys.readouterr().out
    assert main(["coverage", "--vs", str(folders[1])]) == 1 and "needs one scan" in capsys.readouterr().err
    assert main(["coverage", str(folders[0]), "--vs", str(folders[1]), "--threshold", "x"]) == 1
    assert main(["coverage", "--vs", "--help"]) == 0


def test_what_cannot_be_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = make(tmp_path / "other", "other", texts(3), sae="sae-2")
    with pytest.raises(UserError, match="made with sae sae-2"):
        compare(folders[0], other, 1.0)
    with pytest.raises(UserError, match="holds no finished scan"):
        compare(folders[0], tmp_path, 1.0)
    with pytest.raises(UserError, match="the threshold is -1"):
        compare(*folders, -1.0)


def test_the_threshold_is_that_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = {}
    for name, threshold in (("a", 2), ("b", 2.0), ("c", 0.5)):
        scans[name] = str(make(tmp_path / name / "scans" / name, name, texts(ord(name)), peaks="none"))
        (tmp_path / name / "config.yaml").write_text(f"coverage: {{threshold: {threshold}}}")
    scans["merged"] = str(tmp_path / "merged")
    assert main(["scan", "merge", scans["merged"], scans["a"], scans["b"]]) == 0

    def said(*arguments: str) -> str:
        assert main(["coverage", *arguments]) == 0
        return " ".join(capsys.readouterr().out.split())

    for pair in (("a", "b"), ("merged", "a")):
        out = said(scans[pair[0]], "--vs", scans[pair[1]])
        assert "threshold 2: coverage.threshold in" in out and "peaks above 2, of" in out
    assert "peaks above 0.5, of" in said(scans["merged"], "--vs", scans["c"])
    out = said(scans["merged"], "--vs", scans["merged"])
    assert "threshold 1: coverage.threshold by default, as no run holds these scans" in out
    assert main(["coverage", scans["a"], "--vs", scans["c"]]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "coverage.threshold is 2 in" in message and "and 0.5 in" in message and "with --threshold" in message
    assert "peaks above 3, of" in said(scans["a"], "--vs", scans["c"], "--threshold", "3")


def test_what_cannot_be_read_or_written_is_said_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    pair = [str(folders[0]), "--vs", str(folders[1])]
    monkeypatch.setattr("fac_jax.coverage.compare.documents_above", None)
    for place in ("file", "file/below"):
        assert main(["coverage", *pair, "--out", str(tmp_path / place)]) == 1
        assert f"{place} cannot be made a folder" in " ".join(capsys.readouterr().err.split())
    assert main(["coverage", *pair, "--relevance", str(tmp_path / "nope")]) == 1
    assert "nope holds no relevance product (no relevance.json)" in " ".join(capsys.readouterr().err.split())
    assert main(["coverage", *pair, "--spans", "-1"]) == 1
    assert "-1 passages of each feature were asked for" in capsys.readouterr().err


def test_the_spans_are_the_first_of_the_scan_that_covers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever row groups the files have, and without an object for every span there is."""
    copies, wide = 600, []
    for place, folder in zip("ab", folders, strict=True):
        one = load_scan(folder).features()
        many = pa.concat_tables([one] * copies).set_column(
            0, one.schema.field(0), pa.array(range(copies * FEATURES), pa.int32())
        )
        out = tmp_path / place
        out.mkdir()
        pq.write_table(many, out / "features.parquet", row_group_size=700 if place == "a" else 1000)
        product = json.loads((folder / "scan.json").read_text())
        product["identity"]["features"] = copies * FEATURES
        (out / "scan.json").write_text(json.dumps(product))
        wide.append(out)
    for count in (0, 2):
        _, table = compare(*folders, 2.0, spans=count)
        expected = []
        shown = [load_scan(folder).features("spans")["spans"].to_pylist() for folder in folders]
        for feature, side in enumerate(table["side"].to_pylist()):
            spans = [] if side == "neither" else shown[side == "only_b"][feature][:count]
            expected.append([{name: span[name] for name in ("score", "before", "token", "after")} for span in spans])
        assert table["spans"].to_pylist() == expected
        tracemalloc.start()
        _, table = compare(*wide, 2.0, spans=count)
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()
        assert table["spans"].to_pylist() == expected * copies
