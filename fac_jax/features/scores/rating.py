"""Ratings of held-out spans by a language model that is shown an explanation (`heldout.py` says what is asked).

One request rates a handful of spans of one feature, active ones and others mixed, each on Yes / Probably / Maybe / No
by its number; a span is never shown twice in one request, with a right and a wrong mark. A reply that does not rate
every span by its number rates none of them. Reads nothing; `ask.py` writes the log of replies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from transformers import PreTrainedTokenizerFast

from fac_jax.features.ask import ask
from fac_jax.features.scores.heldout import Kind, Trials
from fac_jax.features.scores.prompts import shared_prompt
from fac_jax.features.spans import Passages
from fac_jax.llm.client import Generator, Request
from fac_jax.llm.question import object_schema, question
from fac_jax.scan.spans import decode

LABELS = ("No", "Maybe", "Probably", "Yes")
"""What a rating may be; its place is its number."""
SPANS_PER_REQUEST = 10
PURPOSES: Mapping[Kind, str] = {"detection": "detect", "fuzzing": "fuzz"}
"""First word of a question's key, and the name of its prompt."""


@dataclass(frozen=True)
class Exam:
    """Trials, and the explanation that those of each feature are rated by."""

    kind: Kind
    trials: Trials
    explanations: Mapping[int, str]
    control: bool = False
    """The explanations are those of other features."""


@dataclass(frozen=True)
class Rated:
    """What came back for one exam."""

    rating_r: Float64[np.ndarray, " r"]
    """0 (No) to 3 (Yes); NaN where the reply could not be read."""
    replies: int
    unread: int
    """Of the replies, those that could not be read."""


def rate(
    generator: Generator,
    passages: Passages,
    tokenizer: PreTrainedTokenizerFast,
    exams: Mapping[str, Exam],
    seed: int,
    log: Path,
) -> dict[str, Rated]:
    """The ratings of all exams, asked for together."""
    asked: dict[str, Request] = {}
    rows: dict[str, tuple[str, Int64[np.ndarray, " s"]]] = {}
    for name, exam in exams.items():
        for key, mine in _requests(exam, seed).items():
            asked[key] = _request(exam, mine, passages, tokenizer)
            rows[key] = name, mine
    answers = ask(generator, asked, log, "score explanations")
    ratings = {name: np.full(len(exam.trials.feature_r), np.nan) for name, exam in exams.items()}
    counts = {name: [0, 0] for name in exams}
    for key, (name, mine) in rows.items():
        value = answers[key].value
        counts[name][0] += 1
        counts[name][1] += value is None
        if value is not None:
            ratings[name][mine] = [LABELS.index(value[str(number)]) for number in range(1, len(mine) + 1)]
    return {name: Rated(ratings[name], *counts[name]) for name in exams}


def requests_each(kind: Kind, active: int, silent: int) -> int:
    """Requests for one feature with so many trials of either answer."""
    return max(2 if kind == "fuzzing" else 1, -(-(active + silent) // SPANS_PER_REQUEST))


def _requests(exam: Exam, seed: int) -> dict[str, Int64[np.ndarray, " s"]]:
    """Rows of the trials by question's key, in the order that they are shown in."""
    trials, found = exam.trials, {}
    cuts = np.flatnonzero(np.diff(trials.feature_r, prepend=-1, append=-1))
    for first, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        feature, mine = int(trials.feature_r[first]), np.arange(first, stop)
        active = mine[trials.active_r[first:stop]]
        silent = mine[~trials.active_r[first:stop]]
        count = requests_each(exam.kind, len(active), len(silent))
        # One further for the others: the two marks of a span, which have the same place in their rows, part ways.
        batch = np.concatenate([np.arange(len(active)) % count, (np.arange(len(silent)) + 1) % count])
        random = np.random.default_rng([seed, feature, len(mine)])
        middle = f"{PURPOSES[exam.kind]}:" if exam.control else ""
        for number in range(count):
            key = f"{'control' if exam.control else PURPOSES[exam.kind]}:{feature}:{middle}{number}"
            found[key] = random.permutation(np.concatenate([active, silent])[batch == number])
    return found


def _request(exam: Exam, mine: np.ndarray, passages: Passages, tokenizer: PreTrainedTokenizerFast) -> Request:
    spans = {str(number): _shown(exam, int(row), passages, tokenizer) for number, row in enumerate(mine, start=1)}
    explanation = exam.explanations[int(exam.trials.feature_r[mine[0]])]
    schema = object_schema(**{number: {"type": "string", "enum": list(LABELS[::-1])} for number in spans})
    return question(shared_prompt(PURPOSES[exam.kind]), {"explanation": explanation, "spans": spans}, schema)


def _shown(exam: Exam, row: int, passages: Passages, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A span's text; where a token is marked, what comes before it, the token, and what comes after it."""
    trials = exam.trials
    start, stop = int(trials.start_r[row]), int(trials.stop_r[row])
    if exam.kind == "detection":
        return decode(passages.token_t[start:stop], tokenizer)
    mark = int(passages.start_n[trials.document_r[row]] + trials.position_r[row])
    cuts = {"before": (start, mark), "token": (mark, mark + 1), "after": (mark + 1, stop)}
    return {name: decode(passages.token_t[slice(*cut)], tokenizer) for name, cut in cuts.items()}
