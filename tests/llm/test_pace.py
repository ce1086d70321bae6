"""The pace: nearly all of what a server allows, and hardly a refusal.

What is measured in seconds is measured in virtual time, where it does not depend on what else the machine does; a real
server in a process of its own shows that the client keeps the same pace.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import dataclass

import pytest

from fac_jax.config.llm import LlmConfig
from fac_jax.llm.client import Request
from fac_jax.llm.fake import Answer, FakeServer
from fac_jax.llm.http import HttpGenerator
from fac_jax.llm.pace import Pace
from fac_jax.scale.llm_server import Limits, counts, limiting
from tests import virtual_time

CONCURRENCY = 256


@dataclass(frozen=True)
class Asked:
    """What a server counted, the seconds that it took, and the largest number of requests that were open."""

    accepted: int
    refused: int
    overloaded: int
    seconds: float
    most_in_flight: int


def ask(count: int, latency_s: float, slow_s: float = 30.0, **limits: float) -> Asked:
    """Send `count` requests to a server with these limits which answers after `latency_s`, in virtual time."""

    async def all_of_them() -> Asked:
        clock = asyncio.get_running_loop().time
        server, pace = Limits(**limits, clock=clock), Pace(CONCURRENCY, slow_s, clock)

        async def one(_: int) -> None:
            for tries in itertools.count():
                sent = await pace.begin(again=tries > 0)
                refusal = server.refusal()
                if refusal is None:
                    server.open += 1
                    await asyncio.sleep(latency_s)
                    server.open -= 1
                    pace.end(sent, "answered")
                    return
                status, wait_s = refusal
                pace.end(sent, "refused" if status == 429 else "overloaded", math.ceil(wait_s) or None)
                await asyncio.sleep(pace.paused_s() or latency_s)

        async def work() -> None:
            for request in todo:
                await one(request)

        todo = iter(range(count))
        pace.start()
        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        return Asked(server.accepted, server.refused, server.overloaded, clock(), pace.most_in_flight)

    return virtual_time.run(all_of_them())


@pytest.mark.parametrize(("rate", "burst"), [(7, 20), (100, 100), (100, 300), (1000, 1000)])
def test_a_rate_limit_is_used_and_hardly_ever_hit(rate: int, burst: int) -> None:
    count = 60 * rate + burst
    asked = ask(count, 0.03, rate=rate, burst=burst)
    print(asked, count / (burst + rate * asked.seconds))
    assert asked.accepted == count
    assert count > 0.9 * (burst + rate * asked.seconds)
    assert asked.refused < 25, "what it costs to find the rate, and to see now and then whether it has grown"


def test_a_limit_on_open_requests_is_found() -> None:
    asked = ask(5000, 0.03, at_once=12)
    print(asked, 5000 * 0.03 / asked.seconds)
    assert asked.accepted == 5000 and asked.overloaded < 0.05 * 5000
    assert 5000 * 0.03 / asked.seconds > 0.8 * 12, "most of its places were taken"
    assert 12 < asked.most_in_flight < 16


def test_it_grows_while_the_server_keeps_up() -> None:
    asked = ask(1200, 0.1)
    print(asked)
    assert asked.most_in_flight > 32 and asked.seconds < 1200 * 0.1 / 16


def requests(count: int) -> list[Request]:
    return [Request(({"role": "user", "content": str(i)},), 20, seed=i) for i in range(count)]


def test_a_real_server_is_asked_at_its_pace() -> None:
    with limiting("--rate", "100", "--burst", "100", "--latency", "0.03") as url:
        HttpGenerator(LlmConfig(url=url, model="swift")).generate(requests(600))
        counted = counts(url)
    assert counted["accepted"] == 600 and counted["overloaded"] == 0
    # Beside other work timers wake late and in bursts; without a pace it would be most of them.
    assert 0 < counted["refused"] < 0.1 * 600


def test_slow_answers_do_not_make_more_of_them() -> None:
    with FakeServer(then=Answer(delay_s=0.1)) as server:
        generator = HttpGenerator(LlmConfig(url=server.url, timeout_s=0.3))
        generator.generate(requests(40))
        assert server.most_at_once <= 4
