"""Samples that are more than user turns: how a writer writes them down, what is wrong with one, what is measured of it.

A writer is asked for plain lines with marks in front, which a small model can follow where it writes no valid JSON:

    two choices               preference pair                    instruction and answer
    a question                Person: ...                        the instruction, in one line or several
    (A) one answer            Assistant: ...                     (its answer is written once it is kept)
    (B) another               Person: ...
    Matches: (B)              Better: ...
                              Worse: ...

Read strictly: marks in this order, each once, and nothing behind them. A `Reading` keeps the fields that exports are
made of, the text that the SAE measures (a choice as the model-written evaluations print it, a pair by its chosen
transcript, an instruction by itself) and the lines as a prompt shows them to a writer. Reads and writes no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fac_jax.features.task import SampleShape
from fac_jax.words import normalised

Fields = Mapping[str, str | list[dict[str, str]]]
LONGER = 2.0
"""The better and the worse answer of a pair may differ in length by this factor; else length alone tells them apart."""
ANSWER_WORDS = 600
"""An answer to an instruction has fewer."""

_CHOICE = re.compile(r"\(([AB])\)\s*(.*)", re.DOTALL)
_MATCHES = re.compile(r"matches\s*:\s*\(?([AB])\)?\.?$", re.IGNORECASE)
_SAYS = re.compile(r"(person|human|user|assistant|better|worse)\s*:\s*(.*)", re.IGNORECASE | re.DOTALL)
_REFUSAL = re.compile(
    r"\b(?:i'?m|i am) (?:sorry|unable|not able)\b"
    r"|\bi (?:cannot|can't|can not|won't|will not) (?:help|assist|do|answer|provide)",
    re.IGNORECASE,
)
_ROLES = {"person": "user", "assistant": "assistant"}
_TRANSCRIPT = {"person": "Human", "assistant": "Assistant"}
"""Speakers as the published preference data name them."""


@dataclass(frozen=True)
class Reading:
    """What a writer's lines were read as."""

    text: str
    """What is measured and kept."""
    written: str
    """The lines as a prompt shows them."""
    reason: str | None
    """Why it is no sample."""
    fields: Fields = field(default_factory=dict)


def read_choices(lines: list[str], shape: SampleShape) -> Reading:
    """Question, choices (A) and (B), and which of them matches the behaviour."""
    question, *rest = _blocks(lines, _CHOICE, _MATCHES)
    choices = [mark for block in rest[:2] if (mark := _CHOICE.match(block))]
    matches = _MATCHES.match(rest[2]) if len(rest) == 3 else None
    if [mark[1] for mark in choices] != ["A", "B"] or matches is None:
        raw = "\n".join(lines)
        return Reading(raw, raw, "needs a question, then (A), then (B), then which of them matches")
    a, b = (" ".join(mark[2].split()) for mark in choices)
    reason = _first(
        _length("the question", question, shape),
        None if "?" in question else "asks no question",
        *(_length(f"choice ({name})", one, shape, 1) for name, one in (("A", a), ("B", b))),
        "the choices are the same" if _words(a) == _words(b) else None,
    )
    fields = {"question": question, "choice_a": a, "choice_b": b, "matches": matches[1].upper()}
    text = f"{question}\n\nChoices:\n (A) {a}\n (B) {b}"
    return Reading(text, f"{question}\n(A) {a}\n(B) {b}\nMatches: ({fields['matches']})", reason, fields)


def read_pair(lines: list[str], shape: SampleShape) -> Reading:
    """A conversation up to a person's last turn, and a better and a worse answer to it."""
    said = [_said(block) for block in _blocks(lines, _SAYS)]
    speakers = [who for who, _ in said]
    questions = (len(said) - 1) // 2
    if questions < 1 or speakers != [*(["person", "assistant"] * questions)[:-1], "better", "worse"]:
        raw = "\n".join(lines)
        return Reading(raw, raw, "needs turns of Person and Assistant, the last a Person's, then Better, then Worse")
    turns, (better, worse) = said[:-2], (what for _, what in said[-2:])
    lengths = [len(_words(one)) for one in (better, worse)]
    asked = f"{shape.min_turns} to {shape.max_turns} were asked for"
    apart = f"the answers have {lengths[0]} and {lengths[1]} words: their length alone would tell them apart"
    reason = _first(
        None if shape.min_turns <= questions <= shape.max_turns else f"{questions} questions, {asked}",
        *(_length("a turn", what, shape, 1) for _, what in turns),
        _length("the better answer", better, shape),
        _length("the worse answer", worse, shape),
        "the answers are the same" if _words(better) == _words(worse) else None,
        apart if max(lengths) > LONGER * min(lengths) else None,
        "the worse answer is a refusal" if _REFUSAL.search(worse) else None,
    )
    written = [f"{who.capitalize()}: {what}" for who, what in said]
    transcript = [f"{_TRANSCRIPT[who]}: {what}" for who, what in (*turns, ("assistant", better))]
    prompt = [{"role": _ROLES[who], "content": what} for who, what in turns]
    fields: Fields = {"prompt": prompt, "chosen": better, "rejected": worse}
    return Reading("\n\n".join(transcript), "\n".join(written), reason, fields)


def read_instruction(lines: list[str], shape: SampleShape) -> Reading:
    """An instruction, whole and never carried out."""
    text = "\n".join(lines)
    return Reading(text, text, _length("the instruction", text, shape), {"instruction": text})


def answer_misfit(text: str, finish_reason: str) -> str | None:
    """Why this is no answer to an instruction; None when it is one."""
    count = len(_words(text))
    if finish_reason != "stop":
        return "the answer was cut off" if finish_reason == "length" else f"the writer ended with {finish_reason!r}"
    if not count:
        return "the answer is empty"
    if count >= ANSWER_WORDS:
        return f"the answer has {count} words, fewer than {ANSWER_WORDS} were asked for"
    return "the answer is a refusal" if _REFUSAL.search(text) else None


READERS = {"two choices": read_choices, "preference pair": read_pair, "instruction and answer": read_instruction}
"""By the form that task.yaml names."""


def _blocks(lines: list[str], *marks: re.Pattern[str]) -> list[str]:
    """Lines joined up to the next one that begins with a mark."""
    blocks: list[str] = []
    for line in lines:
        if not blocks or any(mark.match(line) for mark in marks):
            blocks.append(line)
        else:
            blocks[-1] += "\n" + line
    return blocks


def _said(block: str) -> tuple[str, str]:
    mark = _SAYS.match(block)
    if mark is None:
        return "nobody", block
    who = mark[1].lower()
    return {"human": "person", "user": "person"}.get(who, who), mark[2].strip()


def _first(*found: str | None) -> str | None:
    return next((one for one in found if one is not None), None)


def _words(text: str) -> list[str]:
    return normalised(text).split()


def _length(what: str, text: str, shape: SampleShape, fewest: int | None = None) -> str | None:
    count, fewest = len(_words(text)), shape.min_words if fewest is None else fewest
    if fewest <= count <= shape.max_words:
        return None
    return f"{what} has {count} words, {fewest} to {shape.max_words} were asked for"
