"""One strict question per feature: send it, keep the raw reply, read it without trust.

Replies are appended to a log (`replies.jsonl`) as they arrive; a run that was stopped, or whose server went away, goes
on with what is missing. A reply that does not follow its schema is a failure and stays one: it keeps its raw text and
the reason, and never becomes a default label.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fac_jax.llm.client import Generator, Reply, Request
from fac_jax.llm.structured import Answer, read_answer
from fac_jax.plain import digest
from fac_jax.progress import progress
from fac_jax.runs import whole_lines, write_text


def ask(
    generator: Generator, questions: Mapping[str, Request], log: Path, title: str, unit: str = "features"
) -> dict[str, Answer]:
    """Answers by the questions' keys. A reply in `log` to the same request by the same model is not asked for again."""
    marks = {key: digest({"request": request, "generator": generator.name}) for key, request in questions.items()}
    texts = {mark: reply["text"] for mark, reply in _read_log(log).items()}
    todo = [key for key in questions if marks[key] not in texts]
    log.parent.mkdir(parents=True, exist_ok=True)
    with progress(title, len(todo), unit) as bar, open(log, "a", encoding="utf-8") as lines:

        def keep(index: int, reply: Reply) -> None:
            mark = marks[todo[index]]
            texts[mark] = reply.text
            line = {"mark": mark, "key": todo[index], **dataclasses.asdict(reply)}
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            bar.advance(1, generator.spent)

        generator.generate([questions[key] for key in todo], keep, todo)
    if todo:
        _settle(log, [marks[key] for key in questions])
    return {key: read_answer(texts[marks[key]], questions[key].schema or {}) for key in questions}


def _settle(log: Path, marks: Sequence[str]) -> None:
    """Rewrite the log in the order of the questions, behind those of other rounds: the order of arrival is chance."""
    lines = _read_log(log)
    asked = dict.fromkeys(marks)
    order = [*(mark for mark in lines if mark not in asked), *asked]
    write_text(log, "".join(json.dumps(lines[mark]) + "\n" for mark in order))


def _read_log(log: Path) -> dict[str, dict[str, Any]]:
    """Replies by mark."""
    replies = (json.loads(line) for line in whole_lines(log))
    return {reply["mark"]: reply for reply in replies}
