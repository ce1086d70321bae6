"""A contender in a process of its own: its last line, or why there is none; rounds are pooled."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fac_jax.errors import UserError
from fac_jax.scale.contest import Result, circumstances, run_json
from fac_jax.scale.sae_bench import Bench


def test_a_contender_that_fails_says_why() -> None:
    python = sys.executable
    assert run_json([python, "-c", "print('noise'); print('{\"seconds\": [1]}')"], 60) == {"seconds": [1]}
    assert run_json([python, "-c", "raise MemoryError('too wide')"], 60) == {
        "absent": "ended with status 1: MemoryError: too wide"
    }
    assert run_json([python, "-c", "import time; time.sleep(9)"], 0.2) == {"absent": "took more than 0.2 s"}
    assert "cannot be run" in run_json(["/no/such/python"], 1)["absent"]


def test_rounds_are_pooled() -> None:
    result = Result()
    for seconds, peak in (([2.0], 30), ([8.0, 4.0], 20)):
        result.add({"seconds": seconds, "peak_bytes": peak, "version": "v", "count": 12})
    assert (result.median_s, result.rate, result.peak_bytes, result.absent) == (4.0, 3.0, 30, None)
    result.add({"absent": "took more than 3 s"})
    assert result.absent == "took more than 3 s"


def test_a_gpu_is_asked_for_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contenders may use no processor instead; without a GPU nothing is measured."""
    said = [sys.executable, "-c", "import os, json; print(json.dumps({'on': os.environ['JAX_PLATFORMS']}))"]
    assert [run_json(said, 60, device) for device in ("cpu", "gpu")] == [{"on": "cpu"}, {"on": "cuda"}]
    driver = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no NVIDIA GPU is here .*nvidia-smi.* leave --device out"):
        circumstances("sae", Bench(device="gpu"))
    driver.write_text("#!/bin/sh\necho NVIDIA H200\necho NVIDIA H200\n", encoding="utf-8")
    driver.chmod(0o755)
    assert circumstances("sae", Bench(device="gpu"))["gpu"] == "NVIDIA H200"
    assert circumstances("sae", Bench())["gpu"] is None
    driver.write_text("#!/bin/sh\necho no devices were found >&2\nexit 6\n", encoding="utf-8")
    with pytest.raises(UserError, match="exit status 6"):
        circumstances("sae", Bench(device="gpu"))
