"""The terminal twin: the same numbers, no passages, and text that cannot steer the terminal."""

import dataclasses
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
    for expected in (
        "23 of 59",
        "61.0%",
        "76.5%",
        "47.8%",
        "0.604 ± 0.012",
        "0.261",
        "0.977",
        "0.689 (0.685 to 0.693)",
    ):
        assert expected in words, expected


def test_no_passage_and_no_sample(view: RunView) -> None:
    words = printed(render(view), width=400)
    assert view.missing[0].spans[0].before.strip() not in words
    assert view.kept[0].text not in words
    assert view.splice is not None and view.splice["sample"]["clean"] not in words


def test_what_may_be_harmful_is_shown_to_who_asks_for_it(view: RunView) -> None:
    hidden, shown = (printed(render(view, unsafe), width=400) for unsafe in (False, True))
    assert "kill" not in hidden and "--show-unsafe prints it" in hidden
    assert "kill, shoot, murder" in shown and "…how would someone kill a neighbour" in shown
    assert view.kept[0].text not in shown and "--show-unsafe" not in shown


def test_explanations_of_a_task_without_harm_are_shown_and_passages_are_not(view: RunView) -> None:
    view.records["relevance"].summary["harmful"] = False
    words = printed(render(view), width=400)
    view.records["relevance"].summary["harmful"] = True
    assert "kill, shoot, murder" in words and "how would someone" not in words


def test_the_judges_agreement_and_suspect_passages(view: RunView) -> None:
    judged = {
        "passes": 2, "spans_shown": 700, "suspect_spans": 3,
        "agreement": {"features": 70, "same_label": 0.9, "same_relevance": 0.95, "kappa": 0.61, "kappa_linear": 0.7},
    }  # fmt: skip
    record = dataclasses.replace(view.records["relevance"], summary=judged)
    words = printed(render(dataclasses.replace(view, records={**view.records, "relevance": record})), width=400)
    assert "70 features were judged 2 times" in words and "Cohen’s kappa 0.61; by steps of the scale 0.70" in words
    assert "3 of the 700 passages shown to the judge look as if" in words


def test_hostile_text_has_no_effect(hostile_run: Path) -> None:
    words = printed(summary(hostile_run, unsafe=True), width=400)
    assert "\x1b" not in words and "\u202e" not in words
    assert "[red]" in words or "…" in words


@pytest.mark.parametrize("upto", STAGES)
def test_every_partial_run_has_a_summary(tmp_path: Path, upto: str) -> None:
    config = write_run(tmp_path / "run", upto=upto, features=3)
    printed(render(read_view(tmp_path / "run", config)))


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.yaml does not exist"):
        summary(tmp_path)
