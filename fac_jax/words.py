"""The words of a text: what samples are counted in, what makes two texts one, and what is no text."""

from __future__ import annotations

import re
import unicodedata
from functools import cache


def normalised(text: str) -> str:
    """Lower-case words without punctuation, joined by single spaces: equal for texts that a reader calls the same."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(word(plain), plain))


def words(text: str) -> str:
    """What is compared of a text: its words, or all of it where it has none."""
    return normalised(text) or text.strip()


def is_text(text: str) -> bool:
    """Whether every character is one: JSON can hold halves of UTF-16 pairs, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def word(text: str) -> str:
    r"""The regular expression of a word in `text`: letters, digits and what combines with them.

    Python's `\w` knows no combining marks, and so not the vowels of Hindi, Thai and many more.
    """
    return r"\w+" if text.isascii() else rf"\w[\w{_marks()}]*"  # the first is twice as fast


@cache
def _marks() -> str:
    """The combining marks as ranges of a character class; selectors of variants (of emoji) are no part of a word."""
    ranges: list[list[int]] = []
    for code in (*range(0x300, 0xFE00), *range(0xFE10, 0x20000)):  # beyond are such selectors only
        if unicodedata.category(chr(code)) not in ("Mn", "Mc"):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)
