"""Diversity of words: distinct n-grams, n-gram entropy, Self-BLEU, length, compression. One function per number.

All are exact, on all rows, and linear (or n log n) in the number of words: n-grams become integers and are counted by
sorting. A ratio whose denominator is empty is undefined and returned as None, never 0. Except for the mean length and
Self-BLEU, they depend on how much text there is (more text repeats more): compare sets of about the same size.

Reads and writes nothing.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from fac_jax.words import word

BLEU_ORDERS = 4
BLEU_EPSILON = 0.1
"""Numerator of a precision without a match (smoothing method 1 of Chen and Cherry 2014, as in NLTK)."""


@dataclass(frozen=True)
class Coded:
    """Sequences of symbols (words, part-of-speech tags) of several documents, one behind the other, as integers."""

    symbol_t: Int64[np.ndarray, " t"]
    """Numbers of the symbols, below `symbols`."""
    document_t: Int64[np.ndarray, " t"]
    """Document of each symbol, rising."""
    symbols: int
    documents: int

    @property
    def lengths_n(self) -> Int64[np.ndarray, " n"]:
        """Symbols in each document."""
        return np.bincount(self.document_t, minlength=self.documents).astype(np.int64)

    def only(self, rows: Int64[np.ndarray, " chosen"]) -> Coded:
        """Some of the documents (each once), in their order."""
        place_n = np.full(self.documents, -1)
        place_n[np.sort(rows)] = np.arange(len(rows))
        held_t = place_n[self.document_t] >= 0
        return Coded(self.symbol_t[held_t], place_n[self.document_t[held_t]], self.symbols, len(rows))


def words(text: str) -> list[str]:
    """Lower-case words (with their apostrophes) and single punctuation marks."""
    text = text.lower()
    return re.findall(rf"{word(text)}(?:['’]{word(text)})*|[^\w\s]", text)


def coded(sequences: Sequence[Sequence[str]]) -> Coded:
    """Symbols as integers, in the order in which they first come."""
    numbers: dict[str, int] = {}
    symbols = [numbers.setdefault(symbol, len(numbers)) for sequence in sequences for symbol in sequence]
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    documents = np.repeat(np.arange(len(sequences)), lengths)
    return Coded(np.array(symbols, np.int64), documents.astype(np.int64), len(numbers), len(sequences))


def distinct(corpus: Coded, n: int) -> float | None:
    """Distinct-n: different n-grams / all n-grams of a corpus, none across documents (Li 2016, arXiv 1510.03055).

    In (0, 1]; higher is more diverse. It falls as the corpus grows. None without n-grams.
    """
    grams, _ = ngrams(corpus, n)
    return len(np.unique(grams)) / len(grams) if len(grams) else None


def ngram_entropy(corpus: Coded, n: int) -> float | None:
    """Shannon entropy, in bits, of the distribution of a corpus's n-grams (Ent-n; Zhang et al. 2018, arXiv 1809.05972).

    From 0 (one n-gram only) to log2 of their number; higher is more diverse. It rises as the corpus grows.
    """
    grams, _ = ngrams(corpus, n)
    return entropy_bits(np.unique(grams, return_counts=True)[1]) if len(grams) else None


def entropy_bits(counts: Int64[np.ndarray, " k"]) -> float:
    """Shannon entropy, in bits, of the distribution that has these counts, of which one at least is above 0."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # -0.0 of a single kind is 0.0


def mean_length(corpus: Coded) -> float | None:
    """Symbols per document, on average: of words, those of `words`. No diversity by itself; others grow with it."""
    return len(corpus.symbol_t) / corpus.documents if corpus.documents else None


def compression_ratio(texts: Sequence[str]) -> float | None:
    """Bytes of the texts (UTF-8, joined by newlines) / their bytes by gzip -9 (Shaib et al. 2024, arXiv 2403.00553).

    Above 1 but for tiny corpora; lower is more diverse: what repeats compresses. The compressor looks 32 KiB back, so
    the order of the texts matters a little, and the caller fixes it.
    """
    joined = "\n".join(texts).encode()
    return len(joined) / len(gzip.compress(joined, 9, mtime=0)) if joined else None


def self_bleu(corpus: Coded) -> float | None:
    """Self-BLEU-4: mean over documents of BLEU-4 with all others as references (Zhu et al. 2018, arXiv 1802.01886).

    In [0, 1]; lower is more diverse. BLEU has uniform weights, the closest reference's length (the shorter of two) and
    smoothing method 1; a document that shares no word with any other has 0. It rises as the corpus grows.
    Exact and not quadratic: the largest count of an n-gram among the *other* documents is the largest of all documents,
    or the second largest where the document itself holds that. None with fewer than two documents.
    """
    if corpus.documents < 2:
        return None
    return float(bleu_against_others(corpus).mean())


def bleu_against_others(corpus: Coded) -> Float64[np.ndarray, " n"]:
    """BLEU-4 of each document against all others."""
    lengths_n = corpus.lengths_n
    log_precision_n = np.zeros(corpus.documents)
    for order in range(1, BLEU_ORDERS + 1):
        matched_n = _clipped(corpus, order)
        if order == 1:
            matches_n = matched_n > 0
        possible_n = np.maximum(lengths_n - order + 1, 1)
        log_precision_n += np.log(np.where(matched_n > 0, matched_n, BLEU_EPSILON) / possible_n) / BLEU_ORDERS
    lengths_n = np.maximum(lengths_n, 1)  # a document without words matches nothing, so it has 0 anyway
    log_brevity_n = np.minimum(0.0, 1.0 - _closest_other(corpus.lengths_n) / lengths_n)
    return np.where(matches_n, np.exp(log_precision_n + log_brevity_n), 0.0)


def ngrams(corpus: Coded, n: int) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """A number for every n-gram (equal for equal ones) and its document; none reaches across documents."""
    gram, start = corpus.symbol_t, np.arange(len(corpus.symbol_t))
    for further in range(1, n):
        inside = start + further < len(corpus.symbol_t)
        inside[inside] = corpus.document_t[start[inside] + further] == corpus.document_t[start[inside]]
        gram, start = gram[inside], start[inside]
        pairs = gram * max(corpus.symbols, 1) + corpus.symbol_t[start + further]
        gram = np.unique(pairs, return_inverse=True)[1].astype(np.int64)  # small again, so that pairs fit 64 bits
    return gram, corpus.document_t[start]


def _clipped(corpus: Coded, n: int) -> Int64[np.ndarray, " n"]:
    """n-grams of each document that the others hold too, each at most as often as the one that holds it most."""
    gram, document = ngrams(corpus, n)
    pairs, count = np.unique(gram * corpus.documents + document, return_counts=True)
    gram, document = pairs // corpus.documents, pairs % corpus.documents
    best = np.lexsort((-count, gram))  # within an n-gram, the document that holds it most comes first
    first = np.flatnonzero(np.diff(gram[best], prepend=-1))
    several = np.diff(np.append(first, len(best))) > 1
    second = np.zeros(len(first), np.int64)
    second[several] = count[best[first[several] + 1]]
    which = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(best))))  # of the sorted pairs, by n-gram
    among_others = np.where(document == document[best[first]][which], second[which], count[best[first]][which])
    found = np.bincount(document, np.minimum(count, among_others), minlength=corpus.documents)
    return found.astype(np.int64)


def _closest_other(lengths_n: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The length, among the other documents, that is nearest to each one's; the shorter of two as near."""
    ordered = np.sort(lengths_n)
    left = np.searchsorted(ordered, lengths_n, "left")
    right = np.searchsorted(ordered, lengths_n, "right")
    shorter = np.where(left > 0, ordered[left - 1], np.iinfo(np.int64).min // 2)
    longer = np.where(right < len(ordered), ordered[np.minimum(right, len(ordered) - 1)], np.iinfo(np.int64).max // 2)
    nearest = np.where(lengths_n - shorter <= longer - lengths_n, shorter, longer)
    return np.where(right - left > 1, lengths_n, nearest)
