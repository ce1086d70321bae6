"""Does a text from a corpus look as if it were meant to give a language model orders?

It only counts: such spans are shown like all others (`llm/question.py` keeps them from being obeyed), and how many
there were stands in the product, so that a corpus that was tampered with is noticed. Found are chat control tokens,
orders to drop instructions (in twelve languages), verdicts handed over ready-made, replies and data marks that are
faked, turns of a system, hidden directions, and any of these in base64. Text that merely speaks of such things can be
taken for it: 6 of 137,793 turns of a chit-chat corpus are ("I usually just ignore the prompts"). Reads and writes
nothing.
"""

from __future__ import annotations

import base64
import re
import unicodedata

from fac_jax.llm.control_tokens import TOKENS, plain_reading

_WHAT = r"(?:instructions?|prompts?|rules?|rubric|directions|guidelines|commands?|orders)"
_ORDERS = re.compile(
    rf"\b(?:ignore|disregard|forget|override|overrule|discard|bypass)\b[^.!?\n]{{0,40}}\b{_WHAT}\b"
    rf"|\b(?:new|updated|revised|real|actual|following) (?:system )?(?:instructions?|prompt|rules?)\s*[:=]"
    rf"|\byour (?:new |real |only )?(?:task|job|{_WHAT}) (?:is|are) (?:now|to (?:answer|say|reply|output|label))\b"
    r"|\b(?:from now on,?|henceforth,?) (?:you|answer|reply|respond|label)\b"
    r"|\byou (?:must|should|will|have to|are to) (?:now )?(?:only )?(?:answer|reply|respond|output|label|judge|rate)"
    r"\b[^.!?\n]{0,30}\b(?:yes|probably|maybe|no)\b"
    r"|\b(?:answer|reply|respond|label|rate|judge|output|say)\b[^.!?\n]{0,30}"
    r"(?:[\"'“‘`*](?:yes|probably|maybe)[\"'”’`*]|\b(?:only|just|simply|always|with|as) (?:yes|probably|maybe)\b"
    r"(?! [a-z]))"
    r"|\b(?:dear|attention|note (?:to|for)|message (?:to|for)) (?:the )?(?:judge|grader|rater|evaluator|annotator"
    r"|reviewer|language model|llm|ai|model|assistant)\b"
    # Spanish, Portuguese, Italian; French; German.
    r"|\b(?:ignora|ignore|olvida|esqueca|dimentica|omite)\b[^.!?\n]{0,30}\b(?:instrucciones|instrucoes|istruzioni|reglas"
    r"|regras|regole)\b"
    r"|\b(?:ignore[zr]?|oublie[zr]?)\b[^.!?\n]{0,30}\b(?:instructions|consignes|regles)\b"
    r"|\b(?:ignoriere?n?|vergiss|vergessen sie|missachte)\b[^.!?\n]{0,40}\b(?:anweisung(?:en)?|vorgaben|regeln)\b"
)
# Scripts of their own, so not in the plain reading: Russian, Chinese, Japanese, Korean, Arabic, Hindi.
_FOREIGN_ORDERS = re.compile(
    r"(?:игнорируй(?:те)?|забудь(?:те)?)[^.!?\n]{0,40}(?:инструкци|указани|правил)"
    r"|(?:忽略|无视|無視|忘记|忘記)[^。!?\n]{0,15}(?:指令|指示|说明|說明|规则|規則|提示)"
    r"|(?:指示|命令|ルール)[^。!?\n]{0,8}(?:無視|忘れ)"
    r"|(?:지시|명령|규칙)[^.!?\n]{0,12}(?:무시|잊)"
    r"|(?:تجاهل|انس)[^.!?\n]{0,30}(?:التعليمات|الأوامر|القواعد)"
    r"|(?:निर्देश|नियम)[^।.!?\n]{0,20}(?:अनदेखा|भूल)"
)
_VERDICT = re.compile(
    r"\b(?:final|correct|right|true|expected|official)[ _-](?:decision|answer|verdict|label|judge?ment|rating|response)"
    r"\s*(?:[:=]|is\b|-{1,2}>)\s*[\"'“‘`*]*(?:yes|probably|maybe|no)\b"
    r"|\b(?:decision|verdict|label|judge?ment|rating)\s*[:=]\s*[\"'“‘`*]*(?:yes|probably|maybe)\b"
)
_FAKES = re.compile(
    r"[\"'](?:label|verdict|explanation|reason|spans|role)[\"']\s*:\s*[\"'\[{]"  # a reply, data, a chat message
    r"|\b(?:begin|end)(?:ing)? (?:of )?(?:the )?(?:data|untrusted|user input)\b[^a-z\n]*(?:$|[0-9a-f]{8}|\n)"
    r"|</?(?:data|rubric|system|instructions?|user_input|untrusted)>"
)
_TURN = re.compile(r"(?:^|\n)\s*(?:#{1,6}\s*)?(?:(?:system|developer)(?: prompt| message)?|assistant)\s*:"
                   r"|(?:^|\n)\s*#{2,6}\s*(?:instructions?|system|response|assistant)\b")  # fmt: skip
_HIDDEN = re.compile("[\u202d\u202e]|[\U000e0020-\U000e007e]{8}")
"""Overridden direction, and eight tags in a row (a flag emoji has at most six)."""
_BASE64 = re.compile(r"[A-Za-z0-9+/]{24,}")


def sign_of_injection(text: str) -> str | None:
    """What in the text looks like an order to a model; None where nothing does."""
    return _sign(text) or ("in base64" if any(_sign(inner) for inner in _decoded(text)) else None)


def _sign(text: str) -> str | None:
    plain, _ = plain_reading(text)
    native = unicodedata.normalize("NFKC", text).casefold()
    for name, pattern, where in (
        ("chat control token", TOKENS, plain),
        ("order", _ORDERS, plain),
        ("order", _FOREIGN_ORDERS, native),
        ("verdict", _VERDICT, plain),
        ("fake reply or data", _FAKES, plain),
        ("turn of a system or assistant", _TURN, plain),
        ("hidden text", _HIDDEN, text),
    ):
        if pattern.search(where):
            return name
    return None


def _decoded(text: str) -> list[str]:
    """What stands in base64 in the text; it may begin anywhere in a run of letters, so four readings of each."""
    runs = [match[0][skip:] for match in _BASE64.finditer(text) for skip in range(4)]
    padded = [run + "=" * (-len(run) % 4) for run in runs if len(run) % 4 != 1]
    return [base64.b64decode(run).decode("utf-8", "ignore") for run in padded]
