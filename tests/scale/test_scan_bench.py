"""`fac bench scan`: what is refused, ratios and goals by hand, and a small run whose contenders find the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fac_jax.errors import UserError
from fac_jax.scale import bench
from fac_jax.scale.contest import Result
from fac_jax.scale.scan_bench import ScanBench, goals, rows
from tests.backbone.tiny_backbone import write_model


def test_settings_are_checked() -> None:
    for settings, message in (
        ({"documents": 0}, "documents is 0; it must be more than 0"),
        ({"peers": ("oficial",)}, "peer 'oficial' is unknown .did you mean 'official'.*choose from official, delphi"),
        ({"features": (64, 16)}, "features is 16 and k 32; an SAE needs at least as many"),
        ({"peaks": "some"}, "choose none or all"),
        ({"geometry": "8"}, "geometry '8' must be packed rows x tokens"),
    ):
        with pytest.raises(UserError, match=message):
            ScanBench(**settings)  # type: ignore[arg-type]


def test_ratios_are_to_the_same_kind_of_activation() -> None:
    parts = {"read and pack": 1.0, "backbone": 6.0, "encoder and top-k": 2.0, "bookkeeping": 1.0}
    found = rows({
        "fac_jax topk": Result([2.0, 4.0, 3.0], 2**30, "v", parts, 300),
        "fac_jax relu": Result([6.0], 2**30, "v", {}, 300),
        "official": Result([60.0], 2**30, "v", {}, 300), "delphi": Result(absent="cannot be imported here"),
    })  # fmt: skip
    assert [row.get("tokens_per_second") for row in found] == [100.0, 50.0, 5.0, None]
    assert [row.get("ahead") for row in found] == [None, None, 10.0, None]
    assert found[3]["absent"] == "cannot be imported here"
    lines = [goal.line() for goal in goals(found)]
    assert lines[0] == "reached  fac_jax topk: bookkeeping takes 10.0% (goal: at most 10.0%)"
    assert lines[1].startswith("reached  10.00x as fast as official way") and len(lines) == 2


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published way finds the same active pairs of feature and document as ours with all ReLU activations."""
    write_model(tmp_path / "model")
    texts = [f"document {number} has the words {'abc ' * (number % 5)}and ends" for number in range(12)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "run.yaml").write_text(
        f"backbone: {{model: {tmp_path}/model, layer: 2}}\n"
        f"data: {{corpus: {{sources: [{{path: {tmp_path}/corpus.jsonl}}], max_tokens: 64}}}}\n"
    )
    flags = [
        "--config",
        str(tmp_path / "run.yaml"),
        "--features",
        "64",
        "--k",
        "4",
        "--rounds",
        "1",
        "--documents",
        "9",
    ]
    flags += ["--geometry", "8x64", "--out", str(tmp_path / "report.json"), "--folder", str(tmp_path)]
    assert bench.main(["scan", *flags]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    found = {row["contender"]: row for row in report["widths"][0]["rows"]}
    assert found["official"]["active"] == found["fac_jax relu"]["active"] > 0
    assert found["fac_jax topk"]["active"] < found["fac_jax relu"]["active"]
    assert found["official"]["ahead"] > 0 and set(found["fac_jax topk"]["parts"]) >= {"backbone", "bookkeeping"}
    said = capsys.readouterr().out
    assert "of 64 features" in said and "bookkeeping takes" in said and "official way" in said
    if "absent" in found["delphi"]:  # it is installed for the benchmark alone
        assert "cannot be imported here" in found["delphi"]["absent"] and "absent: cannot be imported" in said
    assert not list(tmp_path.glob("fac-bench-*")), "the files in between are removed"
