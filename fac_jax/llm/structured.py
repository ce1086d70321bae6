"""An answer that should be one JSON object of a given schema, read without trust.

Servers may follow `response_format`, ignore it without a word, or be cut off in the middle: what does not follow the
schema is a failure with its reason and its raw text, and never becomes a default value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from fac_jax.words import is_text

SHOWN = 200
"""Characters of a value that a message repeats."""


@dataclass(frozen=True)
class Answer:
    """What came back for one question."""

    raw: str
    value: dict[str, Any] | None
    """The reply as its schema has it; None when it does not follow it."""
    error: str | None
    """Why it could not be read."""


def read_answer(text: str, schema: Mapping[str, Any]) -> Answer:
    """Read a reply that should be one JSON object; a code fence around all of it is allowed, anything else is not."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(
            fenced[1] if fenced else text, object_pairs_hook=_without_repeats, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        return Answer(text, None, f"not JSON: {error.msg} at character {error.pos}")
    except ValueError as error:
        return Answer(text, None, f"not JSON: {error}")
    except RecursionError:
        return Answer(text, None, "not JSON: nested too deeply")
    if not is_text(json.dumps(value, ensure_ascii=False)):  # half of an emoji, where a length was reached
        return Answer(text, None, "holds half of a UTF-16 pair, which is no character")
    if not isinstance(value, dict):
        return Answer(text, None, f"a JSON {type(value).__name__}, not an object")
    wrong = best_match(_validator(json.dumps(schema)).iter_errors(value))
    if wrong is not None:
        return Answer(text, None, f"{wrong.json_path}: {_shortened(wrong.message)}")
    return Answer(text, value, None)


@lru_cache(maxsize=64)
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema))


def _shortened(message: str) -> str:
    return message if len(message) <= SHOWN else f"{message[: SHOWN // 2]} ... {message[-SHOWN // 2 :]}"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # which of two would count differs from reader to reader
        raise ValueError(f"a field of {sorted(value)} occurs twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
