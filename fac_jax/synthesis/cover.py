"""Step 2: new samples from each contrastive pair, and which of all samples are kept.

The prompt shows the weak and the strong candidate and an anchor text with the peaks they reached, weakest first. What
is written is scored like the candidates of step 1. A sample is kept for a feature only when its peak exceeds the
threshold (the official code has no such filter). Reads and writes no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_array

from fac_jax.coverage.choose import greedy_cover
from fac_jax.synthesis.contrast import DRAWS, Pair, Target, rotated
from fac_jax.synthesis.generations import Job, Sampling
from fac_jax.synthesis.prompt import Example, Prompt, messages
from fac_jax.synthesis.steering import UNSTEERED, Strengths

STEP = 2


@dataclass(frozen=True)
class Kept:
    """A sample, and the feature that it is kept for."""

    row: int
    feature: int
    peak: float
    adds: tuple[int, ...]
    """Features that no earlier kept sample activates."""


def jobs(
    prompt: Prompt,
    targets: Sequence[Target],
    pairs: Mapping[int, Pair],
    texts: Sequence[str],
    count: int,
    sampling: Sampling,
    strengths: Strengths = UNSTEERED,
) -> list[Job]:
    """`count` jobs for each target that has a pair; `texts` are the candidates that pairs point into."""
    return [
        sampling.job(
            *(target.feature, STEP, index, _messages(prompt, target, pairs[target.feature], texts, index)),
            strengths.steer(target.feature, target.peak, index),
        )
        for target in targets
        if pairs[target.feature].reason is None
        for index in range(count)
    ]


def assign(peaks_nf: csr_array, features: Int[np.ndarray, " m"], threshold: float, keep_per_feature: int) -> list[Kept]:
    """Which of n samples are kept: first those that cover the most, then the best for each feature that has none.

    Greedy maximum coverage chooses samples until every feature that any sample activates is covered, equal gains going
    to the larger margin over the threshold; each such sample is kept for the feature it activates most clearly. Then
    every covered feature is filled up, best peak first, to `keep_per_feature` samples kept for it. None is kept twice.
    """
    wanted = peaks_nf[:, features]
    margins = csr_array((np.maximum(wanted.data - threshold, 0), wanted.indices, wanted.indptr), shape=wanted.shape)
    rank_n = np.argsort(np.argsort(-margins.sum(axis=1), kind="stable"))
    kept: list[Kept] = []
    for pick in greedy_cover(peaks_nf, features, threshold, [f"{rank:012d}" for rank in rank_n]):
        peaks = peaks_nf[[pick.row]][:, pick.features].toarray()[0]
        best = int(peaks.argmax())
        kept.append(Kept(pick.row, pick.features[best], float(peaks[best]), tuple(pick.features)))
    return [*kept, *_fill_up(kept, wanted, features, threshold, keep_per_feature)]


def _fill_up(
    kept: Sequence[Kept], wanted_nm: csr_array, features: np.ndarray, threshold: float, keep_per_feature: int
) -> list[Kept]:
    """The clearest samples not kept yet, feature by feature until each has as many as it may."""
    have = {int(feature): sum(one.feature == feature for one in kept) for feature in features}
    used = {one.row for one in kept}
    entries = wanted_nm.tocoo()
    clear = np.flatnonzero(entries.data > threshold)
    order = clear[np.lexsort((entries.row[clear], entries.col[clear], -entries.data[clear]))]
    more = []
    for entry in order:
        row, feature = int(entries.row[entry]), int(features[entries.col[entry]])
        if row not in used and have[feature] < keep_per_feature:
            used.add(row)
            have[feature] += 1
            more.append(Kept(row, feature, float(entries.data[entry]), ()))
    return more


def _messages(
    prompt: Prompt, target: Target, pair: Pair, texts: Sequence[str], index: int
) -> tuple[dict[str, str], ...]:
    assert pair.strong is not None and pair.weak is not None
    shown = [
        Example(texts[pair.weak], pair.weak_peak),
        Example(texts[pair.strong], pair.strong_peak),
        *rotated(target.examples, index // DRAWS, 1),
    ]
    shown.sort(key=lambda example: example.score)
    return messages(prompt, target.about, shown, shown[-1].score)
