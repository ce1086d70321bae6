"""A task is a folder of data: task.yaml, rubric.md and prompts. `tasks/README.md` says how to add one; no code need.

task.yaml says what a positive label means, which answers a judge may give and what a synthetic sample is. `judge.task`
names a folder in `tasks/` or gives the path of one's own. Prompts that say the same for every task (explain, verify,
judge) come from `tasks/shared/` where the folder has none of its own; what a sample is, is the task's to say. In all of
them {{title}}, {{positive}} and {{rubric}} are filled in. Text from a corpus is never put into a prompt: it travels as
JSON in the user's turn (`llm/question.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from fac_jax.errors import UserError
from fac_jax.plain import from_plain, suggest

FOLDER = Path(__file__).parent / "tasks"
SHARED = FOLDER / "shared"
FALL_BACK = ("explain", "judge", "verify")
"""Prompts that `tasks/shared` has for tasks that lack them."""
OWN = ("contrast", "cover", "answer")
"""Prompts that only the task can give: they say what a sample is. `answer` is for instructions."""
MEASURED = {
    "user turns": "auprc", "preference pair": "preference accuracy", "two choices": "robust accuracy",
    "instruction and answer": "win rate",
}  # fmt: skip
"""What a synthetic sample may be, and what a model trained on such samples is measured by."""


@dataclass(frozen=True)
class SampleShape:
    """How large one synthetic sample must be; `synthesis/forms.py` says what it is made of."""

    min_turns: int
    max_turns: int
    """Turns of the person."""
    min_words: int
    max_words: int
    """Of user turns all together, of an instruction, of a question (a choice may have less), of an answer (a turn of
    the conversation before it may have less)."""
    label: float
    """Label that every sample carries."""

    def __post_init__(self) -> None:
        for unit, low, high in (
            ("turns", self.min_turns, self.max_turns),
            ("words", self.min_words, self.max_words),
        ):
            if not 1 <= low <= high:
                raise UserError(f"sample has min_{unit} {low} and max_{unit} {high}; need 1 <= min <= max")
        if not 0 <= self.label <= 1:
            raise UserError(f"sample has the label {self.label:g}; it must lie in 0 to 1")


@dataclass(frozen=True)
class Description:
    """task.yaml."""

    title: str
    positive: str
    """What a label above 0.5 means, as a clause."""
    labels: tuple[str, ...]
    """Answers of a judge, from the surest to the least sure; the last one means no."""
    form: Literal["user turns", "preference pair", "two choices", "instruction and answer"]
    """What a synthetic sample is."""
    metric: Literal["auprc", "preference accuracy", "robust accuracy", "win rate"]
    """What is measured downstream."""
    sample: SampleShape
    """How many turns and words it may have."""
    harmful: bool = False
    """Whether what the task looks for does harm. Reports then blur explanations, as they do passages, and the terminal
    shows neither unless it is asked to."""

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels) or not all(self.labels):
            raise UserError(f"labels are {list(self.labels)}; they must be two or more, none twice and none empty")
        if not self.title.strip() or not self.positive.strip():
            raise UserError(f"title is {self.title!r} and positive {self.positive!r}; neither may be empty")
        if self.metric != MEASURED[self.form]:
            raise UserError(f"metric is {self.metric!r}; with the form {self.form!r} it is {MEASURED[self.form]!r}")


@dataclass(frozen=True)
class Task:
    """A task, read and checked."""

    name: str
    description: Description
    rubric: str
    prompts: Mapping[str, str]
    """Prompts as they are sent, by file name without ending."""
    digest: str
    """Of every file that was read, those of `tasks/shared` included."""

    def prompt(self, name: str) -> str:
        """A prompt, or UserError when the task has none of that name."""
        if name not in self.prompts:
            raise UserError(f"task {self.name!r} has no prompt {name}.txt; it has: {', '.join(sorted(self.prompts))}")
        return self.prompts[name]


def task_names() -> list[str]:
    """The tasks there are."""
    return sorted(path.parent.name for path in FOLDER.glob("*/task.yaml"))


def load_task(name: str) -> Task:
    """Read the task of that name, or in that folder.

    Raises UserError that lists the tasks there are, or names the file that is wrong and what is wrong with it.
    """
    folder = _folder(name)
    own = {file.stem: file for file in sorted(folder.glob("*.txt"))}
    for stem, file in own.items():
        if stem not in (*FALL_BACK, *OWN):
            names = ", ".join(f"{one}.txt" for one in (*FALL_BACK, *OWN))
            near = suggest(stem, (*FALL_BACK, *OWN))
            raise UserError(f"{file} is no prompt of a task{near}; the prompts are: {names}")
    files = {stem: SHARED / f"{stem}.txt" for stem in FALL_BACK} | own
    texts = {stem: _read(file) for stem, file in files.items()}
    yaml_text, rubric = _read(folder / "task.yaml"), _read(folder / "rubric.md")
    description = _description(yaml_text, folder / "task.yaml")
    if not rubric.strip():
        raise UserError(f"{folder / 'rubric.md'} is empty; it must say what belongs to the task and what does not")
    known = {"title": description.title, "positive": description.positive, "rubric": rubric.strip()}
    prompts = {stem: _fill(text, files[stem], known) for stem, text in texts.items()}
    every = {"task.yaml": yaml_text, "rubric.md": rubric, **texts}
    content = "\0".join(f"{stem}\0{every[stem]}" for stem in sorted(every))
    return Task(
        name=folder.resolve().name,
        description=description,
        rubric=rubric.strip(),
        prompts=prompts,
        digest=hashlib.sha256(content.encode()).hexdigest()[:16],
    )


def _folder(name: str) -> Path:
    """The folder meant: of a shipped task, or a path from the working directory."""
    names = task_names()
    if name in names:
        return FOLDER / name
    folder = Path(name).expanduser()
    separators = [one for one in (os.sep, os.altsep) if one]
    if not name.strip() or not (folder.is_dir() or any(one in name for one in separators)):
        raise UserError(
            f"judge.task is {name!r}{suggest(name, names)}; the tasks are: {', '.join(names)}; "
            "or give the path of a folder with a task.yaml"
        )
    if not (folder / "task.yaml").is_file():
        raise UserError(f"judge.task is {name!r}, and {folder / 'task.yaml'} does not exist: mend the path or write it")
    return folder


def _description(text: str, file: Path) -> Description:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from None
    where = f"{file.parent.name}/{file.name}"
    try:
        return from_plain(Description, raw, where)
    except UserError as error:  # what a value itself says of its fields does not name the file
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; a task needs task.yaml and rubric.md") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None


def _fill(text: str, file: Path, known: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise UserError(f"{file} asks for {match[0]}; known are: {', '.join(known)}")
        return known[match[1]]

    return re.sub(r"\{\{(\w+)\}\}", value, text).strip()
