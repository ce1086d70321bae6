"""Strict reading of a model's `config.json`: everything that changes the computation is understood or refused.

Reads `config.json` (and `generation_config.json` beside it) of a Llama, Qwen2 or Mistral model in either of the two
forms Hugging Face has written (`rope_theta` at the top level, or inside `rope_parameters`); GGUF metadata becomes the
same mapping in `gguf_file.py`. Writes nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fac_jax.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2")
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)
# Settings that would change the forward pass, with the only value this implementation computes.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies beyond the trained context."""

    kind: Literal["linear", "llama3"]
    """linear divides every frequency; llama3 (Llama 3.1) only the low ones, with a smooth passage."""
    factor: float
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / this are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / this are left alone."""
    original_max_positions: int = 8192
    """llama3: context before stretching, in tokens."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one decoder-only transformer."""

    family: str
    """llama, mistral or qwen2."""
    n_layers: int
    """Blocks in the whole model, however many are loaded."""
    d_model: int
    """Width of the residual stream."""
    d_ff: int
    """Hidden units of a block's gated feed-forward part."""
    n_heads: int
    """Query heads."""
    n_kv_heads: int
    """Key and value heads; each serves n_heads / n_kv_heads query heads."""
    head_dim: int
    """Width of a head."""
    vocab: int
    """Rows of the embedding."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None
    """Stretching of the rotary frequencies, if any."""
    rms_eps: float
    """Added to the mean square before its root."""
    tie_embeddings: bool
    """The unembedding is the embedding."""
    qkv_bias: bool
    """Queries, keys and values have a bias (Qwen2)."""
    sliding_windows: tuple[int | None, ...]
    """Tokens each block's attention looks back on, itself included; None is all of them."""
    max_positions: int
    """Context length, in tokens."""
    eos_ids: tuple[int, ...]
    """Tokens that end a generation."""

    def check_layer(self, layer: int, source: str) -> None:
        """Raise UserError unless `layer` blocks can be applied; `source` names the model."""
        if not 0 <= layer <= self.n_layers:
            raise UserError(
                f"{source}: the model has {self.n_layers} layers, config asks {layer}; lower backbone.layer, "
                "harvest.layers or sweep.layers"
            )


def read_model_config(source: Mapping[str, Any] | str | Path) -> ModelConfig:
    """Read a config mapping, a `config.json`, or the folder that holds one.

    Raises UserError for a missing file, a family other than `FAMILIES`, missing keys (all named) and every setting
    that would change the forward pass in a way this implementation does not compute.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source, "model config")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    raw = _read_json(path)
    generation = path.parent / "generation_config.json"
    if generation.exists():
        raw["generation_eos"] = _read_json(generation).get("eos_token_id")
    return _from_mapping(raw, str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a Hugging Face model folder holds a config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download the model again") from None


def _from_mapping(raw: Mapping[str, Any], where: str) -> ModelConfig:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where} has model_type {family!r}; backbones are read for {', '.join(FAMILIES)}")
    missing = [key for key in REQUIRED if raw.get(key) is None]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; it is no complete {family} config")
    wrong = [f"{key} = {raw[key]!r} (only {only!r})" for key, only in FIXED.items() if raw.get(key, only) != only]
    if wrong:
        raise UserError(f"{where} asks for what this backbone does not compute: {'; '.join(wrong)}")
    theta, scaling = _rope(raw, where)
    d_model, n_heads, n_layers = raw["hidden_size"], raw["num_attention_heads"], raw["num_hidden_layers"]
    config = ModelConfig(
        family=family,
        n_layers=n_layers,
        d_model=d_model,
        d_ff=raw["intermediate_size"],
        n_heads=n_heads,
        n_kv_heads=raw.get("num_key_value_heads") or n_heads,
        head_dim=raw.get("head_dim") or d_model // n_heads,
        vocab=raw["vocab_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=raw["rms_norm_eps"],
        tie_embeddings=raw.get("tie_word_embeddings") or False,
        qkv_bias=family == "qwen2",
        sliding_windows=_windows(raw, n_layers, where),
        max_positions=raw.get("max_position_embeddings") or 2048,
        eos_ids=_ids(raw.get("eos_token_id"), raw.get("generation_eos")),
    )
    if config.n_heads % config.n_kv_heads or config.head_dim % 2:
        raise UserError(
            f"{where}: {config.n_heads} heads cannot share {config.n_kv_heads} key-value heads "
            f"of width {config.head_dim} (it must be even)"
        )
    return config


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (new form) or `rope_theta` and `rope_scaling` (old form)."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise UserError(
            f"{where} has neither rope_theta nor rope_parameters.rope_theta; add the one the model was made with"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where} has partial_rotary_factor {parameters['partial_rotary_factor']}; only 1.0 is computed"
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), RopeScaling("linear", float(parameters["factor"]))
    if kind != "llama3":
        raise UserError(f"{where} has rope_type {kind!r}; default, linear and llama3 are computed")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if key not in parameters]
    if missing:
        raise UserError(f"{where}: rope_type llama3 lacks {', '.join(missing)}")
    factor, low, high, original = (parameters[key] for key in keys)
    return float(theta), RopeScaling("llama3", float(factor), float(low), float(high), int(original))


def _windows(raw: Mapping[str, Any], n_layers: int, where: str) -> tuple[int | None, ...]:
    """Window of every block, by the rules of each family: Mistral always, Qwen2 only where use_sliding_window says."""
    size = raw.get("sliding_window")
    if raw["model_type"] == "qwen2" and not raw.get("use_sliding_window", False):
        size = None
    if size is None or raw["model_type"] == "llama":
        return (None,) * n_layers
    if raw["model_type"] == "mistral":
        return (size,) * n_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", n_layers)
        return tuple(size if layer >= first else None for layer in range(n_layers))
    if len(kinds) != n_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{where}: layer_types {sorted(set(kinds))} x {len(kinds)} do not describe {n_layers} layers")
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def _ids(*values: int | list[int] | None) -> tuple[int, ...]:
    found: set[int] = set()
    for value in values:
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))
