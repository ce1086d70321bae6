"""The line that a log gets of a bar, and which rate it shows."""

from __future__ import annotations

import pytest

from fac_jax import progress
from fac_jax.progress import Bar, rate_text


@pytest.mark.parametrize(("rate", "text"), [(1949.6, "1,950"), (12.4, "12"), (2.46, "2.5"), (0.345, "0.34")])
def test_a_rate_has_two_digits_at_least(rate: float, text: str) -> None:
    assert rate_text(rate) == text


def test_a_line_counts_rates_and_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = Bar("harvest", 4000, "tokens", None)
    now[0] += 2
    bar.advance(1000, "fvu 0.31")
    assert bar.line("fvu 0.31") == "harvest  1,000/4,000 tokens  500 tokens/s  ETA 6 s  fvu 0.31"


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress("scan", None, "documents") as bar:
        for _ in range(50):
            now[0] += 1
            bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0] == "scan  11 documents  1 documents/s"
