"""One strict question per feature: send it, keep the raw reply, read it without trust.

Replies are appended to a log (`replies.jsonl`) as they arrive; a run that was stopped, or whose server went away, goes
on with what is missing. A reply that does not follow its schema is a failure and stays one: it keeps its raw text and
the reason, and never becomes a default label.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fac_jax.llm.client import Generator, Reply, Request
from fac_jax.plain import digest
from fac_jax.progress import progress
from fac_jax.runs import whole_lines

MAX_TOKENS = 300  # of a reply: one short JSON object


@dataclass(frozen=True)
class Answer:
    """What came back for one question."""

    raw: str
    value: dict[str, Any] | None
    """The reply as its schema has it; None when it does not follow it."""
    error: str | None
    """Why it could not be read."""


def question(system: str, data: Mapping[str, Any], schema: Mapping[str, Any]) -> Request:
    """A request at temperature 0. `data` goes as JSON into the user's turn: text in it cannot pose as instructions."""
    turns = ({"role": "system", "content": system}, {"role": "user", "content": json.dumps(data, ensure_ascii=False)})
    return Request(messages=turns, max_tokens=MAX_TOKENS, temperature=0.0, schema=dict(schema))


def object_schema(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of an object with exactly these properties."""
    return {
        "type": "object", "properties": dict(properties), "required": list(properties), "additionalProperties": False
    }  # fmt: skip


def label_schema(labels: Sequence[str]) -> dict[str, Any]:
    """One of `labels`, with a reason."""
    return object_schema(label={"type": "string", "enum": list(labels)}, reason={"type": "string", "maxLength": 500})


def ask(generator: Generator, questions: Mapping[str, Request], log: Path, title: str) -> dict[str, Answer]:
    """Answers by the questions' keys. A reply in `log` to the same request by the same model is not asked for again."""
    marks = {key: digest({"request": request, "generator": generator.name}) for key, request in questions.items()}
    texts = {mark: reply["text"] for mark, reply in _read_log(log).items()}
    todo = [key for key in questions if marks[key] not in texts]
    log.parent.mkdir(parents=True, exist_ok=True)
    with progress(title, len(todo), "features") as bar, open(log, "a", encoding="utf-8") as lines:
        tokens = 0

        def keep(index: int, reply: Reply) -> None:
            nonlocal tokens
            mark = marks[todo[index]]
            texts[mark] = reply.text
            line = {"mark": mark, "key": todo[index], **dataclasses.asdict(reply)}
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            tokens += reply.prompt_tokens + reply.completion_tokens
            bar.advance(1, f"{tokens:,} tokens")

        generator.generate([questions[key] for key in todo], keep)
    return {key: read_answer(texts[marks[key]], questions[key].schema or {}) for key in questions}


def read_answer(text: str, schema: Mapping[str, Any]) -> Answer:
    """Read a reply that should be one JSON object; a code fence around all of it is allowed, anything else is not."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except json.JSONDecodeError as error:
        return Answer(text, None, f"not JSON: {error.msg} at character {error.pos}")
    except RecursionError:
        return Answer(text, None, "not JSON: nested too deeply")
    wrong = _violation(value, schema)
    return Answer(text, None, wrong) if wrong else Answer(text, value, None)


def _violation(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What breaks the schema (objects of strings, as made above), or None."""
    if not isinstance(value, dict):
        return f"a JSON {type(value).__name__}, not an object"
    properties = schema["properties"]
    if set(value) != set(properties):
        return f"has the fields {sorted(value)}, not {sorted(properties)}"
    for name, wanted in properties.items():
        item = value[name]
        if not isinstance(item, str):
            return f"{name} is {type(item).__name__}, not text"
        if item not in wanted.get("enum", [item]):
            return f"{name} is {item[:80]!r}, not one of {wanted['enum']}"
        if len(item) > wanted.get("maxLength", len(item)):
            return f"{name} has {len(item)} characters, more than {wanted['maxLength']}"
    return None


def _read_log(log: Path) -> dict[str, dict[str, Any]]:
    """Replies by mark."""
    replies = (json.loads(line) for line in whole_lines(log))
    return {reply["mark"]: reply for reply in replies}
