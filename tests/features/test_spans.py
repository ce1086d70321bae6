"""Which places explain a feature and which score it: never one document for both; spans as the scan cuts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from fac_jax.config.features import ExplainConfig
from fac_jax.features.scores.heldout import choose_trials
from fac_jax.features.spans import (
    PAPER_TOKENS,
    Passages,
    explaining_places,
    explaining_spans,
    read_passages,
    spread,
)
from fac_jax.scan.product import Scan
from fac_jax.scan.spans import span_bounds
from fac_jax.text import document_hash
from tests.features.topics import (
    FEATURES,
    FIRES_ON,
    SPAN_TOKENS,
    decoder,
    topics_tokenizer,
)
from tests.scan.written_scan import altered


@pytest.fixture(scope="session")
def scan(passages: Passages) -> Scan:
    return passages.scan


def test_bounds_are_those_of_the_scan(scan: Scan, passages: Passages) -> None:
    table = scan.documents("token_ids", "content").to_pylist()
    places = [(n, t) for n, row in enumerate(table[:40]) for t in np.flatnonzero(row["content"])]
    documents, positions = np.array(places).T
    start, stop = passages.bounds(documents, positions)
    first, last = start - passages.start_n[documents], stop - passages.start_n[documents]
    for (n, t), *bounds in zip(places, first.tolist(), last.tolist(), strict=True):
        assert tuple(bounds) == span_bounds(np.array(table[n]["content"]), int(t), SPAN_TOKENS)


def test_places_are_the_peaks_of_the_scan(scan: Scan, passages: Passages) -> None:
    for feature in range(FEATURES):
        column = scan.peaks_nf[:, [feature]].toarray()[:, 0]
        for explaining in (True, False):
            mine = passages.places(feature, explaining)
            documents = passages.document_p[mine]
            half = np.array([(document_hash(name, "explain") < 0.5) == explaining for name in scan.ids_n.tolist()])
            assert set(documents) == set(np.flatnonzero((column > 0) & half))
            assert passages.peak_p[mine].tolist() == sorted(column[documents], reverse=True)
            words = passages.token_t[passages.start_n[documents] + passages.position_p[mine]]
            expected = topics_tokenizer().convert_tokens_to_ids(FIRES_ON[feature : feature + 1])
            assert set(words.tolist()) == set(expected)
    assert (
        passages.token_t[(passages.start_n[passages.document_p] + passages.position_p)][passages.place_m]
    ).tolist() == (scan.token_ids_m.tolist())


@given(count=st.integers(1, 30), of=st.integers(0, 200))
def test_spread_takes_one_from_each_stratum(count: int, of: int) -> None:
    chosen = spread(count, of)
    assert len(chosen) == min(count, of) == len(set(chosen.tolist()))
    if of > count:
        assert [int(place * count / of) for place in chosen + 0.5] == list(range(count))


@pytest.mark.parametrize("protocol", ["quantiles", "paper"])
def test_protocols(passages: Passages, protocol: Any) -> None:
    choice = ExplainConfig(protocol=protocol, spans=6)
    shown = explaining_spans(passages, range(FEATURES), choice, topics_tokenizer())
    assert shown[FEATURES - 1] == [], "a feature that never fires has nothing to show"
    for feature, word in enumerate(FIRES_ON):
        every = passages.peak_p[passages.places(feature, explaining=True)]
        peaks = passages.peak_p[explaining_places(passages, feature, choice)]
        top = 6 if protocol == "paper" else 3
        assert peaks[:top].tolist() == every[:top].tolist() and sorted(peaks, reverse=True) == peaks.tolist()
        assert len(every) < 10 or (peaks[-1] < np.median(every)) == (protocol == "quantiles")
        for span, peak in zip(shown[feature], peaks, strict=True):
            assert span["token"].strip() == word and span["activation"] == round(float(peak), 2)
            if protocol == "paper":
                assert span["after"] == "" and len(span["before"].split()) <= PAPER_TOKENS - 1
    longest = max(len(f"{s['before']} {s['after']}".split()) for spans in shown.values() for s in spans)
    assert longest == (PAPER_TOKENS if protocol == "paper" else SPAN_TOKENS) - 1


@st.composite
def random_peaks(draw: st.DrawFn) -> tuple[int, float, int]:
    return draw(st.integers(0, 2**20)), draw(st.sampled_from([0.004, 0.02, 0.1, 0.7])), draw(st.integers(1, 12))


@settings(max_examples=12, deadline=None)
@given(case=random_peaks(), protocol=st.sampled_from(["quantiles", "paper"]))
def test_no_document_explains_and_scores_a_feature(scan: Scan, case: tuple[int, float, int], protocol: Any) -> None:
    """Whatever the peaks, dense or rare; and what is scored is as long on documents that explain nothing at all."""
    seed, share, spans = case
    random = np.random.default_rng(seed)
    dense = (random.random((len(scan.ids_n), FEATURES)) < share) * random.random((len(scan.ids_n), FEATURES))
    peaks = csr_array(dense.astype(np.float32))
    content = [np.flatnonzero(row) for row in scan.documents("content")["content"].to_pylist()]
    rows = np.repeat(np.arange(len(scan.ids_n)), np.diff(peaks.indptr))
    pick = (random.random(len(rows)) * np.array([len(places) for places in content])[rows]).astype(int)
    positions = np.array([content[row][place] for row, place in zip(rows, pick, strict=True)], np.int32)
    noise = read_passages(altered(scan, peaks_nf=peaks, positions_m=positions))
    choice = ExplainConfig(protocol=protocol, spans=spans)
    trials = choose_trials(noise, range(FEATURES), decoder(), spans, seed=1)
    for feature in range(FEATURES):
        explains = set(noise.document_p[explaining_places(noise, feature, choice)].tolist())
        for some in trials.values():
            scores = some.document_r[some.feature_r == feature]
            assert not explains & set(scores.tolist())
            assert not noise.explaining_n[scores].any()
        active = (dense[:, feature] > 0) & noise.explaining_n
        assert bool(explains) == bool((dense[:, feature] > 0).any())
        assert active.any() or not any((some.feature_r == feature).any() for some in trials.values())


def test_the_split_does_not_depend_on_the_order_of_documents(tmp_path: Path, scan: Scan, passages: Passages) -> None:
    ids = scan.ids_n[::-1]
    turned = altered(scan, ids_n=ids)
    assert read_passages(turned).explaining_n.tolist() == passages.explaining_n[::-1].tolist()
    assert 0.4 < passages.explaining_n.mean() < 0.6
