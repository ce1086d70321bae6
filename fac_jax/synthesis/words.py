"""The words of a text, as samples of every form are counted, compared and looked up."""

from __future__ import annotations

import re
import unicodedata


def normalised(text: str) -> str:
    """Lower-case words without punctuation, joined by single spaces: equal for texts that a reader calls the same."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
