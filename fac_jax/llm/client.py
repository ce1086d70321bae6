"""Chat requests to whoever answers them: the protocol, and its implementation over HTTP.

`Generator` is all that the rest of the package knows. `HttpGenerator` speaks to any OpenAI-compatible server
(`POST {llm.url}/chat/completions`); `llm/local.py` decodes with the backbone in this process; `llm/fake.py` is the
double that tests use. Reads the key from the environment variable `llm.key_env` and writes it nowhere.

What a server sends back is untrusted: the envelope is checked here, the text by the caller, also when a schema was
asked for (some servers ignore `response_format` without a word).
"""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
from jax.sharding import Mesh

from fac_jax.config import Config, LlmConfig
from fac_jax.errors import UserError

T = TypeVar("T")
Message = dict[str, str]


@dataclass(frozen=True)
class Request:
    """One chat completion to be had."""

    messages: tuple[Message, ...]
    """Turns, each {"role": ..., "content": ...}."""
    max_tokens: int
    """New tokens at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus."""
    seed: int = 0
    """Sampling seed; the same request with the same seed asks for the same text (servers only try)."""
    schema: dict[str, Any] | None = None
    """JSON schema that the text should follow. Validate the text all the same."""


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    """What was written; empty where a server withheld the content (`finish_reason` says why)."""
    finish_reason: str
    """`stop` when the writer ended by itself, `length` when max_tokens cut it, or the server's own word."""
    prompt_tokens: int
    """Tokens read; 0 when the server does not count."""
    completion_tokens: int
    """Tokens written; 0 when the server does not count."""
    model: str
    """Who answered."""


OnReply = Callable[[int, Reply], None]


class Generator(Protocol):
    """Answers chat requests, many at a time."""

    @property
    def name(self) -> str:
        """Kept beside every text it wrote, such as `embedded:SmolLM2-135M-Instruct`."""

    def generate(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        """Replies in the order of `requests`.

        `on_reply(index, reply)` is called for each as it arrives, in any order, always before an error about
        another one is raised: a caller that stores what it is handed loses nothing.
        """


def open_generator(config: Config, mesh: Mesh) -> Generator:
    """The server at `llm.url`, or the backbone itself when there is none. Raises UserError when it is not there."""
    if config.llm.url is not None:
        return HttpGenerator(config.llm)
    # Imported late: with a server, the backbone's weights for decoding are never read.
    from fac_jax.llm.local import open_local

    return open_local(config, mesh)


class HttpGenerator:
    """An OpenAI-compatible server.

    Broken connections, timeouts, 408, 429, 5xx and answers of the wrong shape are tried again up to `llm.retries`
    times, with exponentially growing jittered pauses or the server's Retry-After; no request takes longer than
    `llm.timeout_s` x (`llm.retries` + 1). Then, or at once for any other status, a UserError names the URL, what
    happened, the first 300 characters of the last answer and the next action.
    """

    def __init__(self, config: LlmConfig, first_pause_s: float = 0.5) -> None:
        """Check the URL and the key, and ask the server for its models unless `llm.model` names one."""
        self.url = _checked_url(config.url)
        self._config = config
        self._key = _key(config.key_env)
        self._first_pause_s = first_pause_s
        self._not_before = 0.0
        self.model = config.model if config.model is not None else asyncio.run(self._first_model())
        self.name = f"http:{self.model}"

    def generate(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        """See `Generator.generate`; at most `llm.concurrency` requests are in flight."""
        return asyncio.run(self._generate(requests, on_reply))

    async def _generate(self, requests: Sequence[Request], on_reply: OnReply | None) -> list[Reply]:
        replies: dict[int, Reply] = {}
        failures: list[UserError] = []
        todo = iter(enumerate(requests))

        async def work(client: httpx.AsyncClient) -> None:
            for index, request in todo:
                if failures:  # nothing new is begun after a failure; what is in flight may still arrive and is kept
                    return
                try:
                    reply = await self._call(client, "/chat/completions", self._body(request), read_reply, failures)
                except UserError as error:
                    failures.append(error)
                    return
                replies[index] = reply
                if on_reply is not None:
                    on_reply(index, reply)

        async with self._client() as client:
            await asyncio.gather(*(work(client) for _ in range(min(self._config.concurrency, len(requests)))))
        if failures:
            raise UserError(f"{failures[0]} ({len(replies)} of {len(requests)} replies had arrived)")
        return [replies[index] for index in range(len(requests))]

    async def _first_model(self) -> str:
        async with self._client() as client:
            return await self._call(client, "/models", None, read_first_model, [])

    def _client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # A proxy from the environment is for other machines; a sidecar on this one is reached directly.
        on_this_machine = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        limits = httpx.Limits(max_connections=self._config.concurrency)
        return httpx.AsyncClient(headers=headers, timeout=None, limits=limits, trust_env=not on_this_machine)

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        if request.schema is not None:
            schema = {"name": "reply", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _call(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], T],
        failures: Sequence[UserError],
    ) -> T:
        """One request with its tries; gives up early once another request has failed for good."""
        # A Retry-After binds every request of this generator, not only the one that was told.
        await asyncio.sleep(self._not_before - time.monotonic())
        began = time.monotonic()
        deadline = began + self._config.timeout_s * (self._config.retries + 1)
        jitter = random.Random(path + str(body))  # different requests must not come back in step
        for tries in range(1, self._config.retries + 2):
            timeout_s = min(self._config.timeout_s, deadline - time.monotonic())
            try:
                return await self._try(client, path, body, read, timeout_s)
            except _Trouble as trouble:
                last = trouble
            if last.retry_after_s is not None:
                self._not_before = max(self._not_before, time.monotonic() + last.retry_after_s)
            growing_s = self._first_pause_s * 2 ** (tries - 1) * jitter.uniform(0.5, 1.5)
            pause_s = max(growing_s, self._not_before - time.monotonic())
            left_s = deadline - time.monotonic()
            if last.final or failures or tries > self._config.retries:
                break
            if pause_s >= left_s:
                last.what += f"; the next try would be in {pause_s:.1f} s, and {max(left_s, 0):.1f} s are left"
                break
            await asyncio.sleep(pause_s)
        raise UserError(self._explain(self.url + path, last, tries, time.monotonic() - began))

    async def _try(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], T],
        timeout_s: float,
    ) -> T:
        """One try, or `_Trouble`. The timeout covers the whole exchange: a server that drips bytes is slow too."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await client.request("GET" if body is None else "POST", self.url + path, json=body)
        except TimeoutError:
            advice = "raise llm.timeout_s or lower llm.concurrency"
            raise _Trouble(f"no answer within {timeout_s:.3g} s", advice) from None
        except httpx.TransportError as error:
            advice = "start the server, or correct llm.url"
            raise _Trouble(f"connection failed ({type(error).__name__}: {error})", advice) from None
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            return read(response.json())
        except ValueError as error:  # also what response.json() raises
            advice = "check that llm.url is the base URL of an OpenAI-compatible server (it usually ends in /v1)"
            raise _Trouble(f"HTTP 200 with an unusable answer ({error})", advice, response.text) from None

    def _refusal(self, response: httpx.Response) -> "_Trouble":
        status = response.status_code
        what = f"HTTP {status} {response.reason_phrase}".strip()
        if status == 429:
            advice, final = "lower llm.concurrency or raise llm.retries", False
        elif status >= 500 or status == 408:
            advice, final = "look at the server's log", False
        elif status in (401, 403):
            state = "is set" if self._key else "is not set"
            advice, final = f"check the key in the environment variable {self._config.key_env} (it {state})", True
        elif status == 404:
            advice, final = f"check llm.url (it usually ends in /v1) and llm.model ({self._config.model})", True
        else:
            advice, final = "the server does not take this request; its answer should say why", True
        return _Trouble(what, advice, response.text, final, _retry_after_s(response.headers.get("retry-after")))

    def _explain(self, url: str, trouble: "_Trouble", tries: int, seconds: float) -> str:
        said = repr(trouble.answer[:300]) if trouble.answer else "none"
        text = (
            f"{url} gave no usable reply after {tries} {'try' if tries == 1 else 'tries'} in {seconds:.1f} s: "
            f"{trouble.what}. Last answer: {said}. Next: {trouble.advice}"
        )
        return text.replace(self._key, "[key]") if self._key else text


class _Trouble(Exception):
    """A try that failed: what happened, what to do about it, and whether trying again could help."""

    def __init__(
        self, what: str, advice: str, answer: str = "", final: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.advice, self.answer, self.final, self.retry_after_s = what, advice, answer, final, retry_after_s


def read_reply(payload: Any) -> Reply:
    """A chat completion's envelope, strictly. Raises ValueError that says what is missing or mistyped."""
    choice = _field(_first(payload, "choices"), "choices[0]", dict)
    message = _field(choice.get("message"), "choices[0].message", dict)
    if "content" not in message:
        raise ValueError("choices[0].message has no content")
    content = message["content"]
    # null is what servers send for withheld or filtered content: an empty text, rejected by the caller by that name
    text = "" if content is None else _field(content, "choices[0].message.content", str)
    usage = payload.get("usage") or {}
    counts = [usage.get(key) or 0 for key in ("prompt_tokens", "completion_tokens")]
    if not all(type(count) is int for count in counts):
        raise ValueError(f"usage is {usage!r}")
    reason = choice.get("finish_reason") or "unknown"
    return Reply(text, str(reason), counts[0], counts[1], str(payload.get("model") or "unknown"))


def read_first_model(payload: Any) -> str:
    """Name of the first model of a `/models` answer. Raises ValueError when there is none."""
    return _field(_field(_first(payload, "data"), "data[0]", dict).get("id"), "data[0].id", str)


def _first(payload: Any, key: str) -> Any:
    items = payload.get(key) if isinstance(payload, dict) else None
    if not isinstance(items, list) or not items:
        raise ValueError(f"no {key} in it")
    return items[0]


def _field(value: Any, name: str, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value


def _retry_after_s(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    if header is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(header))
    with contextlib.suppress(ValueError, TypeError):  # a date without a zone cannot be subtracted
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    return None


def _checked_url(url: str | None) -> str:
    parts = urlsplit(url or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"llm.url is {url!r}; it must be a base URL such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # The config is saved beside every product, so nothing secret may be in it.
        raise UserError(
            f"llm.url for {parts.hostname} carries credentials or a query; give scheme, host and path only, "
            "and put the key in the environment variable that llm.key_env names"
        )
    return (url or "").rstrip("/")


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in the environment variable {variable} holds characters no HTTP header may have")
    return key
