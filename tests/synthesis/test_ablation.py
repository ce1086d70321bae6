"""Arms side by side in a toy world: figures counted by hand, replies shared, a stopped ablation gone on with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from scipy.stats import t as student

from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig
from fac_jax.config.synthesis import AblationConfig, ArmConfig
from fac_jax.errors import UserError
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from fac_jax.synthesis import ablation as module
from fac_jax.synthesis.ablation import Bench, Outcome, _arm, ablate, mean_and_interval, said, table
from tests.synthesis.toy_world import SEEN, TOPICS, WORDS, Toy, asked_for, message, write

MISSING = [word for word in TOPICS if word not in SEEN]


def able(request: Request) -> str:
    return message(asked_for(request), request.seed)


def unlucky(request: Request) -> str:
    """Of guns nothing but the same text, without the word; of all else what is asked."""
    return message("ropes", 5) if asked_for(request) == "guns" else able(request)


def ablated(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, arms: dict[str, ArmConfig], writer: Any = able, **settings: Any
) -> tuple[dict[str, Any], FakeGenerator]:
    """The product, and who was asked."""
    write(toy.inputs["explanations"].parent / "relevance" / "relevance.parquet", [
        {"feature": f, "relevant": WORDS[f] in TOPICS} for f in range(len(WORDS))
    ])  # fmt: skip
    relevance = toy.inputs["explanations"].parent / "relevance"
    (relevance / "relevance.json").write_text(json.dumps({"sae": "sae-1"}))
    generator = FakeGenerator(writer) if callable(writer) else writer
    monkeypatch.setattr(module, "open_generator", lambda config, mesh, directions: generator)
    chosen = AblationConfig(name="toy", arms=arms, **{"seeds": (0, 1), **settings})
    config = dataclasses.replace(toy.config, ablation=chosen)
    ablate(config, toy.out, {**toy.inputs, "relevance": relevance})
    return json.loads((toy.out / "ablation.json").read_text()), generator


def outcomes(product: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    return [one for one in product["outcomes"] if one["arm"] == arm]


def test_what_a_hit_costs_is_no_figure_where_a_seed_hit_nothing() -> None:
    outcomes = [
        Outcome("one", seed, 50, 50, 160, 1.0, 0.0, 20, hits, hits / 50, hits / 50, 30_000, per, per, None, None)
        for seed, (hits, per) in enumerate([(20, 8.0), (0, None)])
    ]
    figures = _arm(cast(Bench, SimpleNamespace(config=Config())), ArmConfig(), outcomes)
    assert figures["texts_per_hit"] is figures["tokens_per_hit"] is None, "8 texts a hit is that of the lucky seed"
    assert figures["hit_rate"]["mean"] == pytest.approx(0.2) and figures["written"]["mean"] == 160


def test_figures_are_those_that_can_be_counted(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    toy = dataclasses.replace(toy, config=dataclasses.replace(toy.config, llm=LlmConfig(price_in=1e6, price_out=2e6)))
    product, generator = ablated(toy, monkeypatch, {"two steps": ArmConfig()}, unlucky)
    for number, one in enumerate(outcomes(product, "two steps")):
        rows = [json.loads(line) for line in log(toy, "two steps", number)]
        read, wrote = (sum(row[f"{side}_tokens"] for row in rows) for side in ("prompt", "completion"))
        assert one["missing"] == one["written_for"] == 7 and one["hits"] == one["kept"] == 6
        # Of guns two texts in step 1, alike; no pair, so no second step. Ropes are no missing feature.
        assert one["written"] == len(rows) == 7 * 2 + 6 * 2
        assert one["near_duplicate_rate"] == pytest.approx(1 / 26) and one["valid_share"] == pytest.approx(25 / 26)
        assert one["hit_rate"] == one["hit_rate_written"] == pytest.approx(6 / 7)
        assert one["tokens"] == read + wrote and one["tokens_per_hit"] == pytest.approx((read + wrote) / 6)
        assert one["texts_per_hit"] == pytest.approx(26 / 6)
        assert one["cost_per_hit"] == pytest.approx((read + 2 * wrote) / 6)
    assert len(generator.requests) == 52
    assert product["arms"]["two steps"]["hit_rate"] == {"mean": pytest.approx(6 / 7), "low": 6 / 7, "high": 6 / 7}


def test_arms_share_replies_and_each_pays_as_if_alone(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    arms = {
        "one step": ArmConfig(second_step=0),
        "two steps": ArmConfig(),
        "more": ArmConfig(candidates=4, second_step=0),
        "warmer": ArmConfig(temperature=1.2, second_step=0),
    }
    product, generator = ablated(toy, monkeypatch, arms, seeds=(3,))
    assert {name: outcomes(product, name)[0]["written"] for name in arms} == {
        "one step": 14, "two steps": 28, "more": 28, "warmer": 14
    }  # fmt: skip
    assert len(generator.requests) == 14 + 14 + 14 + 14, "the first two draws of `more` are those of `one step`"
    alone, _ = ablated(toy_copy(toy), monkeypatch, {"two steps": ArmConfig()}, seeds=(3,))
    assert outcomes(alone, "two steps") == outcomes(product, "two steps")
    for arm in ("one step", "two steps", "more"):
        assert len(log(toy, arm, 3)) == outcomes(product, arm)[0]["written"], (
            "what others had written is not left in it"
        )


def test_ablations_of_a_run_share_replies_too(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    steps = dataclasses.replace(toy, out=toy.out / "steps")
    more = dataclasses.replace(toy, out=toy.out / "more")
    for one in (steps, more):
        one.out.mkdir()
    ablated(steps, monkeypatch, {"one step": ArmConfig(second_step=0)})
    _, generator = ablated(more, monkeypatch, {"two": ArmConfig()}, seeds=(1, 2))
    assert len(generator.requests) == 14 + 28, "step 1 of seed 1 is there"


def test_controls_write_for_other_features_and_meet_the_missing_by_chance(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    arms = {
        "missing": ArmConfig(max_features=3),
        "random missing": ArmConfig(max_features=3, target="random missing"),
        "random relevant": ArmConfig(max_features=3, target="random relevant"),
        "random": ArmConfig(max_features=3, target="random"),
    }
    asked: set[str] = set()

    def any_word(request: Request) -> str:
        word = next(word for word in WORDS[2:] if f"Topic: {word}" in request.messages[-1]["content"])
        asked.add(word)
        return message(word, request.seed)

    product, _ = ablated(toy, monkeypatch, arms, any_word, seeds=tuple(range(6)))
    for name in arms:
        assert [one["written_for"] for one in outcomes(product, name)] == [3] * 6
    assert all(one["hits"] >= 3 for one in outcomes(product, "missing") + outcomes(product, "random missing"))
    relevant = outcomes(product, "random relevant")
    assert all(2 <= one["hits"] <= 3 for one in relevant), "all but ropes are missing"
    assert any(one["hits"] < 3 for one in outcomes(product, "random")) and asked - set(TOPICS), "also filler words"
    # Common words are active on every text, so what is kept of the control is chosen by its own features.
    assert product["arms"]["random"]["changed"] == {"target": "random", "max_features": 3}


def test_a_smaller_share_of_the_features_lies_in_a_larger_one(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    arms = {f"{ratio:g}": ArmConfig(feature_ratio=ratio, second_step=0) for ratio in (0.3, 0.6, 1.0)}
    product, generator = ablated(toy, monkeypatch, arms, seeds=(0,))
    assert [outcomes(product, name)[0]["written_for"] for name in arms] == [3, 5, 7]
    assert [outcomes(product, name)[0]["hits"] for name in arms] == [3, 5, 7]
    assert len(generator.requests) == 14, "each share asks only for what the one before did not"


class Fluent(FakeGenerator):
    """Every text is as surprising as it has words."""

    def nats_per_token(self, messages: Any, texts: list[str]) -> np.ndarray:
        assert all(turns[-1]["role"] == "user" for turns in messages)
        return np.array([len(text.split()) for text in texts], np.float32)


def test_steered_arms_show_what_it_costs_in_fluency(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    arms = {"asked": ArmConfig(), "steered": ArmConfig(steer=(0.5, 2.0), second_step=0)}
    product, generator = ablated(toy, monkeypatch, arms, Fluent(able), seeds=(0,))
    assert {name: outcomes(product, name)[0]["nats_per_token"] for name in arms} == {"asked": 8.0, "steered": 8.0}
    strengths = {request.steer.strength for request in generator.requests if request.steer is not None}
    assert strengths == {1.5, 6.0}, "of peaks of 3"
    assert sum(request.steer is None for request in generator.requests) == 28
    unsteered, _ = ablated(toy_copy(toy), monkeypatch, {"asked": ArmConfig()}, Fluent(able), seeds=(0,))
    assert outcomes(unsteered, "asked")[0]["nats_per_token"] is None


def test_a_threshold_decides_what_is_missing(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    arms = {"low": ArmConfig(threshold=1.0), "high": ArmConfig(threshold=2.9), "above all": ArmConfig(threshold=3.0)}
    with pytest.raises(UserError, match="arm 'above all': no feature is missing at threshold 3"):
        ablated(toy, monkeypatch, arms)
    product, _ = ablated(toy, monkeypatch, {name: arms[name] for name in ("low", "high")})
    assert [product["arms"][name]["threshold"] for name in ("low", "high")] == [1.0, 2.9]
    assert [product["arms"][name]["missing"] for name in ("low", "high")] == [[7], [7]]


def test_samples_of_another_run_are_read_and_nothing_is_written(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    file = toy.out.parent / "kept.jsonl"
    file.write_text("".join(json.dumps({"text": message(word, 9)}) + "\n" for word in ("guns", "fire", "ropes")))
    product, generator = ablated(toy, monkeypatch, {"transfer": ArmConfig(samples=str(file))})
    (one,) = outcomes(product, "transfer")
    assert generator.requests == [] and (one["kept"], one["hits"], one["tokens"]) == (3, 2, None)
    assert product["arms"]["transfer"]["hit_rate"] == {"mean": 2 / 7, "low": None, "high": None}
    file.write_text('{"txt": "a"}\n')
    with pytest.raises(UserError, match="arm 'again': .*kept.jsonl cannot be read as samples .KeyError.'text'"):
        ablated(toy, monkeypatch, {"again": ArmConfig(samples=str(file))})


def test_a_stopped_ablation_goes_on_and_ends_with_the_same_bytes(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    arms = {"one": ArmConfig(second_step=0), "two": ArmConfig(), "hot": ArmConfig(temperature=1.0)}
    undisturbed = toy_copy(toy)
    ablated(undisturbed, monkeypatch, arms)
    left = [40]

    def tiring(request: Request) -> str:
        if not left[0]:
            raise UserError("the server went away")
        left[0] -= 1
        return able(request)

    with pytest.raises(UserError, match="went away"):
        ablated(toy, monkeypatch, arms, tiring)
    _, generator = ablated(toy, monkeypatch, arms)
    assert len(generator.requests) == 2 * (28 + 28) - 40
    assert files(toy.out) == files(undisturbed.out)
    _, again = ablated(toy, monkeypatch, arms)
    assert again.requests == []


def log(toy: Toy, arm: str, seed: int) -> list[str]:
    return (toy.out / arm / f"seed-{seed}" / "generations.jsonl").read_text().splitlines()


def toy_copy(toy: Toy) -> Toy:
    """Another run directory: ablations of one share replies."""
    out = toy.out.parent / "another" / "ablations" / "toy"
    out.mkdir(parents=True)
    return dataclasses.replace(toy, out=out)


def files(folder: Path) -> dict[str, str]:
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def test_the_interval_is_students():
    values = np.random.default_rng(0).normal(3, 2, 5)
    low, high = student.interval(0.95, 4, values.mean(), values.std(ddof=1) / np.sqrt(5))
    assert mean_and_interval(values.tolist()) == {
        "mean": pytest.approx(values.mean()), "low": pytest.approx(low), "high": pytest.approx(high)
    }  # fmt: skip
    assert mean_and_interval([2.0]) == {"mean": 2.0, "low": None, "high": None} and mean_and_interval([]) is None


def test_a_table_shows_the_figures_that_there_are(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    from rich.console import Console

    product, _ = ablated(toy, monkeypatch, {"two steps": ArmConfig(), "one": ArmConfig(second_step=0)}, unlucky)
    console = Console(width=200, record=True)
    console.print(table(product))
    shown = console.export_text()
    assert "2 seeds, ± is half of the 95% interval" in shown and "money" not in shown
    assert "85.7 ± 0.0 %" in shown and "3.8 ± 0.0 %" in shown
    assert said("tokens_per_hit", {"mean": 1234.56, "low": 1000.0, "high": 1469.12}) == "1,235 ± 235"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"feature_ratio": 0.0}, "feature_ratio is 0.0"),
        ({"feature_ratio": 0.5, "max_features": 3}, "both feature_ratio 0.5 and max_features 3"),
    ],
)
def test_an_arm_that_cannot_be_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        ArmConfig(**settings)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_names_are_folders(name: str):
    with pytest.raises(UserError, match="names a folder"):
        AblationConfig(arms={name: ArmConfig()})
    with pytest.raises(UserError, match="names a folder"):
        AblationConfig(name=name)


def test_seeds_are_named_once():
    with pytest.raises(UserError, match=r"seeds is \[1, 1\]"):
        AblationConfig(seeds=(1, 1))
    assert Config().ablation.arms == {}
