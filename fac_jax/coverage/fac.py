"""Feature activation coverage: set arithmetic over stored peaks, one function per number (paper, section 3).

Symbols: g_i(x) is the peak of feature i on document x, `peaks_nf[x, i]` (sparse: zeros are not stored);
A_i(x) = 1[g_i(x) > threshold], strictly. F is the set of features judged relevant to the task.
F_anchor, F_seed and F_gen are the features of F that are active on at least one document of the anchor, the seed and
the generated set; missing = F_anchor \\ F_seed.

Sets are boolean masks over features. A ratio whose denominator is empty is undefined and returned as None, never 0.
Nothing here reads or writes a file, or runs a model: coverage at another threshold, or of a subset, is arithmetic.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64
from scipy.sparse import csr_array
from scipy.special import gammaln

from fac_jax.errors import UserError

AT_ONCE = 2**20
"""Probabilities that are held at a time: large data sets have a million different counts of documents."""


def active_documents(peaks_nf: csr_array, threshold: float) -> Int[np.ndarray, " f"]:
    """Number of documents on which each feature's peak exceeds `threshold`, strictly."""
    if not threshold >= 0:
        raise UserError(f"the threshold is {threshold}; peaks are at least 0, so it must be at least 0")
    above = peaks_nf.indices[peaks_nf.data > threshold]
    return np.bincount(above, minlength=peaks_nf.shape[1])


def active(peaks_nf: csr_array, threshold: float) -> Bool[np.ndarray, " f"]:
    """Features active on at least one document."""
    return active_documents(peaks_nf, threshold) > 0


def missing(
    relevant_f: Bool[np.ndarray, " f"], anchor_f: Bool[np.ndarray, " f"], seed_f: Bool[np.ndarray, " f"]
) -> Bool[np.ndarray, " f"]:
    """Relevant features that the anchor activates and the seed does not: F_anchor without F_seed."""
    return relevant_f & anchor_f & ~seed_f


def fac(
    relevant_f: Bool[np.ndarray, " f"], anchor_f: Bool[np.ndarray, " f"], generated_f: Bool[np.ndarray, " f"]
) -> float | None:
    """|F_gen ∩ F_anchor| / |F_anchor|, in [0, 1]: the share of what could be covered that is covered."""
    could = relevant_f & anchor_f
    return _ratio(_size(could & generated_f), _size(could))


def raw_fac_ratio(
    relevant_f: Bool[np.ndarray, " f"], anchor_f: Bool[np.ndarray, " f"], generated_f: Bool[np.ndarray, " f"]
) -> float | None:
    """|F_gen| / |F_anchor|: the paper's formula as written, which may exceed 1."""
    return _ratio(_size(relevant_f & generated_f), _size(relevant_f & anchor_f))


def target_hit_rate(missing_f: Bool[np.ndarray, " f"], generated_f: Bool[np.ndarray, " f"]) -> float | None:
    """Share of the missing features that the generated set activates (the percentages of the paper's ablations)."""
    return _ratio(_size(missing_f & generated_f), _size(missing_f))


def fac_freq(
    relevant_f: Bool[np.ndarray, " f"], anchor_f: Bool[np.ndarray, " f"], peaks_nf: csr_array, threshold: float
) -> float | None:
    """Mean over F_anchor of the share of generated documents that activate the feature; None without documents."""
    could = relevant_f & anchor_f
    hits = active_documents(peaks_nf, threshold)[could].sum()
    return _ratio(hits, _size(could) * peaks_nf.shape[0])


def fac_magnitude(
    relevant_f: Bool[np.ndarray, " f"], anchor_f: Bool[np.ndarray, " f"], peaks_nf: csr_array, threshold: float
) -> float | None:
    """Mean over F_anchor, and over generated documents, of the peak where it is active and 0 elsewhere.

    In units of activation: comparable only between sets scored with the same SAE.
    """
    could = relevant_f & anchor_f
    counted = (peaks_nf.data > threshold) & could[peaks_nf.indices]
    return _ratio(peaks_nf.data[counted].sum(dtype=np.float64), _size(could) * peaks_nf.shape[0])


def draws_of_length(
    tokens_n: Int[np.ndarray, " n"], budget: int, draws: int, seed: int
) -> list[Int[np.ndarray, " chosen"]]:
    """Random subsets of documents that hold at most `budget` tokens together.

    The number of active features grows with the length of the text (correlation .92 in arXiv 2502.14050), so two sets
    are compared fairly only at the same length. Each draw takes documents in a random order as long as they fit; a
    budget for the whole set gives the whole set, once.
    """
    if tokens_n.sum() <= budget:
        return [np.arange(len(tokens_n))]
    generator = np.random.default_rng(seed)
    chosen = []
    for _ in range(draws):
        order = generator.permutation(len(tokens_n))
        chosen.append(np.sort(order[np.cumsum(tokens_n[order]) <= budget]))
    return chosen


def expected_covered(
    documents_f: Int[np.ndarray, " f"], total: int, sizes: Int[np.ndarray, " m"]
) -> Float64[np.ndarray, " m"]:
    """Features that so many documents, drawn at random from `total` without return, cover in expectation.

    A feature that is active on c of n documents is missed by m of them with probability C(n - c, m) / C(n, m); summed
    over features it is exact, so no order of the documents has to be drawn (in ecology: rarefaction, Hurlbert 1971).
    """
    count, times = np.unique(documents_f[documents_f > 0], return_counts=True)  # features alike in c are alike
    size, expected = np.asarray(sizes, np.float64)[None], np.zeros(len(sizes))
    step = max(AT_ONCE // max(len(sizes), 1), 1)
    for first in range(0, len(count), step):
        left = total - count[first : first + step, None]
        drawn = np.minimum(size, left)  # more documents than do without it: it cannot be missed
        log_missed = gammaln(left + 1) - gammaln(left - drawn + 1) + gammaln(total - drawn + 1) - gammaln(total + 1)
        missed = np.where(size > left, 0.0, np.exp(log_missed))
        expected += ((1 - missed) * times[first : first + step, None]).sum(axis=0)
    return expected


def curve_sizes(total: int, points: int) -> Int64[np.ndarray, " m"]:
    """Numbers of documents from 1 to `total`, at most `points`, evenly spaced on a logarithmic axis."""
    return np.unique(np.geomspace(1, max(total, 1), points).round().astype(np.int64))


def bootstrap_fac(
    relevant_f: Bool[np.ndarray, " f"],
    anchor_f: Bool[np.ndarray, " f"],
    peaks_nf: csr_array,
    threshold: float,
    draws: int,
    seed: int,
) -> tuple[float, float] | None:
    """95% interval of fac over documents that might have been in the set instead of those that are.

    Documents are drawn with return, as many as there are. Such a sample holds 63% of the different documents and so
    covers less: the quantiles are therefore those of its differences from the mean sample, put around the set's own
    fac, within [0, 1]. None where fac is undefined.
    """
    could = relevant_f & anchor_f
    found = fac(relevant_f, anchor_f, active(peaks_nf, threshold))
    if found is None:
        return None
    n = peaks_nf.shape[0]
    above = csr_array(peaks_nf[:, np.flatnonzero(could)] > threshold).astype(np.int32)
    generator = np.random.default_rng(seed)
    shares = np.empty(draws)
    for draw in range(draws):
        drawn_n = np.bincount(generator.integers(0, n, n), minlength=n) if n else np.zeros(0, int)
        shares[draw] = np.count_nonzero(drawn_n @ above) / _size(could)
    low, high = np.clip(np.quantile(shares - shares.mean(), [0.025, 0.975]) + found, 0, 1).tolist()
    return low, high


def _size(features_f: Bool[np.ndarray, " f"]) -> int:
    return int(np.count_nonzero(features_f))


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None
