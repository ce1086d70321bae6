"""Feature statistics: against brute force, merged in any order and grouping; spans hold the activating token."""

from __future__ import annotations

import dataclasses
from functools import reduce

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_jax.packing import EncodedDocument
from fac_jax.scan.spans import (
    EDGES,
    TEXTS,
    FeatureStats,
    empty_summary,
    extend,
    merge,
    merge_summaries,
    span_bounds,
    span_text,
    span_texts,
)
from fac_jax.text import Turn, make_document
from tests.features.topics import topics_tokenizer
from tests.scan.reference_stats import stats_of

FEATURES, TOP = 5, 3
peak_values = st.sampled_from([0.25, 0.5, 1.0, 1.25, 4.0, 5000.0])
cells = st.tuples(st.integers(0, 11), st.integers(0, FEATURES - 1))
corpora = st.dictionaries(cells, st.tuples(peak_values, st.integers(0, 9)), max_size=40)


def stats(peaks: dict[tuple[int, int], tuple[float, int]]) -> FeatureStats:
    rows = np.array([(d, f, p, t) for (d, f), (p, t) in peaks.items()], np.float64).reshape(-1, 4)
    document = rows[:, 0].astype(np.int64)
    feature = rows[:, 1].astype(np.int64)
    ids = (document * 7919 % 101).astype(np.uint64)  # the order of ids is not that of the documents
    tokens_f = np.bincount(feature, minlength=FEATURES)
    return stats_of(feature, rows[:, 2].astype(np.float32), rows[:, 3].astype(np.int64), document, ids, tokens_f, TOP)


def same(a: FeatureStats, b: FeatureStats) -> bool:
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(FeatureStats))
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


@given(corpora)
def test_against_brute_force(peaks: dict[tuple[int, int], tuple[float, int]]) -> None:
    found = stats(peaks)
    for f in range(FEATURES):
        mine = [(p, d * 7919 % 101, t, d) for (d, g), (p, t) in peaks.items() if g == f]
        assert found.max_f[f] == max((p for p, *_ in mine), default=0)
        assert found.documents_f[f] == len(mine)
        best = sorted(mine, key=lambda row: (-row[0], row[1], row[2]))[:TOP]
        assert [(s, i, t, d) for s, i, t, d in zip(
            found.score_fn[f], found.id_fn[f], found.position_fn[f], found.span_fn[f], strict=True
        ) if d >= 0] == best  # fmt: skip
        for j in range(len(EDGES)):  # peaks above an edge, strictly, are those of the later bins
            assert found.histogram_fh[f, j + 1 :].sum() == sum(p > EDGES[j] for p, *_ in mine)


@settings(max_examples=60)
@given(corpora, st.lists(st.integers(0, 11), max_size=4), st.randoms(use_true_random=False))
def test_merge_is_associative_and_ignores_order(
    peaks: dict[tuple[int, int], tuple[float, int]], cuts: list[int], random: object
) -> None:
    groups = np.searchsorted(sorted(cuts), np.arange(12), side="right")
    parts = [stats({k: v for k, v in peaks.items() if groups[k[0]] == g}) for g in range(len(cuts) + 1)]
    whole = stats(peaks)
    assert same(reduce(merge, parts), whole)
    assert same(reduce(lambda right, left: merge(left, right), reversed(parts)), whole)
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert same(reduce(merge, parts), whole)


@given(st.lists(st.booleans(), min_size=1, max_size=50), st.data(), st.integers(1, 12))
def test_span_holds_the_token_and_stays_in_the_turn(content: list[bool], data: st.DataObject, room: int) -> None:
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = True
    start, stop = span_bounds(np.array(content), position, room)
    assert start <= position < stop <= len(content) and stop - start <= room
    assert all(content[start:stop])
    if stop - start < room:  # no room is left unused while the turn has tokens
        assert start == 0 or not content[start - 1]
        assert stop == len(content) or not content[stop]


@settings(max_examples=60)
@given(corpora, st.lists(st.integers(0, 11), max_size=4), st.randoms(use_true_random=False))
def test_words_follow_their_spans(
    peaks: dict[tuple[int, int], tuple[float, int]], cuts: list[int], random: object
) -> None:
    groups = np.searchsorted(sorted(cuts), np.arange(12), side="right")
    asked: list[int] = []

    def cut(documents: np.ndarray) -> pa.Table:  # span_fn is the document here
        asked.extend(documents.tolist())
        return pa.table({name: [f"{name} {d}" for d in documents.tolist()] for name in TEXTS.names}, schema=TEXTS)

    parts = [
        extend(empty_summary(FEATURES, TOP), stats({k: v for k, v in peaks.items() if groups[k[0]] == g}), cut)
        for g in range(len(cuts) + 1)
    ]
    asked.clear()
    whole = extend(empty_summary(FEATURES, TOP), stats(peaks), cut)
    assert len(asked) == (whole.stats.span_fn >= 0).sum() == whole.texts.num_rows, "cut for what is kept alone"
    documents = stats(peaks).span_fn
    words = whole.texts["token"].to_pylist()
    for place, row in np.ndenumerate(whole.stats.span_fn):
        assert (documents[place] < 0) == (row < 0)
        assert row < 0 or words[row] == f"token {documents[place]}"
    random.shuffle(parts)  # type: ignore[attr-defined]
    merged = reduce(merge_summaries, parts)
    assert same(merged.stats, whole.stats) and merged.texts.equals(whole.texts)
    assert reduce(lambda a, b: merge_summaries(b, a), parts).texts.equals(whole.texts)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(1, 12))
def test_many_spans_are_cut_as_each_alone(contents: list[list[bool]], room: int) -> None:
    """Turns end where their document does, however they are joined; and the words are those of one at a time."""
    tokenizer = topics_tokenizer()
    documents = [
        EncodedDocument(
            make_document([Turn("user", str(n))], None, "t"), np.arange(n, n + len(c)) % 30, np.array(c), {}
        )
        for n, c in enumerate(contents)
    ]
    places = [(n, int(t)) for n, one in enumerate(documents) for t in np.flatnonzero(one.content)]
    document_m, position_m = np.array(places, np.int64).reshape(-1, 2).T
    found = span_texts(documents, document_m, position_m, room, tokenizer)
    assert found.schema == TEXTS
    alone = [span_text(documents[n].ids, documents[n].content, t, room, tokenizer) for n, t in places]
    assert found.to_pylist() == alone


def test_span_is_mostly_what_came_before() -> None:
    assert span_bounds(np.ones(100, bool), 50, 32) == (27, 59)
    assert span_bounds(np.ones(100, bool), 2, 32) == (0, 32)
    assert span_bounds(np.ones(100, bool), 99, 32) == (68, 100)
