"""Does a feature's peak go with a label? Rank tests for all features at once, on sparse peaks with their zeros counted.

Reads and writes nothing. `peaks_nf` is sparse; what is not stored is 0 and ties with every other 0.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy.sparse import csc_array, csr_array
from scipy.special import ndtr

RARE = 10.0
"""Positives expected among a feature's active documents, below which the normal approximation is not trusted."""


def mann_whitney(peaks_nf: csr_array, positive_n: Bool[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """(AUROC, one-sided p) per feature: are the peaks of positive documents higher? Float64 [f] each.

    U is the number of (positive, negative) pairs in which the positive document's peak is higher, ties counting one
    half; AUROC = U / (number of pairs). p is the normal approximation with tie and continuity corrections, as
    `scipy.stats.mannwhitneyu(method="asymptotic", alternative="greater")`. Both classes must be there.
    """
    n, positives = len(positive_n), int(positive_n.sum())
    rank_sum_f, ties_f = _rank_sums(csc_array(peaks_nf), positive_n)
    u_f = rank_sum_f - positives * (positives + 1) / 2
    pairs = positives * (n - positives)
    variance_f = pairs / 12 * (n + 1 - ties_f / (n * (n - 1)))
    with np.errstate(divide="ignore", invalid="ignore"):
        z_f = (u_f - pairs / 2 - 0.5) / np.sqrt(variance_f)
    return u_f / pairs, np.where(variance_f > 0, ndtr(-z_f), 1.0)


def _rank_sums(peaks_nf: csc_array, positive_n: Bool[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the positives' ranks (ties get their mean), and sum of t^3 - t over the groups of ties, per feature."""
    n, features = peaks_nf.shape
    stored_f = np.diff(peaks_nf.indptr)
    zeros_f = n - stored_f
    column = np.repeat(np.arange(features), stored_f)
    order = np.lexsort((peaks_nf.data, column))
    value, positive = peaks_nf.data[order], positive_n[peaks_nf.indices[order]]
    new = np.append(True, (value[1:] != value[:-1]) | (column[1:] != column[:-1]))[: len(value)]
    group = np.cumsum(new) - 1
    size = np.bincount(group)
    start = np.flatnonzero(new)
    within = start - peaks_nf.indptr[column[start]]  # stored values of the column below the group
    rank = zeros_f[column[start]] + within + (size + 1) / 2
    stored_sum_f = np.bincount(column, weights=positive * rank[group], minlength=features)
    positive_zeros_f = positive_n.sum() - np.bincount(column, weights=positive, minlength=features)
    cubes_f = np.bincount(column[start], weights=size**3.0 - size, minlength=features) + zeros_f**3.0 - zeros_f
    return stored_sum_f + positive_zeros_f * (zeros_f + 1) / 2, cubes_f


def active_excess(peaks_nf: csr_array, positive_n: Bool[np.ndarray, " n"]) -> Float64[np.ndarray, " f"]:
    """One-sided Fisher exact p per feature: are more positive documents active (above 0) than chance would have?"""
    active_f, active_positive_f = _active_counts(peaks_nf, positive_n)
    from scipy.stats import hypergeom  # a second to import, and every command would pay it

    return hypergeom.sf(active_positive_f - 1, len(positive_n), active_f, positive_n.sum())


def association(peaks_nf: csr_array, positive_n: Bool[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """(AUROC, p) per feature: the Mann-Whitney test, made safe for features that are active on few documents.

    With a handful of active documents and few positives, the normal tail is far too small (3 active documents, all
    positive, at 5% positives: 1e-14 where chance gives 1e-4). Where fewer than RARE positives are expected among the
    active documents, p is the larger of this test's and Fisher's exact one, which holds at any count.
    """
    auroc_f, p_f = mann_whitney(peaks_nf, positive_n)
    active_f, _ = _active_counts(peaks_nf, positive_n)
    rare_f = active_f * positive_n.mean() < RARE
    return auroc_f, np.where(rare_f, np.maximum(p_f, active_excess(peaks_nf, positive_n)), p_f)


def _active_counts(peaks_nf: csr_array, positive_n: Bool[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.repeat(np.arange(peaks_nf.shape[0]), np.diff(peaks_nf.indptr))
    active_f = np.bincount(peaks_nf.indices, minlength=peaks_nf.shape[1])
    return active_f, np.bincount(peaks_nf.indices[positive_n[rows]], minlength=peaks_nf.shape[1])


def benjamini_hochberg(p_m: Float[np.ndarray, " m"]) -> Float64[np.ndarray, " m"]:
    """Adjusted p (q): rejecting q <= a keeps the expected share of false rejections at a (Benjamini, Hochberg 1995)."""
    order = np.argsort(p_m)
    scaled = p_m[order] * len(p_m) / np.arange(1, len(p_m) + 1)
    q_m = np.empty(len(p_m))
    q_m[order] = np.minimum(1, np.minimum.accumulate(scaled[::-1])[::-1])
    return q_m
