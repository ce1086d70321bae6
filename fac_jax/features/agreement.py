"""How far a judge agrees with itself when the spans of a feature are shown in another order: Cohen's kappa.

kappa = 1 - observed / expected disagreement, the latter of two judges who give each label as often as they do, but at
random. `kappa` counts every disagreement as one (unweighted); `kappa_linear` by how many steps of the scale lie between
the two labels. Both are undefined, and None, where no feature was judged twice, and where both passes give one and the
same label to all features: chance then explains everything. Of three passes or more, each is the mean over those pairs
of passes for which it is defined. Reads and writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Agreement:
    """Over the features that were judged in two orders or more, every reply readable."""

    features: int
    same_label: float | None
    """Share of them whose passes all give one label."""
    same_relevance: float | None
    """Share whose passes all find them relevant, or all not."""
    kappa: float | None
    kappa_linear: float | None


def agreement(labels: Sequence[Sequence[int]], labels_there_are: int, lowest: int) -> Agreement:
    """`labels`: for each feature the label of each pass, as its place on the scale; relevant up to `lowest`."""
    twice = [np.asarray(passes) for passes in labels if len(passes) > 1]
    if not twice:
        return Agreement(0, None, None, None, None)
    most = max(map(len, twice))
    pairs = []
    for first, second in itertools.combinations(range(most), 2):
        both = [passes for passes in twice if len(passes) > second]
        pairs.append((np.array([one[first] for one in both]), np.array([one[second] for one in both])))
    return Agreement(
        features=len(twice),
        same_label=float(np.mean([len(set(passes)) == 1 for passes in twice])),
        same_relevance=float(np.mean([len(set(passes <= lowest)) == 1 for passes in twice])),
        kappa=_mean([cohen_kappa(*pair, labels_there_are) for pair in pairs]),
        kappa_linear=_mean([cohen_kappa(*pair, labels_there_are, "linear") for pair in pairs]),
    )


def cohen_kappa(
    first_n: Int[np.ndarray, " n"],
    second_n: Int[np.ndarray, " n"],
    labels: int,
    weights: Literal["linear"] | None = None,
) -> float | None:
    """Kappa of two judges of n things, each label given as its place among `labels`; None where it is undefined."""
    if not len(first_n):
        return None
    observed = np.zeros((labels, labels))
    np.add.at(observed, (first_n, second_n), 1 / len(first_n))
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0))
    steps = np.abs(np.subtract.outer(np.arange(labels), np.arange(labels)))
    cost = steps if weights == "linear" else (steps > 0)
    by_chance = float((cost * expected).sum())
    return 1 - float((cost * observed).sum()) / by_chance if by_chance > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
