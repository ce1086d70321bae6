"""The stage on a tiny model: held-out nats against transformers with peft's adapters, outputs against its decoding."""

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

from fac_jax.backbone.model import logits, residual
from fac_jax.backbone.weights import load_backbone
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.downstream import FinetuneConfig, LoraConfig
from fac_jax.config.features import JudgeConfig
from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig
from fac_jax.config.machine import MeshConfig
from fac_jax.downstream import arms as module
from fac_jax.downstream import completions as completions_module
from fac_jax.downstream import tune as tune_module
from fac_jax.downstream.arms import COMPARED
from fac_jax.downstream.lora import adapters, merged
from fac_jax.downstream.tune import tune
from fac_jax.errors import Stopped, UserError
from fac_jax.llm.fake import FakeServer
from fac_jax.llm.question import data_shown
from fac_jax.mesh import make_mesh
from tests.backbone.test_model import CASES, hugging_face, whole
from tests.downstream.experiment import Experiment, stopping_before
from tests.downstream.test_lora import LORA, filled

ARMS = ("seed", "seed+random", "seed+kept")
TEMPLATE = "<|start|>{0}<|end|><|start|>{1}<|end|>"


def row(number: int) -> dict[str, str]:
    return {"instruction": f"say {number % 10}", "output": f"{number % 10}" * 4, "dataset": "digits"}


def told(number: int) -> dict[str, str]:
    return {"instruction": f"tell {number}", "output": f"{number % 10}" * (3 + number % 3)}


@pytest.fixture(params=["1x1", "2x4"])
def experiment(tmp_path: Path, request: pytest.FixtureRequest) -> Experiment:
    data, feature = map(int, request.param.split("x"))
    hugging_face(*CASES["qwen2"], tmp_path / "model")
    sets = {
        "taught": [told(n) for n in range(6)], "heldout": [told(n) for n in range(20, 27)],
        "asked": [row(n) for n in range(3)], "random": [told(n) for n in range(6, 9)],
        "kept": [told(n) for n in range(9, 12)],
    }  # fmt: skip
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    names = ("taught", "heldout", "asked")
    config = Config(
        mesh=MeshConfig(data, feature),
        judge=JudgeConfig(task="instruction_following"),
        backbone=BackboneConfig(model=str(tmp_path / "model"), dtype="float32", rows_per_batch=2, row_tokens=64),
        data={name: DataSet((Source(str(tmp_path / f"{name}.jsonl")),), max_tokens=32) for name in names},
        finetune=FinetuneConfig(
            train="taught", method="lora", epochs=3, learning_rate=1e-2, batch=4, seeds=(42, 43), outputs_for="asked",
            output_tokens=5, lora=LoraConfig(rank=4),
        ),
        llm=LlmConfig(local_batch=2),
    )  # fmt: skip
    return Experiment(tmp_path, config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_nats_and_outputs_are_those_of_transformers_with_pefts_adapters(experiment: Experiment) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    summary = experiment.run()
    evaluation = experiment.evaluation()
    assert tuple(evaluation["arms"]) == ("backbone", *ARMS) == tuple(summary["nats_per_token"])
    assert [evaluation["arms"][arm]["added"] for arm in ARMS] == [0, 3, 3]
    predictions = pq.read_table(experiment.out / "predictions.parquet").to_pylist()
    assert len(predictions) == 7 + 3 * 2 * 7
    loaded = load_backbone(str(experiment.folder / "model"), 0, "float32", make_mesh(MeshConfig(1, 1)))
    tokenizer, held = loaded.tokenizer, [told(n) for n in range(20, 27)]

    def of(model: Any) -> tuple[list[int], list[float]]:
        """Tokens and summed nats of each held-out answer and its end, from the logits of all that stands before."""
        tokens, nats = [], []
        for one in held:
            before = TEMPLATE.format(one["instruction"], "").removesuffix("<|end|>")
            ids = tokenizer(before + one["output"] + "<|end|>", add_special_tokens=False)["input_ids"]
            first = len(tokenizer(before, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                log_tv = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            nats.append(-sum(float(log_tv[place - 1, ids[place]]) for place in range(first, len(ids))))
            tokens.append(len(ids) - first)
        return tokens, nats

    for arm, seed in (("backbone", None), ("seed", 43), ("seed+kept", 42)):
        model = AutoModelForCausalLM.from_pretrained(experiment.folder / "model").eval()
        if seed is not None:
            model = peft.PeftModel.from_pretrained(model, str(experiment.out / f"arms/{arm}/seed-{seed}")).eval()
        tokens, nats = of(model)
        one = [p for p in predictions if (p["arm"], p["seed"]) == (arm, seed)]
        assert [p["tokens"] for p in one] == tokens
        np.testing.assert_allclose([p["nats"] * p["tokens"] for p in one], nats, rtol=1e-4)
        figure = evaluation["arms"][arm]["nats_per_token"]["values"][0 if seed is None else seed - 42]
        assert figure == pytest.approx(sum(nats) / sum(tokens), rel=1e-4)
        if arm == "seed+kept":
            written = json.loads((experiment.out / f"arms/{arm}/model_outputs.json").read_text())
            for one_output, asked in zip(written, (row(n) for n in range(3)), strict=True):
                prompt = f"<|start|>{asked['instruction']}<|end|>"
                ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
                with torch.no_grad():
                    for _ in range(5):
                        best = model(ids).logits[0, -1].argmax()
                        if int(best) == tokenizer.eos_token_id:
                            break
                        ids = torch.cat([ids, best[None, None]], 1)
                continuation = tokenizer.decode(ids[0])[len(prompt) :].strip()
                assert one_output == {
                    "instruction": asked["instruction"], "output": continuation,
                    "generator": "model (seed+kept, seed 42)", "dataset": "digits",
                }  # fmt: skip
    assert (
        evaluation["arms"]["seed"]["nats_per_token"]["mean"] < evaluation["arms"]["backbone"]["nats_per_token"]["mean"]
    )
    assert evaluation["local_pairwise_judge"] is None, "no server, no judge"
    assert evaluation["outputs"]["files"]["seed"] == "arms/seed/model_outputs.json"
    assert [(d["arm"], d["minus"]) for d in evaluation["differences"]] == [*COMPARED, ("seed", "backbone")]


@pytest.mark.parametrize("experiment", ["1x1"], indirect=True)
def test_with_a_server_the_arms_answers_are_compared(experiment: Experiment) -> None:
    """A judge that prefers whichever comes first never lets an arm win."""

    def first(body: dict[str, Any]) -> str:
        assert set(data_shown(body["messages"][-1]["content"])) == {"instruction", "answer_a", "answer_b"}
        return json.dumps({"label": "A", "reason": "it is first"})

    with FakeServer(write=first) as server:
        llm = LlmConfig(url=server.url, local_batch=2)
        run = dataclasses.replace(experiment.config.run, dir=str(experiment.folder / "run"))
        experiment.config = dataclasses.replace(experiment.config, llm=llm, run=run)
        experiment.run(seeds=(42,), epochs=1)
        asked = len(server.bodies)
        found = experiment.evaluation()["local_pairwise_judge"]
        assert [(one["arm"], one["other"]) for one in found] == list(COMPARED)
        for one in found:
            assert one["win"] == one["loss"] == one["failed"] == 0 and one["preferred"] == 0.5 and one["judged"] == 3
            assert one["disagreed"] + one["equal"] == 3
        assert asked <= 2 * sum(one["disagreed"] for one in found)
        assert pq.read_table(experiment.out / "judgements.parquet").num_rows == 9
        experiment.run()
        assert len(server.bodies) == asked, "what was answered is not asked again"


@pytest.mark.parametrize("experiment", ["1x1"], indirect=True)
def test_a_judge_that_does_not_answer_costs_no_training(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*arguments: Any) -> Any:
        raise UserError("no answer from llm.url")

    def training(*arguments: Any) -> Any:
        raise AssertionError("a step is taken again")

    with FakeServer() as server:
        llm = LlmConfig(url=server.url, local_batch=2)
        run = dataclasses.replace(experiment.config.run, dir=str(experiment.folder / "run"))
        experiment.config = dataclasses.replace(experiment.config, llm=llm, run=run)
        with monkeypatch.context() as patched, pytest.raises(UserError, match="no answer from llm.url"):
            patched.setattr(completions_module, "compare_outputs", down)
            experiment.run(epochs=1)
        before = {file: file.read_bytes() for file in experiment.out.rglob("metrics.jsonl")}
        assert len(before) == 6
        monkeypatch.setattr(tune_module, "total_weight", training)
        experiment.run()
    assert [(one["arm"], one["other"]) for one in experiment.evaluation()["local_pairwise_judge"]] == list(COMPARED)
    assert {file: file.read_bytes() for file in experiment.out.rglob("metrics.jsonl")} == before
    assert not list(experiment.out.rglob("checkpoints")), "what is done goes on from nothing"


@pytest.mark.parametrize("experiment", ["1x1"], indirect=True)
def test_stopped_between_arms_it_ends_with_the_same_bytes(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an arm has answered already is not written again."""
    experiment.run(seeds=(42,), epochs=1)
    undisturbed = {f: f.read_bytes() for f in sorted(experiment.out.rglob("*")) if f.is_file()}
    shutil.rmtree(experiment.out)

    monkeypatch.setattr(module, "tune", stopping_before("seed+kept"))
    with pytest.raises(Stopped):
        experiment.run()
    written = experiment.out / "arms/seed+random/model_outputs.json"
    before = written.stat().st_mtime_ns
    monkeypatch.setattr(module, "tune", tune)
    experiment.run()
    assert written.stat().st_mtime_ns == before
    assert {f: f.read_bytes() for f in sorted(experiment.out.rglob("*")) if f.is_file()} == undisturbed


@pytest.mark.parametrize("experiment", ["1x1"], indirect=True)
def test_a_head_is_refused(experiment: Experiment) -> None:
    with pytest.raises(UserError, match="finetune.method is 'head': answers are learned by adapters"):
        experiment.run(method="head")


def test_merging_leaves_the_backbone_as_it_was(tmp_path: Path, mesh: Mesh) -> None:
    hugging_face(*CASES["qwen2"], tmp_path)
    loaded = load_backbone(str(tmp_path), None, "float32", mesh)
    params = filled(loaded, LORA)
    batch = whole(np.random.default_rng(0).integers(0, 260, (2, 24)).astype(np.int32))
    before = np.asarray(logits(loaded.model, residual(loaded.model, *batch, 3)))
    wanted = logits(loaded.model, residual(loaded.model, *batch, 3, adapters(params, LORA, None)))
    one = merged(loaded, params, LORA)
    np.testing.assert_allclose(logits(one.model, residual(one.model, *batch, 3)), wanted, atol=2e-4)
    np.testing.assert_array_equal(logits(loaded.model, residual(loaded.model, *batch, 3)), before)
    assert one.model.blocks["w_q"][...].sharding == loaded.model.blocks["w_q"][...].sharding
    assert np.abs(np.asarray(wanted) - before).max() > 0.1
