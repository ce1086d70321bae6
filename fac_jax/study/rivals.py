"""Samples written without a look at features, as published: what synthesis has to beat at the same budget.

    Self-Instruct (arXiv 2212.10560)   six texts of the seed and two that it wrote are shown, one more is asked for
    Evol-Instruct (arXiv 2304.12244)   a text is shown and made over, deeper in one of four ways or into another of its
                                       kind; what came of it is made over next, and one whose evolution failed stays

What is a sample, a copy or a near duplicate is decided as synthesis decides it (both papers have filters of their own),
so that arms differ in what is asked for and in nothing else. Texts stand where the writer's own words stand, as in
`synthesis/prompt.py`. Writes `generations.jsonl` in the folder given: a stopped run asks only for what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fac_jax.errors import UserError
from fac_jax.features.task import Description
from fac_jax.llm.client import Generator, Message
from fac_jax.llm.control_tokens import without_control_tokens
from fac_jax.synthesis.ablation import LOG
from fac_jax.synthesis.generations import Generation, Job, Sampling, settle_log, write_all
from fac_jax.synthesis.samples import read_sample, without_copies

SYSTEM = (
    "You write down what people type to a chat assistant, in their own words: {positive}. A filter learns from it. You "
    "never answer and never explain how harmful things are done. Write one new short message of such a person, and "
    "nothing else."
)
ASK = "Write one message."
DEEPER = (
    "Write it again with one more condition that has to be met.",
    "Write it again so that it goes further into the matter.",
    "Write it again with particular names, places or things in place of general ones.",
    "Write it again so that it takes several steps of thought to answer.",
)
BROADER = "Write another message of that kind, about something that is rarer."
PROMPTS = (SYSTEM, ASK, *DEEPER, BROADER)
"""All that decides what is asked."""
SHOWN_SEED, SHOWN_OWN = 6, 2
ROUND = 32
"""Texts asked for at once; what came of a round may be shown in the next."""
MOST = 5
"""Texts asked for at most, for each that is wanted."""
NO_FEATURE = -1


@dataclass(frozen=True)
class Rival:
    """What a rival wrote."""

    texts: list[str]
    """Samples, in the order in which they were written."""
    written: int
    """Texts that were asked for."""
    tokens: int
    """Read and written."""


@dataclass(frozen=True)
class Writing:
    """What both need."""

    description: Description
    """Of the task: what a sample is."""
    known: frozenset[str]
    """Normalised texts that no sample may copy."""
    generator: Generator
    sampling: Sampling
    folder: Path


def self_instruct(writing: Writing, seeds: Sequence[str], count: int) -> Rival:
    """`count` samples after the texts of the seed, or as many as come of MOST times as many tries."""
    own: list[str] = []

    def prompts(first: int) -> list[tuple[Message, ...]]:
        asked = []
        for place in range(first, first + ROUND):
            random = np.random.default_rng([writing.sampling.seed, 11, place])
            shown = [*_drawn(random, seeds, SHOWN_SEED), *_drawn(random, own, SHOWN_OWN)]
            asked.append(_messages(writing, [(ASK, shown[at]) for at in random.permutation(len(shown))], ASK))
        return asked

    return _write(writing, count, prompts, lambda place, text: own.append(text))


def evol_instruct(writing: Writing, seeds: Sequence[str], count: int) -> Rival:
    """`count` samples that the texts of the seed evolved into, or as many as come of MOST times as many tries."""
    pool = list(seeds)

    def prompts(first: int) -> list[tuple[Message, ...]]:
        asked = []
        for place in range(first, first + ROUND):
            random = np.random.default_rng([writing.sampling.seed, 12, place])
            how = (*DEEPER, BROADER)[int(random.integers(len(DEEPER) + 1))]
            asked.append(_messages(writing, [(ASK, pool[place % len(pool)])], how))
        return asked

    def evolved(place: int, text: str) -> None:
        pool[place % len(pool)] = text

    return _write(writing, count, prompts, evolved)


def _write(
    writing: Writing,
    count: int,
    prompts: Callable[[int], list[tuple[Message, ...]]],
    taken: Callable[[int, str], None],
) -> Rival:
    """Rounds until there are enough; `taken` hears of every sample and its place among the tries."""
    what, log = writing.description, writing.folder / LOG
    found: list[tuple[str, str]] = []
    every: list[Generation] = []
    while len(found) < count and len(every) < MOST * count:
        first = len(every)
        jobs = [
            writing.sampling.job(NO_FEATURE, 1, first + place, messages)
            for place, messages in enumerate(prompts(first))
        ]
        replies = write_all(jobs, writing.generator, log)
        every += replies
        read = [read_sample(one.text, one.finish_reason, what.sample, what.form) for one in replies]
        samples = without_copies(read, [job.id for job in jobs], writing.known, list(map(_shown, jobs)), found)
        for place, (job, sample) in enumerate(zip(jobs, samples, strict=True), first):
            if sample.reason is None:
                found.append((job.id, sample.text))
                taken(place, sample.text)
    settle_log(log, every)
    tokens = sum(one.prompt_tokens + one.completion_tokens for one in every)
    return Rival([text for _, text in found[:count]], len(every), tokens)


def _messages(writing: Writing, shown: Sequence[tuple[str, str]], ask: str) -> tuple[Message, ...]:
    turns = [{"role": "system", "content": SYSTEM.format(positive=writing.description.positive)}]
    for asked, text in shown:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": without_control_tokens(text)}]
    return (*turns, {"role": "user", "content": ask})


def _shown(job: Job) -> list[str]:
    return [turn["content"] for turn in job.request.messages if turn["role"] == "assistant"]


def _drawn(random: np.random.Generator, texts: Sequence[str], count: int) -> list[str]:
    return [texts[at] for at in random.choice(len(texts), min(count, len(texts)), replace=False)] if texts else []


def check_seeds(seeds: Sequence[str], name: str) -> None:
    """Raises UserError where there is nothing to begin with."""
    if not seeds:
        raise UserError(
            f"data set {name!r} has no text with the task's label, and self-instruct and evol-instruct begin with such "
            "texts; leave both out of study.arms, or give the seed some"
        )
