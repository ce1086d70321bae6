"""Where a feature fires in the scanned documents, which of these places explain it, and the text around a place.

Documents are split in two by a hash of their content: explanations are made from one half and scored on the other
(`scores/`), so none is scored on text that it was made from. A scan keeps one peak for each feature and document, so
a feature's spans are cut from as many documents, around its peak in each.

Explaining from the strongest spans alone describes the strongest ones alone: a feature that peaks on " killer" may fire
weakly on crime of every kind. So `protocol: quantiles` takes half of the spans from the top and the others from equal
strata of the documents that remain; `paper` takes the top, each cut to the last tokens up to the activating one.

Reads the scan's documents; writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from transformers import PreTrainedTokenizerFast

from fac_jax.config.features import ExplainConfig
from fac_jax.scan.product import Scan
from fac_jax.scan.spans import bounds_around, decode, span_text, turns
from fac_jax.text import document_hash

PAPER_TOKENS = 10
"""Tokens of a span that the paper's code shows; ours end with the activating token, which the code's stop short of."""


@dataclass(frozen=True)
class Passages:
    """The documents of a scan as tokens, and the places p where a feature peaks.

    Places are sorted by feature, those in explaining documents first, strongest first.
    """

    scan: Scan
    explaining_n: Bool[np.ndarray, " n"]
    """Documents that explanations are made from."""
    token_t: Int32[np.ndarray, " t"]
    """Tokens of all documents, end to end."""
    content_t: Bool[np.ndarray, " t"]
    start_n: Int64[np.ndarray, " n+1"]
    """Where each document starts in `token_t`."""
    turn_start_t: Int64[np.ndarray, " t"]
    """Start, in `token_t`, of the user turn that a content token lies in."""
    turn_stop_t: Int64[np.ndarray, " t"]
    """Where that turn ends."""
    first_f: Int64[np.ndarray, " f+1"]
    """Where each feature starts among the places."""
    heldout_f: Int64[np.ndarray, " f"]
    """Where the places in held-out documents start."""
    document_p: Int64[np.ndarray, " p"]
    peak_p: Float32[np.ndarray, " p"]
    position_p: Int64[np.ndarray, " p"]
    """Place of the peak in its document."""
    place_m: Int64[np.ndarray, " p"]
    """The place that each stored peak of the scan became."""

    def places(self, feature: int, explaining: bool) -> Int64[np.ndarray, " q"]:
        """Where a feature peaks in the documents of one half, strongest first."""
        if explaining:
            return np.arange(self.first_f[feature], self.heldout_f[feature])
        return np.arange(self.heldout_f[feature], self.first_f[feature + 1])

    def bounds(self, document_m: np.ndarray, position_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[start, stop) in `token_t` of the spans around some positions."""
        at = self.start_n[document_m] + position_m
        return bounds_around(at, self.turn_start_t[at], self.turn_stop_t[at], self.scan.identity.span_tokens)


def explaining_half(scan: Scan) -> Bool[np.ndarray, " n"]:
    """Which documents explanations are made from: about half of them, by content, whatever their order."""
    return np.array([document_hash(name, "explain") < 0.5 for name in scan.ids_n.tolist()], bool)


def read_passages(scan: Scan) -> Passages:
    """Read a scan's tokens and sort its peaks. Equal peaks come in the order of document ids, not of the corpus."""
    table = scan.documents("token_ids", "content").combine_chunks()
    lists = table["token_ids"].combine_chunks()
    content_t = table["content"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    start_n = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())]).astype(np.int64)
    turn_start_t, turn_stop_t = turns(content_t, start_n)
    features, feature_p, explaining_n = scan.identity.features, scan.peaks_nf.indices, explaining_half(scan)
    document_p = np.repeat(np.arange(len(scan.ids_n)), np.diff(scan.peaks_nf.indptr))
    by_id = np.argsort(np.argsort(scan.ids_n))
    order = np.lexsort((by_id[document_p], -scan.peaks_nf.data, ~explaining_n[document_p], feature_p))
    place_m = np.empty(len(order), np.int64)
    place_m[order] = np.arange(len(order))
    first_f = np.concatenate([[0], np.cumsum(np.bincount(feature_p, minlength=features))]).astype(np.int64)
    return Passages(
        scan=scan,
        explaining_n=explaining_n,
        token_t=lists.flatten().to_numpy(),
        content_t=content_t,
        start_n=start_n,
        turn_start_t=turn_start_t,
        turn_stop_t=turn_stop_t,
        first_f=first_f,
        heldout_f=first_f[:-1] + np.bincount(feature_p[explaining_n[document_p]], minlength=features),
        document_p=document_p[order],
        peak_p=scan.peaks_nf.data[order],
        position_p=scan.positions_m[order].astype(np.int64),
        place_m=place_m,
    )


def spread(count: int, of: int) -> Int64[np.ndarray, " count"]:
    """Places of `count` out of `of` things in order, each from the middle of one of `count` equal strata; all of fewer.

    Over documents sorted by peak, these are quantiles of a feature's activation.
    """
    if of <= count:
        return np.arange(of)
    return ((np.arange(count) + 0.5) * of / count).astype(np.int64)


def explaining_places(passages: Passages, feature: int, settings: ExplainConfig) -> Int64[np.ndarray, " q"]:
    """Places that a feature is explained from, strongest first.

    A feature that is active in no document of the explaining half is explained from the other one, rather than not at
    all; it then has no held-out documents, and no score.
    """
    mine = passages.places(feature, explaining=True)
    if not len(mine):
        mine = passages.places(feature, explaining=False)
    if settings.protocol == "paper":
        return mine[: settings.spans]
    top = -(-settings.spans // 2)
    rest = mine[top:]
    return np.concatenate([mine[:top], rest[spread(settings.spans - top, len(rest))]])


def explaining_spans(
    passages: Passages, features: Sequence[int], settings: ExplainConfig, tokenizer: PreTrainedTokenizerFast
) -> dict[int, list[dict[str, Any]]]:
    """The spans of some features, as they are shown to a language model that is to explain them."""
    return {
        feature: [
            {**_cut(passages, int(place), settings, tokenizer), "activation": round(float(passages.peak_p[place]), 2)}
            for place in explaining_places(passages, feature, settings)
        ]
        for feature in features
    }


def top_spans(scan: Scan, features: Sequence[int], count: int) -> dict[int, list[dict[str, Any]]]:
    """The best spans of some features, as they are shown to a language model."""
    table = scan.features("feature", "spans")
    table = table.take(np.asarray(features, np.int64))  # row f is feature f
    return {
        feature: [
            {"before": s["before"], "token": s["token"], "after": s["after"], "activation": round(s["score"], 2)}
            for s in spans[:count]
        ]
        for feature, spans in zip(table["feature"].to_pylist(), table["spans"].to_pylist(), strict=True)
    }


def _cut(passages: Passages, place: int, settings: ExplainConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    document, position = int(passages.document_p[place]), int(passages.position_p[place])
    start, stop = passages.start_n[document], passages.start_n[document + 1]
    ids, content = passages.token_t[start:stop], passages.content_t[start:stop]
    if settings.protocol != "paper":
        return span_text(ids, content, position, passages.scan.identity.span_tokens, tokenizer)
    first = max(position - PAPER_TOKENS + 1, int(passages.turn_start_t[start + position] - start))
    return {
        "before": decode(ids[first:position], tokenizer), "token": decode(ids[position : position + 1], tokenizer),
        "after": "",
    }  # fmt: skip
