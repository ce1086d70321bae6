"""A cell of a study: the seed with what an arm adds at one budget and with one seed, and every figure of it.

Coverage and diversity are of the whole training set, the seed's documents included, as detection is. Of what was added
alone are the target hit rate, of the features that the seed misses, and label agreement: the share whose label a head
trained on the whole anchor gives too, as a sample may activate all that is missing and not be what it is labelled.

Each cell's figures and scores are kept as soon as they are there: a stopped study goes on behind them, and adapters
serve another study of the run directory too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fac_jax.config.downstream import FinetuneConfig
from fac_jax.config.file import Config
from fac_jax.coverage import fac as arithmetic
from fac_jax.diversity import measure, syntax
from fac_jax.downstream.classifier import Examples, groups_of, head_scores, open_tuner
from fac_jax.downstream.evaluate import auprc, auroc
from fac_jax.downstream.tune import score_texts, tune
from fac_jax.plain import digest
from fac_jax.runs import write_text
from fac_jax.study.library import Library, Rows, documents_of

SEED_ALONE = "seed"
ADAPTERS = "adapters"
"""Folder beside the product: what took minutes is used again when another study asks for it."""
METRICS = ("fac", "target_hit_rate", "label_agreement", *(metric.name for metric in measure.METRICS))
"""What may go with detection."""


@dataclass(frozen=True)
class Cell:
    """Which documents are trained on."""

    arm: str
    budget: int
    seed: int

    @property
    def name(self) -> str:
        """Names its files."""
        return f"{self.arm.replace(' ', '-')}-{self.budget}-seed-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """A cell, measured."""

    cell: Cell
    added: int
    """Documents that came to the seed's."""
    figures: Mapping[str, float | None]
    """METRICS; None where one is not defined or its model not here."""
    scores: Mapping[str, Float[np.ndarray, " n"]]
    """By `head` and, where adapters were trained, `lora`: logits of the held-out documents."""


def cells(config: Config, lora: bool = False) -> list[Cell]:
    """All cells; or those with adapters."""
    study = config.study
    budgets, seeds = (study.lora_budgets, study.lora_seeds) if lora else ((0, *study.budgets), study.seeds)
    arms = [(SEED_ALONE, 0)] if 0 in budgets else []
    arms += [(arm, budget) for arm in study.arms for budget in budgets if budget]
    return [Cell(arm, budget, seed) for arm, budget in arms for seed in seeds]


def measure_cells(library: Library, out: Path) -> list[Outcome]:
    """Heads and figures of every cell, then adapters where they are asked for."""
    config = library.config
    measured = {cell: _measured(library, cell, out) for cell in cells(config)}
    tuned = _tuned(library, out)
    return [
        replace(one, scores={**one.scores, **({"lora": tuned[cell]} if cell in tuned else {})})
        for cell, one in measured.items()
    ]


def adapter_settings(config: Config, documents: int) -> FinetuneConfig:
    """How adapters are trained on so many documents: as many whole epochs as come next to the steps that are asked."""
    study = config.study
    epochs = max(1, round(study.lora_steps / -(-documents // study.lora_batch)))
    changed = {"epochs": epochs, "learning_rate": study.lora_learning_rate, "batch": study.lora_batch}
    return replace(config.finetune, method="lora", **changed)  # type: ignore[arg-type]


def detection(library: Library, scores_n: Float[np.ndarray, " n"]) -> dict[str, float]:
    """How well the held-out documents are told apart."""
    positive_n = library.heldout.positive_n
    return {"auprc": auprc(positive_n, scores_n), "auroc": auroc(positive_n, scores_n)}


def figures_of(library: Library, added: Rows) -> dict[str, float | None]:
    """METRICS of the seed with these documents."""
    rows = np.concatenate([library.seed, added])
    found = library.coverage
    whole_f = arithmetic.active(library.peaks_nf[rows], found.threshold)
    added_f = arithmetic.active(library.peaks_nf[added], found.threshold)
    figures = {
        "fac": arithmetic.fac(found.relevant_f, found.anchor_f, whole_f),
        "target_hit_rate": arithmetic.target_hit_rate(found.missing_f, added_f) if len(added) else None,
        "label_agreement": float(library.agrees_n[added].mean()) if len(added) else None,
    }
    return {**figures, **_diversity(library, rows)}


def _diversity(library: Library, rows: Rows) -> dict[str, float | None]:
    diverse, settings = library.diverse, library.config.diversity
    told = measure.of_words(documents_of([library.examples.texts[row] for row in rows]))
    found: dict[str, float | None] = {name: figure["value"] for name, figure in told.items()}
    if diverse.parsed is not None:
        found["pos_distinct_2"] = syntax.pos_distinct_2(diverse.parsed.tags.only(rows))
        found["dependency_entropy"] = syntax.dependency_entropy(diverse.parsed.relations.only(rows))
    if diverse.here is not None and diverse.reference is not None:
        here = measure.Embedded(diverse.here.vectors_nd[rows], diverse.here.unit_nd[rows], len(rows))
        name = measure.reference(library.config)
        told = measure.figures_of(here, diverse.reference, diverse.centres_cd, settings, name)
        found |= {name: figure["value"] for name, figure in told.items()}
    return {metric.name: found.get(metric.name) for metric in measure.METRICS}


def _added(library: Library, cell: Cell) -> Rows:
    if cell.arm == SEED_ALONE:
        return np.zeros(0, np.int64)
    return library.added(cell.arm, cell.budget, library.config.study.seeds.index(cell.seed))


def _measured(library: Library, cell: Cell, out: Path) -> Outcome:
    done = out / "heads" / f"{cell.name}.json"
    added = _added(library, cell)
    if done.exists():
        told = json.loads(done.read_text(encoding="utf-8"))
    else:
        settings = replace(library.config.finetune, seeds=(cell.seed,))
        config, seed = replace(library.config, finetune=settings), library.take(library.seed)
        scores_n = head_scores(config, _training(library, cell), library.heldout, seed)[0]
        told = {"figures": figures_of(library, added), "scores": scores_n.tolist()}
        _keep(done, told)
    return Outcome(cell, len(added), told["figures"], {"head": np.array(told["scores"])})


def _tuned(library: Library, out: Path) -> dict[Cell, Float[np.ndarray, " n"]]:
    """Scores of the held-out documents by adapters and head."""
    config, folder = library.config, out.parent / ADAPTERS
    training = {cell: _training(library, cell) for cell in cells(config, lora=True)}
    files = {cell: folder / f"{cell.name}-{_adapter_key(library, cell, some)}.json" for cell, some in training.items()}
    todo = [cell for cell, file in files.items() if not file.exists()]
    if todo:
        tuner, heldout = open_tuner(config, adapter_settings(config, 1), library.model), groups_of(library.heldout)
        for cell in todo:
            state, settings = files[cell].with_suffix(""), adapter_settings(config, len(training[cell].ids))
            learned = tune(replace(tuner, settings=settings), groups_of(training[cell]), cell.seed, state)
            _keep(files[cell], {"scores": score_texts(tuner, learned, heldout)[:, 0].tolist()})
            shutil.rmtree(state)
    return {cell: np.array(json.loads(file.read_text(encoding="utf-8"))["scores"]) for cell, file in files.items()}


def _training(library: Library, cell: Cell) -> Examples:
    return library.take(np.concatenate([library.seed, _added(library, cell)]))


def _adapter_key(library: Library, cell: Cell, training: Examples) -> str:
    """Of all that decides what the adapters of a cell learn and score."""
    settings = replace(adapter_settings(library.config, len(training.ids)), seeds=())
    # Not the ids, which are of the text before max_tokens cuts it.
    tokens = [[ids_t.tobytes().hex() for ids_t in some.tokens] for some in (training, library.heldout)]
    documents = [tokens, training.positive_n.tolist()]
    return digest([settings, cell.seed, documents, library.model, library.config.backbone.dtype])


def _keep(file: Path, told: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(told))
