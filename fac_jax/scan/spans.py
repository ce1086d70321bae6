"""What is kept of each feature over a corpus, merged in any order, and the spans of text that show it.

`FeatureStats` holds per feature its maximum, on how many documents and content tokens it is active (above 0), a
histogram of its peaks per document over fixed bins, and its best documents. `merge` is associative and commutative, so
parts of a corpus may be scanned apart and in any order. A span is the user's text around an activating token, that
token included (the official code's spans stop before it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64, Shaped, UInt64
from transformers import PreTrainedTokenizerFast

EDGES = 2.0 ** np.arange(-8, 12.5, 0.5)
"""Edges of the histogram, half octaves: bin j counts peaks in (EDGES[j-1], EDGES[j]], the last those above them all."""
NO_ID = np.uint64(2**64 - 1)  # sorts last; stands where a feature has fewer documents than places


@dataclass(frozen=True)
class FeatureStats:
    """Per feature; `n` places for its best documents, by (score descending, document id, position)."""

    max_f: Float32[np.ndarray, " f"]
    documents_f: Int64[np.ndarray, " f"]
    tokens_f: Int64[np.ndarray, " f"]
    histogram_fh: Int64[np.ndarray, "f h"]
    score_fn: Float32[np.ndarray, "f n"]
    id_fn: UInt64[np.ndarray, "f n"]
    document_fn: Int64[np.ndarray, "f n"]
    """Ordinal of the document in the corpus, -1 where there is none."""
    position_fn: Int64[np.ndarray, "f n"]


def stats_of(
    feature: Int[np.ndarray, " m"],
    peak: Float32[np.ndarray, " m"],
    position: Int[np.ndarray, " m"],
    document: Int[np.ndarray, " m"],
    id: UInt64[np.ndarray, " m"],
    tokens_f: Int64[np.ndarray, " f"],
    top: int,
) -> FeatureStats:
    """Statistics of m peaks above 0, one per (document, feature), in any order."""
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
        document_fn=places(document, -1, np.int64),
        position_fn=places(position, -1, np.int64),
    )


def merge(a: FeatureStats, b: FeatureStats) -> FeatureStats:
    """Statistics of two disjoint sets of documents together."""
    joined = {
        name: np.concatenate([getattr(a, name), getattr(b, name)], axis=1)
        for name in ("score_fn", "id_fn", "document_fn", "position_fn")
    }
    order = np.lexsort((joined["position_fn"], joined["id_fn"], -joined["score_fn"]))[:, : a.score_fn.shape[1]]
    return FeatureStats(
        max_f=np.maximum(a.max_f, b.max_f),
        documents_f=a.documents_f + b.documents_f,
        tokens_f=a.tokens_f + b.tokens_f,
        histogram_fh=a.histogram_fh + b.histogram_fh,
        **{name: np.take_along_axis(table, order, axis=1) for name, table in joined.items()},
    )


def span_bounds(content: Bool[np.ndarray, " t"], position: int, span_tokens: int) -> tuple[int, int]:
    """[start, stop) of a span of at most `span_tokens` tokens that holds `position`, inside the same user turn.

    A causal model's activation is explained by what comes before it, so three quarters of the room lie there; what
    one side cannot use the other gets.
    """
    first = position - int(np.argmin(np.append(content[position::-1], False))) + 1
    last = position + int(np.argmin(np.append(content[position:], False)))
    after = min(span_tokens // 4, last - position - 1)
    before = min(span_tokens - 1 - after, position - first)
    after = min(span_tokens - 1 - before, last - position - 1)
    return position - before, position + 1 + after


def span_text(
    ids: Int[np.ndarray, " t"],
    content: Bool[np.ndarray, " t"],
    position: int,
    span_tokens: int,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, str]:
    """The text before the activating token, the token, and the text after it."""
    start, stop = span_bounds(content, position, span_tokens)
    cuts = {"before": ids[start:position], "token": ids[position : position + 1], "after": ids[position + 1 : stop]}
    return {name: decode(cut, tokenizer) for name, cut in cuts.items()}


def decode(ids: Int[np.ndarray, " t"], tokenizer: PreTrainedTokenizerFast) -> str:
    """Text of token ids, spaces as they are; a token that is part of a character shows as the replacement character."""
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _rank_in_group(sorted_values: Shaped[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
    """0, 1, 2, ... within each run of equal values."""
    index = np.arange(len(sorted_values))
    new = np.append(True, sorted_values[1:] != sorted_values[:-1])[: len(sorted_values)]
    return index - np.maximum.accumulate(np.where(new, index, 0))
