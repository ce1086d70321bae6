"""Questions with two choices, as a model is asked them: in both orders, with the answer's letter as one token.

A question is a user's turn as the model-written evaluations print it; the assistant's turn begins with `(`, and what
follows is the letter. Reads files of questions, and of samples that are some; writes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from fac_jax.config.data import Source
from fac_jax.config.downstream import SteerConfig
from fac_jax.errors import UserError
from fac_jax.text import document_hash, read_rows
from fac_jax.words import words

_CHOICES = re.compile(r"(.*?)\n\s*(?:Choices:\s*\n)?\s*\(A\)\s*(.*?)\n\s*\(B\)\s*(.*?)(?:\n\s*Answer:\s*)?", re.DOTALL)
_LETTER = re.compile(r"\s*\(?([AB])\)?\s*")
LETTERS = "AB"


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the one that shows the behaviour."""

    question: str
    choices: tuple[str, str]
    matches: int
    """0: (A), 1: (B)."""

    @property
    def text(self) -> str:
        """As the model-written evaluations print it."""
        return f"{self.question}\n\nChoices:\n (A) {self.choices[0]}\n (B) {self.choices[1]}"

    @property
    def swapped(self) -> Question:
        """The same in the other order."""
        return replace(self, choices=self.choices[::-1], matches=1 - self.matches)

    @cached_property
    def said(self) -> tuple[str, frozenset[str]]:
        """The words of the question, and of its choices in no order: equal for what a reader calls the same."""
        return words(self.question), frozenset(map(words, self.choices))


@dataclass(frozen=True)
class Asked:
    """A question in tokens."""

    body_t: Int[np.ndarray, " t"]
    """Up to the end of the user's words."""
    tail_t: Int[np.ndarray, " t"]
    """From there up to the letter: the rest of the template, and what opens the answer."""
    letters: tuple[int, int]
    """Tokens that follow: of (A) and of (B)."""


def read_questions(steer: SteerConfig) -> list[Question]:
    """Held-out questions. Raises UserError for a row that is none, with its place."""
    assert steer.heldout is not None
    found = []
    for where, row in read_rows(Source(path=steer.heldout)):
        if not isinstance(row, dict) or any(not isinstance(row.get(n), str) for n in (steer.question, steer.matching)):
            raise UserError(
                f"{where} has no text in {steer.question!r} and {steer.matching!r}; set steer.question and "
                "steer.matching to the fields with the question and the matching choice"
            )
        found.append(parse_question(row[steer.question], row[steer.matching], where))
    found.sort(key=lambda one: document_hash(one.text, "steer"))
    return found[: steer.limit]


def parse_question(text: str, matching: str, where: str) -> Question:
    """A question as printed, and the letter that matches. Raises UserError where either is not what it should be."""
    printed, letter = _CHOICES.fullmatch(text.strip()), _LETTER.fullmatch(matching)
    if printed is None or letter is None:
        wrong = "its question does not end in choices (A) and (B)" if printed is None else f"the match is {matching!r}"
        raise UserError(f"{where}: {wrong}; it must look as in the model-written evaluations")
    question, a, b = (part.strip() for part in printed.groups())
    return Question(question, (a, b), LETTERS.index(letter[1]))


def read_samples(path: Path) -> list[Question]:
    """What synthesis wrote, by line. Raises UserError for samples of a form without two choices."""
    # Not splitlines: it would also split at characters that JSON leaves as they are, such as U+2028.
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for number, sample in enumerate(samples, 1):
        if missing := [name for name in ("question", "choice_a", "choice_b", "matches") if name not in sample]:
            raise UserError(
                f"{path}:{number} has no {', '.join(missing)}: only samples with two choices make a steering vector, "
                "such as those of the tasks sycophancy and survival"
            )
    return [question_of(sample) for sample in samples]


def question_of(sample: dict[str, Any]) -> Question:
    """A line of kept.jsonl or random.jsonl."""
    choices = (sample["choice_a"], sample["choice_b"])
    return Question(sample["question"], choices, LETTERS.index(sample["matches"]))


def check_unseen(samples: Sequence[Question], heldout: Sequence[Question], arm: str, name: str) -> None:
    """Raise UserError naming a sample that is a held-out question, in whatever spelling and order of the choices."""
    measured = {one.said for one in heldout}
    shared = [number for number, one in enumerate(samples, 1) if one.said in measured]
    if shared:
        first = f"{arm}.jsonl:{shared[0]}: {samples[shared[0] - 1].question[:80]!r}"
        raise UserError(
            f"{len(shared)} samples of arm {arm!r} are held-out questions of {name} (the same words, the choices in "
            f"either order), the first is {first}; name other questions in steer.heldout, or leave those out of what "
            "samples are written from (data.NAME.without) and synthesize again"
        )


def ask_all(questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> list[Asked]:
    """Questions under the chat template. Raises UserError for a tokenizer that merges the letters' surroundings."""
    found = []
    for question in questions:
        messages = [{"role": "user", "content": question.text}]
        opening = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        end = opening.rindex(question.choices[1]) + len(question.choices[1])
        encoded = [
            tokenizer(f"{opening}({letter})", add_special_tokens=False, return_offsets_mapping=True)
            for letter in LETTERS
        ]
        ids = [list(one["input_ids"]) for one in encoded]
        same = next(i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])
        starts = [start for start, _ in encoded[0]["offset_mapping"]]
        first = next(i for i, start in enumerate(starts) if start >= end)
        if not first < same:
            raise UserError(f"the tokenizer joins an answer's letter to what stands before it: {ids[0][-4:]}")
        body, tail = np.asarray(ids[0][:first], np.int32), np.asarray(ids[0][first:same], np.int32)
        found.append(Asked(body, tail, (ids[0][same], ids[1][same])))
    return found
