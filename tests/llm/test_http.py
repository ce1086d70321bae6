"""HttpGenerator against a real loopback server that misbehaves; the messages are read, and nothing is lost."""

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.llm import http
from fac_jax.llm.client import Reply, Request, Steer
from fac_jax.llm.exchange import read_reply
from fac_jax.llm.fake import BROKEN, GARBAGE, GOOD, TRUNCATED, WRONG_SHAPE, Answer, FakeServer, rate_limited
from fac_jax.llm.http import HttpGenerator
from fac_jax.llm.structured import read_answer

KEY = "sk-secret-0123456789"


def requests(count: int) -> list[Request]:
    return [Request(({"role": "user", "content": f"question {i}"},), max_tokens=20, seed=i) for i in range(count)]


def generator(server: FakeServer, **settings: object) -> HttpGenerator:
    base = {"url": server.url, "timeout_s": 5.0, "retries": 2, "concurrency": 4, "key_env": "FAC_TEST_KEY"}
    return HttpGenerator(LlmConfig(**{**base, **settings}), first_pause_s=0.01)  # type: ignore[arg-type]


def test_replies_come_in_the_order_of_requests_and_are_handed_over_as_they_arrive():
    handed: dict[int, Reply] = {}
    with FakeServer([Answer(delay_s=0.2)]) as server:
        replies = generator(server).generate(requests(9), lambda index, reply: handed.update({index: reply}))
        assert [reply.text for reply in replies] == [f"echo: question {i}" for i in range(9)]
        assert [handed[i] for i in range(9)] == replies
        assert list(handed) != list(range(9))  # the slow one came later
        assert replies[0] == Reply("echo: question 0", "stop", 7, 3, "fake-model")


def test_the_body_is_what_an_openai_server_expects():
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    with FakeServer(models=["first", "second"]) as server:
        writer = generator(server)
        assert writer.name == "http:first"
        writer.generate([Request(({"role": "user", "content": "hi"},), 33, 0.8, 0.9, 7, schema)])
        body = server.bodies[0]
        assert body["response_format"]["json_schema"] == {"name": "reply", "schema": schema, "strict": True}
        assert {k: body[k] for k in ("model", "max_tokens", "temperature", "top_p", "seed")} == {
            "model": "first",
            "max_tokens": 33,
            "temperature": 0.8,
            "top_p": 0.9,
            "seed": 7,
        }
        writer.generate(requests(1))
        assert "response_format" not in server.bodies[1]


def test_no_more_than_concurrency_requests_are_open():
    with FakeServer(then=Answer(delay_s=0.02)) as server:
        generator(server, concurrency=3).generate(requests(12))
        assert 1 < server.most_at_once <= 3


def test_a_steered_request_is_refused_before_anything_is_sent():
    steered = Request(({"role": "user", "content": "a"},), 4, steer=Steer(3, 2.0))
    with FakeServer() as server:
        with pytest.raises(UserError, match="a server cannot be steered: only the embedded writer can .llm.url: null"):
            generator(server).generate([*requests(1), steered])
        assert not server.bodies and not server.probes


def test_no_requests_no_replies():
    with FakeServer() as server:
        assert generator(server).generate([]) == []


@pytest.mark.parametrize("trouble", [BROKEN, GARBAGE, WRONG_SHAPE, TRUNCATED, rate_limited("0")])
def test_passing_trouble_is_outlived(trouble: Answer):
    with FakeServer([trouble, GOOD, trouble]) as server:
        replies = generator(server, concurrency=1).generate(requests(3))
        assert [reply.text for reply in replies] == [f"echo: question {i}" for i in range(3)]
        assert len(server.bodies) == 5


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (BROKEN, ["HTTP 500", "the engine died", "server's log"]),
        (GARBAGE, ["HTTP 200 with an unusable answer", "It works!", "ends in /v1"]),
        (WRONG_SHAPE, ["choices[0].message is NoneType", "a completion, not a chat"]),
        (TRUNCATED, ["connection failed", "Last answer: none"]),
        (rate_limited("0"), ["HTTP 429", "slow down", "lower llm.concurrency"]),
        (Answer(delay_s=0.6), ["no answer within 0.", "raise llm.timeout_s"]),
    ],
)
def test_lasting_trouble_ends_bounded_and_named_with_everything_before_kept(trouble: Answer, words: list[str]):
    kept: list[int] = []
    with FakeServer([GOOD, GOOD], then=trouble) as server:
        writer = generator(server, concurrency=1, timeout_s=0.2 if trouble.delay_s else 5.0)
        with pytest.raises(UserError) as caught:
            writer.generate(requests(5), lambda index, reply: kept.append(index))
        message = str(caught.value)
        assert kept == [0, 1]
        assert len(server.bodies) <= 2 + 3
        for word in [f"{server.url}/chat/completions", "2 of 5 replies had arrived", *words]:
            assert word in message
        assert "Next: " in message


def test_replies_in_flight_when_another_request_fails_are_kept():
    kept: list[int] = []
    with FakeServer([Answer(delay_s=0.3), Answer(400, '{"error": "no such parameter"}')]) as server:
        with pytest.raises(UserError, match="HTTP 400.*no such parameter.*1 of 8 replies"):
            generator(server, concurrency=2).generate(requests(8), lambda index, reply: kept.append(index))
        assert len(kept) == 1
        assert len(server.bodies) == 2  # nothing was begun after the failure, and a 400 is not tried again


def test_ctrl_c_ends_at_once_and_what_arrived_was_handed_over():
    kept: list[int] = []

    def interrupt(index: int, reply: Reply) -> None:
        kept.append(index)
        if len(kept) == 3:
            raise KeyboardInterrupt

    with FakeServer() as server:
        with pytest.raises(KeyboardInterrupt):
            generator(server, concurrency=1).generate(requests(20), interrupt)
        assert kept == [0, 1, 2] and len(server.bodies) <= 4


@pytest.mark.parametrize("seconds", ["0.3", "date"])
def test_retry_after_is_obeyed_by_every_request(seconds: str):
    if seconds == "date":
        seconds = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    with FakeServer([rate_limited(seconds)]) as server:
        began = time.monotonic()
        replies = generator(server, concurrency=2).generate(requests(4))
        assert time.monotonic() - began > 0.25
        assert [reply.text for reply in replies] == [f"echo: question {i}" for i in range(4)]


def test_a_retry_after_beyond_the_deadline_ends_at_once():
    with FakeServer(then=rate_limited("3600")) as server:
        began = time.monotonic()
        with pytest.raises(UserError, match=r"HTTP 429.*next try would be in 3600\.0 s, and \d+\.\d s are left"):
            generator(server).generate(requests(1))
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(("sent", "read"), [("smile \ud83d", "smile �"), ("\ud83d\ude00 ok", "😀 ok"), ("é😀", "é😀")])
def test_half_of_a_pair_never_gets_in(sent: str, read: str):
    message = {"choices": [{"message": {"content": sent}, "finish_reason": "length"}]}
    reply = read_reply(json.loads(json.dumps(message)))
    assert reply.text == read and reply.text.encode()
    schema = {"type": "object", "properties": {"reason": {"type": "string"}}, "required": ["reason"]}
    answer = read_answer(json.dumps({"reason": "smile \ud83d"}), schema)
    assert answer.value is None and answer.error == "holds half of a UTF-16 pair, which is no character"


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_nobody_waits_out_a_retry_after_once_the_run_has_failed(concurrency: int):
    with FakeServer([Answer()] * 2, then=rate_limited("3600")) as server:
        began = time.monotonic()
        with pytest.raises(UserError, match=r"HTTP 429.*\(\d+ of 16 replies had arrived\)"):
            generator(server, concurrency=concurrency).generate(requests(16))
        assert time.monotonic() - began < 3


def test_the_deadline_ends_what_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "STARTED", time.monotonic())
    with FakeServer(then=rate_limited("20")) as server:
        began = time.monotonic()
        with pytest.raises(UserError, match=r"llm.deadline_s is 1 and the command has run for"):
            generator(server, concurrency=16, deadline_s=1.0, timeout_s=60.0).generate(requests(16))
        assert time.monotonic() - began < 5


def test_the_total_time_is_bounded_whatever_the_server_does():
    with FakeServer(then=Answer(delay_s=0.3)) as server:
        began = time.monotonic()
        with pytest.raises(UserError):
            generator(server, timeout_s=0.1, retries=3).generate(requests(1))
        assert time.monotonic() - began < 0.4 + 1


def test_a_server_that_is_down_is_named():
    with FakeServer() as server:
        url = server.url
    with pytest.raises(UserError) as caught:
        HttpGenerator(LlmConfig(url=url, timeout_s=1.0, retries=1), first_pause_s=0.01)
    assert f"{url}/models" in str(caught.value)
    assert "after 2 tries" in str(caught.value)
    assert "start the server" in str(caught.value)


def test_a_wrong_key_is_said_once_and_never_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAC_TEST_KEY", KEY + "\n")
    refused = Answer(401, json.dumps({"error": f"key {KEY} is not valid"}))
    with FakeServer([refused]) as server:
        with pytest.raises(UserError) as caught:
            generator(server).generate(requests(1))
        assert server.keys == [f"Bearer {KEY}"]
        assert KEY not in str(caught.value)
        assert "key [key] is not valid" in str(caught.value)
        assert "FAC_TEST_KEY (it is set)" in str(caught.value)
        assert caught.value.__cause__ is None


def test_without_a_key_no_key_is_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FAC_TEST_KEY", raising=False)
    with FakeServer() as server:
        generator(server).generate(requests(1))
        assert server.keys == [None]


def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAC_TEST_KEY", "sk-se\ncret")
    with pytest.raises(UserError, match="FAC_TEST_KEY") as caught:
        HttpGenerator(LlmConfig(url="http://127.0.0.1:1/v1", key_env="FAC_TEST_KEY"))
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", None])
def test_a_url_that_is_none_is_refused(url: str | None):
    with pytest.raises(UserError, match="llm.url"):
        HttpGenerator(LlmConfig(url=url))


@pytest.mark.parametrize("url", ["http://user:hunter2@host/v1", "http://host/v1?key=hunter2"])
def test_a_url_with_a_secret_is_refused_without_showing_it(url: str):
    with pytest.raises(UserError, match="credentials") as caught:
        HttpGenerator(LlmConfig(url=url))
    assert "hunter2" not in str(caught.value)


def test_a_server_without_models_or_path_says_so():
    with FakeServer(models=[]) as server:
        with pytest.raises(UserError, match="no data in it"):
            generator(server, retries=0)
        with pytest.raises(UserError, match="HTTP 404.*llm.url"):
            generator(server, url=server.url.removesuffix("/v1"), retries=0)
        assert generator(server, model="mine").name == "http:mine"


@pytest.mark.parametrize(
    "payload",
    [
        [],
        {},
        {"choices": []},
        {"choices": [3]},
        {"choices": [{"message": {}}]},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}},
    ],
)
def test_envelopes_of_the_wrong_shape_are_refused(payload: object):
    with pytest.raises(ValueError):
        read_reply(payload)


def test_withheld_content_is_an_empty_text_with_the_servers_reason():
    payload = {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}
    assert read_reply(payload) == Reply("", "content_filter", 0, 0, "unknown")
