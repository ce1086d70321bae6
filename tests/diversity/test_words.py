"""Metrics of words against NLTK, zlib, counting by hand and brute force, and what must hold for any corpus."""

from __future__ import annotations

import math
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from fac_jax.diversity.words import (
    bleu_against_others,
    coded,
    compression_ratio,
    distinct,
    entropy_bits,
    mean_length,
    ngram_entropy,
    ngrams,
    self_bleu,
    words,
)

SENTENCES = st.lists(st.lists(st.sampled_from("abcd"), max_size=9), min_size=1, max_size=8)


def grams(sentences: list[list[str]], n: int) -> list[tuple[str, ...]]:
    return [tuple(one[i : i + n]) for one in sentences for i in range(len(one) - n + 1)]


def test_words_are_lower_case_with_punctuation_on_its_own() -> None:
    assert words("Don't stop, O’Neil!\nÉté 3.5") == "don't stop , o’neil ! été 3 . 5".split()
    assert words("वह दिन था।") == ["वह", "दिन", "था", "।"]


def test_by_hand() -> None:
    corpus = coded([["a", "b", "a"], ["b", "a"], ["c"]])
    assert distinct(corpus, 1) == 3 / 6
    assert distinct(corpus, 2) == 2 / 3, "ab, ba, ba; none across documents"
    assert distinct(corpus, 3) == 1.0
    assert mean_length(corpus) == 2.0
    assert ngram_entropy(corpus, 1) == pytest.approx(
        -(3 / 6 * math.log2(3 / 6) + 2 / 6 * math.log2(2 / 6) + 1 / 6 * math.log2(1 / 6))
    )
    assert ngram_entropy(coded([["a"] * 5]), 1) == 0.0
    assert entropy_bits(np.array([4, 0, 4, 4, 4])) == 2.0


def test_what_has_no_text_is_undefined() -> None:
    for corpus in (coded([]), coded([[]])):
        assert distinct(corpus, 1) is None and ngram_entropy(corpus, 2) is None
    assert distinct(coded([["a"], ["b"]]), 2) is None
    assert mean_length(coded([])) is None and compression_ratio([]) is None
    assert self_bleu(coded([["a"]])) is None, "a document alone has no references"


@given(SENTENCES, st.integers(1, 5))
@settings(deadline=None)
def test_ngrams_are_those_of_a_sliding_window(sentences: list[list[str]], n: int) -> None:
    corpus, expected = coded(sentences), grams(sentences, n)
    found, document = ngrams(corpus, n)
    assert len(found) == len(expected)
    assert len(set(zip(found.tolist(), expected, strict=True))) == len(set(expected)) == len(set(found.tolist()))
    assert document.tolist() == [row for row, one in enumerate(sentences) for _ in range(len(one) - n + 1)]
    if expected:
        counts = np.array(list(Counter(expected).values()))
        shares = counts / counts.sum()
        assert distinct(corpus, n) == len(set(expected)) / len(expected)
        assert ngram_entropy(corpus, n) == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-12)


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=9), min_size=2, max_size=7))
@settings(deadline=None)
def test_bleu_is_nltks(sentences: list[list[str]]) -> None:
    smoothing = SmoothingFunction().method1
    expected = [
        sentence_bleu(sentences[:row] + sentences[row + 1 :], one, (0.25,) * 4, smoothing) if one else 0.0
        for row, one in enumerate(sentences)
    ]
    np.testing.assert_allclose(bleu_against_others(coded(sentences)), expected, atol=1e-12)
    assert self_bleu(coded(sentences)) == pytest.approx(np.mean(expected), abs=1e-12)


def test_self_bleu_of_english_is_nltks() -> None:
    texts = [
        "The cat sat on the mat, and the dog sat on the cat.",
        "the dog sat on the mat",
        "Nobody expects the cat on the mat to sit there for long.",
        "Zebras gallop.",
        "the dog sat on the mat",
    ]
    sentences, smoothing = [words(text) for text in texts], SmoothingFunction().method1
    scores = [
        sentence_bleu(sentences[:i] + sentences[i + 1 :], s, (0.25,) * 4, smoothing) for i, s in enumerate(sentences)
    ]
    found = bleu_against_others(coded(sentences))
    np.testing.assert_allclose(found, scores, rtol=1e-12)
    assert found[1] == pytest.approx(1.0), "a copy is among the others"


def test_compression_is_zlibs_with_a_header_of_gzip() -> None:
    texts = ["tell me a story", "tell me another story", "ça alors"] * 20
    joined = "\n".join(texts).encode()
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    size = len(squeezed.compress(joined) + squeezed.flush())
    assert compression_ratio(texts) == len(joined) / (size + 18)


@given(SENTENCES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_documents_does_not_matter(sentences: list[list[str]], random: object) -> None:
    shuffled = sentences.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = coded(sentences), coded(shuffled)
    for n in (1, 2):
        assert distinct(one, n) == distinct(other, n)
        assert ngram_entropy(one, n) == pytest.approx(ngram_entropy(other, n))
    assert mean_length(one) == mean_length(other)
    assert self_bleu(one) == pytest.approx(self_bleu(other))


@given(SENTENCES)
@settings(deadline=None)
def test_a_corpus_twice_is_less_diverse_and_has_the_same_entropy(sentences: list[list[str]]) -> None:
    once, twice = coded(sentences), coded(sentences * 2)
    for n in (1, 2):
        if (single := distinct(once, n)) is not None:
            assert distinct(twice, n) == pytest.approx(single / 2)
            assert ngram_entropy(twice, n) == pytest.approx(ngram_entropy(once, n))
    if len(sentences) > 1:
        assert (bleu_against_others(twice)[: len(sentences)] >= bleu_against_others(once) - 1e-12).all()
    texts = [" ".join(one) for one in sentences]
    if any(texts):
        assert (compression_ratio(texts * 2) or 0) >= (compression_ratio(texts) or 0)


@given(SENTENCES, st.data())
@settings(deadline=None)
def test_some_documents_are_a_corpus_of_their_own(sentences: list[list[str]], data: st.DataObject) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, len(sentences) - 1))))
    part, alone = coded(sentences).only(np.array(rows, np.int64)), coded([sentences[row] for row in rows])
    assert part.lengths_n.tolist() == alone.lengths_n.tolist()
    assert distinct(part, 2) == distinct(alone, 2)
