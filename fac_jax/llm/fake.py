"""Doubles that ship: a generator in this process, and an OpenAI-compatible server on loopback that misbehaves on cue.

`FakeGenerator` answers with a function, for tests of what uses a generator. `FakeServer` is a real HTTP server
(standard library, one thread per connection) for tests of `HttpGenerator`, and for trying a pipeline without a model:
it works through a script of `Answer`s, one per chat request, then answers well for ever.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from fac_jax.llm.client import OnReply, Reply, Request
from fac_jax.llm.http import PROBE


class FakeGenerator:
    """Answers with `write(request)`; `requests` holds all that were asked."""

    def __init__(self, write: Callable[[Request], str | Reply], name: str = "fake:writer") -> None:
        self.name = name
        self.requests: list[Request] = []
        self._write = write

    @property
    def spent(self) -> str:
        """See `Generator.spent`."""
        return f"{len(self.requests)} requests"

    def generate(
        self, requests: Sequence[Request], on_reply: OnReply | None = None, about: Sequence[str] | None = None
    ) -> list[Reply]:
        """See `Generator.generate`. Replies arrive in reverse, so that nobody relies on their order."""
        replies: dict[int, Reply] = {}
        for index in reversed(range(len(requests))):
            self.requests.append(requests[index])
            written = self._write(requests[index])
            replies[index] = written if isinstance(written, Reply) else self._reply(requests[index], written)
            if on_reply is not None:
                on_reply(index, replies[index])
        return [replies[index] for index in range(len(requests))]

    def _reply(self, request: Request, text: str) -> Reply:
        words = sum(len(message["content"].split()) for message in request.messages)
        return Reply(text, "stop", words, len(text.split()), self.name)


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; without a body, a well-formed chat completion."""

    status: int = 200
    """HTTP status."""
    body: str | None = None
    """Sent as it is."""
    headers: dict[str, str] = field(default_factory=dict)
    """Added to the usual ones."""
    delay_s: float = 0.0
    """Pause before anything is sent."""
    cut: bool = False
    """Send half of the body that Content-Length promises, then close."""


GOOD = Answer()
BROKEN = Answer(status=500, body='{"error": {"message": "the engine died"}}')
GARBAGE = Answer(body="<html>It works!</html>")
WRONG_SHAPE = Answer(body='{"choices": [{"text": "a completion, not a chat"}]}')
TRUNCATED = Answer(cut=True)


def rate_limited(retry_after: str) -> Answer:
    """429 with a Retry-After header (seconds, or an HTTP date)."""
    return Answer(429, '{"error": {"message": "slow down"}}', {"Retry-After": retry_after})


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed broke the connection: that is what a test is for, and no traceback."""


class FakeServer:
    """A loopback server: `with FakeServer([rate_limited("1"), GOOD]) as server: ... server.url`.

    `write(body)` makes the text of good answers. `bodies` and `keys` hold what chat requests carried, `models` what
    `/models` lists, `most_at_once` the largest number of chat requests that were open at one time. The small question
    that `llm/http.py` asks first is answered beside the script, as a server does that follows schemas or does not.
    """

    def __init__(
        self,
        script: Sequence[Answer] = (),
        write: Callable[[dict[str, Any]], str] = lambda body: "echo: " + body["messages"][-1]["content"],
        models: Sequence[str] = ("fake-model",),
        then: Answer = GOOD,
        follows_schema: bool = True,
    ) -> None:
        self.models, self.write, self.follows_schema = list(models), write, follows_schema
        self.probes = 0
        self.listed: dict[str, Any] = {}
        """What `/models` says of each model beside its name."""
        self.answers_as: str | None = None
        """The model that answers name; None: the one that was asked for."""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self._script, self._then = list(script), then
        self._open = 0
        self._lock = threading.Lock()
        self._server = _Quiet(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """Base URL, as `llm.url` wants it."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "FakeServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def chat(self, body: dict[str, Any], key: str | None) -> Answer:
        """Note a chat request and take the next answer of the script, its body filled in."""
        if body["messages"] == list(PROBE.messages):
            self.probes += 1
            text = '{"colour": "green"}' if self.follows_schema else "Hello"
            return Answer(body=json.dumps(self._completion(body, text)))
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            answer = self._script.pop(0) if self._script else self._then
        time.sleep(answer.delay_s)
        with self._lock:
            self._open -= 1
        filled = answer.body if answer.body is not None else json.dumps(self._completion(body, self.write(body)))
        return Answer(answer.status, filled, answer.headers, cut=answer.cut)

    def listing(self) -> Answer:
        """What `/models` answers."""
        return Answer(
            body=json.dumps({"object": "list", "data": [{"id": name, **self.listed} for name in self.models]})
        )

    def _completion(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 7, "completion_tokens": len(text.split()), "total_tokens": 7 + len(text.split())}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {
            "object": "chat.completion",
            "model": self.answers_as or body.get("model"),
            "choices": [choice],
            "usage": usage,
        }


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(server.listing() if self.path == "/v1/models" else Answer(404, "no such page"))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.path == "/v1/chat/completions"
            self._send(server.chat(body, self.headers["Authorization"]) if known else Answer(404, "no such page"))

        def log_message(self, format: str, *args: Any) -> None:
            """Silence: the standard library logs every request to stderr."""

        def _send(self, answer: Answer) -> None:
            content = (answer.body or "").encode()
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if answer.cut else content)
            except ConnectionError:
                pass  # the client had stopped waiting: that is what a slow answer is for
            self.close_connection = self.close_connection or answer.cut

    return Handler
