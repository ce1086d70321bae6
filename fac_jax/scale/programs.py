"""The real training step and the real harvest step, compiled for devices that are not here: no array is ever made.

The functions are those that `fac train` and `fac harvest` run; only their inputs are shapes with shardings. A backbone
is known by its config alone: of the paper's three models the figures lie in `architectures/`, other sources are read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fac_jax.activations.rows import row_dtype
from fac_jax.backbone.config import ModelConfig, read_model_config
from fac_jax.backbone.model import Backbone, parameters
from fac_jax.backbone.weights import DTYPES, Loaded, open_model
from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.mesh import DATA, FEATURE, platform, row_sharding
from fac_jax.sae.problem import Problem, pose
from fac_jax.sae.step import Batch, TrainState, init_state, make_train_step, state_shardings

ARCHITECTURES = Path(__file__).with_name("architectures")
_SIZES = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """A compiled program: its text and what it takes of a device's memory, in bytes."""

    text: str
    peak_bytes: int
    """Arguments, results and temporaries together, at the moment when they are the most."""
    argument_bytes: int
    temporary_bytes: int
    code_bytes: int
    """The program itself."""


class OutOfMemory(Exception):
    """The program does not fit: bytes that it needs, as far as the compiler says, and bytes that there are."""

    def __init__(self, needed: float, limit: float) -> None:
        unit, name = (2**30, "GiB") if limit >= 2**30 else (2**20, "MiB")
        super().__init__(f"{needed / unit:.2f} {name} of {limit / unit:.2f} {name}")
        self.needed, self.limit = needed, limit


def model_config(source: str) -> ModelConfig:
    """Of a backbone, without its weights where they are not at hand. Raises UserError for a source that is none."""
    known = ARCHITECTURES / f"{source.replace('/', '--')}.json"
    if "/" in source and known.exists():
        return read_model_config(json.loads(known.read_text(encoding="utf-8")))
    folder = Path(source).expanduser()
    return read_model_config(folder) if folder.is_dir() else open_model(source)[0]


def posed(config: Config, d_model: int, platform: str) -> Problem:
    """The problem of training; the scale of the rows, which only a store knows, changes no cost."""
    return pose(config.sae, config.train, d_model, d_model**0.5, platform)


def compile_train(problem: Problem, mesh: Mesh, limit: float) -> Program:
    """The training step for the devices of `mesh`, each with `limit` bytes. Raises OutOfMemory."""
    rows = problem.train.batch_rows
    if rows % mesh.shape[DATA]:
        raise UserError(f"train.batch_rows {rows} does not divide by {mesh.shape[DATA]} shards of the data axis")
    state = abstract_state(problem, mesh)
    batch = Batch(
        jax.ShapeDtypeStruct((rows, problem.d_model), jnp.bfloat16, sharding=row_sharding(mesh, rows)),
        jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=row_sharding(mesh, rows)),
    )
    step: Any = make_train_step(problem, mesh)
    return _compile(step.lower(state, batch), mesh, limit)


def abstract_state(problem: Problem, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state that a training carries."""
    state = jax.eval_shape(lambda: init_state(problem, np.zeros(problem.d_model), 0, mesh))
    placed = state_shardings(state, mesh, problem.train.shard_optimizer)
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, placed)


def state_bytes(problem: Problem, mesh: Mesh) -> int:
    """Of one device's part of the state, without padding."""
    leaves = jax.tree.leaves(abstract_state(problem, mesh))
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def compile_harvest(config: Config, model: ModelConfig, mesh: Mesh, limit: float, target: str) -> Program:
    """The backbone up to the last layer that is read, on one host's devices, which may only stand in for those of
    platform `target`. Raises OutOfMemory."""
    backbone, layers = config.backbone, config.harvested_layers
    model.check_layer(layers[-1], backbone.model)
    dtype = "bfloat16" if backbone.dtype == "auto" else backbone.dtype
    table = parameters(model, layers[-1], False, mesh.shape[FEATURE])
    arrays: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(
            one.shape, np.dtype(np.float32) if one.norm else DTYPES[dtype], sharding=NamedSharding(mesh, one.spec)
        )
        for name, one in table.items()
    }
    none: Any = None
    loaded = Loaded(Backbone(model, arrays), model, none, "", mesh, dtype)
    kept = str(row_dtype(config.harvest.dtype))
    lowered = loaded.lower_residuals(layers, kept, backbone.rows_per_batch, backbone.row_tokens, target)
    return _compile(lowered, mesh, limit)


def _compile(lowered: Any, mesh: Mesh, limit: float) -> Program:
    on_target = platform(mesh) != "cpu"
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(*memory_error(str(error), limit)) from None
    memory = compiled.memory_analysis()
    # XLA's CPU compiler counts neither arguments nor results in its peak.
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = int(max(memory.peak_memory_in_bytes, 0 if on_target else whole + memory.temp_size_in_bytes))
    if peak > limit:
        raise OutOfMemory(peak, limit)
    return Program(
        compiled.as_text(),
        peak,
        int(memory.argument_size_in_bytes),
        int(memory.temp_size_in_bytes),
        int(memory.generated_code_size_in_bytes),
    )


def memory_error(text: str, limit: float) -> tuple[float, float]:
    """Bytes needed and bytes there are, from what the TPU compiler says, in either of its forms."""
    for form in (
        r"Used ([\d.]+)([BKMGT]) of ([\d.]+)([BKMGT]) hbm",
        r"\(([\d.]+)([BKMGT])\) exceeds available HBM \(([\d.]+)([BKMGT])\)",
    ):
        found = re.search(form, text)
        if found:
            return float(found[1]) * _SIZES[found[2]], float(found[3]) * _SIZES[found[4]]
    return float("nan"), limit
