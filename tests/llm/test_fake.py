"""The doubles do what tests lean on: replies out of order, a script worked through, what was asked kept."""

import httpx

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
    with FakeServer(script, write=lambda body: body["model"], then=GOOD) as server:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        with httpx.Client(trust_env=False, headers={"Authorization": "Bearer k"}) as client:
            answers = [client.post(f"{server.url}/chat/completions", json=body) for _ in range(4)]
            assert client.get(f"{server.url}/models").json()["data"] == [{"id": "fake-model"}]
            assert client.post(f"{server.url}/elsewhere", json=body).status_code == 404
    assert [answer.status_code for answer in answers] == [200, 503, 200, 200]
    assert "message" not in answers[0].json()["choices"][0]
    assert answers[1].headers["X-Mood"] == "low"
    assert answers[3].json()["choices"][0]["message"]["content"] == "m"
    assert server.bodies == [body] * 4 and server.keys == ["Bearer k"] * 4
