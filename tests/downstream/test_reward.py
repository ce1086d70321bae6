"""The stage on a tiny model: accuracies by hand, ties, sections, heads against scikit-learn, adapters against peft."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from jax.sharding import Mesh

from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.downstream import FinetuneConfig, LoraConfig
from fac_jax.config.features import JudgeConfig
from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig, RunConfig
from fac_jax.downstream import reward as module
from fac_jax.downstream.encode import encode_answer, encode_examples
from fac_jax.downstream.evaluate import bootstrap_mean
from fac_jax.downstream.head import fit_pairs
from fac_jax.downstream.published import Example
from fac_jax.downstream.reward import wins
from fac_jax.errors import UserError
from fac_jax.pipeline import pipeline
from fac_jax.runs import Record, Run, Stage
from fac_jax.text import Turn
from tests.backbone.test_model import CASES, hugging_face
from tests.downstream.experiment import Experiment

ARMS = ("seed", "seed+random", "seed+kept")


def row(number: int, subset: str | None = None) -> dict[str, Any]:
    """Better answers end in an exclamation mark, worse ones in a full stop."""
    word = "abcdefghijklmnopqrstuvwxyz"[number % 26]
    found = {"prompt": f"q{number}", "chosen": f"{word}!", "rejected": f"{word}."}
    return found if subset is None else {**found, "subset": subset}


@pytest.fixture(params=["1x1", "2x4"])
def experiment(tmp_path: Path, request: pytest.FixtureRequest) -> Experiment:
    data, feature = map(int, request.param.split("x"))
    hugging_face(*CASES["qwen2"], tmp_path / "model")
    subsets = ("alpacaeval-easy", "mt-bench-med", "llmbar-natural", "mine")
    sets = {
        "pairs": [row(n) for n in range(8)],
        "heldout": [row(n, subsets[n % 4]) for n in range(50, 74)],
        "kept": [row(n) for n in range(8, 16)],
        "random": [row(n) for n in range(16, 24)],
    }
    config = Config(
        mesh=MeshConfig(data, feature),
        judge=JudgeConfig(task="helpfulness"),
        backbone=BackboneConfig(model=str(tmp_path / "model"), dtype="float32", rows_per_batch=2, row_tokens=64),
        data={
            name: DataSet((Source(str(tmp_path / f"{name}.jsonl")),), max_tokens=32) for name in ("pairs", "heldout")
        },
        finetune=FinetuneConfig(
            train="pairs", epochs=4, learning_rate=1e-2, batch=8, seeds=(42, 43), lora=LoraConfig(rank=4)
        ),
    )
    found = Experiment(tmp_path, config)
    for name, rows in sets.items():
        found.write(name, rows)
    return found


@pytest.mark.parametrize("method", ["head", "lora"])
def test_every_arm_is_measured_and_every_score_is_kept(experiment: Experiment, method: str) -> None:
    summary = experiment.run(method=method)
    evaluation = experiment.evaluation()
    assert tuple(evaluation["arms"]) == ARMS == tuple(summary["accuracy"])
    assert [row["pairs"] for row in evaluation["arms"].values()] == [8, 16, 16]
    assert [row["added"] for row in evaluation["arms"].values()] == [0, 8, 8]
    assert evaluation["heldout"]["pairs"] == 24 and evaluation["heldout"]["unknown_subsets"] == ["mine"]
    assert (
        "math-prm" in evaluation["heldout"]["missing_subsets"] and len(evaluation["heldout"]["missing_subsets"]) == 20
    )
    predictions = pq.read_table(experiment.out / "predictions.parquet").to_pylist()
    assert len(predictions) == 3 * 2 * 24
    for arm in ARMS:
        of_arm = evaluation["arms"][arm]
        for place, seed in enumerate((42, 43)):
            one = [p for p in predictions if (p["arm"], p["seed"]) == (arm, seed)]
            right = {p["pair"]: p["chosen"] > p["rejected"] for p in one}
            assert of_arm["accuracy"]["values"][place] == pytest.approx(np.mean(list(right.values())))
            by_subset = {
                name: np.mean([right[p["pair"]] for p in one if p["subset"] == name])
                for name in ("alpacaeval-easy", "mt-bench-med", "llmbar-natural")
            }
            chat = (100 * by_subset["alpacaeval-easy"] + 40 * by_subset["mt-bench-med"]) / 140
            assert of_arm["sections"]["Chat"]["values"][place] == pytest.approx(chat)
            assert of_arm["score"]["values"][place] == pytest.approx((chat + by_subset["llmbar-natural"]) / 2)
        assert set(of_arm["sections"]) == {"Chat", "Chat Hard"} and of_arm["ties"] == [0, 0]
        assert of_arm["interval"]["low"] <= of_arm["accuracy"]["mean"] <= of_arm["interval"]["high"]
    if method == "lora":
        assert evaluation["arms"]["seed+kept"]["accuracy"]["mean"] > 0.9, "what tells is read last"
        assert sorted(p.name for p in (experiment.out / "arms/seed/seed-42").iterdir()) == [
            "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "metrics.jsonl"
        ]  # fmt: skip


@pytest.mark.parametrize("experiment", ["1x1"], indirect=True)
def test_a_tie_is_not_a_win(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that is the same for everything prefers nothing."""
    assert wins(np.array([[1.0, 1.0], [0.0, -1.0], [-1.0, 0.0]])).tolist() == [False, True, False]
    equal = {arm: np.ones((2, 24, 2), np.float32) for arm in ARMS}
    equal["seed+kept"] = np.stack([np.array([[1.0, 0.0]] * 6 + [[2.0, 2.0]] * 18)] * 2)
    monkeypatch.setattr(module, "_headed", lambda *arguments: equal)
    experiment.run(method="head")
    arms = experiment.evaluation()["arms"]
    assert arms["seed"]["accuracy"]["mean"] == 0.0 == arms["seed"]["score"]["mean"]
    assert arms["seed"]["ties"] == [24, 24]
    assert arms["seed+kept"]["accuracy"]["values"] == [0.25, 0.25] and arms["seed+kept"]["ties"] == [18, 18]
    assert [d["mean"] for d in experiment.evaluation()["differences"]] == [0.25, 0.0, 0.25]


@pytest.mark.parametrize("experiment", ["1x1"], indirect=True)
def test_made_again_it_writes_the_same_bytes(experiment: Experiment) -> None:
    experiment.run(method="head")
    first = {path.name: path.read_bytes() for path in experiment.out.iterdir()}
    experiment.run()
    assert {path.name: path.read_bytes() for path in experiment.out.iterdir()} == first


@pytest.mark.parametrize("experiment", ["1x1"], indirect=True)
def test_as_a_stage_it_is_made_once_and_again_where_a_pair_changes(experiment: Experiment) -> None:
    def written(config: Config, out: Path, inputs: Any) -> dict[str, Any]:
        for name in ("kept", "random"):
            shutil.copy(experiment.folder / f"{name}.jsonl", out)
        return {}

    def made() -> Record:
        run_dir = RunConfig(dir=str(experiment.folder / "run"))
        config = dataclasses.replace(experiment.config, run=run_dir)
        stages = pipeline(config)
        stages["synthesis"] = Stage("synthesis", "synthesis", "synthesize", written, dict)
        with Run(config) as run:
            run.execute(stages["synthesis"], stages)
            return run.execute(stages["finetune"], stages)

    first = made()
    assert set(first.summary["accuracy"]) == set(ARMS) and first == made()
    experiment.write("heldout", [row(n) for n in range(50, 60)])
    assert made().summary["pairs"] == 10


@pytest.mark.parametrize("experiment", ["1x1"], indirect=True)
def test_a_held_out_pair_stops_the_run(experiment: Experiment) -> None:
    experiment.write("kept", [row(8), {**row(9), "prompt": "Q60."}])
    with pytest.raises(UserError, match=r"kept\.jsonl:2, there heldout\.jsonl:11"):
        experiment.run(method="head")
    assert not (experiment.out / "eval.json").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("experiment", ["1x1"], indirect=True)
def test_peft_gives_the_scores_that_were_kept(experiment: Experiment) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    experiment.run(method="lora", seeds=(42,), epochs=1)
    folder = experiment.out / "arms/seed+kept/seed-42"
    base = AutoModelForCausalLM.from_pretrained(experiment.folder / "model")
    model, head = peft.PeftModel.from_pretrained(base, str(folder)).eval(), load_file(folder / "head.safetensors")
    table = pq.read_table(experiment.out / "predictions.parquet").to_pylist()
    one = next(p for p in table if p["arm"] == "seed+kept")
    pair = json.loads((experiment.folder / "heldout.jsonl").read_text().splitlines()[0])
    for side in ("chosen", "rejected"):
        template = f"<|start|>{pair['prompt']}<|end|><|start|>{pair[side]}<|end|>"
        loaded = load_backbone(str(experiment.folder / "model"), 1, "float32", module.make_mesh(MeshConfig(1, 1)))
        ids = torch.tensor([loaded.tokenizer(template, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            last_d = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        assert one[side] == pytest.approx(float(last_d @ head["weight"]), abs=1e-4)


def loaded_tiny(folder: Path, mesh: Mesh) -> Loaded:
    hugging_face(*CASES["qwen2"], folder)
    return load_backbone(str(folder), None, "float32", mesh)


def test_the_end_of_a_conversation_stays(tmp_path: Path, mesh_1x1: Mesh) -> None:
    tokenizer = loaded_tiny(tmp_path, mesh_1x1).tokenizer
    turns = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", "tree"))
    pair = Example(turns, ("good", "bad"), None, "here:1")
    whole = "<|start|>one<|end|><|start|>two<|end|><|start|>tree<|end|><|start|>good<|end|>"
    text = encode_answer(pair, "good", tokenizer)
    assert tokenizer.decode(text.ids_t) == whole
    assert tokenizer.decode(text.ids_t[text.learned_t]) == "good<|end|>"
    cut = encode_examples([pair], tokenizer, 9, "end")
    assert [tokenizer.decode(one.ids_t) for one in cut.groups[0]] == [
        "ee<|end|><|start|>good<|end|>",
        "ree<|end|><|start|>bad<|end|>",
    ]
    assert cut.cut == 2
    kept = encode_examples([Example(turns, ("good",), None, "here:1")], tokenizer, 19, "start").groups[0][0]
    assert tokenizer.decode(kept.ids_t[kept.learned_t]) == "go"
    with pytest.raises(UserError, match="here:1: the prompt alone has 10 tokens or more, so nothing of its answer is"):
        encode_examples([pair], tokenizer, 10, "start")


def test_a_text_without_a_template_ends_too(tmp_path: Path, mesh_1x1: Mesh) -> None:
    tokenizer = loaded_tiny(tmp_path, mesh_1x1).tokenizer
    tokenizer.chat_template = None
    text = encode_answer(Example((Turn("user", "one"),), ("two",), None, "here"), "two", tokenizer)
    assert tokenizer.decode(text.ids_t) == "one\n\ntwo<|end|>"
    assert tokenizer.decode(text.ids_t[text.learned_t]) == "two<|end|>"


def test_a_template_that_refuses_a_conversation_names_the_row(tmp_path: Path, mesh_1x1: Mesh) -> None:
    """Some want a user's turn first, which answers to nothing lack."""
    tokenizer = loaded_tiny(tmp_path, mesh_1x1).tokenizer
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        UserError, match=r"pairs:3: the chat template refuses turns of assistant \(roles must alternate\)"
    ):
        encode_examples([Example((), ("a", "b"), None, "pairs:3")], tokenizer, 32, "end")


def test_a_head_finds_what_scikit_learn_finds() -> None:
    """The direction of a logistic regression without a bias on differences, both ways round."""
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    true_d = generator.normal(size=5)
    x_nd = generator.normal(size=(400, 5))
    x_nd *= np.where(generator.random(400) < 1 / (1 + np.exp(-(x_nd @ true_d))), 1, -1)[:, None]
    settings = FinetuneConfig(epochs=60, learning_rate=1e-2, batch=400, seeds=(0, 1))
    head_sd = fit_pairs(x_nd.astype(np.float32), dataclasses.replace(settings, epochs=600))
    both, labels = np.concatenate([x_nd, -x_nd]), np.repeat([1, 0], 400)
    wanted = LogisticRegression(C=1e6, fit_intercept=False, tol=1e-8).fit(both, labels).coef_[0]
    np.testing.assert_allclose(head_sd, np.stack([wanted, wanted]), atol=2e-2)
    one = fit_pairs(np.ones((4, 1), np.float32), settings)
    assert (one > 0).all(), "a pair is always won by what the better answer has more of"


def test_an_interval_holds_the_mean_and_narrows() -> None:
    generator = np.random.default_rng(0)
    values, weights = generator.normal(1, 1, 400), generator.integers(1, 9, 400)
    few, many = bootstrap_mean(values[:50]), bootstrap_mean(values)
    assert many.low < values.mean() < many.high and many.high - many.low < few.high - few.low
    assert many.high - many.low == pytest.approx(4 * 0.98 / 20, rel=0.1), "1.96 standard errors on each side"
    assert many == bootstrap_mean(values) and bootstrap_mean(np.ones(9)).low == 1.0
    repeated = bootstrap_mean(np.repeat(values, weights))
    assert bootstrap_mean(values, weights).mean == pytest.approx(repeated.mean)
