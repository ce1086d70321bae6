"""Stage: does coverage help? Arms, budgets and seeds side by side, and which metric goes with detection.

Reads the scans of the seed, the anchor, the held-out set and of what the arms wrote (`texts.py`), and relevance.
Writes
- `heads/`, and `adapters/` beside the product: every cell's figures and its scores of the held-out documents, as soon
  as they are there;
- `cells.parquet`: a row a cell: arm, budget, seed, documents added, every figure, AUPRC and AUROC of head and adapters;
- `study.json`: means over seeds with 95% intervals (Student's t), what each arm gains over the seed alone with a 95%
  interval over held-out documents (paired bootstrap), and the correlations of every metric with AUPRC: over all cells,
  and over those without selection, whose documents are real and rightly labelled, which sets them apart by itself.
Held-out documents are scored once, after the last step; nothing is tuned on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fac_jax.config.file import Config
from fac_jax.downstream.evaluate import paired_bootstrap
from fac_jax.runs import write_text, writing
from fac_jax.study.cells import METRICS, SEED_ALONE, Outcome, detection, measure_cells
from fac_jax.study.correlate import correlation, pearson, spearman
from fac_jax.study.library import SELECTION, Library, read_library
from fac_jax.synthesis.ablation import mean_and_interval

TRAINED = ("head", "lora")


def study(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage. Raises UserError where a data set lacks a class or a document that is trained on is held out."""
    library = read_library(config, inputs)
    outcomes = measure_cells(library, out)
    rows = [row(library, one) for one in outcomes]
    with writing(out / "cells.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    lines, written = table(library, outcomes, rows), [one for one in rows if one["arm"] != SELECTION]
    product = {
        "heldout": {
            "data": config.finetune.heldout, "documents": len(library.heldout.ids),
            "positive": int(library.heldout.positive_n.sum()),
        },
        "seed": {"documents": len(library.seed), "positive": int(library.take(library.seed).positive_n.sum())},
        "missing": int(library.coverage.missing_f.sum()), "seeds": list(config.study.seeds),
        "pools": config.study.pools,
        "arms": {
            name: {
                "texts": [pool[name].written for pool in library.costs],
                "tokens": [pool[name].tokens for pool in library.costs],
            }
            for name in library.costs[0]
        },
        "cells": lines,
        "correlations": {trained: correlations(rows, f"auprc_{trained}") for trained in TRAINED},
        "correlations_of_written": {trained: correlations(written, f"auprc_{trained}") for trained in TRAINED},
    }  # fmt: skip
    write_text(out / "study.json", json.dumps(product, indent=1, allow_nan=False))
    return {f"{line['arm']} {line['budget']}".removesuffix(" 0"): line["auprc_head"]["mean"] for line in lines}


def row(library: Library, outcome: Outcome) -> dict[str, Any]:
    """One line of cells.parquet."""
    told: dict[str, Any] = {**asdict(outcome.cell), "added": outcome.added, **outcome.figures}
    for trained in TRAINED:
        scores = outcome.scores.get(trained)
        measured = None if scores is None else detection(library, scores)
        told |= {f"{name}_{trained}": measured and measured[name] for name in ("auprc", "auroc")}
    return told


def table(library: Library, outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a cell over its seeds."""
    by_cell: dict[tuple[str, int], list[int]] = {}
    for place, one in enumerate(outcomes):
        by_cell.setdefault((one.cell.arm, one.cell.budget), []).append(place)
    alone = [outcomes[place] for place in by_cell[SEED_ALONE, 0]]
    lines = []
    for (arm, budget), places in by_cell.items():
        line: dict[str, Any] = {"arm": arm, "budget": budget, "added": mean_and_interval(_known(rows, places, "added"))}
        names = [*METRICS, *(f"{name}_{trained}" for trained in TRAINED for name in ("auprc", "auroc"))]
        line |= {name: mean_and_interval(_known(rows, places, name)) for name in names}
        line["gain"] = {
            trained: _gain(library, [outcomes[place] for place in places], alone, trained) for trained in TRAINED
        }
        lines.append(line)
    return lines


def correlations(rows: Sequence[Mapping[str, Any]], target: str) -> dict[str, Any]:
    """Of every metric with the target: over all cells, and at equal budget over those that add something."""
    there = [row for row in rows if row[target] is not None]
    seeds = sorted({row["seed"] for row in there})
    cells = list(dict.fromkeys((row["arm"], row["budget"]) for row in there))
    at = {(row["arm"], row["budget"], row["seed"]): row for row in there}
    found: dict[str, Any] = {}
    for name in METRICS:
        known = [cell for cell in cells if all(at[*cell, seed][name] is not None for seed in seeds)]
        values = {
            figure: np.array([[at[*cell, seed][figure] for seed in seeds] for cell in known], np.float64)
            for figure in (name, target)
        }
        budgets = np.array([budget for _, budget in known], np.int64)
        added = budgets > 0
        told: dict[str, Any] = {}
        for how in (pearson, spearman):
            if not known:
                continue
            whole = correlation(how, values[name], values[target])
            equal = correlation(how, values[name][added], values[target][added], budgets[added])
            told[how.__name__] = whole and asdict(whole)
            told[f"{how.__name__}_at_equal_budget"] = equal and asdict(equal)
        found[name] = told
    return found


def _known(rows: Sequence[Mapping[str, Any]], places: Sequence[int], name: str) -> list[float]:
    return [float(rows[place][name]) for place in places if rows[place][name] is not None]


def _gain(
    library: Library, outcomes: Sequence[Outcome], alone: Sequence[Outcome], trained: str
) -> dict[str, Any] | None:
    """AUPRC less that of the seed alone, by the same seeds."""
    before = {one.cell.seed: one.scores[trained] for one in alone if trained in one.scores}
    after = {one.cell.seed: one.scores[trained] for one in outcomes if trained in one.scores}
    seeds = sorted(set(before) & set(after))
    if outcomes[0].cell.arm == SEED_ALONE or not seeds:
        return None
    scores, others = (np.stack([of_seed[seed] for seed in seeds]) for of_seed in (after, before))
    return asdict(paired_bootstrap(library.heldout.positive_n, scores, others))
