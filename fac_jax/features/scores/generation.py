"""Does a text that is written from an explanation alone activate its feature?

It is what synthesis needs of an explanation, and detection does not tell: an explanation may fit what a feature fires
on, and still be too broad to write from. The generator sees the explanation and nothing else; backbone and SAE, which
wrote none of it, score each text just as a scan does. A feature's score is the share of its texts whose peak exceeds a
threshold; its control is the same share of the texts written for the other features, for a feature that fires on
anything would be hit by any text. A reply that is no text activates nothing.

Reads backbone and SAE; `ask.py` writes the log of replies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from fac_jax.features.ask import ask
from fac_jax.features.scores.auroc import over_features
from fac_jax.features.scores.prompts import shared_prompt
from fac_jax.llm.client import Generator, Request
from fac_jax.llm.question import question
from fac_jax.scan.scorer import Score

MAX_TOKENS = 100
"""Of a text."""
TEMPERATURE, TOP_P = 0.8, 0.9
"""As synthesis writes (paper)."""


@dataclass(frozen=True)
class Generated:
    """What the texts written from explanations activate."""

    columns: Mapping[int, dict[str, Any]]
    """Per feature: columns of explanations.parquet."""
    summary: Mapping[str, Any]


def score_generated(
    generator: Generator,
    explanations: Mapping[int, str],
    score: Score,
    marks: Sequence[str],
    count: int,
    threshold: float,
    seed: int,
    log: Path,
) -> Generated:
    """Have `count` texts written from each explanation and score them.

    `marks` are the chat template's; a reply that holds one is no text, but turns.
    """
    features = list(explanations)
    asked = {
        f"write:{feature}:{number}": _request(explanations[feature], seed * count + number)
        for feature in features
        for number in range(count)
    }
    answers = ask(generator, asked, log, "write from explanations")
    texts = [answers[key].raw.strip() for key in asked]
    usable = np.array([bool(text) and not any(mark in text for mark in marks) for text in texts], bool)
    peak_tf = _peaks(texts, usable, features, score)
    written_for = np.repeat(np.arange(len(features)), count)
    columns = {}
    for column, feature in enumerate(features):
        own, others = peak_tf[written_for == column, column], peak_tf[written_for != column, column]
        columns[feature] = {
            "generation_peaks": own.tolist(), "generation_score": float((own > threshold).mean()),
            "generation_any": float((own > 0).mean()),
            "generation_control": float((others > threshold).mean()) if len(others) else None,
            "generation_control_any": float((others > 0).mean()) if len(others) else None,
        }  # fmt: skip
    return Generated(columns, _summary(columns, len(texts), int((~usable).sum()), threshold, generator.name, seed))


def _request(explanation: str, seed: int) -> Request:
    asked = question(shared_prompt("write_example"), {"explanation": explanation}, {})
    return dataclasses.replace(
        asked, schema=None, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, top_p=TOP_P, seed=seed
    )


def _peaks(
    texts: Sequence[str], usable: Bool[np.ndarray, " t"], features: Sequence[int], score: Score
) -> Float[np.ndarray, "t f"]:
    """Peaks of every text on the features asked for; 0 where there is no text."""
    peak_tf = np.zeros((len(texts), len(features)), np.float32)
    scored = score([text for text, use in zip(texts, usable, strict=True) if use])
    peak_tf[usable] = scored[:, features].toarray()
    return peak_tf


def _summary(
    columns: Mapping[int, Mapping[str, Any]], texts: int, unusable: int, threshold: float, writer: str, seed: int
) -> dict[str, Any]:
    found: dict[str, Any] = {"writer": writer, "texts": texts, "unusable": unusable, "threshold": threshold}
    for name in ("generation_score", "generation_any", "generation_control", "generation_control_any"):
        values = [column[name] for column in columns.values() if column[name] is not None]
        found[name] = over_features(values, seed)
    return found
