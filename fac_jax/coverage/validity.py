"""What coverage figures of a set hang on besides its content: dead and dense features, very short text, length.

A number that a user would trust less for it should stand beside the number. Reads a scan with single documents; pure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from scipy.sparse import csr_array

DENSE = 0.1
"""Share of all content tokens above which a feature is dense: it is there with any text."""
SHORT = 8
"""Content tokens below which a document is very short."""


def validity(
    relevant_f: Bool[np.ndarray, " f"],
    peaks_nf: csr_array,
    content_tokens_n: Int[np.ndarray, " n"],
    tokens_f: Int[np.ndarray, " f"],
    threshold: float,
) -> dict[str, Any]:
    """Counts over features, and how far a document's length tells how many relevant features it activates.

    dead_features: never active, on any content token (masked text is not encoded, so a feature of the chat template
    alone is dead here). dense_features: active on more than DENSE of the content tokens. Of both also the relevant
    ones. only_in_short_text: relevant and active above the threshold, but on documents of fewer than SHORT content
    tokens alone. length_correlation: Spearman's, between a document's content tokens and the relevant features that it
    activates; length_r2: share of the variance of the logarithm of the latter that a line on that of the former
    explains. Both None where either is constant.
    """
    total = int(content_tokens_n.sum())
    dead_f, dense_f = tokens_f == 0, tokens_f > DENSE * total
    rows = np.repeat(np.arange(peaks_nf.shape[0]), np.diff(peaks_nf.indptr))
    above = (peaks_nf.data > threshold) & relevant_f[peaks_nf.indices]
    row, feature = rows[above], peaks_nf.indices[above]
    features = peaks_nf.shape[1]
    longer_f = np.bincount(feature[content_tokens_n[row] >= SHORT], minlength=features) > 0
    active_f = np.bincount(feature, minlength=features) > 0
    activated_n = np.bincount(row, minlength=peaks_nf.shape[0])
    correlation, r2 = _of_length(content_tokens_n, activated_n)
    return {
        "features": features,
        "dead_features": int(dead_f.sum()),
        "dense_features": int(dense_f.sum()),
        "relevant_dense_features": int((dense_f & relevant_f).sum()),
        "only_in_short_text": int((active_f & ~longer_f).sum()),
        "short_documents": int((content_tokens_n < SHORT).sum()),
        "length_correlation": correlation,
        "length_r2": r2,
    }


def _of_length(tokens_n: np.ndarray, activated_n: np.ndarray) -> tuple[float | None, float | None]:
    if len(set(tokens_n.tolist())) < 2 or len(set(activated_n.tolist())) < 2:
        return None, None
    from scipy.stats import spearmanr  # a second to import, and every command would pay it

    pearson = np.corrcoef(np.log1p(tokens_n), np.log1p(activated_n))[0, 1]
    return float(spearmanr(tokens_n, activated_n).statistic), float(pearson**2)
