"""Which documents of a pool to take, in which order: one function per method.

Symbols: g_i(x) is the peak of feature i on document x, A_i(x) = 1[g_i(x) > threshold]; a pool holds the peaks above the
threshold (`pool.py`). All methods give rows of the pool, the greedy ones most useful first and as they are asked for,
that fit the budget together. Equally good ones go to the smaller document id, so that the order of the rows of a scan
changes nothing.

`greedy` and `magnitude` maximise sum_i max_{x in S} level_i(x), with whole levels: 1 where a feature is active, or its
peak in 65,535ths of the highest. That is monotone and submodular, so greedy choice is within 1 - 1/e of the best.
Gains are not bounded lazily (Minoux 1978) but kept exact: taking a document touches, through the transposed matrix,
those peaks that its own ones reach for the first time, and a peak that is reached is dropped. So all choices together
touch each peak once (coverage), or a few times (magnitude), and finding the best one is an argmax over the documents.
Levels are whole so that gains are exact and no sum depends on the order of its terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int64
from scipy.sparse import csr_array

from fac_jax.coverage.pool import Pool

TOP = 2**16 - 1
"""Level of a feature's highest peak."""


@dataclass(frozen=True)
class Budget:
    """What may be taken: documents whose costs (at least 1 each) add up to `limit` at most; None: any number."""

    cost_n: Int64[np.ndarray, " n"]
    limit: int | None

    @property
    def total(self) -> int:
        """Cost of all that may be taken."""
        return int(self.cost_n.sum()) if self.limit is None else self.limit

    @property
    def least(self) -> int:
        """Cost of the cheapest document."""
        return int(self.cost_n.min()) if len(self.cost_n) else 1


@dataclass(frozen=True)
class Pick:
    """One document taken, and the target features that it covers first."""

    row: int
    features: list[int]


def greedy(pool: Pool, budget: Budget) -> Iterable[int]:
    """Maximum coverage: the document that activates the most features not covered yet, again and again.

    Costs 1: for every budget at least 1 - 1/e = 63% of what the best choice of as many documents covers, and no
    polynomial algorithm does better in general (Nemhauser, Wolsey, Fisher 1978; Feige 1998); a larger budget extends
    the choice of a smaller one. Other costs, with a limit: the better of greedy by features a token and greedy by
    features, which starts with the best single document, both going on with what still fits: at least (1 - 1/e) / 2 =
    31.6% of the best (Khuller, Moss, Naor 1999; for all submodular functions Leskovec et al. 2007). The 1 - 1/e of the
    former needs all triples of documents as starts, which are not tried. A larger budget may choose anew then.
    """
    peaks = pool.peaks_nf
    ones = np.ones(peaks.nnz, np.uint16)
    return _ascend(csr_array((ones, peaks.indices, peaks.indptr), shape=peaks.shape), budget)


def greedy_cover(
    peaks_nf: csr_array, features: Int[np.ndarray, " m"], threshold: float, ids: Sequence[str]
) -> list[Pick]:
    """`greedy` without a budget for documents in memory; rows are those of `peaks_nf`."""
    target_f = np.zeros(peaks_nf.shape[1], bool)
    target_f[features] = True
    order = np.argsort(np.array(ids), kind="stable")
    peaks = peaks_nf[order]
    peaks.data[~((peaks.data > threshold) & target_f[peaks.indices])] = 0
    peaks.eliminate_zeros()
    ones = np.ones(len(order), np.int64)
    pool = Pool(peaks, order.astype(np.int64), np.array(ids)[order], ones)
    picks = covering(pool, greedy(pool, Budget(ones, None)), target_f, until_covered=True)
    return [Pick(int(order[one.row]), one.features) for one in picks]


def magnitude(pool: Pool, budget: Budget) -> Iterable[int]:
    """Facility location: maximise sum_i max_{x in S} g_i(x) / max_{x in pool} g_i(x), greedily.

    Each feature is normalised by its highest peak in the pool (which is the anchor unless another data set is named),
    so it counts 1 at most; peaks up to the threshold count 0. In whole 65,535ths. Monotone and submodular: the
    guarantees of `greedy`, for this sum.
    """
    peaks = pool.peaks_nf
    top_f = np.zeros(peaks.shape[1], np.float32)
    np.maximum.at(top_f, peaks.indices, peaks.data)
    level = peaks.data / top_f[peaks.indices]
    level *= TOP
    level = np.maximum(np.rint(level, out=level), 1, out=level).astype(np.uint16)
    return _ascend(csr_array((level, peaks.indices, peaks.indptr), shape=peaks.shape), budget)


def greed_select(pool: Pool, budget: Budget) -> Iterable[int]:
    """SAE-GreedSelect (arXiv 2502.14050), a rival: `greedy` over every feature of the SAE, whatever is sought.

    The paper: take the sample that adds the most features not activated yet, with activations above a threshold (10
    for its SAE; here coverage.threshold). Ours: ties by id, and the end where no document adds a feature. The pool must
    hold all features, not only the target.
    """
    return greedy(pool, budget)


def sim_scale(pool: Pool, budget: Budget, similarity: float) -> list[int]:
    """SAE-SimScale (arXiv 2502.14050), a rival: one pass that leaves out what resembles the documents taken before.

    The paper scales the choice up by skipping a sample whose features are too similar to those chosen already. The rule
    here, in full, as nothing finer of it is published in code: documents with the most active features first (ties by
    id); one is taken when less than `similarity` of its active features are active on the documents taken before, and
    it fits the budget. Every feature of the SAE counts, so the pool must hold all. No guarantee.
    """
    indices, starts = pool.peaks_nf.indices, pool.peaks_nf.indptr.tolist()
    active_n = np.diff(pool.peaks_nf.indptr)
    seen_f = np.zeros(pool.peaks_nf.shape[1], bool)
    cost_n, least, left, taken = budget.cost_n.tolist(), budget.least, budget.total, []
    for row in np.argsort(-active_n, kind="stable")[: np.count_nonzero(active_n)].tolist():
        features = indices[starts[row] : starts[row + 1]]
        if cost_n[row] <= left and np.count_nonzero(seen_f[features]) < similarity * len(features):
            seen_f[features] = True
            taken.append(row)
            left -= cost_n[row]
            if left < least:
                break
    return taken


def random(pool: Pool, budget: Budget, seed: int) -> list[int]:
    """The control: documents in a random order, as long as they fit."""
    cost_n, least, left, taken = budget.cost_n.tolist(), budget.least, budget.total, []
    for row in np.random.default_rng(seed).permutation(len(cost_n)).tolist():
        if cost_n[row] <= left:
            taken.append(row)
            left -= cost_n[row]
            if left < least:
                break
    return taken


def covering(pool: Pool, rows: Iterable[int], target_f: Bool[np.ndarray, " f"], until_covered: bool) -> list[Pick]:
    """What each document taken adds to the target; `until_covered`: up to the one with the last feature."""
    indices, starts = pool.peaks_nf.indices, pool.peaks_nf.indptr
    open_f = target_f & coverable(pool)
    left = np.count_nonzero(open_f)
    picks = []
    for row in rows:
        if until_covered and not left:
            break
        features = indices[starts[row] : starts[row + 1]]
        new = features[open_f[features]]
        open_f[new] = False
        left -= len(new)
        picks.append(Pick(row, sorted(new.tolist())))
    return picks


def coverable(pool: Pool) -> Bool[np.ndarray, " f"]:
    """Features that are active on some document."""
    active_f = np.zeros(pool.peaks_nf.shape[1], bool)
    active_f[pool.peaks_nf.indices] = True
    return active_f


def _ascend(levels_nf: csr_array, budget: Budget) -> Iterable[int]:
    if (budget.cost_n == 1).all():
        return _climb(levels_nf, budget, by_cost=False)
    if budget.limit is None:  # all that can be reached is reached, with the cheap ones first
        return _climb(levels_nf, budget, by_cost=True)
    plain, by_cost = (list(_climb(levels_nf, budget, by_cost=way)) for way in (False, True))
    return by_cost if _reached(levels_nf, by_cost) >= _reached(levels_nf, plain) else plain


def _reached(levels_nf: csr_array, rows: Sequence[int]) -> int:
    """sum_i max_{x in rows} level_i(x)."""
    reached_f = np.zeros(levels_nf.shape[1], np.int64)
    taken = levels_nf[np.array(rows, np.int64)]
    np.maximum.at(reached_f, taken.indices, taken.data.astype(np.int64))
    return int(reached_f.sum())


def _climb(levels_nf: csr_array, budget: Budget, by_cost: bool) -> Iterator[int]:
    """The row with the highest gain (over its cost) of those that still fit, again and again."""
    features, own_levels, starts = levels_nf.indices, levels_nf.data, levels_nf.indptr
    gain_n = levels_nf @ np.ones(levels_nf.shape[1], np.int64)
    divisor_n = budget.cost_n.astype(np.float64) if by_cost else np.ones(len(gain_n))
    score_n = gain_n / divisor_n  # quotients of whole numbers below 2**26 that are not equal differ as float64 as well
    columns = levels_nf.tocsc()  # of each feature, the documents whose level is above what is reached
    rows, levels = columns.indices, columns.data
    begin_f, end_f = columns.indptr[:-1].tolist(), columns.indptr[1:].tolist()
    reached_f = [0] * levels_nf.shape[1]
    left = budget.total
    while len(score_n):
        row = int(np.argmax(score_n))
        if score_n[row] <= 0:
            break
        if budget.cost_n[row] > left:
            dear_n = budget.cost_n > left
            divisor_n[dear_n], score_n[dear_n] = np.inf, 0
            continue
        yield row
        left -= int(budget.cost_n[row])
        span = slice(starts[row], starts[row + 1])
        for feature, level in zip(features[span].tolist(), own_levels[span].tolist(), strict=True):
            reached = reached_f[feature]
            if level <= reached:
                continue
            begin, end = begin_f[feature], end_f[feature]
            others, theirs = rows[begin:end], levels[begin:end]
            gains = gain_n[others] - (np.minimum(theirs, level).astype(np.int64) - reached)
            gain_n[others] = gains
            score_n[others] = gains / divisor_n[others]
            above = theirs > level
            kept = begin + int(np.count_nonzero(above))
            rows[begin:kept], levels[begin:kept] = others[above], theirs[above]
            end_f[feature], reached_f[feature] = kept, level
