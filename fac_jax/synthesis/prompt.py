"""A task's prompt file to chat messages: few-shot, so that a small model can follow it and a large one is not held up.

A prompt file (`contrast.txt`, `cover.txt` in the task's folder) has three sections, `[system]`, `[example]` and
`[ask]`. Each text that is shown becomes a user turn made from `[example]` and an assistant turn that is the text
itself; `[ask]` is the last user turn. `$name` marks what is filled in.

None of what is filled in can be trusted: a corpus that anyone may have written, or a model that read it. Text from the
corpus stands where the model's own words stand, without chat control tokens, and never in a user's or system's turn.
What a feature is about goes there, as a few single words, which order nobody around, or as a quoted JSON string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template

from fac_jax.errors import UserError
from fac_jax.features.task import Task
from fac_jax.llm.client import Message
from fac_jax.llm.control_tokens import without_control_tokens
from fac_jax.llm.question import one_line_json

SECTIONS = ("system", "example", "ask")
BARE_WORDS, BARE_LETTERS = 4, 24
"""So many words of so many letters, with commas between them, need no quotes."""


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
    about = named(about)
    turns = [{"role": "system", "content": _fill(prompt, prompt.system, {})}]
    for example in examples:
        asked = _fill(prompt, prompt.example, {"about": about, "score": f"{example.score:.1f}"})
        text = without_control_tokens(example.text)
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
    turns.append({"role": "user", "content": _fill(prompt, prompt.ask, {"about": about, "score": f"{goal:.1f}"})})
    return tuple(turns)


def named(about: str) -> str:
    """What a feature is about as it may stand in a user's turn: a short list of words, or a JSON string."""
    text = " ".join(without_control_tokens(about).split())
    words = text.split(", ")
    bare = len(words) <= BARE_WORDS and all(len(word) <= BARE_LETTERS and len(word.split()) == 1 for word in words)
    return text if bare else one_line_json(text)


def _fill(prompt: Prompt, text: str, values: Mapping[str, str]) -> str:
    try:
        return Template(text).substitute(values)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"prompt {prompt.name}.txt: {error} cannot be filled in; known are $about and $score, outside [system]"
        ) from None
