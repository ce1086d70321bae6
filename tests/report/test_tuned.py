"""Sections of a reward and of an instruction model, from the evaluations that their stages write."""

from __future__ import annotations

import dataclasses
import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fac_jax.config.downstream import FinetuneConfig, LoraConfig
from fac_jax.config.file import Config
from fac_jax.downstream import completions, reward
from fac_jax.downstream.arms import Arms
from fac_jax.downstream.encode import Encoded
from fac_jax.downstream.pairwise import VERDICTS, figures
from fac_jax.downstream.pieces import Text
from fac_jax.downstream.published import Example
from fac_jax.report.page import page
from fac_jax.report.products import RunView, read_view
from fac_jax.report.terminal import render
from fac_jax.report.tuned import tuned
from fac_jax.text import Turn
from tests.report.sample_run import write_run

ARMS = ("seed", "seed+random", "seed+kept")
CONFIG = Config(
    finetune=FinetuneConfig(train="pairs", heldout="benchmark", method="lora", lora=LoraConfig(rank=16, alpha=32))
)


@pytest.fixture
def view(tmp_path: Path) -> RunView:
    return dataclasses.replace(read_view(tmp_path / "run", write_run(tmp_path / "run")), finetune=None)


def examples(count: int, answers: int, subset: str | None = None) -> tuple[Example, ...]:
    return tuple(
        Example((Turn("user", f"q{n}"),), tuple(f"a{n}{i}" for i in range(answers)), subset, f"file:{n}")
        for n in range(count)
    )


def words_of(view: RunView, name: str) -> str:
    whole = page(view)
    section = whole[whole.index(f'id="{name}"') :].partition("</section>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", section)).split())


def printed(view: RunView) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(view))
    return " ".join(console.export_text().split())


def arms(heldout: tuple[Example, ...], answers: int) -> Arms:
    some = examples(60, answers)
    return Arms({"seed": some[:40], "seed+random": some[:50], "seed+kept": some}, heldout, {})


def test_a_reward_has_accuracy_sections_and_what_is_missing(view: RunView) -> None:
    heldout = (*examples(30, 2, "alpacaeval-easy"), *examples(10, 2, "mine"), *examples(10, 2))
    scores = {arm: np.zeros((3, 50, 2)) for arm in ARMS}
    for place, arm in enumerate(ARMS):
        scores[arm][:, : 20 + 10 * place, 0] = 1  # the others are ties
    none = Encoded((), 0)
    found = reward._evaluation(CONFIG, arms(heldout, 2), scores, dict.fromkeys(ARMS, none), none)
    words = words_of(dataclasses.replace(view, reward=found), "reward")
    for expected in (
        "seed+kept less seed: +40 points of accuracy (95% interval +",
        "50 held-out pairs; mean ± sd over seeds",
        "seed 40 40.0% ± 0.0",
        "30 30 30",
        "Subsets of RewardBench that are not there: alpacaeval-length, alpacaeval-hard",
        "which count in accuracy only: mine.",
        "10 pairs name no subset.",
        "Adapters of rank 16, alpha 32",
        "a tie is not a win",
    ):
        assert expected in words, (expected, words)
    row = found["arms"]["seed"]
    assert row["sections"] == {"Chat": row["score"]} and row["score"]["mean"] == pytest.approx(20 / 30)
    assert 'id="classifier"' not in page(dataclasses.replace(view, reward=found))
    assert "seed+kept 60 80.0% ± 0.0 100.0% ± 0.0" in printed(dataclasses.replace(view, reward=found))


def test_an_instruction_model_has_nats_and_a_judge_of_its_own_name(view: RunView) -> None:
    heldout = examples(6, 1)
    text = Text(np.arange(9, dtype=np.int32), np.arange(9) > 4)
    nats = {"backbone": np.full((1, 6), 3.0)} | {
        arm: np.full((2, 6), 2.5 - place / 4) for place, arm in enumerate(ARMS)
    }
    judged = [
        {"arm": "seed+kept", "other": "seed", "judge": "http:m", **figures(dict(zip(VERDICTS, range(6), strict=True)))}
    ]
    encoded = Encoded(((text,),) * 6, 1)
    found = completions._evaluation(
        CONFIG, arms(heldout, 1), nats, dict.fromkeys(ARMS, encoded), encoded, examples(15, 0), judged
    )
    shown = dataclasses.replace(view, completions=found)
    words = words_of(shown, "instructions")
    for expected in (
        "backbone untrained 3.000 ± 0.000",
        "seed+kept 60 2.000 ± 0.000 2 to 2",
        "seed+kept less seed: −0.5 of nats a token (95% interval −0.5 to −0.5).",
        "6 held-out answers, 24 tokens",
        "A local pairwise judge, which is not AlpacaEval: http:m compared the arms' answers to 15 instructions",
        "seed+kept against seed 0 1 2 3 4 5 45.0%",
        "AlpacaEval's win rates (WR, LC) need its own judge",
    ):
        assert expected in words, (expected, words)
    assert "seed+kept 60 2.000 ± 0.000" in printed(shown)
    silent = dataclasses.replace(view, completions={**found, "local_pairwise_judge": None})
    assert "local pairwise judge" not in words_of(silent, "instructions").lower()


def test_a_classifiers_run_has_neither(view: RunView) -> None:
    assert view.reward is None and view.completions is None and tuned(view) == []
