"""What a run would ask is what it then asks; nothing is sent or written meanwhile."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fac_jax import dry_run
from fac_jax.config.downstream import StudyConfig
from fac_jax.config.features import ExplainConfig, JudgeConfig
from fac_jax.config.file import Config, load_config
from fac_jax.config.llm import LlmConfig
from fac_jax.config.machine import RunConfig
from fac_jax.dry_run import estimate, estimates, table
from fac_jax.errors import UserError
from fac_jax.llm.cache import open_cache
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeServer
from fac_jax.synthesis.synthesize import synthesize
from tests.synthesis.toy_world import Toy, asked_for, make_toy, message

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    return make_toy(tmp_path, monkeypatch)


def write(body: dict[str, Any]) -> str:
    return message(asked_for(Request(tuple(body["messages"]), 30)), body["seed"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", ["toxicity", "instruction_following"])  # the second's samples are answered as well
def test_synthesis_asks_what_was_foretold(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    monkeypatch.setenv("FAC_JAX_CACHE", str(tmp_path / "cache"))
    with FakeServer(write=write) as server:
        llm = LlmConfig(url=server.url, price_in=1.0, price_out=2.0)
        config = dataclasses.replace(
            toy.config, llm=llm, run=RunConfig(dir=str(tmp_path / "run")), judge=JudgeConfig(task=task)
        )
        cache = open_cache()
        before = files(tmp_path)
        found = estimate(config, "synthesis", toy.out, toy.inputs, cache)
        assert files(tmp_path).keys() == before.keys() and server.probes == 0 and not server.bodies
        synthesize(config, toy.out, toy.inputs)
        bodies = [body["messages"] for body in server.bodies]
        assert all(list(request.messages) in bodies for request in found.requests)
        assert len(found.requests) < len(bodies) <= found.paid and found.cached == 0
        again = estimate(config, "synthesis", toy.out, toy.inputs, cache)
        assert not again.requests, "every reply to the first step is kept"
    read, written = found.tokens()
    assert read > 0 and written == found.paid * config.synthesize.max_new_tokens


def test_what_is_in_the_cache_is_not_paid_for(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAC_JAX_CACHE", str(tmp_path / "cache"))
    with FakeServer(write=write) as server:
        config = dataclasses.replace(
            toy.config, llm=LlmConfig(url=server.url), run=RunConfig(dir=str(tmp_path / "run"))
        )
        synthesize(config, toy.out, toy.inputs)
    fresh = tmp_path / "fresh"
    found = estimate(config, "synthesis", fresh, toy.inputs, open_cache())
    assert len(found.requests) == found.cached > 0 and found.paid == found.later and not fresh.exists()


def test_before_there_are_products_it_says_what_to_run_first(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/quickstart.yaml")
    llm = LlmConfig(url="http://127.0.0.1:9/v1")
    config = dataclasses.replace(config, run=RunConfig(dir=str(tmp_path / "none")), llm=llm)
    found = estimates(config, ["scan:anchor", "explanations", "relevance", "synthesis"])
    assert [one.stage for one in found] == ["explanations", "relevance", "synthesis"]
    assert all(one.note.startswith("not known before ") and not one.requests for one in found)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(config, found))
    assert "run `fac train CONFIG` first" in captured.get() or "run `fac harvest CONFIG` first" in captured.get()
    assert not (tmp_path / "none").exists()


def test_what_is_embedded_asks_nothing(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/quickstart.yaml")
    config = dataclasses.replace(
        config,
        run=RunConfig(dir=str(tmp_path / "none")),
        llm=LlmConfig(url="http://127.0.0.1:9/v1"),
        explain=ExplainConfig(method="embedded"),
        judge=JudgeConfig(method="embedded"),
    )
    stages = ["explanations", "relevance", "synthesis"]
    assert [one.stage for one in estimates(config, stages)] == ["synthesis"]
    config = dataclasses.replace(config, explain=ExplainConfig(method="embedded", generation_features=3))
    explanations, synthesis = estimates(config, stages)
    assert (explanations.stage, explanations.later, synthesis.stage) == ("explanations", 12, "synthesis")
    assert "the server then writes 12 texts from explanations" in explanations.note


def test_without_a_server_it_says_so() -> None:
    with pytest.raises(UserError, match="llm.url is not set"):
        estimates(Config(), ["explanations"])
    assert set(dry_run.ASKING) == {"explanations", "relevance", "synthesis"}


def test_comparing_what_arms_answer_is_said_and_not_counted(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/tasks/instruction_following.yaml")
    config = dataclasses.replace(
        config, run=RunConfig(dir=str(tmp_path)), llm=LlmConfig(url="http://127.0.0.1:9/v1", cache=False)
    )
    (found,) = estimates(config, ["finetune"])
    assert found.note.startswith("compares the arms' answers: 6 questions at most for each instruction of data.asked")
    silent = dataclasses.replace(config.finetune, outputs_for=None)
    assert estimates(dataclasses.replace(config, finetune=silent), ["finetune"]) == []


def test_a_study_says_how_much_it_writes_at_most(tmp_path: Path) -> None:
    config = Config(
        run=RunConfig(dir=str(tmp_path)),
        llm=LlmConfig(url="http://127.0.0.1:9/v1", cache=False),
        study=StudyConfig(budgets=(10, 20), pools=2),
    )
    (found,) = estimates(config, ["study:texts"])
    assert found.requests == [] and found.note.startswith(
        "writes 24 texts at most for each feature and 100 for each of self-instruct and evol-instruct, 2 times"
    )
