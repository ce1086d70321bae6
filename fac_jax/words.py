"""The words of a text: what samples are counted in, and what makes two texts one."""

from __future__ import annotations

import re
import unicodedata


def normalised(text: str) -> str:
    """Lower-case words without punctuation, joined by single spaces: equal for texts that a reader calls the same."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def words(text: str) -> str:
    """What is compared of a text: its words, or all of it where it has none."""
    return normalised(text) or text.strip()
