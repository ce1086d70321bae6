"""Step 1: candidates for each missing feature, and the contrastive pair among them (paper, section on synthesis).

Each missing feature gets n candidates, written from its explanation and from anchor texts that activate it. Every
candidate is scored against every missing feature, whoever it was written for: strong = argmax g_i over all of them, and
it must exceed the threshold; weak = argmin g_i, among the feature's own candidates where there are any. A feature
without a strong candidate has no pair, and says so (the official code invents a score of 5.0). No file is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_array

from fac_jax.synthesis.generations import Job, Sampling
from fac_jax.synthesis.prompt import Example, Prompt, messages
from fac_jax.synthesis.steering import UNSTEERED, Strengths

STEP = 1
SHOWN = 2
"""Anchor texts in a prompt."""
DRAWS = 2
"""Candidates that share a prompt; the next ones are shown other anchor texts, so that not all repeat the same two."""


@dataclass(frozen=True)
class Target:
    """A missing feature that is written for."""

    feature: int
    about: str
    """Its explanation, or the tokens it fires on."""
    examples: tuple[Example, ...]
    """Anchor texts that activate it, best first."""
    peak: float = 0.0
    """Its highest activation on the anchor."""


@dataclass(frozen=True)
class Pair:
    """A feature's strong and weak candidate, as rows of the scores; or why it has none."""

    feature: int
    strong: int | None
    strong_peak: float
    """Highest peak that any candidate reached, above the threshold or not."""
    weak: int | None
    weak_peak: float
    reason: str | None


def jobs(
    prompt: Prompt,
    targets: Sequence[Target],
    candidates: int,
    sampling: Sampling,
    first: int = 0,
    strengths: Strengths = UNSTEERED,
) -> list[Job]:
    """`candidates` jobs for each target, the draws from `first` on."""
    return [
        sampling.job(
            *(target.feature, STEP, index, _messages(prompt, target, index)),
            strengths.steer(target.feature, target.peak, index),
        )
        for target in targets
        for index in range(first, first + candidates)
    ]


def pairs(
    features: Sequence[int], peaks_nf: csr_array, written_for_n: Int[np.ndarray, " n"], threshold: float
) -> list[Pair]:
    """The pair of each feature among n scored candidates; equal peaks go to the earlier one."""
    columns = peaks_nf[:, list(features)].tocsc()
    return [
        _pair(feature, columns[:, [place]].toarray()[:, 0], written_for_n, threshold)
        for place, feature in enumerate(features)
    ]


def _messages(prompt: Prompt, target: Target, index: int) -> tuple[dict[str, str], ...]:
    shown = rotated(target.examples, index // DRAWS * SHOWN, SHOWN)
    return messages(prompt, target.about, shown, max((example.score for example in shown), default=0.0))


def rotated(examples: Sequence[Example], start: int, count: int) -> list[Example]:
    """`count` examples from `start` on, around the end, none twice."""
    return [examples[(start + i) % len(examples)] for i in range(min(count, len(examples)))]


def _pair(feature: int, peaks_n: np.ndarray, written_for_n: np.ndarray, threshold: float) -> Pair:
    if not len(peaks_n):
        return Pair(feature, None, 0.0, None, 0.0, "no candidate is a sample")
    strong = int(peaks_n.argmax())
    best = float(peaks_n[strong])
    if best <= threshold:
        reason = f"no candidate exceeds {threshold:g}; the best of {len(peaks_n)} reached {best:.3g}"
        return Pair(feature, None, best, None, 0.0, reason)
    own = np.flatnonzero(written_for_n == feature)
    rows = own[own != strong] if len(own[own != strong]) else np.delete(np.arange(len(peaks_n)), strong)
    if not len(rows):
        return Pair(feature, None, best, None, 0.0, "the strong candidate is the only sample there is")
    weak = int(rows[peaks_n[rows].argmin()])
    return Pair(feature, strong, best, weak, float(peaks_n[weak]), None)
