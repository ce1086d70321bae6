"""Preference pairs and instructions as others publish them, read into one shape.

A row is read by the fields that it has:

    fields named in the config      finetune.prompt, finetune.answer, finetune.rejected (data sets only)
    RewardBench                     prompt, chosen, rejected, subset
    HH-RLHF                         chosen, rejected: transcripts, alike up to the last answer
    TRL                             prompt, chosen, rejected: lists of {role, content}; the prompt may stand in both
    AlpacaEval, Alpaca              instruction, output (input, dataset)
    TRL                             prompt, completion; or messages
    fac_jax                         kept.jsonl: pairs (prompt, chosen, rejected), instructions (instruction, answer)

A row that is none of these, or lacks a part, is malformed: the run stops with its file and line, or lists it as
`on_bad_row` says. Splits and samples go by the words of the prompt, so what differs in case and punctuation only stays
together. Reads whatever `text.py` reads; writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

from fac_jax.config.data import DataSet
from fac_jax.config.downstream import FinetuneConfig
from fac_jax.errors import UserError
from fac_jax.text import ASSISTANT, USER, Turn, document_hash, parsed_rows
from fac_jax.words import is_text, words

Kind = Literal["pair", "instruction", "prompt"]
"""What a row must hold: two answers, one, or none."""
WANTED = {
    "pair": "chosen and rejected (with prompt, unless they are whole transcripts)",
    "instruction": "instruction and output, instruction and answer, prompt and completion, or messages",
    "prompt": "instruction or prompt",
}
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": USER, "Assistant": ASSISTANT}


@dataclass(frozen=True)
class Example:
    """A prompt and its answers."""

    prompt: tuple[Turn, ...]
    """Up to the user's last turn; empty where answers stand alone."""
    answers: tuple[str, ...]
    """The better one and the worse one; or the one there is; or none."""
    subset: str | None
    """Part of a benchmark that it belongs to."""
    source: str
    """File and row."""

    @cached_property
    def id(self) -> str:
        """16 hex digits, fixed by content."""
        content = [[(turn.role, turn.content) for turn in self.prompt], self.answers]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]

    @cached_property
    def asked(self) -> str:
        """The words of the prompt; empty without one."""
        return words("\n".join(turn.content for turn in self.prompt)) if self.prompt else ""

    @cached_property
    def answered(self) -> str:
        """The words of the answers, whichever is the better one."""
        return "\n".join(sorted(map(words, self.answers)))


@dataclass(frozen=True)
class Read:
    """Rows of a data set."""

    examples: tuple[Example, ...]
    duplicates: int
    """Rows that were there already, letter for letter, and are left out."""
    skipped: tuple[str, ...]
    """Malformed rows that were left out, each with its place."""


def read_examples(dataset: DataSet, kind: Kind, named: FinetuneConfig) -> Read:
    """Rows of a data set in file order, under its split, sample and limits. Raises UserError for a malformed row."""
    found: dict[str, Example] = {}
    skipped: list[str] = []
    duplicates = 0
    apart = set[str]()
    if dataset.without:
        other = replace(dataset, sources=dataset.without, without=(), sample=1.0)
        apart = {one.asked or one.answered for one in read_examples(other, kind, named).examples}
    for source in dataset.sources:
        taken, (low, high) = 0, source.split
        parse = partial(read_row, kind=kind, named=named)
        for one in parsed_rows(source, dataset.on_bad_row, skipped, parse, every_field=True):
            if source.limit is not None and taken >= source.limit:
                break
            key = one.asked or one.answered
            if not low <= document_hash(key, "split") < high or document_hash(key, "sample") >= dataset.sample:
                continue
            if key in apart:
                continue
            if dataset.unique and one.id in found:
                duplicates += 1
                continue
            found[one.id if dataset.unique else f"{one.id}:{len(found)}"] = one
            taken += 1
    return Read(tuple(found.values()), duplicates, tuple(skipped))


def read_row(row: Any, where: str, kind: Kind, named: FinetuneConfig) -> Example:
    """One row. Raises UserError, with its place, where it is none of the formats or a part of it is not what it should
    be."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with fields, this one is {type(row).__name__}")
    prompt, answers = {"pair": _pair, "instruction": _instruction, "prompt": _prompt}[kind](row, where, named)
    if prompt and prompt[-1].role != USER:
        raise UserError(f"{where}: the prompt ends with a turn of {prompt[-1].role!r}; the user's must be its last")
    if any(not answer for answer in answers):
        raise UserError(f"{where}: an answer is empty")
    if len(answers) == 2 and answers[0] == answers[1]:
        raise UserError(f"{where}: the better and the worse answer are the same")
    if not all(map(is_text, (*(turn.content for turn in prompt), *answers))):
        raise UserError(f"{where}: the text holds half of a UTF-16 pair, which is no character")
    subset = next((row[name] for name in ("subset", "dataset") if isinstance(row.get(name), str)), None)
    return Example(prompt, answers, subset, where)


Parts = tuple[tuple[Turn, ...], tuple[str, ...]]


def _pair(row: dict[str, Any], where: str, named: FinetuneConfig) -> Parts:
    if (parts := _named(row, where, named.prompt, named.answer, named.rejected)) is not None:
        return parts
    if not _has(row, "chosen", "rejected"):
        raise _no_format(row, where, "pair", named)
    sides = [row["chosen"], row["rejected"]]
    prompt = row.get("prompt")
    if all(isinstance(side, str) for side in sides):
        if prompt is not None:
            return _turns(prompt, where, "prompt"), tuple(side.strip() for side in sides)
        turns = [_transcript(side, where) for side in sides]
    elif all(isinstance(side, list) for side in sides):
        given = () if prompt is None else _turns(prompt, where, "prompt")
        turns = [_turns(side, where, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True)]
        turns = [(*given, *side) if len(side) == 1 else side for side in turns]  # longer ones hold the prompt
    else:
        kinds = " and ".join(type(side).__name__ for side in sides)
        raise UserError(f"{where}: chosen and rejected are {kinds}; they must be two texts, or two lists of messages")
    chosen, rejected = turns
    if chosen[:-1] != rejected[:-1] or {chosen[-1].role, rejected[-1].role} != {ASSISTANT}:
        raise UserError(f"{where}: chosen and rejected must be one conversation up to two answers of the assistant's")
    return chosen[:-1], (chosen[-1].content, rejected[-1].content)


def _instruction(row: dict[str, Any], where: str, named: FinetuneConfig) -> Parts:
    if (parts := _named(row, where, named.prompt, named.answer)) is not None:
        return parts
    for answer in ("output", "answer"):
        if _has(row, "instruction", answer):
            return _alpaca(row, where), (_text(row, answer, where),)
    if _has(row, "prompt", "completion"):
        prompt, completion = _turns(row["prompt"], where, "prompt"), row["completion"]
        if isinstance(completion, str):
            return prompt, (completion.strip(),)
        turns = (*prompt, *_turns(completion, where, "completion"))
    elif _has(row, "messages"):
        turns = _turns(row["messages"], where, "messages")
    else:
        raise _no_format(row, where, "instruction", named)
    if len(turns) < 2 or turns[-1].role != ASSISTANT:
        raise UserError(f"{where}: the conversation must end with an answer of the assistant's to a user's turn")
    return turns[:-1], (turns[-1].content,)


def _prompt(row: dict[str, Any], where: str, named: FinetuneConfig) -> Parts:
    if named.prompt is not None and _has(row, named.prompt):
        return _turns(row[named.prompt], where, named.prompt), ()
    if _has(row, "instruction"):
        return _alpaca(row, where), ()
    if _has(row, "prompt"):
        return _turns(row["prompt"], where, "prompt"), ()
    raise _no_format(row, where, "prompt", named)


def _named(row: dict[str, Any], where: str, prompt: str | None, *answers: str | None) -> Parts | None:
    """By the fields that the config names; None where it names none, or the row has not all of them."""
    names = [name for name in answers if name is not None]
    if len(names) < len(answers) or not _has(row, *names, *(() if prompt is None else (prompt,))):
        return None
    before = () if prompt is None else _turns(row[prompt], where, prompt)
    return before, tuple(_text(row, name, where) for name in names)


def _has(row: Mapping[str, Any], *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _no_format(row: Mapping[str, Any], where: str, kind: Kind, named: FinetuneConfig) -> UserError:
    fields = {"prompt": named.prompt, "answer": named.answer, "rejected": named.rejected}
    said = ", ".join(f"finetune.{name} {value!r}" for name, value in fields.items() if value is not None)
    return UserError(
        f"{where}: has the fields {', '.join(map(str, row))}; it needs {WANTED[kind]}, or those that finetune.prompt, "
        f"finetune.answer and finetune.rejected name ({said or 'none is set'})"
    )


def _alpaca(row: dict[str, Any], where: str) -> tuple[Turn, ...]:
    """An instruction, and behind it the input that some have."""
    given = row.get("input")
    parts = [_text(row, "instruction", where), "" if given is None else _text(row, "input", where)]
    return _turns("\n\n".join(part for part in parts if part), where, "instruction")


def _text(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise UserError(f"{where}: {name!r} is {type(row[name]).__name__}; it must be text")
    return row[name].strip()


def _turns(value: Any, where: str, name: str) -> tuple[Turn, ...]:
    """A user's text, or messages; those that one speaker says in a row are one turn, empty ones none."""
    if isinstance(value, str):
        value = [{"role": USER, "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{where}: {name!r} is {type(value).__name__}; it must be text or a list of messages")
    said = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"{where}: a message must have a role and a content, this one is {str(message)[:80]!r}")
        said.append(Turn(role, content.strip()))
    return _joined(said, where, name)


def _transcript(text: str, where: str) -> tuple[Turn, ...]:
    """`Human: ...`, `Assistant: ...`, as HH-RLHF prints a conversation."""
    first, *rest = _SPEAKER.split(text.strip())
    if first or not rest:
        raise UserError(f"{where}: without a prompt, chosen and rejected must be transcripts that begin with Human:")
    said = [Turn(_ROLES[who], what.strip()) for who, what in zip(rest[::2], rest[1::2], strict=True)]
    if not said[-1].content:
        raise UserError(f"{where}: an answer is empty")
    return _joined(said, where, "transcript")


def _joined(said: list[Turn], where: str, name: str) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for turn in said:
        if turns and turn.content and turns[-1].role == turn.role:
            turns[-1] = Turn(turn.role, f"{turns[-1].content}\n\n{turn.content}")
        elif turn.content:
            turns.append(turn)
    if not turns:
        raise UserError(f"{where}: {name!r} is empty")
    return tuple(turns)
