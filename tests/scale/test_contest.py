"""A contender in a process of its own: its last line, or why there is none; rounds are pooled."""

from __future__ import annotations

import sys

from fac_jax.scale.contest import Result, run_json


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
