"""A task's prompt file to chat messages: few-shot, so that a small model can follow it and a large one is not held up.

A prompt file (`contrast.txt`, `cover.txt` in the task's folder) has three sections, `[system]`, `[example]` and
`[ask]`. Each text that is shown becomes a user turn made from `[example]` and an assistant turn that is the text
itself; `[ask]` is the last user turn. `$name` marks what is filled in.

Where a sample is more than user turns, a text from the corpus would show the wrong form. Such a prompt has samples of
its own, each a section `[sample]` with what it is about in the first line, which stand before the writer's earlier
ones. `[ask]` may then name texts from the corpus as `$texts`, one JSON list of strings in one line; the prompts that
ship do not: a model of 135M parameters loses the form over them.

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
from fac_jax.synthesis.samples import read_sample

SECTIONS, SAMPLE = ("system", "example", "ask"), "sample"
BARE_WORDS, BARE_LETTERS = 4, 24
"""So many words of so many letters, with commas between them, need no quotes."""


@dataclass(frozen=True)
class Prompt:
    """A prompt file, read."""

    name: str
    system: str
    example: str
    ask: str
    samples: tuple[tuple[str, str], ...] = ()
    """What each is about, and the sample as a writer writes it down."""


@dataclass(frozen=True)
class Example:
    """A text that is shown, and the activation that it reached."""

    text: str
    score: float
    anchor: bool = False
    """Whether it is a text of the corpus, and not a writer's sample."""


def load_prompt(task: Task, name: str) -> Prompt:
    """A task's prompt. Raises UserError that names the file when a section is missing, doubled or unknown, or a sample
    in it is none."""
    pieces = re.split(r"^\[(\w+)\]\s*$", task.prompt(name), flags=re.MULTILINE)
    found = list(zip(pieces[1::2], (text.strip() for text in pieces[2::2]), strict=True))
    sections = [section for section, _ in found if section != SAMPLE]
    if pieces[0].strip() or sorted(sections) != sorted(SECTIONS):
        raise UserError(
            f"prompt {name}.txt of task {task.name!r} has the sections {sections}; "
            f"it must have {', '.join(f'[{section}]' for section in SECTIONS)}, once each, and nothing before them"
        )
    samples = []
    for text in (text for section, text in found if section == SAMPLE):
        about, _, lines = text.partition("\n")
        description = task.description
        read = read_sample(lines, "stop", description.sample, description.form)
        if read.reason is not None:
            raise UserError(
                f"prompt {name}.txt of task {task.name!r}: the sample about {about!r} is none: {read.reason}"
            )
        samples.append((about, read.shown))
    return Prompt(name, **{section: text for section, text in found if section != SAMPLE}, samples=tuple(samples))


def messages(prompt: Prompt, about: str, examples: Sequence[Example], goal: float) -> tuple[Message, ...]:
    """Chat messages: the system's, two per example, and the question, whose `$score` is `goal`.

    Examples without a form of their own (`Example.anchor`) are named in the question where the prompt has samples.
    """
    about, score = named(about), f"{goal:.1f}"
    turns = [{"role": "system", "content": _fill(prompt, prompt.system, {})}]

    def show(about: str, score: str, text: str) -> None:
        asked = _fill(prompt, prompt.example, {"about": about, "score": score})
        turns.extend([{"role": "user", "content": asked}, {"role": "assistant", "content": text}])

    for topic, text in prompt.samples:
        show(topic, score, text)
    anchors = [example for example in examples if example.anchor] if prompt.samples else []
    for example in examples:
        if example not in anchors:
            show(about, f"{example.score:.1f}", without_control_tokens(example.text))
    values = {"about": about, "score": score}
    if prompt.samples:
        values["texts"] = one_line_json([without_control_tokens(example.text) for example in anchors])
    turns.append({"role": "user", "content": _fill(prompt, prompt.ask, values)})
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
            f"prompt {prompt.name}.txt: {error} cannot be filled in; known are $about and $score, outside [system], "
            "and in [ask] $texts, where there is a [sample]"
        ) from None
