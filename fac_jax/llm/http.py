"""An OpenAI-compatible server as a generator: every answer is asked for once, paid for once, and noted.

`HttpGenerator.generate` takes from the cache what is there, and sends the rest over one pool of connections at the pace
that the server takes (`llm/pace.py`), within the limits of the ledger. Before the first request it asks the server who
it is, and has it answer one small question of a given schema: the model it names is part of the cache's keys, and a
server that ignores schemas is said at once and not found out by failures.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.llm.cache import Cache, keys, open_cache
from fac_jax.llm.client import OnReply, Reply, Request
from fac_jax.llm.exchange import Trouble, chat_body, open_exchange, read_models, read_reply
from fac_jax.llm.ledger import Ledger, price
from fac_jax.llm.pace import Pace
from fac_jax.llm.structured import read_answer

T = TypeVar("T")
log = logging.getLogger(__name__)

STARTED = time.monotonic()
"""When this command began, nearly: `llm.deadline_s` counts from here."""
VOLATILE = ("created", "permission")
"""Of a `/models` entry: what changes when a server is started again with the same model."""
PROBE = Request(
    messages=({"role": "user", "content": "Write a greeting of one word."},),
    max_tokens=24,
    schema={
        "type": "object",
        "properties": {"colour": {"type": "string", "enum": ["green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    },
)
"""Nobody answers it in green who does not follow the schema."""


def open_server(config: Config) -> HttpGenerator:
    """The server at `llm.url`, with the run's ledger and the user's cache."""
    ledger = Ledger(Path(config.run.dir), config.llm, config.judge.task)
    return HttpGenerator(config.llm, ledger, open_cache() if config.llm.cache else None)


class End:
    """Why a call sends nothing more, once it does not; what waits to be sent then waits no longer."""

    def __init__(self, pace: Pace) -> None:
        self.reason: UserError | None = None
        self._pace, self._come = pace, asyncio.Event()

    def because(self, reason: UserError) -> None:
        """The first reason counts. What is in flight may still arrive."""
        if self.reason is None:
            self.reason = reason
            self._come.set()
            self._pace.give_up()

    async def pause(self, seconds: float) -> None:
        """Sleep, but not beyond the end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._come.wait(), seconds)


class HttpGenerator:
    """A server; `ledger` and `cache` are optional.

    Broken connections, timeouts, 408, 429, 5xx and answers of the wrong shape are tried again up to `llm.retries`
    times, with exponentially growing jittered pauses or the server's Retry-After; no request takes longer than
    `llm.timeout_s` x (`llm.retries` + 1) from its first try on. Then, or at once for any other status, a UserError
    names the URL, what happened, the first 300 characters of the last answer and the next action.
    """

    def __init__(
        self,
        config: LlmConfig,
        ledger: Ledger | None = None,
        cache: Cache | None = None,
        first_pause_s: float = 0.5,
    ) -> None:
        """Check the URL and the key, and ask the server for its models unless `llm.model` names one."""
        self._config, self._ledger, self._cache = config, ledger, cache
        self._exchange = open_exchange(config)
        self._first_pause_s = first_pause_s
        # An answer that takes a quarter of its time already would run out of it if four times as many were asked for.
        self._pace = Pace(config.concurrency, config.timeout_s / 4)
        self._listed: list[dict[str, Any]] | None = None
        if config.model is None:
            self._listed = asyncio.run(self._models())
            self.model = str(self._listed[0]["id"])
        else:
            self.model = config.model
        self.name = f"http:{self.model}"
        self.follows_schema: bool | None = None
        """Whether the server's answers follow a schema; None before it was asked."""
        self._identity: dict[str, Any] | None = None
        self._tokens = self._hits = 0

    @property
    def spent(self) -> str:
        """See `Generator.spent`."""
        words = [f"{self._tokens:,} tokens"]
        if self._ledger is not None and price(self._config, 0, 0) is not None:
            words.append(f"{self._ledger.total.cost:,.4f} spent in this run")
        if self._hits:
            words.append(f"{self._hits:,} from the cache")
        return ", ".join(words)

    @property
    def most_in_flight(self) -> int:
        """The largest number of requests that were open at one time."""
        return self._pace.most_in_flight

    def meet(self) -> dict[str, Any]:
        """Who answers, as the server reports it: its URL, the model asked for, its entry in `/models`, and the name
        that its answers carry. Asks once, and notes whether it follows a schema. Raises UserError when it cannot."""
        return asyncio.run(self._meet_alone())

    def generate(
        self, requests: Sequence[Request], on_reply: OnReply | None = None, about: Sequence[str] | None = None
    ) -> list[Reply]:
        """See `Generator.generate`. Raises UserError also when a limit of the ledger or `llm.deadline_s` is reached."""
        if not requests:
            return []
        return asyncio.run(self._generate(requests, on_reply, about or [""] * len(requests)))

    async def _generate(
        self, requests: Sequence[Request], on_reply: OnReply | None, about: Sequence[str]
    ) -> list[Reply]:
        bodies = [chat_body(self.model, request) for request in requests]
        replies: dict[int, Reply] = {}
        end = self._begin()

        def arrived(index: int, reply: Reply, cached: bool) -> None:
            self._note(about[index], requests[index], reply, cached)
            replies[index] = reply
            if not cached and self._cache is not None and self._is_sound(requests[index], reply):
                self._cache.put(names[index], reply)
            if on_reply is not None:
                on_reply(index, reply)

        async with self._exchange.session() as session:
            if self._cache is not None or any(request.schema is not None for request in requests):
                await self._meet(session, end)
            names = keys(self._identity or {}, bodies) if self._cache is not None else []
            there = self._cache.get(names) if self._cache is not None else {}
            for index, name in enumerate(names):
                if name in there:
                    arrived(index, there[name], cached=True)
            todo = iter([index for index in range(len(requests)) if index not in replies])

            async def work() -> None:
                for index in todo:
                    if end.reason is not None:
                        return
                    try:
                        reply = await self._call(session, "/chat/completions", bodies[index], read_reply, end)
                    except UserError as error:
                        end.because(error)
                        return
                    arrived(index, reply, cached=False)

            await asyncio.gather(*(work() for _ in range(min(self._config.concurrency, len(requests) - len(replies)))))
        if end.reason is not None and len(replies) < len(requests):
            raise UserError(f"{end.reason} ({len(replies)} of {len(requests)} replies had arrived)")
        return [replies[index] for index in range(len(requests))]

    async def _call(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: bytes | None,
        read: Callable[[Any], T],
        end: End,
    ) -> T:
        """One request with its tries; gives up early once another request has failed for good."""
        began, deadline = 0.0, float("inf")
        for tries in itertools.count(1):
            sent = await self._pace.begin(again=tries > 1)
            if tries == 1:
                began, deadline = sent, sent + self._config.timeout_s * (self._config.retries + 1)
            try:
                if end.reason is not None:
                    raise end.reason
                timeout_s = self._seconds_for_one(deadline)
            except UserError:
                self._pace.end(sent, None)
                raise
            try:
                reply = await self._exchange.send(session, path, body, read, timeout_s)
            except Trouble as trouble:
                last = trouble
                self._pace.end(sent, trouble.outcome, trouble.retry_after_s)
            except BaseException:
                self._pace.end(sent, None)
                raise
            else:
                self._pace.end(sent, "answered")
                return reply
            # Jittered, so that requests which failed together do not come back in step.
            growing_s = self._first_pause_s * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
            pause_s, left_s = max(growing_s, self._pace.paused_s()), deadline - time.monotonic()
            if last.final or end.reason is not None or tries > self._config.retries:
                break
            if pause_s >= left_s:
                last.what += f"; the next try would be in {pause_s:.1f} s, and {max(left_s, 0):.1f} s are left"
                break
            await end.pause(pause_s)
        raise UserError(self._exchange.explain(path, last, tries, time.monotonic() - began))

    def _seconds_for_one(self, deadline: float) -> float:
        """Timeout of the next try, or UserError when the run may send no more."""
        if self._ledger is not None:
            self._ledger.refuse_beyond_limits()
        now, most = time.monotonic(), self._config.deadline_s
        if most is None:
            return min(self._config.timeout_s, deadline - now)
        if now >= STARTED + most:
            raise self._out_of_time()
        return min(self._config.timeout_s, deadline - now, STARTED + most - now)

    def _out_of_time(self) -> UserError:
        seconds = time.monotonic() - STARTED
        return UserError(
            f"llm.deadline_s is {self._config.deadline_s:g} and the command has run for {seconds:.0f} s: "
            "what arrived is kept; run the same command again to go on"
        )

    def _begin(self) -> End:
        """A new event loop has begun: its end, which `llm.deadline_s` brings at the latest."""
        self._pace.start()
        end = End(self._pace)
        if self._config.deadline_s is not None:
            left_s = max(0.0, STARTED + self._config.deadline_s - time.monotonic())
            asyncio.get_running_loop().call_later(left_s, lambda: end.because(self._out_of_time()))
        return end

    async def _models(self) -> list[dict[str, Any]]:
        end = self._begin()
        async with self._exchange.session() as session:
            return await self._call(session, "/models", None, read_models, end)

    async def _meet_alone(self) -> dict[str, Any]:
        end = self._begin()
        async with self._exchange.session() as session:
            return await self._meet(session, end)

    async def _meet(self, session: aiohttp.ClientSession, end: End) -> dict[str, Any]:
        if self._identity is not None:
            return self._identity
        if self._listed is None:
            try:
                self._listed = await self._exchange.send(session, "/models", None, read_models, self._config.timeout_s)
            except Trouble:  # not every server has the list, and llm.model names the model without it
                self._listed = []
        entry = next((entry for entry in self._listed if entry["id"] == self.model), {})
        listed = {key: value for key, value in entry.items() if key not in VOLATILE}
        reply = await self._call(session, "/chat/completions", chat_body(self.model, PROBE), read_reply, end)
        self._note("probe", PROBE, reply, cached=False)
        self.follows_schema = read_answer(reply.text, PROBE.schema or {}).value is not None
        if not self.follows_schema:
            log.warning(
                "%s ignores the JSON schema of a request (it wrote %r): what it answers is checked all the same, and "
                "counted as failed where it does not follow; vLLM follows schemas, `transformers serve` does not",
                self._exchange.url, reply.text[:60],
            )  # fmt: skip
        self._identity = {
            "url": self._exchange.url, "model": self.model, "listed": listed, "answers_as": reply.model
        }  # fmt: skip
        if self._cache is not None:
            self._cache.remember(self._exchange.url, self.model, self._identity)
        return self._identity

    def _is_sound(self, request: Request, reply: Reply) -> bool:
        """Whether an answer may be used again: whole, unfiltered, as its schema has it, by the model that was met."""
        return (
            reply.finish_reason == "stop"
            and bool(reply.text.strip())
            and reply.model == (self._identity or {}).get("answers_as")
            and (request.schema is None or read_answer(reply.text, request.schema).value is not None)
        )

    def _note(self, about: str, request: Request, reply: Reply, cached: bool) -> None:
        if cached:
            self._hits += 1
        else:
            self._tokens += reply.prompt_tokens + reply.completion_tokens
        if self._ledger is not None:
            self._ledger.add(about, request, reply, cached)
