"""What the client itself takes, and how much of a limited server's allowance it uses.

    python -m fac_jax.scale.llm_bench

The server (`llm_server.py`) is a process of its own and answers at once, so that what is measured is the client:
requests of 4,500 characters, each with its cache row and its line in the ledger. The same bytes through a bare socket
say what of it is the server's and the machine's. Prints two tables in Markdown; takes eight minutes.
"""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from fac_jax.config.llm import LlmConfig
from fac_jax.llm.cache import Cache
from fac_jax.llm.client import Request
from fac_jax.llm.exchange import chat_body
from fac_jax.llm.http import HttpGenerator
from fac_jax.llm.ledger import Ledger
from fac_jax.scale.llm_server import counts, limiting

COUNT = 3000
LIMITS = {
    "100/s, bucket of 100": ("--rate 100 --burst 100 --latency 0.05", 3000),
    "200/s, bucket of 400": ("--rate 200 --burst 400 --latency 0.1", 4000),
    "5/s, bucket of 5": ("--rate 5 --burst 5 --latency 1", 200),
    "100/s, bucket of 5, Retry-After 1 s": ("--rate 100 --burst 5 --latency 0.2", 3000),
    "the same, for longer": ("--rate 100 --burst 5 --latency 0.2", 15_000),
    "200 in each second, Retry-After 1 s": ("--rate 200 --window 1 --latency 0.02", 4000),
    "the same, for longer ": ("--rate 200 --window 1 --latency 0.02", 30_000),
    "16 at a time": ("--at-once 16 --latency 0.05", 3000),
    "none": ("--latency 0.2", 3000),
}


def requests(count: int) -> list[Request]:
    """Different ones, as long as those that judge a feature."""
    texts = [f"{'y' * 3000}{place}" for place in range(count)]
    return [Request(({"role": "system", "content": "x" * 1500}, {"role": "user", "content": t}), 300) for t in texts]


def overhead(url: str, concurrency: int) -> list[float]:
    """Milliseconds a request: bare; with cache and ledger; and again, when all come from the cache."""
    found, asked = [], requests(COUNT)
    with tempfile.TemporaryDirectory() as folder:
        config = LlmConfig(url=url, model="swift", concurrency=concurrency)
        bare = HttpGenerator(config)
        kept = HttpGenerator(config, Ledger(Path(folder), config, "bench"), Cache(Path(folder) / "replies.sqlite"))
        kept.meet()
        for generator in (bare, kept, kept):
            began = time.perf_counter()
            generator.generate(asked)
            found.append((time.perf_counter() - began) / COUNT * 1e3)
    return found


def bare_socket(url: str) -> float:
    """Milliseconds a request, one at a time, that nothing on this side of the socket takes."""
    place = urlsplit(url)
    head = f"POST {place.path}/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: "
    bodies = [chat_body("swift", request) for request in requests(COUNT)]
    messages = [head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body for body in bodies]
    with socket.create_connection((str(place.hostname), place.port or 80)) as connection:
        began = time.perf_counter()
        for message in messages:
            connection.sendall(message)
            answer = b""
            while not answer.endswith(b"}"):  # one small JSON object, which comes whole
                answer += connection.recv(65536)
        return (time.perf_counter() - began) / COUNT * 1e3


def main() -> None:
    """Both tables."""
    print("| in flight | bare | with cache and ledger | from the cache |\n|---|---|---|---|")
    with limiting() as url:
        print(f"| 1, by a bare socket | {bare_socket(url):.2f} ms | | |")
        for concurrency in (1, 16, 64):
            print(f"| {concurrency} | " + " | ".join(f"{ms:.2f} ms" for ms in overhead(url, concurrency)) + " |")
    print("\n| limit of the server | answers/s | refused | overloaded | most in flight |\n|---|---|---|---|---|")
    for name, (flags, count) in LIMITS.items():
        with limiting(*flags.split()) as url:
            generator = HttpGenerator(LlmConfig(url=url, model="swift"))
            began = time.perf_counter()
            generator.generate(requests(count))
            seconds = time.perf_counter() - began
            counted = counts(url)
        shares = [f"{counted[key] / sum(counted.values()):.1%}" for key in ("refused", "overloaded")]
        print(f"| {name} | {count / seconds:,.1f} | {shares[0]} | {shares[1]} | {generator.most_in_flight} |")


if __name__ == "__main__":
    main()
