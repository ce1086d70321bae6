"""What explanations are tested on: held-out spans that a reader who knows the explanation should tell apart.

All are cut from documents of the half that no explanation is made from (`spans.py`).
- Detection: is the feature active on this span? Activating spans, one from each of equal strata of the feature's
  held-out documents by peak, against as many on which it is silent. Most of those are hard: cut around the peaks of
  its nearest neighbours by decoder cosine. Features that fire on the same documents would be neighbours too, but where
  one of those is silent there is little to choose from, and long documents and common features would decide who is one.
  The others are cut around a random feature's peak.
- Fuzzing: is the feature active at the marked token of this span? Each activating span marked at its peak, and once
  more at another token.

What could give the answer away without the explanation is matched: silent spans are chosen to be as long as the
activating ones, and wrong marks stand where other features peak in the same span. What a scan does not know is not
claimed: it keeps peaks, so a silent span comes from a document without the feature, and at a wrong mark the feature
may be active more weakly.

Reads nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from fac_jax.features.spans import Passages, spread

Kind = Literal["detection", "fuzzing"]
FEWEST = 3
"""Spans of either answer below which an AUROC would say nothing."""
HARD_SHARE = 0.7
"""Of the silent spans, those of neighbours; where the neighbours have fewer, random ones take their places."""
NEIGHBOURS = 8
"""Nearest features by decoder cosine."""
CHOICES = 4
"""Candidates for each silent span (from each neighbour for hard ones), of which one of the right length is taken."""
DRAWS = 16
"""Tries to find a wrong place whose token is another one than the activating token."""
COSINES = 2**25  # of cosines [features, features] at a time: 128 MiB
RIGHT, HARD, RANDOM, WRONG = range(4)
ORIGINS = ("the feature's peak", "a neighbour's peak", "a random feature's peak", "a wrong place")
"""What a trial's span or mark was chosen for, by number."""


@dataclass(frozen=True)
class Trials:
    """Spans to be rated, r of them: one feature after the other, those on which it is active first."""

    feature_r: Int64[np.ndarray, " r"]
    document_r: Int64[np.ndarray, " r"]
    position_r: Int64[np.ndarray, " r"]
    """Token of the document that the span was cut around (detection), or that is marked (fuzzing)."""
    start_r: Int64[np.ndarray, " r"]
    """Start of the span among the tokens of all documents."""
    stop_r: Int64[np.ndarray, " r"]
    origin_r: Int64[np.ndarray, " r"]
    """RIGHT, HARD, RANDOM or WRONG."""

    @property
    def active_r(self) -> Bool[np.ndarray, " r"]:
        """The right answer."""
        return self.origin_r == RIGHT

    @property
    def features(self) -> list[int]:
        """Features with trials."""
        return np.unique(self.feature_r).tolist()

    def where(self, chosen_r: Bool[np.ndarray, " r"]) -> Trials:
        """Some of the trials."""
        return Trials(*(getattr(self, field.name)[chosen_r] for field in fields(self)))


def choose_trials(
    passages: Passages, features: Sequence[int], w_fd: Float[np.ndarray, "f d"], count: int, seed: int
) -> dict[Kind, Trials]:
    """Trials of some features: at most `count` activating spans and as many silent ones, and marks right and wrong.

    A feature with fewer than FEWEST of one of them has no trials of that kind. Which trials a feature has does not
    depend on the other features asked for.
    """
    near = neighbours(w_fd, features, NEIGHBOURS, passages.heldout_f < passages.first_f[1:])
    start_p, stop_p = passages.bounds(passages.document_p, passages.position_p)
    length_p = stop_p - start_p
    active_n = np.zeros(len(passages.explaining_n), bool)
    heldout_n = np.flatnonzero(~passages.explaining_n & (np.diff(passages.scan.peaks_nf.indptr) > 0))
    rows, draws = [np.empty((0, 3), np.int64)], [np.empty((0, DRAWS))]
    for feature, nearest in zip(features, near, strict=True):
        places = passages.places(feature, explaining=False)
        if len(places) < FEWEST or not len(passages.places(feature, explaining=True)):
            continue  # next to no held-out documents, or explained from them
        random = np.random.default_rng([seed, feature])
        right = places[spread(count, len(places))]
        everywhere = passages.document_p[passages.first_f[feature] : passages.first_f[feature + 1]]
        active_n[everywhere] = True
        lengths = random.permutation(length_p[right])  # so that hard ones do not all go to the strongest
        near_places = _of_neighbours(passages, nearest.tolist(), active_n)
        share = lengths[: round(HARD_SHARE * len(lengths))]
        hard = _matched(near_places, passages.document_p[near_places], length_p[near_places], share)
        active_n[passages.document_p[hard]] = True  # taken
        others = _anywhere(passages, heldout_n[~active_n[heldout_n]], CHOICES * len(lengths), random)
        found = _matched(others, passages.document_p[others], length_p[others], lengths[len(hard) :])
        active_n[everywhere] = active_n[passages.document_p[hard]] = False
        origin = np.repeat([RIGHT, HARD, RANDOM], [len(right), len(hard), len(found)])
        rows.append(np.stack([np.full(len(origin), feature), np.concatenate([right, hard, found]), origin], axis=1))
        draws.append(random.random((len(right), DRAWS)))
    feature, place, origin = np.concatenate(rows).T
    where = passages.document_p[place], passages.position_p[place], start_p[place], stop_p[place]
    detection = Trials(feature, *where, origin)
    fuzzing = _with_wrong_marks(passages, detection.where(detection.active_r), np.concatenate(draws))
    return {"detection": _enough(detection), "fuzzing": _enough(fuzzing)}


def neighbours(
    w_fd: Float[np.ndarray, "f d"], features: Sequence[int], count: int, among_f: Bool[np.ndarray, " f"]
) -> Int[np.ndarray, "features count"]:
    """The `count` features nearest to each of some by decoder cosine, nearest first, themselves left out."""
    columns = np.flatnonzero(among_f)
    w_fd = np.asarray(w_fd, np.float32)
    unit_fd = w_fd / np.maximum(np.linalg.norm(w_fd, axis=1, keepdims=True), 1e-12)
    among_cd, asked = unit_fd[columns], np.asarray(features, np.int64)
    count = min(count, max(0, len(columns) - 1))
    if not count:
        return np.empty((len(asked), 0), np.int64)
    step = max(1, COSINES // len(columns))
    found = [np.empty((0, count), np.int64)]
    for first in range(0, len(asked), step):
        block = asked[first : first + step]
        cosine = unit_fd[block] @ among_cd.T
        cosine[block[:, None] == columns] = -np.inf
        best = np.argpartition(-cosine, count, axis=1)[:, :count]
        order = np.lexsort((best, -np.take_along_axis(cosine, best, axis=1)), axis=1)
        found.append(columns[np.take_along_axis(best, order, axis=1)])
    return np.concatenate(found)


def _of_neighbours(passages: Passages, nearest: Sequence[int], active_n: Bool[np.ndarray, " n"]) -> np.ndarray:
    """Places where the nearest features peak and this one is silent, from strata of each neighbour's peaks."""
    found = [np.empty(0, np.int64)]
    for neighbour in nearest:
        mine = passages.places(neighbour, explaining=False)
        mine = mine[~active_n[passages.document_p[mine]]]
        found.append(mine[spread(CHOICES, len(mine))])
    return np.concatenate(found)


def _anywhere(passages: Passages, silent: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """A random place, of whatever feature peaks there, in each of at most `count` random documents of `silent`."""
    documents = random.choice(silent, min(count, len(silent)), replace=False)
    starts = passages.scan.peaks_nf.indptr.astype(np.int64)
    return passages.place_m[random.integers(starts[documents], starts[documents + 1])]


def _matched(places: np.ndarray, document: np.ndarray, length: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted length the place whose span comes nearest to it, the first of equals; one from each document."""
    gap = np.abs(length - wanted[:, None]).astype(np.float64)
    found: list[int] = []
    for row in gap:
        best = int(row.argmin()) if len(places) else 0
        if not len(places) or row[best] == np.inf:
            break
        found.append(best)
        gap[:, document == document[best]] = np.inf
    return places[found]


def _with_wrong_marks(passages: Passages, right: Trials, draw: Float[np.ndarray, "r draws"]) -> Trials:
    """The trials, and each once more with its mark at a random feature's peak in the span, at another token.

    A token is drawn as often as features peak at it. Trials for which no draw finds another token are left out.
    """
    scan = passages.scan
    document_m = np.repeat(np.arange(len(scan.ids_n)), np.diff(scan.peaks_nf.indptr))
    at_m = passages.start_n[document_m] + scan.positions_m
    below_t = np.concatenate([[0], np.cumsum(np.bincount(at_m, minlength=len(passages.token_t)))])
    low, high = below_t[right.start_r][:, None], below_t[right.stop_r][:, None]
    drawn = np.searchsorted(below_t, low + (draw * (high - low)).astype(np.int64), side="right") - 1
    mark = passages.token_t[passages.start_n[right.document_r] + right.position_r]
    other = passages.token_t[drawn] != mark[:, None]
    usable = other.any(axis=1)
    wrong_position = drawn[np.arange(len(drawn)), other.argmax(axis=1)] - passages.start_n[right.document_r]
    both = [np.tile(getattr(right, field.name)[usable], 2) for field in fields(right)]
    trials = Trials(*both)
    half = int(usable.sum())
    position = np.concatenate([right.position_r[usable], wrong_position[usable]])
    trials = replace(trials, position_r=position, origin_r=np.repeat([RIGHT, WRONG], half))
    order = np.lexsort((np.tile(np.arange(half), 2), trials.origin_r, trials.feature_r))
    return Trials(*(getattr(trials, field.name)[order] for field in fields(trials)))


def _enough(trials: Trials) -> Trials:
    """Without the features that have fewer than FEWEST trials of either answer."""
    size = int(trials.feature_r.max(initial=-1)) + 1
    active_f, silent_f = (
        np.bincount(trials.feature_r[answer], minlength=size) for answer in (trials.active_r, ~trials.active_r)
    )
    return trials.where((np.minimum(active_f, silent_f) >= FEWEST)[trials.feature_r])
