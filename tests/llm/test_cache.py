"""Answers that were paid for are found again, and only by the very same question to the very same model."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.llm.cache import Cache, cache_folder, keys
from fac_jax.llm.client import Reply, Request, Steer
from fac_jax.llm.exchange import chat_body
from fac_jax.llm.fake import Answer, FakeServer
from fac_jax.llm.http import HttpGenerator

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
BASE = Request(({"role": "system", "content": "S"}, {"role": "user", "content": "U"}), 20, 0.5, 0.9, 1, SCHEMA)
IDENTITY = {"url": "http://h/v1", "model": "m", "listed": {"id": "m", "root": "r"}, "answers_as": "m-1"}


def key(request: Request, identity: dict[str, Any] = IDENTITY, model: str = "m") -> str:
    return keys(identity, [chat_body(model, request)])[0]


def changed(field: str, value: Any) -> Request:
    return dataclasses.replace(BASE, **{field: value})


OTHERS = [
    changed("messages", ({"role": "system", "content": "T"}, BASE.messages[1])),
    changed("messages", (BASE.messages[0], {"role": "user", "content": "V"})),
    changed("messages", (BASE.messages[0], {"role": "assistant", "content": "U"})),
    changed("messages", BASE.messages[1:]),
    changed("messages", BASE.messages[::-1]),
    changed("max_tokens", 21),
    changed("temperature", 0.6),
    changed("top_p", 0.8),
    changed("seed", 2),
    changed("schema", None),
    changed("schema", {**SCHEMA, "required": []}),
]


def test_every_field_is_in_the_key() -> None:
    found = {key(request) for request in [BASE, *OTHERS]}
    assert len(found) == len(OTHERS) + 1
    assert {f.name for f in dataclasses.fields(Request)} == {
        "messages", "max_tokens", "temperature", "top_p", "seed", "schema", "steer"
    }, "a new field of a request must be tried above"  # fmt: skip
    with pytest.raises(UserError, match="a server cannot be steered"):
        key(changed("steer", Steer(3, 2.0)))
    for name in IDENTITY:
        assert key(BASE, {**IDENTITY, name: "other"}) not in found
    assert key(BASE, model="other") not in found


texts = st.lists(st.sampled_from("abcd"), max_size=8)


@given(texts, texts, st.randoms())
def test_old_rows_hit_whatever_is_added_or_reordered(old: list[str], new: list[str], random: Any) -> None:
    def of(contents: list[str]) -> list[str]:
        return keys(IDENTITY, [content.encode() for content in contents])

    before = of(old)
    assert len(set(before)) == len(old), "the same question asked n times is n samples"
    together = old + new
    random.shuffle(together)
    assert set(before) <= set(of(together))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.text(), st.integers(0, 9)), max_size=5))
def test_what_is_kept_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache") / "c.sqlite")
    for place, (text, count) in enumerate(rows):
        cache.put(str(place), Reply(text, "stop", count, count, "m"))
        cache.put(str(place), Reply("a later one", "stop", 0, 0, "m"))
    found = cache.get([str(place) for place in range(len(rows) + 1)])
    assert found == {str(p): Reply(text, "stop", count, count, "m") for p, (text, count) in enumerate(rows)}


def ask(server: FakeServer, cache: Cache | None, count: int = 4, **more: Any) -> list[str]:
    generator = HttpGenerator(LlmConfig(url=server.url, retries=0), cache=cache)
    requests = [Request(({"role": "user", "content": f"q{i}"},), 20, **more) for i in range(count)]
    return [reply.text for reply in generator.generate(requests)]


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.sqlite")
    with FakeServer() as server:
        first = ask(server, cache)
        assert len(server.bodies) == 4
        assert ask(server, Cache(tmp_path / "c.sqlite")) == first and len(server.bodies) == 4
        assert ask(server, cache, 6)[:4] == first and len(server.bodies) == 6
        ask(server, cache, temperature=0.1)
        assert len(server.bodies) == 10
        ask(server, None)
        assert len(server.bodies) == 14


def test_equal_requests_are_samples_of_their_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.sqlite")
    written = iter(range(100))
    with FakeServer(write=lambda body: f"sample {next(written)}") as server:
        generator = HttpGenerator(LlmConfig(url=server.url), cache=cache)
        same = [Request(({"role": "user", "content": "tell me"},), 20, 1.0)] * 3
        first = [reply.text for reply in generator.generate(same)]
        assert len(set(first)) == 3
        again = [reply.text for reply in generator.generate([*same, same[0]])]
        assert again[:3] == first and again[3] not in first and len(server.bodies) == 4


def test_another_model_under_the_same_name_is_asked_anew(tmp_path: Path) -> None:
    """What the answers say of themselves counts, and what `/models` lists; not when the server was started."""
    cache = Cache(tmp_path / "c.sqlite")
    with FakeServer() as server:
        ask(server, cache)
        server.listed = {"created": 12345}
        ask(server, cache)
        assert len(server.bodies) == 4
        server.listed = {"root": "another-checkpoint"}
        ask(server, cache)
        assert len(server.bodies) == 8
        server.listed, server.answers_as = {}, "fake-model-2026-12"
        ask(server, cache)
        assert len(server.bodies) == 12


@pytest.mark.parametrize(
    "bad",
    [
        {"finish_reason": "length"},
        {"finish_reason": "content_filter", "message": {"content": None}},
        {"finish_reason": "stop", "message": {"content": "  "}},
        {"finish_reason": "stop", "message": {"content": "not what the schema asks for"}},
    ],
)
def test_what_is_no_answer_is_not_kept(tmp_path: Path, bad: dict[str, Any]) -> None:
    cache = Cache(tmp_path / "c.sqlite")
    choice = {"message": {"content": '{"a": "x"}'}, **bad}
    poor = Answer(body=json.dumps({"model": "fake-model", "choices": [choice]}))
    with FakeServer([poor], write=lambda body: '{"a": "x"}') as server:
        ask(server, cache, 1, schema=SCHEMA)
        assert ask(server, cache, 1, schema=SCHEMA) == ['{"a": "x"}'] and len(server.bodies) == 2
        ask(server, cache, 1, schema=SCHEMA)
        assert len(server.bodies) == 2


def test_an_answer_by_another_model_than_the_one_that_was_met_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.sqlite")
    strange = Answer(body=json.dumps({"model": "stand-in", "choices": [{"message": {"content": "x"}}]}))
    with FakeServer([strange]) as server:
        ask(server, cache, 1)
        ask(server, cache, 1)
        assert len(server.bodies) == 2


def _fill(path: Path, name: str) -> None:
    cache = Cache(path)
    for i in range(200):
        cache.put(f"{name}-{i}", Reply(name, "stop", i, i, "m"))


def test_several_runs_share_it(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=_fill, args=(path, name)) for name in "ab"]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    found = Cache(path).get([f"{name}-{i}" for name in "ab" for i in range(200)])
    assert len(found) == 400 and all(run.exitcode == 0 for run in runs)


def test_only_the_user_may_read_it(tmp_path: Path) -> None:
    Cache(tmp_path / "deep/er/c.sqlite")
    assert (tmp_path / "deep/er/c.sqlite").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["not a database", "a row of another form"])
def test_a_damaged_file_is_named_and_not_overwritten(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.sqlite"
    if damage == "not a database":
        path.write_bytes(b"something else entirely" * 100)
        with pytest.raises(UserError, match="c.sqlite cannot be used .*delete the file.*--llm.no-cache"):
            Cache(path)
        assert path.read_bytes().startswith(b"something else")
    else:
        Cache(path).put("k", Reply("x", "stop", 1, 1, "m"))
        with sqlite3.connect(path) as file:
            file.execute("UPDATE replies SET reply = '[1'")
        with pytest.raises(UserError, match="c.sqlite cannot be used"):
            Cache(path).get(["k"])


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAC_JAX_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FAC_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x/fac_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/fac_jax"
