"""What a run's answers cost: a line per answer in the run directory, sums by purpose and feature, and the limits.

Writes `ledger.jsonl` beside the products. It is no product itself: it says what was paid, also for products that were
set aside since, and what the cache saved. A killed run goes on with the sums that stand in it, so a limit holds for
the run directory and not for one start of the command.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.llm.client import Reply, Request
from fac_jax.runs import whole_lines

FILE = "ledger.jsonl"
CHARACTERS_PER_TOKEN = 4
"""Of English text, roughly: for dry runs and for servers that do not count."""


@dataclass(frozen=True)
class Sum:
    """What some answers took."""

    answers: int = 0
    """Answers, those from the cache left out."""
    cached: int = 0
    """Answers from the cache: nothing was spent on them."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """In the currency of the prices; 0 without prices."""

    def plus(self, line: Mapping[str, Any]) -> Sum:
        """With one more line of the ledger."""
        if line["cached"]:
            return Sum(self.answers, self.cached + 1, self.prompt_tokens, self.completion_tokens, self.cost)
        return Sum(
            self.answers + 1,
            self.cached,
            self.prompt_tokens + line["prompt_tokens"],
            self.completion_tokens + line["completion_tokens"],
            self.cost + (line["cost"] or 0.0),
        )

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.prompt_tokens + self.completion_tokens


class Ledger:
    """The ledger of one run directory, and what its limits leave."""

    def __init__(self, folder: Path, config: LlmConfig, task: str) -> None:
        """Read what was spent before. Raises UserError for a limit on money without prices, or a torn ledger."""
        if config.max_cost is not None and price(config, 0, 0) is None:
            raise UserError(
                f"llm.max_cost is {config.max_cost:g}, but what a token costs is not known: set llm.price_in and "
                "llm.price_out, the money for a million tokens read and written"
            )
        self.path = folder / FILE
        self.total = sum_of(read_ledger(folder))
        self._config, self._task = config, task

    def refuse_beyond_limits(self) -> None:
        """Raises UserError once a limit is reached. Asked before a request is sent: what is in flight may go over."""
        config, total = self._config, self.total
        for name, limit, spent in (
            ("max_cost", config.max_cost, total.cost),
            ("max_tokens", config.max_tokens, total.tokens),
        ):
            if limit is not None and spent >= limit:
                raise UserError(
                    f"llm.{name} is {limit:,}, and this run has spent {spent:,} ({self.path}): what arrived is kept; "
                    f"raise --llm.{name.replace('_', '-')} and the same command goes on"
                )

    def add(self, about: str, request: Request, reply: Reply, cached: bool) -> None:
        """One answer; `about` is PURPOSE:FEATURE, or a purpose alone. Tokens the server did not count are guessed."""
        counted = bool(reply.prompt_tokens or reply.completion_tokens)
        read = reply.prompt_tokens if counted else guessed_tokens(request)
        written = reply.completion_tokens if counted else -(-len(reply.text) // CHARACTERS_PER_TOKEN)
        purpose, _, feature = about.partition(":")
        feature = feature.partition(":")[0]
        line = {
            "at": time.strftime("%Y-%m-%d %H:%M:%S"), "task": self._task, "purpose": purpose,
            "feature": int(feature) if feature else None, "model": reply.model, "prompt_tokens": read,
            "completion_tokens": written, "counted": counted, "cost": price(self._config, read, written),
            "cached": cached,
        }  # fmt: skip
        self.total = self.total.plus(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="ascii") as lines:
            lines.write(json.dumps(line) + "\n")


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's ledger; none when nothing was asked. Raises UserError for one that cannot be read."""
    found = []
    for number, line in enumerate(whole_lines(folder / FILE), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{folder / FILE}:{number} cannot be read ({error}); repair or delete that line (its cost is then not "
                "counted)"
            ) from None
    return found


def sum_of(lines: Iterable[Mapping[str, Any]]) -> Sum:
    """All lines together."""
    total = Sum()
    for line in lines:
        total = total.plus(line)
    return total


def sums_by(lines: Iterable[Mapping[str, Any]], *fields: str) -> dict[tuple[Any, ...], Sum]:
    """A sum for each combination of values that occurs, such as by ("purpose",) or ("purpose", "feature")."""
    found: dict[tuple[Any, ...], Sum] = defaultdict(Sum)
    for line in lines:
        key = tuple(line[field] for field in fields)
        found[key] = found[key].plus(line)
    return dict(found)


def price(config: LlmConfig, prompt_tokens: float, completion_tokens: float) -> float | None:
    """Money for so many tokens, None when no prices are set."""
    if config.price_in is None or config.price_out is None:
        return None
    return (prompt_tokens * config.price_in + completion_tokens * config.price_out) / 1e6


def guessed_tokens(request: Request) -> int:
    """Tokens of a request that was not sent, roughly."""
    characters = sum(len(message["content"]) for message in request.messages)
    return -(-characters // CHARACTERS_PER_TOKEN)
