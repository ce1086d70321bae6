"""Statistics of peaks by sorting all of them at once, in numpy: what the device and the merging are compared with."""

from __future__ import annotations

import numpy as np

from fac_jax.scan.spans import EDGES, NO_ID, FeatureStats


def stats_of(
    feature: np.ndarray,
    peak: np.ndarray,
    position: np.ndarray,
    span: np.ndarray,
    id: np.ndarray,
    tokens_f: np.ndarray,
    top: int,
) -> FeatureStats:
    """Statistics of peaks above 0, one per (document, feature), in any order; `span` is what stands in `span_fn`."""
    features, bins = len(tokens_f), len(EDGES) + 1
    max_f = np.zeros(features, np.float32)
    np.maximum.at(max_f, feature, peak)
    cells = feature.astype(np.int64) * bins + np.searchsorted(EDGES, peak, side="left")
    order = np.lexsort((position, id, -peak, feature))
    best = order[_rank_in_group(feature[order]) < top]
    at = (feature[best], _rank_in_group(feature[best]))

    def places(values: np.ndarray, empty: object, dtype: type) -> np.ndarray:
        table: np.ndarray = np.full((features, top), empty, dtype)
        table[at] = values[best]
        return table

    return FeatureStats(
        max_f=max_f,
        documents_f=np.bincount(feature, minlength=features),
        tokens_f=tokens_f,
        histogram_fh=np.bincount(cells, minlength=features * bins).reshape(features, bins),
        score_fn=places(peak, 0, np.float32),
        id_fn=places(id, NO_ID, np.uint64),
        position_fn=places(position, -1, np.int64),
        span_fn=places(span, -1, np.int64),
    )


def _rank_in_group(sorted_values: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal values."""
    index = np.arange(len(sorted_values))
    new = np.append(True, sorted_values[1:] != sorted_values[:-1])[: len(sorted_values)]
    return index - np.maximum.accumulate(np.where(new, index, 0))
