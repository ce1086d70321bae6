"""`fac bench activations`: ratios and goals, contenders that compute the same rows, and a small run of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jax.sharding import Mesh

from fac_jax.activations.reader import StoreReader
from fac_jax.backbone.weights import load_backbone
from fac_jax.errors import UserError
from fac_jax.scale import bench, store_contender, torch_activations
from fac_jax.scale.activations_bench import (
    LAYOUTS,
    PEERS,
    ActivationsBench,
    harvest_rows,
    read_geometry,
    store_rows,
)
from fac_jax.scale.activations_table import goals
from fac_jax.scale.contest import Result
from tests.backbone.tiny_backbone import VOCAB, write_model

LAYER = 2  # of 3: after the last one transformers has applied the final norm


def result(seconds: float, count: int = 100) -> Result:
    return Result([seconds], 2**30, "v", {}, count)


def test_settings_are_checked() -> None:
    assert read_geometry("8x512") == (8, 512)
    for text in ("8", "0x512", "8x5x2", "axb"):
        with pytest.raises(UserError, match=f"geometry '{text}' must be packed rows x tokens, such as 8x512"):
            ActivationsBench(geometries=(text,))
    with pytest.raises(UserError, match="peer 'hf_sort' is unknown .did you mean 'hf_sorted'.*choose from official"):
        ActivationsBench(peers=("hf_sort",))
    with pytest.raises(UserError, match="rounds is 0; it must be more than 0"):
        ActivationsBench(rounds=0)


def harvested() -> list[dict[str, Any]]:
    """Ours at 100 tokens/s in float32 (125 with nothing written), peers at 25, 40, 80; in bfloat16 no peer ran."""
    ran = [
        ("fac_jax 8x512", "float32", result(1.0)),
        ("fac_jax 8x512, nothing written", "float32", result(0.8)),
        ("official", "float32", result(4.0)),
        ("hf_padded", "float32", result(2.5)),
        ("hf_sorted_cut", "float32", result(1.25)),
        ("fac_jax 8x512", "bfloat16", result(0.5)),
        ("official", "bfloat16", Result(absent="took more than 3 s")),
    ]
    return harvest_rows({"contender": name, "dtype": dtype, "result": one} for name, dtype, one in ran)


def test_harvest_ratios_stay_within_a_type() -> None:
    rows = harvested()
    assert [row["tokens_per_second"] for row in rows[:6]] == [125, 100, 80, 40, 25, 200]
    ours = rows[1]
    assert (ours["to_official"], ours["to_padded"], ours["to_cut"]) == (4.0, 2.5, 1.25)
    assert ours["writes_share"] == pytest.approx(0.2) and rows[0]["writes_share"] is None
    assert rows[5]["to_official"] is None and rows[5]["writes_share"] is None
    assert rows[6] == {"contender": "official", "dtype": "bfloat16", "absent": "took more than 3 s"}


def test_goals_say_what_was_reached() -> None:
    ran = {("read", "raw"): result(1.0), ("read", "stream"): result(1.25), ("read", "official"): result(5.0)}
    table = store_rows(ran, row_bytes=10**9)
    assert [(row["contender"], row["gb_per_second"], row["to_raw"]) for row in table] == [
        ("raw", 100, 1.0), ("stream", 80, 0.8), ("official", 20, 0.2),
    ]  # fmt: skip
    lines = [
        goal.line() for goal in goals({"harvest": {"rows": harvested()}, "store": [{"d_model": 8, "table": table}]})
    ]
    assert lines == [
        "reached  fac_jax 8x512 in float32 harvests at 4.00x the rate of the official way (goal: at least 3.00x)",
        "reached  fac_jax 8x512 in float32 harvests at 2.50x that of transformers' padded batches, all layers "
        "(goal: at least 1.00x)",
        "missed   in float32 20.0% of the time goes into writing (goal: at most 10.0%)",
        "missed   8 wide, the stream gives rows at 80.0% of the raw blocks' rate (goal: at least 85.0%)",
        "reached  8 wide, the stream gives rows at 4.00x the rate of the official layout (goal: at least 3.00x)",
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(folder)
    return folder


@pytest.mark.parametrize("contender", PEERS)
def test_peers_keep_the_rows_that_we_keep(contender: str, model: Path, tmp_path: Path, mesh_1x1: Mesh) -> None:
    """All of transformers' ways give our residuals, for documents of any length, on the content tokens alone."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, VOCAB, length).tolist() for length in generator.integers(3, 20, 37)]
    content = [(generator.random(len(one)) < 0.7).tolist() for one in ids]
    (tmp_path / "ids.json").write_text(json.dumps({"ids": ids, "content": content}))
    (tmp_path / "out").mkdir()
    asked = {"contender": contender, "hf_model": str(model), "layer": LAYER, "dtype": "float32"}
    with torch.inference_mode():
        found = torch_activations.harvest({**asked, "ids": str(tmp_path / "ids.json"), "folder": str(tmp_path / "out")})
    assert (found["count"], found["rows"]) == (sum(map(len, ids)), sum(map(sum, content)))
    (file,) = (tmp_path / "out").iterdir()
    kept_nd = torch.cat(torch.load(file)).float().numpy()
    tokens, segments = np.zeros((2, len(ids), 20), np.int32)
    for index, one in enumerate(ids):
        tokens[index, : len(one)], segments[index, : len(one)] = one, 1
    residual = load_backbone(str(model), LAYER, "float32", mesh_1x1).residual_fn(LAYER)
    resid_btd = np.asarray(residual(tokens, segments, np.tile(np.arange(20, dtype=np.int32), (len(ids), 1))))
    for index, chosen in enumerate(content):
        for row in resid_btd[index, : len(chosen)][chosen]:
            assert np.abs(kept_nd - row).max(axis=1).min() <= 2**-7 * np.abs(row).max()  # they are stored in bfloat16


def test_every_reader_gives_every_row(tmp_path: Path) -> None:
    """And each finds what was written: rows of the pool, in batches or blocks."""
    rows, d = 3000, 16
    pool = {row.tobytes() for row in store_contender.random_rows(d).resid}
    for writer in ("store", "memmap"):
        folder = tmp_path / writer
        folder.mkdir()
        asked = {"contender": writer, "d_model": d, "rows": rows, "folder": str(folder), "batch_rows": 256, "passes": 2}
        assert store_contender.write(asked)["count"] == rows
        for name in LAYOUTS[writer]:
            found = store_contender.read({**asked, "contender": name})
            assert len(found["seconds"]) == 2 and rows <= found["count"] < rows + 256
            total, pieces = store_contender.READERS[name](folder, 256)
            assert total == rows and {row.tobytes() for row in next(pieces)} <= pool
    assert StoreReader(tmp_path / "store").rows == rows


def test_the_official_layout_is_read_whole(tmp_path: Path) -> None:
    rows = torch_activations.SEQUENCES_PER_FILE * torch_activations.TOKENS_PER_SEQUENCE + 1000
    asked = {"d_model": 4, "rows": rows, "folder": str(tmp_path), "batch_rows": 4096, "passes": 2}
    assert torch_activations.write(asked)["count"] == rows
    sizes = [[len(one) for one in torch.load(file)] for file in sorted(tmp_path.iterdir())]
    assert sizes == [[286] * 256, [286, 286, 286, 142]]
    assert (
        sum(file.stat().st_size for file in tmp_path.iterdir()) < 1.2 * rows * 4 * 2
    )  # no tensor brings the pool along
    found = torch_activations.read(asked)
    assert found["count"] == rows and len(found["seconds"]) == 2


@pytest.fixture
def run_file(model: Path, tmp_path: Path) -> Path:
    words = "the cat thought of other things than those that were there".split()
    texts = [" ".join(words[: 3 + i % 8]) + f" {i}" for i in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {
        "backbone": {"model": str(model), "layer": LAYER},
        "data": {"corpus": {"max_tokens": 64, "sources": [{"path": str(tmp_path / "corpus.jsonl")}]}},
        "harvest": {"data": "corpus"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    return tmp_path / "run.yaml"


def test_a_small_harvest_is_measured(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes, on a tiny model."""
    out = tmp_path / "bench.json"
    arguments = ["activations", "--parts", "harvest", "--config", str(run_file), "--documents", "30", "--rounds", "1"]
    arguments += ["--dtypes", "float32", "--geometries", "8x128", "--peers", "official", "--folder", str(tmp_path)]
    assert bench.main([*arguments, "--out", str(out)]) == 0
    report = json.loads(out.read_text())["harvest"]
    found = {row["contender"]: row for row in report["rows"]}
    assert set(found) == {"fac_jax 8x128", "fac_jax 8x128, nothing written", "official"}
    for row in found.values():
        assert row["tokens_per_second"] == pytest.approx(report["tokens"] / row["median_s"]) and row["peak_gib"] > 0.05
    ours = found["fac_jax 8x128"]
    assert ours["to_official"] == pytest.approx(ours["tokens_per_second"] / found["official"]["tokens_per_second"])
    assert set(ours["parts"]) == {"read and pack", "forward", "store"}
    assert found["official"]["to_official"] == 1.0 and report["documents"] == 30 and report["layer"] == LAYER
    shown = capsys.readouterr().out
    assert "the rate of the official way (goal: at least 3.00x)" in shown and "goes into writing" in shown
    assert not list(tmp_path.glob("fac-bench-*"))


def test_a_peer_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["activations", "--parts", "store", "--widths", "16", "--gib", "0.0001", "--batch-rows", "256"]
    arguments += ["--passes", "1", "--rounds", "1", "--peers-python", "/no/such/python", "--folder", str(tmp_path)]
    assert bench.main([*arguments, "--out", str(tmp_path / "bench.json")]) == 0
    (one,) = json.loads((tmp_path / "bench.json").read_text())["store"]
    measured = {(row["part"], row["contender"]) for row in one["table"] if "absent" not in row}
    assert measured == {("write", "store"), ("write", "memmap")} | {
        ("read", name) for name in LAYOUTS["store"] + LAYOUTS["memmap"]
    }
    assert all(row["rows_per_second"] > 0 for row in one["table"] if "absent" not in row)
    shown = " ".join(capsys.readouterr().out.split())
    assert "official layout (torch.save of 256 sequences): not measured, /no/such/python cannot be run" in shown
    assert "16 wide, the stream gives rows at" in shown and "the official layout (goal" not in shown
