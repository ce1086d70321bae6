"""The doubles do what tests lean on: replies out of order, a script worked through, what was asked kept."""

import json
from http.client import HTTPConnection
from urllib.parse import urlsplit

from fac_jax.llm.client import Reply, Request
from fac_jax.llm.fake import GOOD, WRONG_SHAPE, Answer, FakeGenerator, FakeServer


def test_the_generator_keeps_the_order_of_requests_and_hands_over_in_another():
    generator = FakeGenerator(lambda request: f"{request.seed}" if request.seed else Reply("", "length", 1, 2, "m"))
    handed: list[int] = []
    replies = generator.generate([Request((), 5, seed=i) for i in range(3)], lambda index, reply: handed.append(index))
    assert [reply.text for reply in replies] == ["", "1", "2"]
    assert replies[0].finish_reason == "length"
    assert handed == [2, 1, 0] and len(generator.requests) == 3


def test_the_server_works_through_its_script_then_does_one_thing_for_ever():
    script = [WRONG_SHAPE, Answer(503, "busy", {"X-Mood": "low"})]
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

    def ask(method: str, path: str) -> tuple[int, str | None, dict]:
        connection.request(
            method, f"/v1{path}", json.dumps(body) if method == "POST" else None, {"Authorization": "Bearer k"}
        )
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, answer.headers["X-Mood"], json.loads(text) if text.startswith("{") else {}

    with FakeServer(script, write=lambda body: body["model"], then=GOOD) as server:
        connection = HTTPConnection(urlsplit(server.url).netloc, timeout=10)
        answers = [ask("POST", "/chat/completions") for _ in range(4)]
        assert ask("GET", "/models")[2]["data"] == [{"id": "fake-model"}]
        assert ask("POST", "/elsewhere")[0] == 404
        connection.close()
    assert [status for status, _, _ in answers] == [200, 503, 200, 200]
    assert "message" not in answers[0][2]["choices"][0]
    assert answers[1][1] == "low"
    assert answers[3][2]["choices"][0]["message"]["content"] == "m"
    assert server.bodies == [body] * 4 and server.keys == ["Bearer k"] * 4
