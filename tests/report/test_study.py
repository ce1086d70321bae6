"""The section of a study: a figure a group of arms with its intervals, every cell, correlations with theirs."""

from __future__ import annotations

import dataclasses
import html
import re
from typing import Any

import pytest

from fac_jax.config.downstream import StudyConfig
from fac_jax.report.figures import WIDTH
from fac_jax.report.page import page
from fac_jax.report.products import RunView
from fac_jax.report.study import study
from fac_jax.study.cells import METRICS
from fac_jax.study.study import correlations
from fac_jax.synthesis.ablation import mean_and_interval

ARMS = StudyConfig().arms
SEEDS = (1, 2, 3)


def rows() -> list[dict[str, Any]]:
    """A cell and seed a row: AUPRC grows with fac and with nothing else."""
    found = []
    for place, (arm, budget) in enumerate([("seed", 0), *((arm, budget) for arm in ARMS for budget in (25, 50))]):
        for seed in SEEDS:
            fac = 0.5 + 0.02 * place + 0.001 * seed
            found.append(
                {name: None for name in METRICS}
                | {"arm": arm, "budget": budget, "seed": seed, "added": budget, "fac": fac, "vendi_score": 40.0 + seed}
                | {"target_hit_rate": 0.01 * place if budget else None}
                | {"auprc_head": 0.3 + fac / 2, "auroc_head": 0.8, "auprc_lora": None, "auroc_lora": None}
            )
    return found


def product() -> dict[str, Any]:
    every = rows()
    cells = []
    for arm, budget in dict.fromkeys((row["arm"], row["budget"]) for row in every):
        these = [row for row in every if (row["arm"], row["budget"]) == (arm, budget)]
        names = ("added", *METRICS, "auprc_head", "auroc_head", "auprc_lora", "auroc_lora")
        line = {name: mean_and_interval([row[name] for row in these if row[name] is not None]) for name in names}
        gain = {"mean": 0.05, "low": -0.01, "high": 0.11, "resamples": 9} if budget else None
        cells.append({"arm": arm, "budget": budget, **line, "gain": {"head": gain, "lora": None}})
    return {
        "heldout": {"data": "heldout", "documents": 760, "positive": 380}, "missing": 55, "seeds": list(SEEDS),
        "seed": {"documents": 76, "positive": 40}, "pools": 1, "arms": {}, "cells": cells,
        **{
            kind: {name: correlations(some, f"auprc_{name}") for name in ("head", "lora")}
            for kind, some in (
                ("correlations", every),
                ("correlations_of_written", [row for row in every if row["arm"] != "selection"]),
            )
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def section(view: RunView) -> str:
    whole = page(dataclasses.replace(view, study=product()))
    return whole[whole.index('id="study"') :].partition("</section>")[0]


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    from fac_jax.report.products import read_view
    from tests.report.sample_run import write_run

    folder = tmp_path_factory.mktemp("study") / "run"
    return read_view(folder, write_run(folder))


def words(section: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", section)).split())


def test_it_is_there_only_where_a_study_was_made(view: RunView):
    assert study(view) == [] and 'id="study"' not in page(view)
    assert len(study(dataclasses.replace(view, study=product()))) == 1


def test_every_cell_has_its_figures_and_what_it_gains(section: str):
    said = words(section)
    assert "76 documents in the seed (40 positive), 760 held out (380: a random scorer has 0.500), 55 features" in said
    assert all(f" {arm} 50 " in said for arm in ARMS)
    assert said.count("+0.050 (-0.010 to +0.110)") == len(ARMS) * 2
    assert "0.502 ± 0.002" in said, "the seed's fac"
    assert "Vendi score" in said and "Self-BLEU" not in said, "a metric that no cell has is no column"
    assert "LoRA" not in said


def test_correlations_stand_with_their_intervals(section: str):
    said = words(section)
    assert said.count("fac +1.00 (+1.00 to +1.00) +1.00") == 2
    assert "by a linear head, all arms" in said and "by a linear head, arms that write, and the seed alone" in said
    assert "Vendi score – – – –" not in said and not re.search(r"Vendi score [+-]", said), (
        "a constant goes with nothing"
    )


def test_figures_name_all_arms_within_their_width_and_draw_intervals(section: str):
    assert section.count("<svg") == 2
    for arm in ("one step", "two steps", "random features", "random generations", "selection", "self-instruct"):
        at = re.search(rf'<text x="([0-9.]+)"[^>]*>{arm}</text>', section)
        assert at is not None and float(at[1]) + 6.2 * len(arm) <= WIDTH
    assert section.count("thin") == 8 * 3, "four arms in each, at budgets of 0, 25 and 50"
