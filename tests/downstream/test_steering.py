"""Questions read strictly; vectors and answers against plain forwards of transformers; figures by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow.parquet as pq
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file

from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.downstream import SteerConfig
from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig
from fac_jax.downstream.choices import Question, ask_all, parse_question, question_of, read_questions
from fac_jax.downstream.equal_norm import equal_norm
from fac_jax.downstream.steering import answer_logits, caa_vector, figures, steer
from fac_jax.errors import UserError
from fac_jax.pipeline import pipeline
from fac_jax.plain import to_plain
from fac_jax.runs import RECORD, Record
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


def another_run(folder: Path, task: str, numbers: range, model: str, **changes: Any) -> None:
    """A run directory as synthesis leaves it."""
    (folder / "synthesis").mkdir(parents=True, exist_ok=True)
    lines = [
        {"question": q.question, "choice_a": q.choices[0], "choice_b": q.choices[1], "matches": "AB"[q.matches]}
        for q in map(question, numbers)
    ]
    write = "".join(json.dumps({**line, **changes}) + "\n" for line in lines)
    (folder / "synthesis" / "kept.jsonl").write_text(write)
    settings = {"writer": {"task": {"name": task}}, "backbone": {"model": model}, "model": [f"{model} 0123"]}
    record = Record("synthesis", "0", "now", 1.0, {}, settings, {}, {}, {})
    (folder / "synthesis" / RECORD).write_text(json.dumps(dataclasses.asdict(record)))


def equalised(config: Config, tmp_path: Path, *others: str) -> Config:
    return dataclasses.replace(
        config, steer=dataclasses.replace(config.steer, equal_norm_with=tuple(str(tmp_path / one) for one in others))
    )


def test_vectors_of_several_behaviours_get_one_norm(stage: tuple[Config, Path, dict[str, Path]], mesh: Mesh) -> None:
    """The mean of their norms, seed by seed, each vector in its own direction; without the setting nothing changes."""
    config, out, inputs = stage
    config = dataclasses.replace(config, mesh=MeshConfig(mesh.shape["data"], mesh.shape["feature"]))
    tmp_path = out.parent
    another_run(tmp_path, "sycophancy", range(4), "tiny")
    another_run(tmp_path / "other", "survival", range(30, 35), "tiny")
    another_run(tmp_path / "third", "survival", range(40, 43), "tiny")
    steer(config, out, inputs)
    alone = load_file(out / "vectors.safetensors")
    plain = json.loads((out / "eval.json").read_text())
    assert "equal_norm" not in plain
    steer(equalised(config, tmp_path, "other", "third"), out, inputs)
    found, evaluation = load_file(out / "vectors.safetensors"), json.loads((out / "eval.json").read_text())
    loaded = load_backbone(config.backbone.model, None, "float32", mesh)
    said = evaluation["equal_norm"]
    assert [(one["behaviour"], one["run"], one["samples"]) for one in said] == [
        ("sycophancy", str(tmp_path), 4),
        ("survival", str(tmp_path / "other"), 5),
        ("survival", str(tmp_path / "third"), 3),
    ]
    for place, seed in enumerate((42, 43)):
        theirs = [caa_vector(loaded, list(map(question, n)), 2, seed, 2, 256) for n in (range(30, 35), range(40, 43))]
        norms = [float(np.sqrt((one.astype(np.float64) ** 2).sum())) for one in (alone[f"kept.seed-{seed}"], *theirs)]
        np.testing.assert_allclose([one["norm_before"]["values"][place] for one in said], norms, rtol=1e-6)
        np.testing.assert_allclose([one["norm"]["values"][place] for one in said], np.mean(norms), rtol=1e-6)
        for arm in ("kept", "random", "random direction"):
            before, after = alone[f"{arm}.seed-{seed}"], found[f"{arm}.seed-{seed}"]
            np.testing.assert_allclose(after, before * (np.mean(norms) / np.linalg.norm(before)), rtol=1e-5, atol=1e-7)
            assert evaluation["arms"][arm]["norm"]["values"][place] == pytest.approx(np.mean(norms), rel=1e-6)
    assert evaluation["arms"]["kept"]["probability"]["1"] != plain["arms"]["kept"]["probability"]["1"]
    assert evaluation["arms"]["kept"]["probability"]["0"] == plain["arms"]["kept"]["probability"]["0"]


@pytest.mark.parametrize("arm", ["kept", "random"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_held_out_question_is_no_sample(arm: str, swapped: bool, stage: tuple[Config, Path, dict[str, Path]]) -> None:
    """In whatever spelling and order of the choices; the same question with other choices is another one."""
    config, out, inputs = stage
    a, b = question(22).choices[:: -1 if swapped else 1]
    leak = {"question": f"{question(22).question.upper()}!", "choice_a": f"{a}.", "choice_b": b, "matches": "A"}
    file = inputs["synthesis"] / f"{arm}.jsonl"
    before = file.read_text()
    file.write_text(before + json.dumps({**leak, "choice_b": "perhaps"}) + "\n")
    steer(config, out, inputs)
    file.write_text(before + json.dumps(leak) + "\n")
    place = len(before.splitlines()) + 1
    wanted = rf"1 samples of arm '{arm}' are held-out questions of .*heldout.json .*{arm}.jsonl:{place}: 'QUESTION 22, "
    with pytest.raises(UserError, match=wanted):
        steer(config, out, inputs)


vectors_of_any_length = hypothesis.strategies.lists(
    hypothesis.strategies.tuples(hypothesis.strategies.integers(0, 99), hypothesis.strategies.floats(-4, 4)), min_size=1
)


@hypothesis.given(vectors_of_any_length)
def test_norms_become_equal_and_directions_stay(drawn: list[tuple[int, float]]) -> None:
    vectors = {
        place: (10**power * np.random.default_rng(seed).normal(size=32)).astype(np.float32)
        for place, (seed, power) in enumerate(drawn)
    }
    lengths = {place: np.linalg.norm(vector.astype(np.float64)) for place, vector in vectors.items()}
    found = equal_norm(vectors)
    assert found.keys() == vectors.keys()
    for place, vector in found.items():
        length = np.linalg.norm(vector.astype(np.float64))
        assert length == pytest.approx(np.mean(list(lengths.values())), rel=1e-6)
        np.testing.assert_allclose(vector / length, vectors[place] / lengths[place], atol=1e-6)


def test_a_vector_without_a_direction_is_refused() -> None:
    with pytest.raises(UserError, match="length 0, so it has no direction"):
        equal_norm({"one": np.ones(3, np.float32), "other": np.zeros(3, np.float32)})


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (
            ("absent",),
            r"absent, but .*absent/synthesis holds no finished samples: run `fac synthesize`",
        ),
        (("empty",), "kept.jsonl is empty: no sample was kept, so it has no vector"),
        (("pairs",), "kept.jsonl:1 has no question, choice_a, choice_b, matches: only samples with two choices"),
        (("huge",), "huge, whose samples were kept for huge; this run's were for tiny"),
        (("other", "third/../other"), "third/../other beside itself: each behaviour counts once"),
        ((".",), "beside itself"),
    ],
)
def test_runs_that_have_no_vector_to_compare_are_named(
    others: tuple[str, ...], words: str, stage: tuple[Config, Path, dict[str, Path]]
) -> None:
    config, out, inputs = stage
    another_run(out.parent, "sycophancy", range(4), "tiny")
    for name in ("other", "third"):
        another_run(out.parent / name, "survival", range(30, 35), "tiny")
    another_run(out.parent / "empty", "survival", range(0), "tiny")
    another_run(out.parent / "huge", "survival", range(3), "huge")
    another_run(out.parent / "pairs", "helpfulness", range(3), "tiny")
    (out.parent / "pairs/synthesis/kept.jsonl").write_text('{"prompt": [], "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match=words):
        steer(equalised(config, out.parent, *others), out, inputs)
    assert not list(out.iterdir())


def test_what_the_others_kept_is_part_of_the_settings(stage: tuple[Config, Path, dict[str, Path]]) -> None:
    config, out, _ = stage
    config = dataclasses.replace(config, judge=dataclasses.replace(config.judge, task="sycophancy"))
    another_run(out.parent / "other", "survival", range(30, 35), "tiny")

    def settings(config: Config) -> Any:
        return to_plain(pipeline(config)["steering"].settings)

    assert "equal_norm" not in json.dumps(settings(config)), "products from before the setting hold"
    asked = equalised(config, out.parent, "other")
    before = settings(asked)
    assert before != settings(config) and before == settings(asked)
    another_run(out.parent / "other", "survival", range(30, 36), "tiny")
    assert settings(asked) != before
    with pytest.raises(UserError, match="holds no finished samples"):
        settings(equalised(config, out.parent, "absent"))


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
