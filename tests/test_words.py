"""Two texts are one when a reader calls them the same, in any script."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fac_jax.words import is_text, normalised, words


@pytest.mark.parametrize(
    ("one", "other"), [("वह दिन था", "वह दीन था"), ("ปี", "ปู"), ("עִברית", "עַברית"), ("𑄇𑄧", "𑄇𑄨"), ("x̣", "x̄")]
)
def test_texts_that_differ_in_a_combining_mark_are_two(one: str, other: str) -> None:
    """Vowels of Hindi, Thai, Hebrew and Chakma (beyond 16 bits), and accents that no letter has composed."""
    assert normalised(one) != normalised(other) and len(normalised(one).split()) == len(one.split())


def test_case_punctuation_and_the_variant_of_an_emoji_make_no_difference() -> None:
    assert normalised("Héllo, wörld!") == normalised("he\u0301llo WÖRLD") == "héllo wörld"
    assert normalised("दिन, था।") == normalised("दिन था")
    assert normalised("go\ufe0f 1\ufe0f\u20e3 ❤\ufe0f") == normalised("go 1\u20e3 ❤") == "go 1"
    assert words(" ❤ ") == "❤" and words("\u093f") == "\u093f", "a mark by itself is no word"


@given(st.text())
def test_words_without_combining_marks_are_runs_of_letters_and_digits(text: str) -> None:
    plain = unicodedata.normalize("NFKC", text).casefold()
    if not any(unicodedata.category(character) in ("Mn", "Mc") for character in plain):
        assert normalised(text) == " ".join(re.findall(r"\w+", plain))


@given(st.text(st.characters(exclude_categories=[])))
def test_half_of_a_pair_is_no_text(text: str) -> None:
    assert is_text(text) == (not any("\ud800" <= character <= "\udfff" for character in text))
    assert is_text("\U0001f600 é") and not is_text("half \ud83d")
