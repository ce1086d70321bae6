"""A task's prompt file to chat messages: few-shot, so that a small model can follow it and a large one is not held up.

A prompt file (`contrast.txt`, `cover.txt` in the task's folder) has three sections, `[system]`, `[example]` and
`[ask]`. Each text that is shown becomes a user turn made from `[example]` and an assistant turn that is the text
itself; `[ask]` is the last user turn. Text from a corpus thus stands where the model's own words stand, and never
where it could pose as an instruction. `$name` marks what is filled in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template

from fac_jax.errors import UserError
from fac_jax.features.task import Task
from fac_jax.llm.client import Message

SECTIONS = ("system", "example", "ask")


@dataclass(frozen=True)
class Prompt:
    """A prompt file, read."""

    name: str
    system: str
    example: str
    ask: str


@dataclass(frozen=True)
class Example:
    """A text that is shown, and the activation that it reached."""

    text: str
    score: float


def load_prompt(task: Task, name: str) -> Prompt:
    """A task's prompt. Raises UserError that names the file when a section is missing, doubled or unknown."""
    pieces = re.split(r"^\[(\w+)\]\s*$", task.prompt(name), flags=re.MULTILINE)
    found = [section.strip() for section in pieces[1::2]]
    if pieces[0].strip() or sorted(found) != sorted(SECTIONS):
        raise UserError(
            f"prompt {name}.txt of task {task.name!r} has the sections {found}; "
            f"it must have {', '.join(f'[{section}]' for section in SECTIONS)}, once each, and nothing before them"
        )
    return Prompt(name, **dict(zip(found, (text.strip() for text in pieces[2::2]), strict=True)))


def messages(prompt: Prompt, about: str, examples: Sequence[Example], goal: float) -> tuple[Message, ...]:
    """Chat messages: the system's, two per example, and the question, whose `$score` is `goal`."""
    turns = [{"role": "system", "content": _fill(prompt, prompt.system, {"about": about})}]
    for example in examples:
        asked = _fill(prompt, prompt.example, {"about": about, "score": f"{example.score:.1f}"})
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": example.text}]
    turns.append({"role": "user", "content": _fill(prompt, prompt.ask, {"about": about, "score": f"{goal:.1f}"})})
    return tuple(turns)


def _fill(prompt: Prompt, text: str, values: Mapping[str, str]) -> str:
    try:
        return Template(text).substitute(values)
    except (KeyError, ValueError) as error:
        raise UserError(f"prompt {prompt.name}.txt: {error} cannot be filled in; known are $about and $score") from None
