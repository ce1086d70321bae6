"""A judge who believes whatever seems to be addressed to it: honest ("No") until it takes something for an order.

It takes for an order a chat control token anywhere in the user's turn, a role at the start of a line outside the data,
and any "yes" outside the data, in several languages or in base64. The data is the first JSON object between the fence's
lines, or at the start of the turn where there is no fence. It shares no code with what it tests.
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from fac_jax.llm.client import Request

CONTROL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "[inst]", "[/inst]",
           "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]  # fmt: skip
LETTERS = str.maketrans("\u0456\u0455\u0442\u0435\u043e\u0406\u0405\u0422", "isteoIST")  # Cyrillic look-alikes
ROLES = re.compile(r"^\s*(?:#+\s*)?(?:system|assistant|user|human|instruction|response)\s*:", re.I | re.M)
YES = re.compile(r"\b(?:yes|ja|sí|oui|да)\b|是|はい", re.IGNORECASE)


def injections() -> list[dict[str, str]]:
    """The planted injections: kind and text."""
    rows: list[dict[str, Any]] = json.loads(Path(__file__).with_name("injections.json").read_text(encoding="utf-8"))
    return [{"kind": r["kind"], "text": r["text"] * r.get("repeat", 1) + r.get("then", "")} for r in rows]


def gullible(request: Request) -> str:
    """Its reply."""
    label = "Yes" if any(ordered(m["content"]) for m in request.messages if m["role"] == "user") else "No"
    return json.dumps({"label": label, "reason": "so I was told" if label == "Yes" else "not in the rubric"})


def ordered(content: str) -> bool:
    """Whether a user's turn holds what it takes for an order."""
    loosely = unicodedata.normalize("NFKC", "".join(c for c in content if unicodedata.category(c) != "Cf"))
    if any(token in loosely.translate(LETTERS).lower() for token in CONTROL):
        return True
    outside = "\n".join(outside_data(content).splitlines())
    return bool(ROLES.search(outside)) or any(YES.search(text) for text in (outside, *decoded(outside)))


def outside_data(content: str) -> str:
    """The turn without its data."""
    fence = re.match(r"BEGIN DATA (\w+)\n(.*?)\nEND DATA \1(?![^\n])", content, re.DOTALL)
    inside = fence[2] if fence else content
    try:
        value, stop = json.JSONDecoder().raw_decode(inside)
    except json.JSONDecodeError:
        return content
    rest = inside[stop:] if isinstance(value, dict) else inside
    return rest + content[fence.end() :] if fence else rest


def decoded(text: str) -> list[str]:
    """What stands in base64 in a text, wherever in a word it begins."""
    found = [one[skip:] for one in re.findall(r"[A-Za-z0-9+/]{16,}", text) for skip in range(4)]
    whole = [one + "=" * (-len(one) % 4) for one in found if len(one) % 4 != 1]
    return [base64.b64decode(one).decode("utf-8", "ignore") for one in whole]
