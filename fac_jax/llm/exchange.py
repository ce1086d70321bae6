"""One HTTP exchange with an OpenAI-compatible server: what goes out, and an envelope or a `Trouble` that comes back.

Reads the key from the environment, or from the file that the environment names, and writes it nowhere: errors show
`[key]` in its place. Several tries, their pace and their price are `llm/http.py`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp

from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.llm.client import Reply, Request

T = TypeVar("T")
Outcome = Literal["answered", "refused", "overloaded", "broken"]
"""Of a try, for the pace: 429 is refused; 503, a timeout and a broken connection are overloaded."""

KEY_FILE_SUFFIX = "_FILE"
KEPT_ALIVE_S = 4.0
"""Seconds that an idle connection is kept: below uvicorn's 5, so that none is used while the server closes it."""


class Trouble(Exception):
    """A try that failed: what happened, what to do about it, and whether trying again could help."""

    def __init__(
        self,
        what: str,
        advice: str,
        answer: str = "",
        outcome: Outcome = "broken",
        final: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.advice, self.answer, self.outcome = what, advice, answer, outcome
        self.final, self.retry_after_s = final, retry_after_s


@dataclass(frozen=True)
class Exchange:
    """A server and how it is spoken to."""

    url: str
    key: str
    key_env: str
    model_setting: str | None
    connections: int

    def session(self) -> aiohttp.ClientSession:
        """One pool of connections; use it as a context manager, inside a running loop."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # A proxy from the environment is for other machines; a sidecar on this one is reached directly.
        on_this_machine = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        connector = aiohttp.TCPConnector(limit=self.connections, keepalive_timeout=KEPT_ALIVE_S)
        return aiohttp.ClientSession(
            headers=headers, connector=connector, trust_env=not on_this_machine,
            timeout=aiohttp.ClientTimeout(total=None),
        )  # fmt: skip

    async def send(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: bytes | None,
        read: Callable[[Any], T],
        timeout_s: float,
    ) -> T:
        """What `read` makes of the JSON that comes back (it raises ValueError), or `Trouble`.

        The timeout covers the whole exchange: a server that drips bytes is slow too.
        """
        method, headers = ("GET", None) if body is None else ("POST", {"Content-Type": "application/json"})
        try:
            async with asyncio.timeout(timeout_s):
                # A redirect is shown, not followed: the key is for this server.
                sent = session.request(method, self.url + path, data=body, headers=headers, allow_redirects=False)
                async with sent as response:
                    text = (await response.read()).decode("utf-8", errors="replace")
        except TimeoutError:
            advice = "raise llm.timeout_s or lower llm.concurrency"
            raise Trouble(f"no answer within {timeout_s:.3g} s", advice, outcome="overloaded") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            advice = "start the server, or correct llm.url"
            what = f"connection failed ({type(error).__name__}: {error})"
            raise Trouble(what, advice, outcome="overloaded") from None
        except ValueError as error:  # what aiohttp raises for a URL that it cannot take
            raise Trouble(f"no request could be made ({error})", "correct llm.url", final=True) from None
        if response.status != 200:
            raise self._refusal(response, text)
        try:
            return read(json.loads(text))
        except (ValueError, RecursionError) as error:
            advice = "check that llm.url is the base URL of an OpenAI-compatible server (it usually ends in /v1)"
            raise Trouble(f"HTTP 200 with an unusable answer ({error})", advice, text) from None

    def explain(self, path: str, trouble: Trouble, tries: int, seconds: float) -> str:
        """The one line that a user reads when all tries failed."""
        said = repr(trouble.answer[:300]) if trouble.answer else "none"
        text = (
            f"{self.url}{path} gave no usable reply after {tries} {'try' if tries == 1 else 'tries'} in {seconds:.1f} "
            f"s: {trouble.what}. Last answer: {said}. Next: {trouble.advice}"
        )
        return text.replace(self.key, "[key]") if self.key else text

    def _refusal(self, response: aiohttp.ClientResponse, text: str) -> Trouble:
        status = response.status
        what = f"HTTP {status} {response.reason or ''}".strip()
        outcome: Outcome = "refused" if status == 429 else "overloaded" if status == 503 else "broken"
        final = False
        if status == 429:
            advice = "lower llm.concurrency or raise llm.retries"
        elif status >= 500 or status == 408:
            advice = "look at the server's log"
        elif status in (401, 403):
            state = "is set" if self.key else "is not set"
            advice, final = f"check the key in the environment variable {self.key_env} (it {state})", True
        elif status == 404:
            advice, final = f"check llm.url (it usually ends in /v1) and llm.model ({self.model_setting})", True
        else:
            advice, final = "the server does not take this request; its answer should say why", True
        return Trouble(what, advice, text, outcome, final, retry_after_s(response.headers.get("retry-after")))


def open_exchange(config: LlmConfig) -> Exchange:
    """Check the URL and read the key. Raises UserError for either; nothing is sent."""
    key = read_key(config.key_env)
    return Exchange(checked_url(config.url), key, config.key_env, config.model, config.concurrency)


def chat_body(model: str, request: Request) -> bytes:
    """What is posted to /chat/completions: all that can change the answer, in bytes. Raises UserError for a steered
    request: there is no way to say that to a server, and its answer would pass for one."""
    if request.steer is not None:
        raise UserError("a server cannot be steered: only the embedded writer can (llm.url: null)")
    body: dict[str, Any] = {
        "model": model, "messages": list(request.messages), "max_tokens": request.max_tokens,
        "temperature": request.temperature, "top_p": request.top_p, "seed": request.seed,
    }  # fmt: skip
    if request.schema is not None:
        schema = {"name": "reply", "schema": request.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return json.dumps(body).encode("ascii")


def read_reply(payload: Any) -> Reply:
    """A chat completion's envelope, strictly. Raises ValueError that says what is missing or mistyped."""
    choice = _field(_first(payload, "choices"), "choices[0]", dict)
    message = _field(choice.get("message"), "choices[0].message", dict)
    if "content" not in message:
        raise ValueError("choices[0].message has no content")
    content = message["content"]
    # null is what servers send for withheld or filtered content: an empty text, rejected by the caller by that name
    text = "" if content is None else _field(content, "choices[0].message.content", str)
    # Half of a UTF-16 pair, where max_tokens cut an emoji, becomes what decoders make of it: no file could hold it.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    usage = payload.get("usage") or {}
    _field(usage, "usage", dict)
    counts = [usage.get(key) or 0 for key in ("prompt_tokens", "completion_tokens")]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"usage is {usage!r}")
    reason = choice.get("finish_reason") or "unknown"
    return Reply(text, str(reason), counts[0], counts[1], str(payload.get("model") or "unknown"))


def read_models(payload: Any) -> list[dict[str, Any]]:
    """Entries of a `/models` answer. Raises ValueError when there is none, or one without a name."""
    _first(payload, "data")
    for place, entry in enumerate(payload["data"]):
        _field(_field(entry, f"data[{place}]", dict).get("id"), f"data[{place}].id", str)
    return list(payload["data"])


def retry_after_s(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    if header is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(header))
    with contextlib.suppress(ValueError, TypeError):  # a date without a zone cannot be subtracted
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    return None


def checked_url(url: str | None) -> str:
    """A base URL without a slash at its end. Raises UserError for anything else, and for one that carries a secret."""
    try:
        parts = urlsplit(url or "")
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises for a port that is no number
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"llm.url is {url!r}; it must be a base URL such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # The config is saved beside every product, so nothing secret may be in it.
        raise UserError(
            f"llm.url for {parts.hostname} carries credentials or a query; give scheme, host and path only, "
            "and put the key in the environment variable that llm.key_env names"
        )
    return (url or "").rstrip("/")


def read_key(variable: str) -> str:
    """The key in an environment variable, or in the file that VARIABLE_FILE names; empty when neither is set."""
    key, where = os.environ.get(variable, "").strip(), f"the environment variable {variable}"
    file = os.environ.get(variable + KEY_FILE_SUFFIX, "").strip()
    if not key and file:
        where = f"the file that {variable}{KEY_FILE_SUFFIX} names"
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read ({type(error).__name__}): {file}") from None
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in {where} holds characters no HTTP header may have")
    return key


def _first(payload: Any, key: str) -> Any:
    items = payload.get(key) if isinstance(payload, dict) else None
    if not isinstance(items, list) or not items:
        raise ValueError(f"no {key} in it")
    return items[0]


def _field(value: Any, name: str, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    return value
