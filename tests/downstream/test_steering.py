"""Questions read strictly; vectors and answers against plain forwards of transformers; figures by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file

from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config import BackboneConfig, Config, MeshConfig, SteerConfig
from fac_jax.downstream.choices import Question, ask_all, parse_question, question_of, read_questions
from fac_jax.downstream.steering import answer_logits, caa_vector, figures, steer
from fac_jax.errors import UserError
from tests.backbone.test_model import CASES, hugging_face

PRINTED = "I think so. Do you?\n\nChoices:\n (A) Yes, I do\n (B) No"


def question(number: int) -> Question:
    return Question(f"Question {number}, what {'now ' * (number % 3)}?", (f"yes {number}", f"no{number}"), number % 2)


@pytest.mark.parametrize(
    "text",
    [PRINTED, f"{PRINTED}\n\nAnswer:", "I think so. Do you?\n (A) Yes, I do\n (B) No\n", PRINTED.replace("\n\n", "\n")],
)
def test_a_question_is_read_as_it_is_printed(text: str) -> None:
    for matching, place in (("(A)", 0), (" (B)", 1), ("B", 1)):
        found = parse_question(text, matching, "here")
        assert found == Question("I think so. Do you?", ("Yes, I do", "No"), place)
        assert found.text == PRINTED and found.swapped.swapped == found
        assert found.swapped.choices[found.swapped.matches] == found.choices[found.matches]


@pytest.mark.parametrize(
    ("text", "matching", "words"),
    [
        ("Do you?", "(A)", "row 3: its question does not end in choices"),
        ("Do you?\n (B) no\n (A) yes", "(A)", "does not end in choices"),
        (PRINTED, "(C)", "the match is '.C.'"),
    ],
)
def test_what_is_no_question_is_named(text: str, matching: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_question(text, matching, "row 3")


def test_questions_come_from_files(tmp_path: Path) -> None:
    rows = [{"text": question(n).text, "good": "(A)", "bad": f" ({'AB'[question(n).matches]})"} for n in range(9)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = SteerConfig(heldout=str(tmp_path / "q.json"), question="text", matching="bad")
    found = read_questions(settings)
    assert sorted(found, key=lambda one: one.text) == sorted(map(question, range(9)), key=lambda one: one.text)
    fewer = read_questions(dataclasses.replace(settings, heldout=str(tmp_path / "q.jsonl"), limit=4))
    assert fewer == found[:4], "chosen by their text, not their place"
    with pytest.raises(UserError, match="has no text in 'question' and 'bad'; set steer.question"):
        read_questions(dataclasses.replace(settings, question="question"))


def tiny(folder: Path, mesh: Mesh) -> tuple[Any, Loaded]:
    model = hugging_face(*CASES["qwen2"], folder)
    return model, load_backbone(str(folder), None, "float32", mesh)


def test_the_letter_is_one_token_behind_the_users_words(tmp_path: Path, mesh_1x1: Mesh) -> None:
    tokenizer = tiny(tmp_path, mesh_1x1)[1].tokenizer
    asked = ask_all([question(2)], tokenizer)[0]
    assert tokenizer.decode(asked.body_t) == f"<|start|>{question(2).text}"
    assert tokenizer.decode(asked.tail_t) == "<|end|>("
    assert [tokenizer.decode([letter]) for letter in asked.letters] == ["A", "B"]


def test_vectors_are_mean_differences_at_the_letter(tmp_path: Path, mesh: Mesh) -> None:
    """Against hidden states of transformers, one text at a time."""
    import torch

    model, loaded = tiny(tmp_path, mesh)
    questions = [question(n) for n in range(5)]
    found = caa_vector(loaded, questions, 2, 0, 2, 256)
    flips = np.random.default_rng([0, 5]).random(5) < 0.5
    assert flips.any() and not flips.all()
    differences = []
    for one, flip in zip(questions, flips, strict=True):
        drawn = one.swapped if flip else one
        asked = ask_all([drawn], loaded.tokenizer)[0]
        states = []
        for letter in asked.letters:
            ids = torch.tensor([[*asked.body_t.tolist(), *asked.tail_t.tolist(), letter]])
            with torch.no_grad():
                states.append(model(ids, output_hidden_states=True).hidden_states[2][0, -1].numpy())
        differences.append(states[drawn.matches] - states[1 - drawn.matches])
    np.testing.assert_allclose(found, np.mean(differences, axis=0), atol=1e-4)
    assert np.abs(found - caa_vector(loaded, questions, 2, 1, 2, 256)).max() > 1e-3, "seeds draw other orders"


def test_answers_are_those_of_a_hook_that_adds_behind_the_users_words(tmp_path: Path, mesh: Mesh) -> None:
    import torch

    model, loaded = tiny(tmp_path, mesh)
    asked = ask_all([question(n) for n in range(4)], loaded.tokenizer)
    vectors = [np.zeros(32, np.float32), np.random.default_rng(0).normal(0, 2, 32).astype(np.float32)]
    found = answer_logits(loaded, asked, vectors, 2)
    for n, one in enumerate(asked):
        ids = torch.tensor([[*one.body_t.tolist(), *one.tail_t.tolist()]])
        for m, vector in enumerate(vectors):

            def add(
                module: Any, inputs: Any, output: Any, vector: np.ndarray = vector, first: int = len(one.body_t)
            ) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                hidden[:, first:] += torch.tensor(vector)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            hook = model.model.layers[1].register_forward_hook(add)
            with torch.no_grad():
                wanted = model(ids).logits[0, -1, list(one.letters)].numpy()
            hook.remove()
            np.testing.assert_allclose(found[m, n], wanted, atol=2e-3)
    assert np.abs(found[1] - found[0]).max() > 0.05


def test_figures_by_hand() -> None:
    """Three questions in both orders: right in both, always (A), wrong in both."""
    matches = np.array([0, 1, 0, 1, 1, 0])
    margins = np.array([1.0, 2.0, 1.0, -1.0, -3.0, 0.0])
    found = figures(margins, matches)
    assert found["accuracy"] == 3 / 6 and found["robust_accuracy"] == 1 / 3 and found["positional_bias"] == 1 / 3
    assert found["probability"] == pytest.approx((1 / (1 + np.exp(-margins))).mean())


@pytest.fixture
def stage(tmp_path: Path, mesh_1x1: Mesh) -> tuple[Config, Path, dict[str, Path]]:
    hugging_face(*CASES["qwen2"], tmp_path / "model")
    rows = [{"question": question(n).text, "answer_matching_behavior": f"({'AB'[n % 2]})"} for n in range(20, 26)]
    (tmp_path / "heldout.json").write_text(json.dumps(rows))
    (tmp_path / "synthesis").mkdir()
    for name, numbers in (("kept", range(4)), ("random", range(4, 7))):
        lines = [
            {"question": q.question, "choice_a": q.choices[0], "choice_b": q.choices[1], "matches": "AB"[q.matches]}
            for q in map(question, numbers)
        ]
        assert [question_of(line) for line in lines] == list(map(question, numbers))
        (tmp_path / "synthesis" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config(
        mesh=MeshConfig(1, 1),
        backbone=BackboneConfig(
            model=str(tmp_path / "model"), layer=2, dtype="float32", rows_per_batch=2, row_tokens=256
        ),
        steer=SteerConfig(heldout=str(tmp_path / "heldout.json"), seeds=(42, 43)),
    )
    (tmp_path / "out").mkdir()
    return config, tmp_path / "out", {"synthesis": tmp_path / "synthesis"}


def test_the_stage_measures_every_arm(stage: tuple[Config, Path, dict[str, Path]]) -> None:
    config, out, inputs = stage
    summary = steer(config, out, inputs)
    evaluation = json.loads((out / "eval.json").read_text())
    assert evaluation["samples"] == {"kept": 4, "random": 3} and evaluation["questions"] == 6
    assert list(evaluation["arms"]) == ["kept", "random", "random direction"] == list(summary["scr"])
    vectors = load_file(out / "vectors.safetensors")
    assert sorted(vectors) == sorted(f"{arm}.seed-{seed}" for arm in evaluation["arms"] for seed in (42, 43))
    assert np.linalg.norm(vectors["kept.seed-42"]) == pytest.approx(np.linalg.norm(vectors["random direction.seed-42"]))
    answers = pq.read_table(out / "answers.parquet").to_pylist()
    assert len(answers) == 12 * (1 + 3 * 2 * 4)
    chosen = [row for row in answers if (row["arm"], row["seed"], row["multiplier"]) == ("random", 43, 1.0)]
    won = {q: all(row["margin"] > 0 for row in chosen if row["question"] == q) for q in range(6)}
    assert evaluation["arms"]["random"]["robust_accuracy"]["1"]["values"][1] == pytest.approx(
        np.mean(list(won.values()))
    )
    row = evaluation["arms"]["kept"]
    for seed in range(2):
        difference = row["robust_accuracy"]["1"]["values"][seed] - row["robust_accuracy"]["-1"]["values"][seed]
        assert row["scr"]["values"][seed] == pytest.approx(difference)
    zero = {arm: tuple(found["accuracy"]["0"]["values"]) for arm, found in evaluation["arms"].items()}
    assert len(set(zero.values())) == 1, "what is not steered is the same in every arm"


def test_without_samples_or_with_a_layer_that_is_none_it_says_so(stage: tuple[Config, Path, dict[str, Path]]) -> None:
    config, out, inputs = stage
    with pytest.raises(UserError, match="steer.layer is 3; the model has 3 blocks"):
        steer(dataclasses.replace(config, steer=dataclasses.replace(config.steer, layer=3)), out, inputs)
    (inputs["synthesis"] / "kept.jsonl").write_text("")
    with pytest.raises(UserError, match="kept.jsonl is empty: no sample was kept"):
        steer(config, out, inputs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"multipliers": (0.0, 1.0)}, "-1, 0 and 1 must be among them"),
        ({"layer": 0}, "steer.layer is 0"),
        ({"limit": 0}, "steer.limit is 0"),
        ({"seeds": ()}, "steer.seeds is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SteerConfig(**settings)
