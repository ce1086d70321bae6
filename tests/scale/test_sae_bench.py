"""`fac bench sae`: what it asks for, what it makes of the answers, and a small run of real contenders."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from fac_jax.errors import UserError
from fac_jax.scale import bench
from fac_jax.scale.contest import Result
from fac_jax.scale.sae_bench import Bench, Shape, measure, read_shape, rows
from fac_jax.scale.torch_contenders import hand_tuned, official


def test_shapes() -> None:
    assert read_shape("768x16384x1024") == Shape(768, 16384, 1024)
    assert Shape(2, 3, 5).matmul_flops == 60
    for text in ("768x16384", "768x0x4", "axbxc", "1x2x3x4"):
        with pytest.raises(UserError, match=f"shape '{text}' must be d_model x features x batch rows"):
            read_shape(text)


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(
        UserError, match="contender 'sparsfy' is unknown .did you mean 'sparsify'..; choose from fac_jax"
    ):
        measure(Bench(contenders=("sparsfy",)))


def test_ratios_are_to_the_best_published_peer() -> None:
    """Not to the hand-tuned step, which nobody published; who did not run is listed last, with the reason."""
    results = {
        "fac_jax": Result([0.1, 0.3, 0.2], 2**30, "jax 1"),
        "hand_tuned": Result([0.1], 2**29, "torch 2"),
        "official": Result([0.8], 2**31, "torch 2"),
        "sparsify": Result([0.4], 2**31, "eai-sparsify 1"),
        "sae_lens": Result(absent="sae-lens cannot be imported here"),
    }
    table = rows(results, Shape(2, 3, 100), floor_s=0.05)
    assert [row["contender"] for row in table] == ["hand_tuned", "fac_jax", "sparsify", "official", "sae_lens"]
    ours = table[1]
    assert (ours["tokens_per_second"], ours["to_best_peer"], ours["floor_fraction"]) == (500, 2.0, 0.25)
    assert (ours["least_s"], ours["most_s"], ours["peak_gib"]) == (0.1, 0.3, 1.0)
    assert table[-1] == {"contender": "sae_lens", "absent": "sae-lens cannot be imported here"}


@pytest.mark.parametrize("contender", [hand_tuned, official])
def test_the_torch_steps_learn(contender: object) -> None:
    torch.manual_seed(0)
    step = contender(32, 256, 8, contextlib.nullcontext)  # type: ignore[operator]
    x_bd = torch.randn(64, 32)
    losses = [step(x_bd) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_small_run_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes: ours and two torch steps run; a peer that is not installed is named in the table."""
    out = tmp_path / "bench.json"
    arguments = ["sae", "--shapes", "64x1024x128", "--k", "8", "--steps", "2", "--rounds", "1", "--out", str(out)]
    assert bench.main([*arguments, "--contenders", "fac_jax", "hand_tuned", "official", "sparsify"]) == 0
    report = json.loads(out.read_text())
    (table,) = report["tables"]
    found = {row["contender"]: row for row in table["rows"]}
    assert table["matmul_gflops"]["jax"] > 0 and table["matmul_gflops"]["torch"] > 0
    for name in ("fac_jax", "hand_tuned", "official"):
        row = found[name]
        assert row["tokens_per_second"] == pytest.approx(128 / row["median_s"]) and row["peak_gib"] > 0.05
        assert row["floor_fraction"] == pytest.approx(table["floor_s"] / row["median_s"])
    assert found["official"]["to_best_peer"] == 1.0
    assert sum(found["fac_jax"]["parts"].values()) == pytest.approx(found["fac_jax"]["least_s"])
    assert "eai-sparsify cannot be imported here" in found["sparsify"]["absent"]
    shown = capsys.readouterr().out
    assert "of the floor" in shown and "sparsify: not measured, eai-sparsify cannot be imported here" in shown
