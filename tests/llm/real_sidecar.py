"""The sidecar with the real vLLM server on a CPU and SmolLM2-135M: what it can do, how fast it is, and that it goes.

Installs and starts gigabytes, so the suite does not collect it: `bash launch/test-sidecar.sh` runs it, and prints what
it measured. The environment and the model lie in the user's cache folder and are made once. FAC_SIDECAR_KIND chooses
another kind; what only vLLM can do is then left out.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fac_jax.config.llm import LlmConfig
from fac_jax.llm.client import Request
from fac_jax.llm.http import HttpGenerator
from tests.llm.real_server import KIND, Running, fac, get, running

pytestmark = pytest.mark.timeout(1800)
vllm_only = pytest.mark.skipif(KIND == "transformers", reason="the light server ignores it")
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "maximum": 99}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
SCALE = ["Yes", "Probably", "Maybe", "No"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from running(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def warm(server: Running) -> Running:
    """After the first requests of each kind, which compile or load something: the first logprobs took 22 s."""
    chat(server, "Hello", max_tokens=4)
    chat(server, "Hello", max_tokens=4, logprobs=True, top_logprobs=2)
    return server


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=300).read())


def chat(server: Running, text: str, **settings: Any) -> Any:
    message = {"role": "user", "content": text}
    body = {"model": server.model, "messages": [message], "max_tokens": 24, "temperature": 0} | settings
    return post(f"{server.url}/chat/completions", body)


def texts(answer: Any) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def ask(server: Running, *requests: Request) -> list[Any]:
    return list(HttpGenerator(LlmConfig(url=server.url, model=server.model)).generate(requests))


def request(text: str, **settings: Any) -> Request:
    return Request(({"role": "user", "content": text},), **({"max_tokens": 24} | settings))


def test_our_client_gets_an_answer_with_its_tokens_counted(warm: Running) -> None:
    (reply,) = ask(warm, request("What is the capital of France? Answer in one sentence."))
    assert "Paris" in reply.text or "France" in reply.text
    assert reply.prompt_tokens > 10 and 0 < reply.completion_tokens <= 24
    (cut,) = ask(warm, request("Count from 1 to 1000.", max_tokens=5))
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 5)


@vllm_only
def test_the_schema_is_followed_and_our_client_says_so(warm: Running) -> None:
    generator = HttpGenerator(LlmConfig(url=warm.url))
    generator.meet()
    assert generator.follows_schema is True
    requests = [
        request(f"City {n}, and its people.", max_tokens=80, temperature=1.0, seed=n, schema=CITY) for n in range(6)
    ]
    for reply in generator.generate(requests):
        answer = json.loads(reply.text)
        assert answer.keys() == {"city", "people"} and isinstance(answer["people"], int)


@vllm_only
def test_choice_gives_one_of_the_choices(warm: Running) -> None:
    said = {
        text
        for seed in range(4)
        for text in texts(
            chat(warm, "Is it raining?", structured_outputs={"choice": SCALE}, temperature=1.5, seed=seed)
        )
    }
    assert said <= set(SCALE)


@vllm_only
def test_logprobs_are_those_of_the_text(warm: Running) -> None:
    answer = chat(warm, "What is the capital of France?", logprobs=True, top_logprobs=3)
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).removesuffix("<|im_end|>") == texts(answer)[0]
    for token in tokens:
        best = max(token["top_logprobs"], key=lambda one: one["logprob"])
        assert token["logprob"] == best["logprob"] <= 0  # greedy takes the likeliest
        assert len(token["top_logprobs"]) == 3


@vllm_only
def test_n_gives_so_many_different_texts(warm: Running) -> None:
    assert len(set(texts(chat(warm, "Write a line about rain.", temperature=1.0, n=3, seed=5)))) == 3


def test_the_same_seed_writes_the_same_text_and_another_seed_another(warm: Running) -> None:
    def write(seed: int) -> str:
        (reply,) = ask(warm, request("Write a line about rain.", temperature=0.8, top_p=0.9, seed=seed, max_tokens=16))
        return reply.text

    first = write(1)
    assert first == write(1)
    assert first != write(2) or first != write(3)


@vllm_only
def test_lists_of_prompts_are_completed(warm: Running) -> None:
    body = {
        "model": warm.model,
        "prompt": ["The capital of France is", "One, two, three,"],
        "max_tokens": 6,
        "temperature": 0,
    }
    answers = [choice["text"] for choice in post(f"{warm.url}/completions", body)["choices"]]
    assert len(answers) == 2 and "Paris" in answers[0] and "four" in answers[1]


@vllm_only
def test_how_fast_it_is(warm: Running) -> None:
    for clients in (1, 8, 32):

        def write(index: int) -> int:
            answer = chat(
                warm, f"Write about the number {index}.", temperature=0.8, seed=index, max_tokens=48, ignore_eos=True
            )
            return int(answer["usage"]["completion_tokens"])

        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            tokens = sum(pool.map(write, range(max(2, 2 * clients))))
        rate = tokens / (time.monotonic() - began)
        print(f"[measured] {rate:.0f} tokens/s at {clients} clients")
        assert tokens == 48 * max(2, 2 * clients)
    print(f"[measured] {fac('sidecar', 'status', *warm.arguments).strip()}")


def test_after_stop_no_process_is_left_and_the_port_is_free(server: Running) -> None:
    group = [line for line in processes() if line[1] == server.pid]
    assert len(group) >= (1 if KIND == "transformers" else 3)  # vLLM's server, its engine, its worker
    print(f"[measured] {fac('sidecar', 'stop', *server.arguments).strip()}")
    assert [line for line in processes() if line[1] == server.pid or line[0] in [pid for pid, _ in group]] == []
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(f"{server.url}/models")
    assert "no sidecar" in fac("sidecar", "status", *server.arguments)


def processes() -> list[tuple[int, int]]:
    """(process, group) of every process that lives, by ps and not by the code under test."""
    said = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in said.splitlines()]
    return [(int(pid), int(group)) for pid, group, state in rows if not state.startswith("Z")]
