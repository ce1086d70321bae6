"""Plans by the TPU compiler itself; skipped where libtpu is not installed (`bash launch/test-plan.sh` installs it)."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from fac_jax.config.activations import BackboneConfig
from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig
from fac_jax.config.sae import SaeConfig, TrainConfig
from fac_jax.errors import UserError
from fac_jax.mesh import make_mesh
from fac_jax.scale import plan, predict, tables
from fac_jax.scale.chips import CHIPS, read_topology
from fac_jax.scale.devices import has_libtpu, machine, prepare
from fac_jax.scale.hlo import parse
from fac_jax.scale.programs import compile_harvest, model_config

pytestmark = [
    pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed: bash launch/test-plan.sh"),
    pytest.mark.timeout(900),
]
MILLION = 2**20


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    prepare(read_topology("v5e:2x2"))


def asked(features: int, feature_shards: int, rows: int) -> Config:
    """Tied, K 20, Adam; without the schedule's wider branches, which only make the program larger."""
    return Config(
        mesh=MeshConfig(feature=feature_shards),
        backbone=BackboneConfig(model="meta-llama/Llama-3.1-8B-Instruct", layer=16, rows_per_batch=8),
        sae=SaeConfig(features=features, k=20),
        train=TrainConfig(batch_rows=rows, k_start=20, anneal_steps=0, aux_coefficient=0),
    )


def step(config: Config, topology: str, slices: int = 1) -> predict.Step:
    target = machine(read_topology(topology, slices))
    assert target.real
    return predict.train_step(config, 4096, target)


def test_65536_features_fit_sixteen_v5e() -> None:
    found = step(asked(65_536, 4, 8_192), "v5e:4x4")
    assert found.program.peak_bytes < 4 * 2**30 and found.limit_bytes == 15.75 * 2**30
    assert 1 <= found.ratio and found.tokens_per_second > 0
    encoder = 2 * 8_192 * 4_096 * 65_536 / 16
    assert encoder <= found.cost.sum(lambda op: op.work.matmul) < 7 * encoder


def test_a_million_features_fit_256_v5e_and_no_preactivations_are_exchanged() -> None:
    found = step(asked(MILLION, 16, 65_536), "v5e:16x16")
    assert found.program.peak_bytes < 12 * 2**30
    exchanged = tables.collectives(found.cost)
    kinds = [one["kind"] for one in exchanged]
    assert "all-to-all" not in kinds and "ragged-all-to-all" not in kinds
    gathers = [one for one in exchanged if one["kind"] == "all-gather" and one["what"] == "all_gather"]
    assert len(gathers) == 1 and gathers[0]["count"] == 1 and gathers[0]["group"] == 16
    candidates = 65_536 // 16 * 16 * 20 * 4  # rows of a device, shards, K, float32
    assert candidates <= gathers[0]["bytes"] <= 7 * candidates  # tiles may pad K to 128
    # Of a device's pre-activations, 1.07 GB, nothing is exchanged but the gradient that all of them share.
    assert all(one["what"].startswith("backward") for one in exchanged if one["bytes"] > 0.3e9)


def test_a_million_features_on_four_v5e_are_refused_with_what_would_fit() -> None:
    with pytest.raises(UserError) as refused:
        plan.make(asked(MILLION, 4, 8_192), read_topology("v5e:2x2"), 1, 1)
    said = str(refused.value)
    assert "do not fit v5e:2x2" in said and "of 15.75 GiB" in said
    assert "--train.optimizer adafactor" in said and "--topology v5e:2x4" in said


def test_slices_are_joined_along_the_data_axis() -> None:
    one, two = (step(asked(16_384, 4, 2_048), "v5e:2x2", slices) for slices in (1, 2))
    assert (one.settings["mesh.data"], two.settings["mesh.data"]) == (1, 2)
    gradient = 4 * 16_384 // 4 * 4_096
    assert gradient not in [one["bytes"] for one in tables.collectives(one.cost)]
    across = [one for one in tables.collectives(two.cost) if one["bytes"] == gradient]
    assert [(one["kind"], one["group"]) for one in across] == [("all-reduce", 2)]


def test_a_harvest_needs_no_collectives_when_hosts_hold_the_model() -> None:
    config = asked(65_536, 4, 8_192)
    host = machine(read_topology("v5e:2x2"))
    mesh = make_mesh(MeshConfig(feature=1), host.devices)
    model = model_config(config.backbone.model)
    shallow = replace(config, backbone=replace(config.backbone, layer=2))
    program = compile_harvest(shallow, model, mesh, 15.75 * 2**30, "tpu")
    assert "all-reduce" not in program.text


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.platform == "tpu"])
def test_every_tpu_is_known_to_the_compiler(name: str) -> None:
    target = machine(read_topology(f"{name}:{CHIPS[name].shapes[0]}"))
    assert target.real and len(target.devices) == 4 * CHIPS[name].devices


def test_a_shape_that_the_compiler_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="comes in 2x2, 2x4"):
        machine(read_topology("v5e:3x5"))


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.platform == "tpu"])
def test_clock_and_peak_of_a_chip_agree_with_the_compilers_own_estimates(name: str) -> None:
    one = machine(read_topology(f"{name}:{CHIPS[name].shapes[0]}")).devices[0]
    a = jax.ShapeDtypeStruct((8_192, 8_192), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(one))
    module = parse(jax.jit(jnp.dot).lower(a, a).compile().as_text())
    cycles = sum(each.estimated_cycles for each in module.entry)
    chip = CHIPS[name].device
    assert chip.clock_hz and 1 < cycles / chip.clock_hz / (2 * 8_192**3 / chip.matmul_flops) < 1.5
