"""The loop: against torch's AdamW on peft's adapters, in pieces of any size, killed and gone on with, on a mesh."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.backbone.weights import load_backbone
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.downstream import FinetuneConfig, LoraConfig
from fac_jax.downstream import tune as module
from fac_jax.downstream.head import minibatches
from fac_jax.downstream.objectives import Objective
from fac_jax.downstream.pieces import Group, Text
from fac_jax.downstream.tune import Learned, Tuner, make_tuner, rate_at, score_texts, tune
from fac_jax.errors import Stopped, UserError
from tests.backbone.test_model import CASES, hugging_face
from tests.backbone.tiny_backbone import tiny_tokenizer, write_model
from tests.downstream.test_lora import LORA, loss_of_peft, ours, texts, with_peft

SETTINGS = FinetuneConfig(
    epochs=2, batch=3, learning_rate=1e-2, lora=LORA, learning_rate_schedule="cosine", warmup=0.25, weight_decay=0.1,
    gradient_clip=0.7, checkpoint_every=2,
)  # fmt: skip


def tiny(folder: Path, mesh: Mesh, objective: Objective, settings: FinetuneConfig = SETTINGS, rows: int = 2) -> Tuner:
    if not (folder / "config.json").exists():
        write_model(folder)
        tiny_tokenizer().save_pretrained(folder)
    loaded = load_backbone(str(folder), None, "float32", mesh)
    return make_tuner(loaded, objective, settings, BackboneConfig(rows_per_batch=rows, row_tokens=48))


def told(count: int, mark: int = 7, seed: int = 0) -> list[Group]:
    """Texts of random tokens; those labelled 1 end in a mark."""
    random = np.random.default_rng(seed)
    groups: list[Group] = []
    for place in range(count):
        ids = random.integers(10, 250, random.integers(6, 12)).astype(np.int32)
        if place % 2:
            ids[-1] = mark
        groups.append((Text(ids, np.ones(len(ids), bool), float(place % 2)),))
    return groups


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("objective", ["classifier", "reward", "completion"])
def test_steps_are_those_of_torch_on_pefts_adapters(
    tmp_path: Path, mesh_1x1: Mesh, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    adapted, params = with_peft(hugging_face(*CASES["llama-3.1"], tmp_path / "model"))
    loaded = load_backbone(str(tmp_path / "model"), None, "float32", mesh_1x1)
    made = texts([9, 14, 20, 5, 12, 17, 31, 8])
    groups: list[Group] = (
        [(made[i], made[i + 1]) for i in range(0, 8, 2)] if objective == "reward" else [(text,) for text in made]
    )
    head_d = np.random.default_rng(3).normal(0, 0.3, 32).astype(np.float32)
    start = Learned({name: jnp.asarray(value) for name, value in params.items()}, jnp.asarray(head_d))
    monkeypatch.setattr(module, "init_learned", lambda tuner, seed: start)
    tuner = make_tuner(loaded, objective, SETTINGS, BackboneConfig(rows_per_batch=2, row_tokens=40))
    learned = tune(tuner, groups, 5, tmp_path / "out")

    head = torch.tensor(head_d, requires_grad=True)
    trained = [value for name, value in adapted.named_parameters() if "lora_" in name] + [head]
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    order = minibatches(len(groups), 3, 2, 5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(order)
    for step, rows in enumerate(order):
        batch = [groups[row] for row in rows if row >= 0]
        weights = [text.learned_t[1:].sum() for group in batch for text in group]
        total = sum(weights) if objective == "completion" else sum(group[0].weight for group in batch)
        optimizer.zero_grad()
        loss = loss_of_peft(adapted, head, batch, objective) / total
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.7)
        for group in optimizer.param_groups:
            group["lr"] = float(rate_at(step, SETTINGS, len(order)))
        optimizer.step()
        assert lines[step]["loss"] == pytest.approx(loss.item(), rel=1e-3)
        assert lines[step]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
    wanted = ours(adapted, lambda value: value.detach())
    for name, value in learned.adapters.items():  # four steps of 1e-2; Adam makes whole steps of rounded gradients too
        np.testing.assert_allclose(np.asarray(value), wanted[name], atol=5e-4, err_msg=name)
        assert np.abs(np.asarray(value) - params[name]).max() > 1e-2
    if objective != "completion":
        np.testing.assert_allclose(np.asarray(learned.head_d), head.detach().numpy(), atol=5e-4)


def test_a_batch_in_small_pieces_is_the_same_batch(tmp_path: Path, mesh_1x1: Mesh) -> None:
    groups = told(7)
    whole = tune(tiny(tmp_path / "m", mesh_1x1, "classifier", rows=8), groups, 0, tmp_path / "a")
    pieces = tune(tiny(tmp_path / "m", mesh_1x1, "classifier", rows=1), groups, 0, tmp_path / "b")
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=3e-4)


def test_it_is_the_same_on_a_mesh(tmp_path: Path, mesh_1x1: Mesh, mesh_2x4: Mesh) -> None:
    groups = told(7)
    one = tune(tiny(tmp_path / "m", mesh_1x1, "classifier"), groups, 0, tmp_path / "a")
    many = tune(tiny(tmp_path / "m", mesh_2x4, "classifier"), groups, 0, tmp_path / "b")
    assert many.adapters["lora_b_q"].sharding.spec[2] == "feature"
    for alone, spread in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(np.asarray(alone), np.asarray(spread), atol=3e-4)


def test_a_classifier_learns_what_tells_the_labels_apart(tmp_path: Path, mesh_1x1: Mesh) -> None:
    lora = LoraConfig(rank=4, alpha=16, dropout=0.1)
    settings = FinetuneConfig(epochs=6, batch=8, learning_rate=1e-2, lora=lora)
    tuner = tiny(tmp_path / "m", mesh_1x1, "classifier", settings, rows=2)
    learned = tune(tuner, told(64), 0, tmp_path / "out")
    fresh = told(40, seed=1)
    scores_n = score_texts(tuner, learned, fresh)[:, 0]
    right = (scores_n > 0) == np.array([group[0].label > 0 for group in fresh])
    assert right.mean() > 0.9, right.mean()
    before = score_texts(tuner, module.init_learned(tuner, 0), fresh)[:, 0]
    assert ((before > 0) == np.array([group[0].label > 0 for group in fresh])).mean() < 0.7


def test_seeds_differ_and_repeat(tmp_path: Path, mesh_1x1: Mesh) -> None:
    tuner = tiny(tmp_path / "m", mesh_1x1, "classifier", dataclasses.replace(SETTINGS, lora=LoraConfig(rank=2)))
    runs = [tune(tuner, told(6), seed, tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "c"))]
    heads = [np.asarray(one.head_d) for one in runs]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert (heads[0] != heads[2]).any()


@pytest.mark.parametrize("after", [1, 2, 3])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, mesh_1x1: Mesh, after: int) -> None:
    tuner = tiny(tmp_path / "m", mesh_1x1, "classifier", dataclasses.replace(SETTINGS, lora=LoraConfig(rank=2)))
    groups = told(7)
    undisturbed = tune(tuner, groups, 0, tmp_path / "a")
    calls = [0]

    def stopping(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return tuner.gradient(*arguments)  # type: ignore[arg-type]

    with pytest.raises(Stopped, match="SIGTERM: saved after step"):
        tune(dataclasses.replace(tuner, gradient=stopping), groups, 0, tmp_path / "b")  # type: ignore[arg-type]
    resumed = tune(tuner, groups, 0, tmp_path / "b")
    for one, other in zip(jax.tree.leaves(undisturbed), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    logs = [hashlib.sha256((tmp_path / name / "metrics.jsonl").read_bytes()).hexdigest() for name in "ab"]
    assert logs[0] == logs[1]


def test_a_loss_that_is_not_finite_stops_it(tmp_path: Path, mesh_1x1: Mesh) -> None:
    tuner = tiny(tmp_path / "m", mesh_1x1, "classifier", dataclasses.replace(SETTINGS, learning_rate=1e30))
    with pytest.raises(UserError, match=r"at step \d of 6, learning rate .*: training diverged; lower finetune.learn"):
        tune(tuner, told(7), 0, tmp_path / "out")


def test_the_rate_rises_and_falls() -> None:
    rates = [float(rate_at(step, SETTINGS, 8)) for step in range(8)]
    assert rates[:2] == pytest.approx([5e-3, 1e-2]) and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert rates[5] == pytest.approx(1e-2 * (1 + np.cos(np.pi * 3 / 6)) / 2)
    constant = dataclasses.replace(SETTINGS, learning_rate_schedule="constant", warmup=0.0)
    assert [float(rate_at(step, constant, 8)) for step in range(8)] == pytest.approx([1e-2] * 8)
