"""Low-rank adapters (LoRA, arXiv 2106.09685): W x becomes W x + (alpha / rank) B A drop(x); only A and B are trained.

Here matrices are [in, out] as in `backbone/model.py`, so A is [in, rank] and B [rank, out], one of each a block and
matrix. A starts uniform as peft's does and B at 0: the first step sees the model as it was. A and B are float32 and lie
on the mesh as the matrix does that they are added to.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray
from safetensors.numpy import save_file

from fac_jax.backbone.adapter import PREFIX
from fac_jax.backbone.config import ModelConfig
from fac_jax.backbone.model import Tree, parameters
from fac_jax.backbone.weights import Loaded
from fac_jax.config.downstream import LoraConfig
from fac_jax.mesh import FEATURE
from fac_jax.runs import write_text, writing

MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
"""Names of the matrices in Hugging Face's models."""


def init_lora(config: ModelConfig, lora: LoraConfig, seed: int, mesh: Mesh) -> Tree:
    """A and B of every adapted matrix, named `lora_a_q`, `lora_b_q` and so on, [blocks, in, rank], [blocks, rank, out].

    Born on their shards.
    """
    shapes, places = {}, {}
    for name in lora.matrices:
        for side, shape, spec in _sides(config, lora, name, mesh.shape[FEATURE]):
            shapes[f"lora_{side}_{name}"], places[f"lora_{side}_{name}"] = shape, NamedSharding(mesh, spec)

    def init(key: PRNGKeyArray) -> Tree:
        made = {}
        for place, (name, shape) in enumerate(sorted(shapes.items())):
            bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5), as peft starts
            uniform = jax.random.uniform(jax.random.fold_in(key, place), shape, minval=-bound, maxval=bound)
            made[name] = uniform if "_a_" in name else jnp.zeros(shape)
        return made

    return jax.jit(init, out_shardings=places)(jax.random.key(seed))


def adapters(params: Tree, lora: LoraConfig, key: PRNGKeyArray | None) -> Tree:
    """What `run_blocks` adds to the blocks; with a key some inputs are dropped (training), without one none is."""
    blocks = next(iter(params.values())).shape[0]
    added: dict[str, Any] = {**params, "lora_scale": jnp.full(blocks, lora.alpha / lora.rank, jnp.float32)}
    if key is not None and lora.dropout > 0:
        added["lora_kept"] = jnp.full(blocks, 1 - lora.dropout, jnp.float32)
        for place, name in enumerate(lora.matrices):
            added[f"lora_keep_{name}"] = jax.random.key_data(jax.random.split(jax.random.fold_in(key, place), blocks))
    return added


def merged(loaded: Loaded, params: Tree, lora: LoraConfig) -> Loaded:
    """The backbone with the adapters added to its matrices, in their type; the one given stays as it is."""
    graph, state = nnx.split(loaded.model)
    model = nnx.merge(graph, state)

    for name in lora.matrices:
        w = model.blocks[f"w_{name}"][...]
        sides = params[f"lora_a_{name}"], params[f"lora_b_{name}"]
        model.blocks[f"w_{name}"] = nnx.Param(_added(w, *sides, lora.alpha / lora.rank, place=w.sharding))
    return replace(loaded, model=model, compiled={})


@partial(jax.jit, static_argnames="place")
def _added(
    w_nio: Float[Array, "n i o"],
    a_nir: Float[Array, "n i r"],
    b_nro: Float[Array, "n r o"],
    scale: float,
    *,
    place: Any,
) -> Float[Array, "n i o"]:
    total_nio = w_nio.astype(jnp.float32) + scale * jnp.einsum("nir,nro->nio", a_nir, b_nro)
    return jax.lax.with_sharding_constraint(total_nio.astype(w_nio.dtype), place)


def save_peft(folder: Path, params: Tree, head_d: Float[Array, " d"], lora: LoraConfig, model: str) -> None:
    """The adapters as peft reads them (`PeftModel.from_pretrained`), and beside them head.safetensors."""
    tensors = {}
    for name in lora.matrices:
        for side in "ab":
            stacked = np.asarray(params[f"lora_{side}_{name}"], np.float32)
            for block, value in enumerate(stacked):
                where = f"{PREFIX}model.layers.{block}.{MODULES[name]}.lora_{side.upper()}.weight"
                tensors[where] = np.ascontiguousarray(value.T)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model,
        "task_type": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [MODULES[name].rpartition(".")[2] for name in lora.matrices],
        "bias": "none",
        "inference_mode": True,
    }
    for file, found in (("adapter_model.safetensors", tensors), ("head.safetensors", {"weight": np.asarray(head_d)})):
        with writing(folder / file) as temporary:
            save_file(found, temporary, {"format": "pt"})
    write_text(folder / "adapter_config.json", json.dumps(config, indent=1))


def _sides(config: ModelConfig, lora: LoraConfig, name: str, feature: int) -> list[tuple[str, tuple[int, ...], P]]:
    """Shape and placement of A and of B of a matrix."""
    w = parameters(config, config.n_layers, False, feature)[f"w_{name}"]
    (blocks, width, out), (_, in_axis, out_axis) = w.shape, w.spec
    return [
        ("a", (blocks, width, lora.rank), P(None, in_axis, None)),
        ("b", (blocks, lora.rank, out), P(None, None, out_axis)),
    ]
