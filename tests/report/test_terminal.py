"""The terminal twin: the same numbers, no passages, and text that cannot steer the terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fac_jax.errors import UserError
from fac_jax.report.products import RunView, read_view
from fac_jax.report.terminal import render, summary
from tests.report.sample_run import STAGES, write_run


def printed(renderable: object, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_the_pages_numbers(view: RunView) -> None:
    words = printed(render(view))
    for expected in ("23 of 59", "61.0%", "76.5%", "47.8%", "0.604 ± 0.012", "0.261", "0.977", "kill, shoot, murder"):
        assert expected in words, expected


def test_no_passage_and_no_sample(view: RunView) -> None:
    words = printed(render(view), width=400)
    assert view.missing[0].spans[0].before.strip() not in words
    assert view.kept[0].text not in words
    assert view.splice is not None and view.splice["sample"]["clean"] not in words


def test_hostile_text_has_no_effect(hostile_run: Path) -> None:
    words = printed(summary(hostile_run), width=400)
    assert "\x1b" not in words and "\u202e" not in words
    assert "[red]" in words or "…" in words


@pytest.mark.parametrize("upto", STAGES)
def test_every_partial_run_has_a_summary(tmp_path: Path, upto: str) -> None:
    config = write_run(tmp_path / "run", upto=upto, features=3)
    printed(render(read_view(tmp_path / "run", config)))


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.yaml does not exist"):
        summary(tmp_path)
