"""A server that answers at once and limits: what `fac bench llm` and the tests of the pace measure the client against.

    python -m fac_jax.scale.llm_server [--rate 100] [--burst 100] [--at-once 8] [--latency 0.02] [--window 1.0]

Prints its base URL, then answers on loopback until it is stopped. `--rate` with `--burst` is a bucket that refills
steadily and answers 429 with Retry-After when it is empty; with `--window` it is refilled at once at the end of every
window; `--at-once` answers 503 beyond so many open requests. `GET /counts` tells what it did. Reads requests just far
enough to answer them, in one process of its own, so that hardly any time that is measured is its.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ANSWER = {
    "object": "chat.completion",
    "model": "swift",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello there."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1000, "completion_tokens": 3, "total_tokens": 1003},
}


class Limits:
    """What is let through; counts what was and was not."""

    def __init__(
        self,
        rate: float | None = None,
        burst: float = 1.0,
        window_s: float | None = None,
        at_once: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rate, self.burst, self.window_s, self.at_once, self.clock = rate, burst, window_s, at_once, clock
        self.tokens, self.refilled = burst, clock()
        self.open = self.accepted = self.refused = self.overloaded = 0

    def refusal(self) -> tuple[int, float] | None:
        """Status and Retry-After of a request that may not pass; None for one that may."""
        if self.at_once is not None and self.open >= self.at_once:
            self.overloaded += 1
            return 503, 0.0
        if self.rate is not None:
            now = self.clock()
            if self.window_s is None:
                self.tokens = min(self.burst, self.tokens + (now - self.refilled) * self.rate)
                self.refilled, wait_s = now, (1 - self.tokens) / self.rate
            else:
                if now - self.refilled >= self.window_s:
                    self.refilled += (now - self.refilled) // self.window_s * self.window_s
                    self.tokens = self.rate * self.window_s
                wait_s = self.refilled + self.window_s - now
            if self.tokens < 1:
                self.refused += 1
                return 429, wait_s
            self.tokens -= 1
        self.accepted += 1
        return None


def response(status: int, payload: object, retry_after_s: float = 0.0) -> bytes:
    """An HTTP/1.1 answer in bytes; Retry-After in whole seconds, rounded up, as the standard has it."""
    body = json.dumps(payload).encode()
    wait = f"Retry-After: {math.ceil(retry_after_s)}\r\n" if retry_after_s else ""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{wait}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def serve(limits: Limits, latency_s: float) -> None:
    """Answer for ever, on a port that the system chooses."""
    good = response(200, ANSWER)

    async def answer(path: bytes) -> bytes:
        if path.endswith(b"/models"):
            return response(200, {"data": [{"id": "swift"}]})
        if path.endswith(b"/counts"):
            return response(200, {name: getattr(limits, name) for name in ("accepted", "refused", "overloaded")})
        if (refusal := limits.refusal()) is not None:
            return response(refusal[0], {"error": "slow down"}, refusal[1])
        limits.open += 1
        if latency_s:
            await asyncio.sleep(latency_s)
        limits.open -= 1
        return good

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
                lengths = [int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length:")]
                await reader.readexactly(sum(lengths))
                writer.write(await answer(head[0].split(b" ")[1]))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


@contextmanager
def limiting(*flags: str) -> Iterator[str]:
    """A server with these flags in a process of its own; its base URL."""
    command = [sys.executable, "-m", "fac_jax.scale.llm_server", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def counts(url: str) -> dict[str, int]:
    """Requests that it accepted, refused (429), and was too busy for (503)."""
    with urllib.request.urlopen(url + "/counts") as answer:
        return json.load(answer)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, help="requests a second; none: no limit")
    parser.add_argument("--burst", type=float, default=1.0, help="requests that a full bucket holds")
    parser.add_argument("--window", type=float, help="seconds of a window that is refilled at once")
    parser.add_argument("--at-once", type=int, help="open requests beyond which it answers 503")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds an answer takes")
    given = parser.parse_args()
    asyncio.run(serve(Limits(given.rate, given.burst, given.window, given.at_once), given.latency))


if __name__ == "__main__":
    main()
