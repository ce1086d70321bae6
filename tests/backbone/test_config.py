"""Strict reading of config.json: both forms of Hugging Face, and refusal of what would change the computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fac_jax.backbone.config import RopeScaling, read_model_config
from fac_jax.errors import UserError
from tests.backbone.tiny_backbone import TINY


def test_old_and_new_forms_of_the_rotary_settings_agree() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = TINY | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | llama3}
    new = {key: value for key, value in TINY.items() if key != "rope_theta"}
    new |= {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | llama3}
    assert read_model_config(old) == read_model_config(new)
    assert read_model_config(old).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    older = TINY | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert read_model_config(older).rope_scaling == RopeScaling("linear", 4.0)


def test_defaults_of_the_families() -> None:
    config = read_model_config({key: value for key, value in TINY.items() if key != "num_key_value_heads"})
    assert (config.n_kv_heads, config.head_dim, config.qkv_bias, config.tie_embeddings) == (8, 4, False, False)
    assert read_model_config(TINY | {"model_type": "qwen2"}).qkv_bias


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, (8, 8, 8)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None, None)),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, (None, None, None)),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 8),
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, None, 8),
        ),
    ],
)
def test_windows(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read_model_config(TINY | changes).sliding_windows == windows


def test_generation_config_adds_stop_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    assert read_model_config(tmp_path).eos_ids == (3, 5, 258)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"has model_type 'gpt2'; backbones are read for llama, mistral, qwen2"),
        ({"hidden_size": None, "vocab_size": None}, r"lacks vocab_size, hidden_size"),
        ({"hidden_act": "gelu", "mlp_bias": True}, r"hidden_act = 'gelu' \(only 'silu'\); mlp_bias = True"),
        ({"quantization_config": {"bits": 4}}, r"does not compute: quantization_config"),
        ({"rope_theta": None}, r"neither rope_theta nor rope_parameters.rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_type 'yarn'; default, linear and llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, r"llama3 lacks low_freq_factor, high_freq_factor"),
        ({"num_attention_heads": 6}, r"6 heads cannot share 4 key-value heads"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_model_config(TINY | changes)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json does not exist"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not valid JSON"):
        read_model_config(tmp_path)
