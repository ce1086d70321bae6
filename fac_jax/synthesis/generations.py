"""Requests out, replies kept: `generations.jsonl` holds every reply the moment it arrives.

A run that was stopped, or whose server went away, asks only for what is missing: a reply is used again when its
feature, step, index, prompt digest, seed and generator are the same. Once all are there the file is rewritten in the
order of the jobs, so an interrupted run ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fac_jax.errors import UserError
from fac_jax.llm.client import Generator, Message, Reply, Request, Steer
from fac_jax.plain import digest
from fac_jax.progress import progress
from fac_jax.runs import whole_lines, write_text


@dataclass(frozen=True)
class Job:
    """One text to be written for a feature."""

    feature: int
    step: int
    index: int
    request: Request

    @property
    def id(self) -> str:
        """Such as `f812-s1-0`: feature 812, step 1, first candidate."""
        return f"f{self.feature}-s{self.step}-{self.index}"

    @property
    def prompt_digest(self) -> str:
        """Of all that is sent but the seed, and of what steers, where something does."""
        sent = {**dataclasses.asdict(self.request), "seed": None}
        if sent["steer"] is None:  # logs from before there was steering are used again
            del sent["steer"]
        return digest(sent)


@dataclass(frozen=True)
class Generation:
    """A reply with all that it came from: one line of `generations.jsonl`."""

    feature: int
    step: int
    index: int
    prompt_digest: str
    seed: int
    generator: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    model: str

    @property
    def key(self) -> tuple[int, int, int, str, int, str]:
        """What must agree for a reply to be used again."""
        return self.feature, self.step, self.index, self.prompt_digest, self.seed, self.generator


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn, the same for all of a run."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    """Of the run; every job has its own, made from it."""

    def job(
        self, feature: int, step: int, index: int, messages: tuple[Message, ...], steer: Steer | None = None
    ) -> Job:
        """A job whose seed depends on nothing but the run's seed and its own place."""
        place = hashlib.sha256(f"{self.seed}:{feature}:{step}:{index}".encode()).digest()
        seed = int.from_bytes(place[:4], "big") >> 1  # 31 bits: what every server takes
        request = Request(messages, self.max_tokens, self.temperature, self.top_p, seed, steer=steer)
        return Job(feature, step, index, request)


def write_all(jobs: Sequence[Job], generator: Generator, log: Path) -> list[Generation]:
    """A generation per job, in their order; those that `log` holds are not asked for again.

    When the generator fails, all that arrived before is in `log`.
    """
    there = {generation.key: generation for generation in read_log(log)}
    keys = [_key(job, generator.name) for job in jobs]
    todo = [place for place, key in enumerate(keys) if key not in there]
    with progress(f"write step {jobs[0].step}" if jobs else "write", len(todo), "texts") as bar:
        with open(log, "a", encoding="ascii") as lines:
            tokens = 0

            def keep(index: int, reply: Reply) -> None:
                nonlocal tokens
                key = keys[todo[index]]
                there[key] = Generation(*key, **dataclasses.asdict(reply))
                lines.write(_line(there[key]))
                lines.flush()
                tokens += reply.completion_tokens
                rate = tokens / (time.monotonic() - bar.started)
                bar.advance(1, f"{generator.spent}, {rate:,.0f} new tokens/s")

            if todo:
                about = [f"write:{jobs[place].feature}" for place in todo]
                generator.generate([jobs[place].request for place in todo], keep, about)
    return [there[key] for key in keys]


def read_log(log: Path) -> list[Generation]:
    """Generations in a log; a last line that a kill cut short is taken off, so that the next starts on its own.

    Raises UserError for any other line that cannot be read.
    """
    found = []
    for number, line in enumerate(whole_lines(log), 1):
        try:
            found.append(Generation(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{log}:{number} cannot be read ({error}); delete that line, it will be written again"
            ) from None
    return found


def settle_log(log: Path, generations: Sequence[Generation]) -> None:
    """Rewrite the log in this order."""
    write_text(log, "".join(map(_line, generations)))


def _line(generation: Generation) -> str:
    return json.dumps(dataclasses.asdict(generation)) + "\n"


def _key(job: Job, generator: str) -> tuple[int, int, int, str, int, str]:
    return job.feature, job.step, job.index, job.prompt_digest, job.request.seed, generator
