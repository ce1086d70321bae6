"""`fac plan` with CPU devices standing in: what it counts, prints, refuses and advises."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fac_jax.cli import main
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.file import Config, to_yaml
from fac_jax.config.machine import MeshConfig
from fac_jax.config.sae import SaeConfig, TrainConfig
from fac_jax.errors import UserError
from fac_jax.scale import devices, plan, predict, search, tables
from fac_jax.scale.chips import CHIPS, Topology, read_topology
from fac_jax.scale.programs import memory_error, model_config

WIDTH = 64
MODEL = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_libtpu", lambda: False)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return Config(
        mesh=MeshConfig(feature=2),
        backbone=BackboneConfig(model=str(folder), layer=2, rows_per_batch=8, row_tokens=32),
        sae=SaeConfig(features=1024, k=4),
        train=TrainConfig(steps=100, batch_rows=512, k_start=16, anneal_steps=10, aux_coefficient=0),
    )


def small(name: str, memory_gib: float) -> Topology:
    topology = read_topology(name)
    return replace(topology, chip=replace(topology.chip, memory_gib=memory_gib))


def made(config: Config, topology: Topology) -> predict.Plan:
    return plan.make(config, topology, train_tokens=100 * 512, harvest_tokens=1000)


@pytest.mark.parametrize("name", ["h100:8", "v5e:2x4", "tpu7x:2x2x1"])
def test_a_plan_counts_the_real_programs(config: Config, name: str) -> None:
    found = made(config, read_topology(name))
    train, harvest = found.train, found.harvest
    assert not found.real and (train.settings["mesh.data"], train.settings["mesh.feature"]) == (4, 2)
    rows, features = 512 // 4, 1024 // 2
    assert train.cost.sum(lambda op: op.work.matmul) >= 2 * rows * features * WIDTH  # the encoder, at the least
    assert 0 < train.cost.floor_s <= train.cost.seconds <= train.worst.seconds and train.ratio >= 1
    assert train.first is not None and not train.cost.unknown_loops
    assert train.tokens_per_second == 512 / train.cost.seconds
    assert train.days(100 * 512) == pytest.approx(100 * train.cost.seconds / 86_400)
    kinds = {one["kind"] for one in tables.collectives(train.cost)}
    assert {"all-reduce", "all-gather"} <= kinds and "all-to-all" not in kinds
    assert harvest is not None and harvest.settings["mesh.feature"] == 1
    local = 8 * 32 // harvest.settings["mesh.data"]
    block = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * 128)
    assert harvest.cost.sum(lambda op: op.work.matmul) >= 2 * block * local
    assert train.program.peak_bytes >= 3 * 4 * features * WIDTH  # parameters and both moments


def test_one_gpu_harvests_as_a_gpu_does(config: Config) -> None:
    """Not as the processor that stands in for it, which skips batches of nothing but padding."""
    alone = replace(config, mesh=MeshConfig())
    harvest = made(alone, read_topology("h200:1")).harvest
    assert harvest is not None
    block = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * 128)
    assert harvest.cost.sum(lambda op: op.work.matmul) >= 2 * block * 8 * 32 and harvest.ratio >= 1


def test_it_prints_that_nothing_was_measured(
    config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    plan.run(config, {"topology": "v5e:2x2", "tokens": "2**30", "out": str(out)})
    said = " ".join(capsys.readouterr().out.split())
    for words in ("predictions of a model", "CPU devices stood in", "of 15.75 GiB", "x roofline", "all-reduce"):
        assert words in said
    for words in ("tokens/s", "1,073,741,824 tokens", "https://"):
        assert words in said
    found = json.loads(out.read_text())
    assert "nothing here was measured" in found["note"] and found["devices"] == 4 and not found["compiled_for_target"]
    assert found["train"]["tokens"] == 2**30 and found["train"]["collectives"] and found["harvest"]["parts"]
    assert found["train"]["predicted_s"] == pytest.approx(found["train"]["ratio"] * found["train"]["roofline_s"])


def test_the_first_k_takes_longer_than_the_last(config: Config) -> None:
    found = made(replace(config, train=replace(config.train, k_start=512)), read_topology("v5e:2x2")).train
    assert found.first is not None and found.first.seconds > found.cost.seconds


def test_what_does_not_fit_is_refused_with_what_would(config: Config) -> None:
    whole = made(config, read_topology("v5e:2x2")).train.program.peak_bytes / 2**30
    with pytest.raises(UserError) as refused:
        made(config, small("v5e:2x2", 0.9 * whole))
    said = str(refused.value)
    assert "do not fit v5e:2x2" in said and "--mesh.feature 4" in said
    with pytest.raises(UserError, match="nothing that was tried"):
        made(config, small("v5e:2x2", 1e-5))


def test_a_backbone_that_does_not_fit_a_host_leaves_the_training(config: Config) -> None:
    wide = {**MODEL, "vocab_size": 2**16}
    (Path(config.backbone.model) / "config.json").write_text(json.dumps(wide))
    trained = made(config, read_topology("v5e:2x2")).train.program.peak_bytes / 2**30
    found = made(config, small("v5e:2x2", 1.05 * trained))
    assert found.harvest is None and "do not fit a host" in found.harvest_refused
    assert plan.as_json(found, config)["harvest"]["refused"] == found.harvest_refused


def test_search_ranks_what_fits(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    found = search.search(config, read_topology("v5e:2x2"))
    rates = [one.tokens_per_second for one in found.fitting]
    assert rates == sorted(rates, reverse=True)
    meshes = {(one.settings["mesh.data"], one.settings["mesh.feature"]) for one in found.fitting}
    assert meshes == {(1, 4), (2, 2), (4, 1)}
    assert {one.settings["train.batch_rows"] for one in found.fitting} == {128, 256, 512, 1024, 2048}
    best = found.best(config)
    assert best.mesh.feature == found.fitting[0].settings["mesh.feature"] and best.sae == config.sae
    tables.print_search(found)
    assert "to roofline" in capsys.readouterr().out


def test_search_leaves_out_what_cannot_fit_by_arithmetic(config: Config) -> None:
    wide = replace(config, sae=replace(config.sae, features=4096), train=replace(config.train, batch_rows=64))
    found = search.search(wide, small("v5e:2x2", 3 * 2**20 / 2**30))
    assert found.refused[0][0]["mesh.feature"] == 1  # 4 MiB of state and gradient
    assert found.fitting and all(one.program.peak_bytes <= 3 * 2**20 for one in found.fitting)


def test_meshes_use_all_devices_and_divide_the_features() -> None:
    assert search.meshes(1024, 4) == [(1, 4), (2, 2), (4, 1)]
    assert search.meshes(6, 4) == [(2, 2), (4, 1)]
    assert search.meshes(6, 4, shard_optimizer=True) == []


def test_idle_devices_and_uneven_batches_are_refused(config: Config) -> None:
    with pytest.raises(UserError, match="leaves devices"):
        made(replace(config, mesh=MeshConfig(data=1, feature=2)), read_topology("v5e:2x2"))
    with pytest.raises(UserError, match="batch_rows 510"):
        made(replace(config, train=replace(config.train, batch_rows=510)), read_topology("v5e:2x4"))
    with pytest.raises(UserError, match="stand-in devices"):
        made(config, read_topology("v5e:4x4"))


def test_columns_that_a_step_is_expected_to_decode() -> None:
    assert predict.narrowing(20, 1, 512) == (1, 0)  # one shard keeps all of them
    assert predict.narrowing(20, 4, 65_536) == (2, 0)  # 5 on average, but some row has more than 10 on one shard
    assert predict.narrowing(20, 64, 65_536) == (4, 1)  # .3 on average; 6 somewhere: 10 columns of 20, not 5 or 3
    assert predict.narrowing(20, 4096, 64) == (4, 3)


@pytest.mark.parametrize(("text", "value"), [("2**20", 2**20), ("1_000", 1000), ("113,000", 113_000), (None, None)])
def test_whole_numbers(text: str | None, value: int | None) -> None:
    assert plan.whole({} if text is None else {"tokens": text}, "tokens") == value


@pytest.mark.parametrize("text", ["many", "-3", "0", "2**x", ""])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--tokens"):
        plan.whole({"tokens": text}, "tokens")


@pytest.mark.parametrize(
    ("source", "billions", "width"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03, 4096),
        ("Qwen/Qwen2-7B-Instruct", 7.62, 3584),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7.25, 4096),
    ],
)
def test_the_papers_models_are_known_without_a_hub(source: str, billions: float, width: int) -> None:
    from fac_jax.backbone.model import parameters

    config = model_config(source)
    count = sum(math.prod(one.shape) for one in parameters(config, config.n_layers, True, 1).values())
    assert round(count / 1e9, 2) == billions and config.d_model == width


@pytest.mark.parametrize(
    ("text", "needed", "limit"),
    [
        ("Ran out of memory in memory space hbm. Used 22.04G of 15.75G hbm. Exceeded", 22.04, 15.75),
        ("memory required for HLO temporaries (502.97G) exceeds available HBM (94.75G).", 502.97, 94.75),
        ("out of memory", math.nan, 16.0),
    ],
)
def test_what_the_compiler_says_of_memory(text: str, needed: float, limit: float) -> None:
    found = memory_error(text, 16.0 * 2**30)
    assert found == pytest.approx((needed * 2**30, limit * 2**30), nan_ok=True)


def test_labels_keep_what_tells() -> None:
    assert tables.label("jit(step)/cond/branch_0_fun/transpose(jvp())/shard_map/bf,bd->fd/dot_general") == (
        "backward: bf,bd->fd/dot_general"
    )
    assert tables.label("jit(step)/add") == "add" and tables.label("") == "moving data"
    assert tables.label("jit(step)/(jvp()/reduce_sum:jit(step)/psum)") == "reduce_sum"


def test_chips_are_consistent() -> None:
    for chip in CHIPS.values():
        assert chip.source.startswith("https://")
        for shape in chip.shapes:
            assert read_topology(f"{chip.name}:{shape}").chips >= 1


def test_the_command_line(config: Config, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert main(["plan", str(path)]) == 1 and "needs --topology" in capsys.readouterr().err
    assert main(["plan", str(path), "--topology", "v5e:2x2", "--sae.features", "512"]) == 0
    assert "512 features" in capsys.readouterr().out


def test_search_is_a_flag_without_a_value(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, seen = tmp_path / "config.yaml", []
    path.write_text(to_yaml(config))
    monkeypatch.setattr(plan, "run", lambda config, options: seen.append((config.sae.features, options)))
    assert main(["plan", str(path), "--search", "--topology=v5e:2x2", "--sae.features", "512"]) == 0
    assert seen == [(512, {"topology": "v5e:2x2", "search": "--search", "config": str(path)})]
