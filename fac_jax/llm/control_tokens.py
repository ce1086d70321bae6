"""Chat control tokens in text from outside: `<|im_start|>`, `[INST]`, `</s>` and their kin, however they are spelled.

A tokenizer may turn such a piece of text into the very token that ends a turn, and a model may heed one that is merely
written like it. So they are taken out of all corpus text and model text before it goes into a prompt: found in a plain
reading of the text (full-width forms and look-alikes as ASCII, what shows nothing left out, case ignored), removed from
the text itself, until none is left, for removing one can make another. Nothing else is changed. Reads and writes
nothing.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

LOOK_ALIKES = {
    **dict.fromkeys("‹⟨〈❮❰˂ᐸ≺⧼⟪《«", "<"), **dict.fromkeys("›⟩〉❯❱˃ᐳ≻⧽⟫》»", ">"),
    **dict.fromkeys("ǀ∣│❘⏐┃╎┆¦ǁ‖║", "|"), **dict.fromkeys("⟦【〔〖❲", "["), **dict.fromkeys("⟧】〕〗❳", "]"),
    **dict.fromkeys("∕⁄⧸╱", "/"), **dict.fromkeys("▁‿", "_"),
    # Cyrillic, then Greek.
    **dict(zip("аАВсСԁеЕһНіІјЈКӏмМоОрРԛѕЅтТѵԝхХуУ", "aABcCdeEhHiIjJKlmMoOpPqsStTvwxXyY", strict=True)),
    **dict(zip("αΑΒεΕΗιΙκΚΜΝνοΟρΡτΤυΥχΧΖ", "aABeEHiIkKMNvoOpPtTuYxXZ", strict=True)),
}  # fmt: skip
"""Characters that look like ASCII ones, beside those that Unicode's compatibility forms (NFKD) know."""
INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Characters that show nothing though their category does not say so."""
TOKENS = re.compile(
    r"<\s{0,4}\|\s{0,4}[\w.:/-]{1,64}\s{0,4}\|\s{0,4}>"  # ChatML, Llama 3, Phi, Command R, DeepSeek, ...
    r"|<\|[\w.:/-]{1,64}>|<[\w.:/-]{1,64}\|>"  # with one bar: newer Gemma
    r"|\[/?(?:inst|gmask|system_prompt|available_tools|tool_calls|tool_results|tool_content)\]|<</?sys>>"
    r"|</?(?:s|bos|eos|pad|unk|sop|eop|start_of_turn|end_of_turn|think|tool_calls?|tool_response)>"
    r"|<(?:unused|extra_id_|special_|reserved_)\d{1,4}>"
)
"""Control tokens, in plain reading."""


def without_control_tokens(text: str) -> str:
    """The text without chat control tokens; other text comes back as it is."""
    if text.isascii() and "<" not in text and "[" not in text:
        return text
    while True:
        plain, where = plain_reading(text)
        found = [(where[one.start()], where[one.end() - 1] + 1) for one in TOKENS.finditer(plain)]
        if not found:
            return text
        kept, done = [], 0
        for start, stop in found:
            kept.append(text[done:start])
            done = stop
        text = "".join([*kept, text[done:]])


def plain_reading(text: str) -> tuple[str, list[int]]:
    """The text as a reader who is easily fooled would spell it, in small letters, and each character's place in it."""
    pieces = [_plain(character) for character in text]
    return "".join(pieces), [place for place, piece in enumerate(pieces) for _ in piece]


@lru_cache(maxsize=2**16)
def _plain(character: str) -> str:
    if character.isspace():
        return "\n" if character in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029" else " "
    known = LOOK_ALIKES.get(character)
    if known is not None:
        return known.lower()
    spelled = "".join(
        LOOK_ALIKES.get(one, one) for one in unicodedata.normalize("NFKD", character) if not _shows_nothing(one)
    )
    return spelled.casefold()


def _shows_nothing(character: str) -> bool:
    """Joiners, direction marks, tags, controls, accents and variation selectors: letters can hide behind them."""
    return character in INVISIBLE or unicodedata.category(character) in ("Cf", "Cc", "Cs", "Mn", "Me")
