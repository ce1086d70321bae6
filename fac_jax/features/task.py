"""A task is a folder of data: `tasks/NAME/` holds task.yaml, rubric.md and one prompt per .txt file.

task.yaml says what a positive label means, which answers a judge may give and what a synthetic sample looks like. A new
task is a new folder; no code knows the name of one. In prompts, {{title}}, {{positive}} and {{rubric}} are filled in.
Text from a corpus is never put into a prompt: it travels as JSON in the user's turn.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from fac_jax.errors import UserError
from fac_jax.plain import from_plain, suggest

FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class SampleShape:
    """What one synthetic sample must look like."""

    min_turns: int
    max_turns: int
    min_words: int
    max_words: int
    label: float
    """Label that every sample carries."""


@dataclass(frozen=True)
class Description:
    """task.yaml."""

    title: str
    positive: str
    """What a label above 0.5 means, as a clause."""
    labels: tuple[str, ...]
    """Answers of a judge, from the surest to the least sure; the last one means no."""
    metric: str
    sample: SampleShape


@dataclass(frozen=True)
class Task:
    """A task, read and checked."""

    name: str
    description: Description
    rubric: str
    prompts: Mapping[str, str]
    """Prompts as they are sent, by file name without ending."""
    digest: str
    """Of every file in the folder."""

    def prompt(self, name: str) -> str:
        """A prompt, or UserError when the task has none of that name."""
        if name not in self.prompts:
            raise UserError(f"task {self.name!r} has no prompt {name}.txt; it has: {', '.join(sorted(self.prompts))}")
        return self.prompts[name]


def task_names() -> list[str]:
    """The tasks there are."""
    return sorted(path.parent.name for path in FOLDER.glob("*/task.yaml"))


def load_task(name: str) -> Task:
    """Read a task. Raises UserError that lists the tasks there are, or names the file that is wrong."""
    names = task_names()
    if name not in names:
        raise UserError(f"judge.task is {name!r}{suggest(name, names)}; the tasks are: {', '.join(names)}")
    folder = FOLDER / name
    try:
        raw = yaml.safe_load((folder / "task.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{folder / 'task.yaml'} is not valid YAML: {error}") from None
    description = from_plain(Description, raw, f"{name}/task.yaml")
    rubric = (folder / "rubric.md").read_text(encoding="utf-8").strip()
    known = {"title": description.title, "positive": description.positive, "rubric": rubric}
    prompts = {file.stem: _fill(file, known) for file in sorted(folder.glob("*.txt"))}
    files = (file.name.encode() + b"\0" + file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file())
    return Task(name, description, rubric, prompts, hashlib.sha256(b"\0\0".join(files)).hexdigest()[:16])


def _fill(file: Path, known: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise UserError(f"{file} asks for {match[0]}; known are: {', '.join(known)}")
        return known[match[1]]

    return re.sub(r"\{\{(\w+)\}\}", value, file.read_text(encoding="utf-8")).strip()
