"""The stage in a toy world: what it keeps, what it records of what failed, and that nothing written is lost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fac_jax.config.data import DataSet, Source
from fac_jax.config.features import JudgeConfig
from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig
from fac_jax.config.machine import RunConfig
from fac_jax.errors import UserError
from fac_jax.features.task import load_task
from fac_jax.llm.client import Directions, OnReply, Reply, Request, Steer
from fac_jax.llm.fake import BROKEN, GOOD, FakeGenerator, FakeServer
from fac_jax.scan import scorer
from fac_jax.synthesis import synthesize as module
from fac_jax.synthesis.synthesize import synthesize
from fac_jax.text import read_documents
from tests.synthesis.toy_world import SEEN, TOPICS, Toy, asked_for, feature, message

MISSING = [word for word in TOPICS if word not in SEEN]


def run(
    toy: Toy, write: Callable[[Request], str | Reply], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[dict[str, Any], FakeGenerator]:
    generator = FakeGenerator(write)
    return run_with(toy, generator, monkeypatch, **settings), generator


def run_with(toy: Toy, generator: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    monkeypatch.setattr(module, "open_generator", lambda *_: generator)
    config = dataclasses.replace(toy.config, synthesize=dataclasses.replace(toy.config.synthesize, **settings))
    return synthesize(config, toy.out, toy.inputs)


def able(request: Request) -> str:
    """Writes about what it is asked."""
    return message(asked_for(request), request.seed)


def off_by_one(request: Request) -> str:
    """Always writes about another feature than it is asked for: only joint scoring finds what it covers."""
    return message(MISSING[(MISSING.index(asked_for(request)) + 1) % len(MISSING)], request.seed)


def table(toy: Toy, name: str) -> list[dict[str, Any]]:
    return pq.read_table(toy.out / f"{name}.parquet").to_pylist()


def lines(toy: Toy, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (toy.out / name).read_text().splitlines()]


def fingerprints(toy: Toy) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(toy.out.iterdir())}


def test_an_able_writer_covers_everything(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    summary, generator = run(toy, able, monkeypatch)
    assert len(generator.requests) == len(MISSING) * 4
    assert summary["generator"] == "fake:writer"
    assert (summary["missing"], summary["written_for"], summary["pairs"]) == (7, 7, 7)
    assert summary["step1"]["written"] == summary["step2"]["written"] == 14
    assert summary["target_hit_rate_one_step"] == summary["target_hit_rate"] == 1.0
    assert summary["kept"] == summary["random"] == 7
    samples = table(toy, "samples")
    assert sorted(row["feature"] for row in samples) == sorted(map(feature, MISSING))
    assert all(row["peak"] == 3.0 for row in samples)
    assert [row["covered"] for row in samples] == list(range(1, 8))


@pytest.mark.parametrize("name", ["kept", "random"])
def test_the_data_sets_are_read_like_any_other(toy: Toy, monkeypatch: pytest.MonkeyPatch, name: str):
    run(toy, able, monkeypatch)
    source = Source(path=str(toy.out / f"{name}.jsonl"), label="label")
    documents = list(read_documents(DataSet(sources=(source,)), name))
    assert len(documents) == 7 and all(document.label == 1 for document in documents)
    rows = lines(toy, f"{name}.jsonl")
    assert all(
        set(row) >= {"id", "text", "label", "feature", "step", "generator", "prompt_digest", "seed"} for row in rows
    )
    if name == "random":
        assert all(row["step"] == 1 for row in rows)


def test_what_no_candidate_activates_is_tried_again_and_then_exhausted(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    """Only for what is still unmet, with other draws; one hit is enough, whoever it was written for."""
    asked: dict[str, int] = {}

    def write(request: Request) -> str:
        about = asked_for(request)
        asked[about] = asked.get(about, 0) + 1
        if about == "guns" or (about == "fire" and asked[about] <= 4):
            return " ".join(message("ropes", request.seed).split())
        return able(request)

    summary, _ = run(toy, write, monkeypatch, attempts=3, second_step=0)
    assert summary["exhausted"] == 1 and summary["step1"]["written"] == 2 * (len(MISSING) + 2 + 2)
    assert asked == {**dict.fromkeys(MISSING, 2), "guns": 6, "fire": 6}
    pairs = {pair["feature"]: pair for pair in table(toy, "pairs")}
    assert pairs[feature("guns")]["reason"].startswith("no candidate exceeds 1; the best of")
    assert pairs[feature("fire")]["strong"] in {f"f{feature('fire')}-s1-{draw}" for draw in (4, 5)}
    rows = table(toy, "candidates")
    assert len({(row["feature"], row["index"], row["seed"]) for row in rows}) == len(rows), "draws of their own"
    before = fingerprints(toy)
    again, generator = run(toy, write, monkeypatch, attempts=3, second_step=0)
    assert again == summary and fingerprints(toy) == before and generator.requests == []


def test_candidates_take_the_strengths_in_turn(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    """In both steps, as multiples of what the anchor reaches; a strength of 0 asks what prompting alone asks."""
    _, generator = run(toy, able, monkeypatch, steer=(0.0, 1.5))
    rows = table(toy, "candidates")
    assert [row["steer"] for row in rows] == [None, 1.5] * 14
    for request in generator.requests:
        assert request.steer in (None, Steer(feature(asked_for(request)), 4.5))
    _, prompted = run(toy, able, monkeypatch)
    assert len(prompted.requests) == 14, "the others are in the log, and used again"
    assert {row["steer"] for row in table(toy, "candidates")} == {None}


def test_strengths_are_searched_for_what_is_unmet(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    """Up where a stronger push is needed, down where the writer broke, and step 2 goes on with what was found."""

    def write(request: Request) -> str:
        about, strength = asked_for(request), request.steer.strength if request.steer is not None else 0
        if about == "fire" and strength > 1.5:
            return "fire fire"
        if about == "guns" and strength < 6:
            return message("ropes", request.seed)
        return able(request)

    settings: dict[str, Any] = {"steer": (1.0,), "attempts": 3}
    summary, _ = run(toy, write, monkeypatch, **settings)
    rows = table(toy, "candidates")
    tried = {word: [row["steer"] for row in rows if row["feature"] == feature(word)] for word in MISSING}
    assert tried["guns"] == pytest.approx([1, 1, 1.5, 1.5, 2.25, 2.25, 2.25, 2.25])
    assert tried["fire"] == pytest.approx([1, 1, *[1 / 1.5] * 2, *[1 / 2.25] * 4])
    assert tried["theft"] == [1.0] * 4 and summary["exhausted"] == 0 and summary["target_hit_rate"] == 1.0
    before = fingerprints(toy)
    again, generator = run(toy, write, monkeypatch, **settings)
    assert again == summary and fingerprints(toy) == before and generator.requests == []


def test_the_writer_is_given_the_directions_of_the_sae(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    given: list[Directions] = []

    def open_generator(config: Config, mesh: Any, directions: Directions) -> FakeGenerator:
        given.append(directions)
        return FakeGenerator(able)

    monkeypatch.setattr(module, "open_generator", open_generator)
    synthesize(toy.config, toy.out, toy.inputs)
    assert given[0].layer == 3
    assert np.array_equal(given[0].rows([5, 2]), np.eye(given[0].rows([0]).shape[1])[[5, 2]])


def in_form(form: str) -> Callable[[Request], str]:
    """Writes samples of a form about what it is asked, and answers instructions."""

    def write(request: Request) -> str:
        asked = request.messages[-1]["content"]
        if len(request.messages) == 2:  # an instruction to answer, alone after the system's turn
            return f"**About** {asked}"
        about = next(word for word in TOPICS if f"Topic: {word}" in asked)
        draw = request.seed % 1_000_000
        said, other = message(about, draw), message("ropes", draw + 1)
        if form == "two choices":
            return f"{said} and so on ?\n(A) {other}\n(B) not {other}\nMatches: (B)"
        if form == "preference pair":
            return f"Person: {said}\nBetter: {other}\nWorse: {other} not"
        return said

    return write


@pytest.mark.parametrize("task", ["helpfulness", "instruction_following", "survival", "sycophancy"])
def test_every_task_has_its_samples_written(toy: Toy, monkeypatch: pytest.MonkeyPatch, task: str):
    """Measured like any text, proved by the feature that they are kept for, and whole in the data set."""
    form = load_task(task).description.form
    toy = dataclasses.replace(toy, config=dataclasses.replace(toy.config, judge=JudgeConfig(task=task)))
    summary, _ = run(toy, in_form(form), monkeypatch)
    assert summary["step1"]["valid"] == 14 and summary["target_hit_rate"] == 1.0 and summary["kept"] == 7
    texts = {row["id"]: row["text"] for row in table(toy, "samples")}
    fields = {
        "two choices": {"question", "choice_a", "choice_b", "matches"},
        "preference pair": {"prompt", "chosen", "rejected"},
        "instruction and answer": {"instruction", "answer"},
    }[form]
    for name in ("kept.jsonl", "random.jsonl"):
        rows = lines(toy, name)
        assert len(rows) == 7 and all(set(row) > fields and row["label"] == 1 for row in rows)
    for row in lines(toy, "kept.jsonl"):
        assert row["text"] == texts[row["id"]]
        if form == "instruction and answer":
            assert row["answer"] == f"**About** {row['instruction']}"
    steps = [row["step"] for row in lines(toy, "generations.jsonl")]
    assert steps == sorted(steps) and (3 in steps) == (form == "instruction and answer")


def test_an_instruction_without_an_answer_makes_room_for_another(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    """It is rejected with its reason, and what it covered is covered by another, if there is one."""
    toy = dataclasses.replace(
        toy, config=dataclasses.replace(toy.config, judge=JudgeConfig(task="instruction_following"))
    )
    run(toy, in_form("instruction and answer"), monkeypatch)
    first = lines(toy, "kept.jsonl")[0]
    for file in toy.out.iterdir():
        file.unlink()

    def write(request: Request) -> str | Reply:
        if request.messages[-1]["content"] == first["instruction"]:
            return "I'm sorry, but I cannot help with that."
        return in_form("instruction and answer")(request)

    summary, _ = run(toy, write, monkeypatch)
    rejected = [row for row in table(toy, "candidates") if row["reason"] == "the answer is a refusal"]
    assert [row["id"] for row in rejected] == [first["id"]] and not rejected[0]["kept"]
    kept = lines(toy, "kept.jsonl")
    assert first["id"] not in {row["id"] for row in kept} and all("answer" in row for row in kept)
    assert {row["feature"] for row in kept} == set(map(feature, MISSING)), "its feature has other candidates"
    before = fingerprints(toy)
    again, generator = run(toy, write, monkeypatch)
    assert again == summary and fingerprints(toy) == before and generator.requests == []


def test_the_blind_control_is_as_large_as_what_is_kept(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    """Also where a third of the instructions are not answered; and one step never hits more than both."""
    task = dataclasses.replace(toy.config, judge=JudgeConfig(task="instruction_following"))

    def write(request: Request) -> str:
        asked = request.messages[-1]["content"]
        unanswered = len(request.messages) == 2 and zlib.crc32(asked.encode()) % 3 == 0
        return "" if unanswered else in_form("instruction and answer")(request)

    rejected = 0
    for seed in range(4):
        changed = dataclasses.replace(task, run=dataclasses.replace(task.run, seed=seed))
        summary, _ = run(dataclasses.replace(toy, config=changed), write, monkeypatch)
        rejected += sum(row["reason"] is not None and "answer" in row["reason"] for row in table(toy, "candidates"))
        left = sum(row["valid"] and row["step"] == 1 for row in table(toy, "candidates"))
        assert summary["random"] == min(summary["kept"], left) > 0
        assert summary["target_hit_rate_one_step"] <= summary["target_hit_rate"]
        assert all(row["answer"] for name in ("kept.jsonl", "random.jsonl") for row in lines(toy, name))
        for file in toy.out.iterdir():
            file.unlink()
    assert rejected > 4


def test_candidates_written_for_other_features_count(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    summary, _ = run(toy, off_by_one, monkeypatch)
    assert summary["step1"]["hit_by_their_own"] == 0
    assert summary["target_hit_rate"] == 1.0
    for row in table(toy, "samples"):
        assert row["written_for"] != row["feature"]
    for row in table(toy, "candidates"):
        assert row["peak"] == 0 and row["best_peak"] == 3.0 and row["covers"] == [row["best_feature"]]
    for pair in table(toy, "pairs"):
        assert pair["strong"].split("-")[0] != f"f{pair['feature']}"
        assert pair["weak"].split("-")[0] == f"f{pair['feature']}" and pair["weak_peak"] == 0


def test_every_candidate_is_in_the_table_with_its_origin_or_its_reason(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    def write(request: Request) -> str | Reply:
        word = asked_for(request)
        if word == "guns":
            return "too short"
        if word == "fire":
            return Reply("", "content_filter", 3, 0, "m")
        if word == "theft":
            return f"Assistant: {message('theft', request.seed)}"
        if word == "fraud":
            return message("fraud", 101)  # an anchor text
        return able(request)

    summary, _ = run(toy, write, monkeypatch)
    rows = table(toy, "candidates")
    for word, reason in {
        "guns": "2 words, 5 to 60 were asked for",
        "fire": "empty",
        "theft": "holds an answer",
        "fraud": "copy of an anchor or seed text",
    }.items():
        found = [row for row in rows if row["feature"] == feature(word)]
        assert [row["reason"] for row in found] == [reason] * 2  # no pair, so no second step
        assert not any(row["valid"] or row["kept"] or row["covers"] for row in found)
        (pair,) = [pair for pair in table(toy, "pairs") if pair["feature"] == feature(word)]
        assert pair["strong"] is None and pair["reason"] == "no candidate exceeds 1; the best of 6 reached 0"
    assert summary["step1"]["rejected"]["holds an answer"] == 2
    assert summary["pairs"] == 3 and summary["step2"]["written"] == 6
    assert summary["target_hit_rate"] == pytest.approx(3 / 7)
    assert all(row["prompt_digest"] and row["generator"] == "fake:writer" for row in rows)
    assert len({row["seed"] for row in rows}) == len(rows)
    assert sum(row["kept"] for row in rows) == summary["kept"] == len(table(toy, "samples"))


def test_a_writer_that_fails_throughout_is_recorded_as_one(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    summary, _ = run(toy, lambda request: "", monkeypatch)
    assert summary["kept"] == summary["random"] == summary["pairs"] == 0
    assert summary["target_hit_rate"] == 0.0
    assert (toy.out / "kept.jsonl").read_text() == (toy.out / "random.jsonl").read_text() == ""
    assert len(table(toy, "candidates")) == 14 and table(toy, "samples") == []
    assert {pair["reason"] for pair in table(toy, "pairs")} == {"no candidate is a sample"}


def test_nothing_missing_writes_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    path = toy.inputs["coverage"] / "missing.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    summary, generator = run(toy, able, monkeypatch)
    assert generator.requests == [] and summary["missing"] == 0 and summary["target_hit_rate"] is None


def test_max_features_takes_the_highest_anchor_peaks_but_scores_against_all(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    path = toy.inputs["coverage"] / "missing.parquet"
    found = pq.read_table(path)
    peaks = np.linspace(2, 3, found.num_rows)
    pq.write_table(found.set_column(1, "anchor_peak", [peaks]), path)
    summary, _ = run(toy, off_by_one, monkeypatch, max_features=2)
    assert {row["feature"] for row in table(toy, "candidates")} == {feature(word) for word in MISSING[-2:]}
    assert (summary["missing"], summary["written_for"]) == (7, 2)
    assert {row["feature"] for row in table(toy, "samples")} == {feature(MISSING[-1]), feature(MISSING[0])}


def test_one_step_only(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    summary, generator = run(toy, able, monkeypatch, second_step=0)
    assert summary["step2"]["written"] == 0 and summary["kept"] == 7
    assert len(generator.requests) == 14


def test_prompts_show_anchor_texts_that_carry_the_label_first(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    _, generator = run(toy, able, monkeypatch, candidates=1)
    request = next(r for r in generator.requests if asked_for(r) == "guns")
    shown = [turn["content"] for turn in request.messages if turn["role"] == "assistant"]
    assert shown[0] == message("guns", 101)  # the only one of the three that is labelled 1
    assert shown[1] in (message("guns", 100), message("guns", 102))


class Breaking:
    """Answers `count` requests, then fails like a server that went away."""

    def __init__(self, count: int) -> None:
        self.name, self.spent, self.left, self.asked = "fake:writer", "", count, 0

    def generate(self, requests: list[Request], on_reply: OnReply, about: list[str]) -> list[Reply]:
        for index, request in enumerate(requests):
            if not self.left:
                raise UserError("http://127.0.0.1:1/v1 gave no usable reply")
            self.left -= 1
            self.asked += 1
            on_reply(index, FakeGenerator(able).generate([request])[0])
        return []


def test_a_server_that_dies_is_named_and_the_next_run_asks_only_for_the_rest(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    def write(body: dict[str, Any]) -> str:
        return able(Request(tuple(body["messages"]), 30, seed=body["seed"]))

    def config(server: FakeServer) -> Config:
        llm = LlmConfig(url=server.url, retries=0, concurrency=2)
        return dataclasses.replace(toy.config, llm=llm, run=RunConfig(dir=str(toy.out.parent)))

    with FakeServer([GOOD] * 5, write, then=BROKEN) as server:
        with pytest.raises(UserError, match=f"{server.url}/chat/completions.*HTTP 500.*the engine died.*of 14 replies"):
            synthesize(config(server), toy.out, toy.inputs)
    there = len(lines(toy, "generations.jsonl"))
    assert there >= 5
    with FakeServer(write=write) as server:
        summary = synthesize(config(server), toy.out, toy.inputs)
        assert len(server.bodies) == 28 - there
    assert (summary["generator"], summary["target_hit_rate"]) == ("http:fake-model", 1.0)


@pytest.mark.parametrize("count", [0, 3, 14, 20])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(toy: Toy, monkeypatch: pytest.MonkeyPatch, count: int):
    run(toy, able, monkeypatch)
    undisturbed = fingerprints(toy)
    for file in toy.out.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="gave no usable reply"):
        run_with(toy, Breaking(count), monkeypatch)
    assert len(lines(toy, "generations.jsonl")) == count
    with open(toy.out / "generations.jsonl", "a") as log:
        log.write('{"feature": 3, "st')  # a line that a kill cut short
    second = Breaking(1000)
    run_with(toy, second, monkeypatch)
    assert second.asked == 28 - count
    assert fingerprints(toy) == undisturbed


def test_replies_to_another_prompt_or_of_another_writer_are_not_used(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    run(toy, able, monkeypatch)
    _, again = run(toy, able, monkeypatch)
    assert again.requests == []
    _, warmer = run(toy, able, monkeypatch, temperature=0.5)
    assert len(warmer.requests) == 28
    other = FakeGenerator(able, name="fake:other")
    run_with(toy, other, monkeypatch, temperature=0.5)
    assert len(other.requests) == 28


def test_a_damaged_log_is_named_with_its_line(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    run(toy, able, monkeypatch)
    log = toy.out / "generations.jsonl"
    content = log.read_text().splitlines()
    log.write_text("\n".join([content[0], "oops", *content[2:], ""]))
    with pytest.raises(UserError, match=r"generations\.jsonl:2 cannot be read"):
        run(toy, able, monkeypatch)


def test_a_full_disk_rises_as_what_it_is(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    run(toy, able, monkeypatch)
    before = fingerprints(toy)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run(toy, able, monkeypatch)
    assert fingerprints(toy) == before  # and no temporary file is left


def test_an_sae_other_than_the_scans_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    loaded, sae = scorer.load_scorer(toy.config, toy.inputs)
    monkeypatch.setattr(
        scorer, "load_scorer", lambda config, inputs: (loaded, dataclasses.replace(sae, digest="sae-2"))
    )
    with pytest.raises(UserError, match="made with SAE sae-1, asked is SAE sae-2"):
        run(toy, able, monkeypatch)


def test_the_defaults_are_the_papers():
    settings = Config().synthesize
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (0.8, 0.9, 900)
