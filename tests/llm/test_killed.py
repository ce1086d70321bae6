"""500 questions to a server that misbehaves in every way it can, and a client that is killed twenty times meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fac_jax.llm.fake import BROKEN, GARBAGE, TRUNCATED, Answer, FakeServer, rate_limited
from fac_jax.llm.question import data_shown

COUNT, KILLS = 500, 20
KEY = "sk-planted-4711-do-not-show"
ASK = """
import json, sys
from pathlib import Path
from fac_jax.config.llm import LlmConfig
from fac_jax.features.ask import ask
from fac_jax.llm.question import label_schema, question
from fac_jax.llm.cache import open_cache
from fac_jax.llm.http import HttpGenerator
from fac_jax.llm.ledger import Ledger

url, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
config = LlmConfig(url=url, timeout_s=2.0, retries=12, concurrency=8, key_env="FAC_TEST_KEY")
generator = HttpGenerator(config, Ledger(folder, config, "toxicity"), open_cache(), first_pause_s=0.01)
schema = label_schema(["Yes", "No"])
asked = {f"judge:{i}": question("Judge.", {"feature": i}, schema) for i in range(count)}
answers = ask(generator, asked, folder / "replies.jsonl", "judge")
product = {key: [answer.value, answer.error] for key, answer in answers.items()}
(folder / "product.json").write_text(json.dumps(product, indent=1))
"""


def feature_of(body: dict[str, Any]) -> int:
    return int(data_shown(body["messages"][1]["content"])["feature"])


def write(body: dict[str, Any]) -> str:
    feature = feature_of(body)
    if feature % 50 == 7:
        return "I would rather not say"
    return json.dumps({"label": "Yes" if feature % 3 else "No", "reason": f"because of {feature}"})


class Chaos(FakeServer):
    """Of five requests one fails: 429, 500, garbage, a cut body, a hang; every 25th text is cut by its length."""

    def __init__(self) -> None:
        super().__init__(write=write)
        self.random = random.Random(0)
        self.well: list[int] = []
        """Features of the requests that were answered well, in order."""

    def chat(self, body: dict[str, Any], key: str | None) -> Answer:
        trouble = self.random.choices(
            [None, rate_limited("0.02"), BROKEN, GARBAGE, TRUNCATED, Answer(delay_s=2.5)], [80, 6, 5, 4, 4, 1]
        )[0]
        answer = super().chat(body, key)
        if len(body["messages"]) == 1:  # the question who the server is
            return answer
        time.sleep(0.01)
        if trouble is not None:
            time.sleep(trouble.delay_s)
            return trouble
        self.well.append(feature_of(body))
        if feature_of(body) % 25 == 3:
            choice = {"message": {"content": '{"label": "Ye'}, "finish_reason": "length"}
            return Answer(body=json.dumps({"model": body["model"], "choices": [choice]}))
        return answer


def start(server: FakeServer, folder: Path, cache: Path, count: int = COUNT) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", ASK, server.url, str(folder), str(count)]
    environment = {**os.environ, "FAC_JAX_CACHE": str(cache), "FAC_TEST_KEY": KEY}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], status: int = 0) -> bytes:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err[-3000:].decode()
    return out + err


def lines(folder: Path) -> list[dict[str, Any]]:
    log = folder / "replies.jsonl"
    whole = log.read_bytes().rpartition(b"\n")[0] if log.exists() else b""
    return [json.loads(line) for line in whole.splitlines()]


@pytest.mark.timeout(600)
def test_killed_twenty_times_it_ends_with_the_same_bytes_and_asks_nothing_twice(tmp_path: Path) -> None:
    chance = random.Random(1)
    with Chaos() as server:
        finish(start(server, tmp_path / "undisturbed", tmp_path / "cache-1"))
        assert len(server.bodies) > 1.1 * COUNT, "there was trouble"
    with Chaos() as server:
        folder, moments = tmp_path / "killed", []
        for wanted in sorted(chance.sample(range(5, COUNT - 20), KILLS)):
            process = start(server, folder, tmp_path / "cache-2")
            deadline = time.monotonic() + 60
            while len(lines(folder)) < wanted:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(chance.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            time.sleep(0.05)  # the server writes to the dead and notes what it had answered
            kept, seen = {int(line["key"].split(":")[1]) for line in lines(folder)}, len(server.bodies)
            moments.append((seen, kept))
        finish(start(server, folder, tmp_path / "cache-2"))
        for seen, kept in moments:
            later = {feature_of(body) for body in server.bodies[seen:] if len(body["messages"]) == 2}
            assert not later & kept, "an answer that had arrived was asked for again"
        twice = len(server.well) - len(set(server.well))
        assert twice <= KILLS * 8, "only what was in flight at a kill was answered twice"
        for name in ("product.json", "replies.jsonl"):
            assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
        product = json.loads((folder / "product.json").read_text())
        assert sum(value is not None for value, _ in product.values()) == COUNT - COUNT // 25 - COUNT // 50
        asked = len(server.bodies)
        finish(start(server, tmp_path / "anew", tmp_path / "cache-2"))
        fresh = {feature_of(body) for body in server.bodies[asked:] if len(body["messages"]) == 2}
        assert fresh == {i for i in range(COUNT) if i % 25 == 3 or i % 50 == 7}, "the rest came from the cache"
        assert (tmp_path / "anew/product.json").read_bytes() == (folder / "product.json").read_bytes()


def test_a_planted_key_is_in_no_file_log_or_traceback(tmp_path: Path) -> None:
    """Neither when all goes well, nor when the server repeats it in an error, nor in a traceback of the library."""
    leak = Answer(400, json.dumps({"error": f"bad key {KEY}"}))
    said = b""
    with FakeServer(write=write) as server:
        said += finish(start(server, tmp_path / "well", tmp_path / "cache", 5))
        assert server.keys and set(server.keys) == {f"Bearer {KEY}"}
    with FakeServer(then=leak) as server:
        failed = finish(start(server, tmp_path / "refused", tmp_path / "cache", 5), status=1)
        assert b"Traceback" in failed and b"bad key [key]" in failed  # the script catches nothing: all of it is shown
    crashes = ASK.replace("ask(generator", "1 / 0; ask(generator")
    environment = {**os.environ, "FAC_JAX_CACHE": str(tmp_path / "cache"), "FAC_TEST_KEY": KEY}
    with FakeServer() as server:
        command = [sys.executable, "-c", crashes, server.url, str(tmp_path / "well"), "5"]
        done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 1 and b"ZeroDivisionError" in done.stderr
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4
    for content in [said, failed, done.stdout, done.stderr, *files]:
        assert KEY.encode() not in content


def test_a_key_may_stand_in_a_file_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fac_jax.llm.exchange import read_key

    (tmp_path / "key").write_text(KEY + "\n")
    monkeypatch.setenv("FAC_TEST_KEY_FILE", str(tmp_path / "key"))
    assert read_key("FAC_TEST_KEY") == KEY
    monkeypatch.setenv("FAC_TEST_KEY", "another")
    assert read_key("FAC_TEST_KEY") == "another"
