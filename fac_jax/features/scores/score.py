"""How well explanations tell, on documents that they were not made from, where their features are active.

Each explained feature gets a detection and a fuzzing AUROC with intervals (`heldout.py` says what they ask, `auroc.py`
what they count): rated by a language model, or simulated from the tokens that an embedded explanation names. The
control rates the same spans by explanations that were shuffled among the features: it must come out at 0.5, and is what
the scores owe to the way spans were chosen rather than to the explanations.

Reads nothing; `ask.py` writes the log of replies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from fac_jax.config.features import ExplainConfig
from fac_jax.features.scores.auroc import Estimate, feature_aurocs, over_features
from fac_jax.features.scores.heldout import ORIGINS, Kind, Trials, choose_trials
from fac_jax.features.scores.rating import Exam, Rated, rate
from fac_jax.features.scores.simulate import simulated
from fac_jax.features.spans import Passages
from fac_jax.llm.client import Generator

SCORED_SPANS = pa.schema(
    {
        "feature": pa.int32(), "test": pa.string(), "document_id": pa.string(), "position": pa.int32(),
        "origin": pa.string(), "active": pa.bool_(), "rating": pa.float32(), "control_rating": pa.float32(),
    }
)  # fmt: skip
KINDS: tuple[Kind, ...] = ("detection", "fuzzing")


@dataclass(frozen=True)
class Scores:
    """What the tests of all explanations say."""

    columns: Mapping[int, dict[str, Any]]
    """Per scored feature: columns of explanations.parquet."""
    summary: Mapping[str, Any]
    spans: pa.Table
    """Every rated span: a row of SCORED_SPANS."""


def drawn(features: Sequence[int], count: int | None, seed: int) -> list[int]:
    """`count` of the features in order, or all; a larger draw holds a smaller one."""
    order = np.random.default_rng([seed, len(features)]).permutation(np.asarray(features, np.int64))
    return sorted(order[:count].tolist())


def partners(features: Sequence[int], seed: int) -> dict[int, int]:
    """Another one of the features for each of them, no two the same; none where there is only one."""
    order = np.random.default_rng([seed, len(features)]).permutation(np.asarray(features, np.int64))
    return dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True)) if len(features) > 1 else {}


def score_embedded(
    passages: Passages, named: Mapping[int, Sequence[int]], w_fd: np.ndarray, settings: ExplainConfig, seed: int
) -> Scores:
    """Scores of explanations that name tokens (`named` for each explained feature), by simulation."""
    features = drawn(list(named), settings.scored_features, seed)
    trials = choose_trials(passages, features, w_fd, settings.scored_spans, seed)
    swapped = {feature: named[other] for feature, other in partners(features, seed).items()}
    tests: dict[str, Trials] = {}
    ratings: dict[str, np.ndarray] = {}
    for kind in KINDS:
        tests[kind] = trials[kind]
        ratings[kind] = simulated(passages, trials[kind], kind, named)
        if swapped:
            tests[f"control {kind}"] = trials[kind]
            ratings[f"control {kind}"] = simulated(passages, trials[kind], kind, swapped)
    return _scores(passages, tests, ratings, seed)


def score_with(
    generator: Generator,
    passages: Passages,
    tokenizer: PreTrainedTokenizerFast,
    explanations: Mapping[int, str],
    w_fd: np.ndarray,
    settings: ExplainConfig,
    seed: int,
    log: Path,
) -> Scores:
    """Scores of explanations in words, by a language model."""
    features = drawn(list(explanations), settings.scored_features, seed)
    trials = choose_trials(passages, features, w_fd, settings.scored_spans, seed)
    sample = drawn([f for f in features if f in set(trials["detection"].features)], settings.control_features, seed)
    pairs = partners(sample, seed).items()
    swapped = {f: explanations[other] for f, other in pairs if explanations[other] != explanations[f]}
    exams = {str(kind): Exam(kind, trials[kind], explanations) for kind in KINDS}
    for kind in KINDS:
        controlled = trials[kind].where(np.isin(trials[kind].feature_r, list(swapped)))
        exams[f"control {kind}"] = Exam(kind, controlled, swapped, control=True)
    rated = rate(generator, passages, tokenizer, exams, seed, log)
    found = _scores(
        passages,
        {name: exam.trials for name, exam in exams.items()},
        {name: one.rating_r for name, one in rated.items()},
        seed,
    )
    return Scores(found.columns, {**found.summary, **_reading(rated.values())}, found.spans)


def _reading(rated: Iterable[Rated]) -> dict[str, int]:
    rated = list(rated)
    return {
        "rating_replies": sum(one.replies for one in rated),
        "rating_replies_unreadable": sum(one.unread for one in rated),
    }


def _scores(passages: Passages, tests: Mapping[str, Trials], ratings: Mapping[str, np.ndarray], seed: int) -> Scores:
    columns: dict[int, dict[str, Any]] = {}
    summary: dict[str, Any] = {}
    for name, trials in tests.items():
        found = feature_aurocs(trials, ratings[name], seed)
        summary[f"{name.replace(' ', '_')}_auroc"] = over_features([one.value for one in found.values()], seed)
        for feature, one in found.items():
            columns.setdefault(feature, {"unread_ratings": 0}).update(_columns(name, one))
        for feature in trials.feature_r[np.isnan(ratings[name])].tolist():
            columns[feature]["unread_ratings"] += 1
    spans = pa.concat_tables([_span_rows(passages, kind, tests, ratings) for kind in KINDS])
    return Scores(dict(sorted(columns.items())), summary, spans)


def _columns(name: str, found: Estimate) -> dict[str, float]:
    if name.startswith("control"):
        return {f"{name.replace(' ', '_')}_auroc": found.value}
    return {f"{name}_auroc": found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _span_rows(
    passages: Passages, kind: Kind, tests: Mapping[str, Trials], ratings: Mapping[str, np.ndarray]
) -> pa.Table:
    trials = tests[kind]
    control_r = np.full(len(trials.feature_r), np.nan)
    if f"control {kind}" in tests:
        control_r[np.isin(trials.feature_r, tests[f"control {kind}"].features)] = ratings[f"control {kind}"]
    columns = {
        "feature": trials.feature_r, "test": pa.array([kind] * len(trials.feature_r), pa.string()),
        "document_id": pa.array(passages.scan.ids_n[trials.document_r].tolist(), pa.string()),
        "position": trials.position_r, "origin": pa.array([ORIGINS[one] for one in trials.origin_r], pa.string()),
        "active": trials.active_r, "rating": pa.array(ratings[kind], pa.float32(), from_pandas=True),
        "control_rating": pa.array(control_r, pa.float32(), from_pandas=True),
    }  # fmt: skip
    return pa.table(columns).cast(SCORED_SPANS)
