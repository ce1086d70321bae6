"""Every answer is on the ledger with its price, and limits hold for a run directory, however often it is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.llm.cache import Cache
from fac_jax.llm.client import Reply, Request
from fac_jax.llm.fake import Answer, FakeServer
from fac_jax.llm.http import HttpGenerator
from fac_jax.llm.ledger import Ledger, Sum, read_ledger, sum_of, sums_by

PRICES = {"price_in": 2.0, "price_out": 10.0}
EACH = (7 * 2.0 + 3 * 10.0) / 1e6  # what FakeServer counts: 7 tokens read, 3 words written


def requests(count: int) -> list[Request]:
    return [Request(({"role": "user", "content": f"question {i}"},), max_tokens=20, seed=i) for i in range(count)]


def spend(folder: Path, server: FakeServer, count: int, cache: Cache | None = None, **settings: object) -> None:
    base = {"url": server.url, "retries": 0, "concurrency": 4, **PRICES}
    config = LlmConfig(**{**base, **settings})  # type: ignore[arg-type]
    ledger = Ledger(folder, config, "toxicity")
    about = [f"explain:{i // 2}" if i % 2 else f"judge:{i // 2}:1" for i in range(count)]
    HttpGenerator(config, ledger, cache).generate(requests(count), about=about)


def test_a_line_per_answer_and_sums(tmp_path: Path) -> None:
    with FakeServer() as server:
        spend(tmp_path, server, 6)
    lines = read_ledger(tmp_path)
    assert len(lines) == 6 and all(line["task"] == "toxicity" and line["counted"] for line in lines)
    total = sum_of(lines)
    assert (total.answers, total.prompt_tokens, total.completion_tokens) == (6, 42, 18)
    assert total.cost == pytest.approx(6 * EACH)
    by_purpose = sums_by(lines, "purpose")
    assert {key: found.answers for key, found in by_purpose.items()} == {("explain",): 3, ("judge",): 3}
    assert all(found.answers == 2 for found in sums_by(lines, "feature").values())
    assert sum(found.cost for found in sums_by(lines, "purpose", "feature").values()) == pytest.approx(total.cost)


def test_the_cache_costs_nothing_and_is_shown(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.sqlite")
    with FakeServer() as server:
        spend(tmp_path / "one", server, 3, cache)
        spend(tmp_path / "two", server, 5, cache)
    assert sum_of(read_ledger(tmp_path / "one")).answers == 1 + 3, "who the server is was asked as well"
    second = sum_of(read_ledger(tmp_path / "two"))
    assert (second.answers, second.cached) == (1 + 2, 3)


@pytest.mark.parametrize(
    ("limit", "reached"), [({"max_cost": 10 * EACH}, "max_cost"), ({"max_tokens": 100}, "max_tokens")]
)
def test_a_limit_stops_and_the_same_command_stays_stopped(
    tmp_path: Path, limit: dict[str, float], reached: str
) -> None:
    with FakeServer(then=Answer(delay_s=0.01)) as server:
        with pytest.raises(UserError, match=f"llm.{reached} is .*and this run has spent .*what arrived is kept"):
            spend(tmp_path, server, 100, **limit)
        asked = len(server.bodies)
        assert 10 <= asked <= 10 + 4, "over by no more than what was in flight"
        assert len(read_ledger(tmp_path)) == asked, "what was in flight arrived and is counted"
        with pytest.raises(UserError, match=f"llm.{reached}"):
            spend(tmp_path, server, 100, **limit)
        assert len(server.bodies) == asked, "nothing more was sent"


def test_a_limit_on_money_needs_prices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llm.max_cost is 1, but .*set llm.price_in and llm.price_out"):
        Ledger(tmp_path, LlmConfig(url="http://h/v1", max_cost=1.0), "toxicity")


def test_a_deadline_for_the_command(tmp_path: Path) -> None:
    with FakeServer() as server:
        with pytest.raises(UserError, match="llm.deadline_s is 0 and the command has run for"):
            spend(tmp_path, server, 3, deadline_s=0.0)
        assert not server.bodies


def test_tokens_that_a_server_does_not_count_are_guessed(tmp_path: Path) -> None:
    silent = Answer(body=json.dumps({"model": "m", "choices": [{"message": {"content": "x" * 41}}]}))
    with FakeServer([silent]) as server:
        spend(tmp_path, server, 1)
    (line,) = read_ledger(tmp_path)
    assert not line["counted"] and line["prompt_tokens"] == 3 and line["completion_tokens"] == 11


def test_a_line_that_a_kill_cut_short_is_taken_off_and_any_other_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, LlmConfig(url="http://h/v1"), "toxicity")
    ledger.add("explain:1", requests(1)[0], Reply("x", "stop", 5, 6, "m"), cached=False)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"at": "20')
    assert sum_of(read_ledger(tmp_path)) == Sum(1, 0, 5, 6, 0.0)
    ledger.path.write_bytes(b"not a line\n" + whole)
    with pytest.raises(UserError, match="ledger.jsonl:1 cannot be read"):
        read_ledger(tmp_path)


def test_a_server_that_ignores_schemas_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    with_schema = [Request(({"role": "user", "content": str(i)},), 20, schema=schema) for i in range(3)]
    for follows in (True, False):
        with FakeServer(follows_schema=follows) as server:
            generator = HttpGenerator(LlmConfig(url=server.url))
            generator.generate(requests(1))
            assert server.probes == 0, "nobody asked for a schema"
            generator.generate(with_schema)
            generator.generate(with_schema)
            assert server.probes == 1 and generator.follows_schema is follows
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1 and "ignores the JSON schema" in warnings[0] and "'Hello'" in warnings[0]
