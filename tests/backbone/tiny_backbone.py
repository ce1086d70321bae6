"""Tiny random models, written as real model folders and .gguf files without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fac_jax.backbone.config import ModelConfig, read_model_config
from fac_jax.backbone.model import parameters

VOCAB = 260
EOS = 258
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
}


def byte_vocabulary() -> list[str]:
    """The 256 byte-level symbols, one merge and three special tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*symbols, "th", "<|start|>", "<|end|>", "<|unknown|>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with one merge and a chat template."""
    tokens = byte_vocabulary()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        chat_template="{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}",
    )


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face names and shapes; norms and biases are random too, so that none can be forgotten."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for wanted in parameters(config, config.n_layers, True, 1).values():
        blocks = range(config.n_layers) if wanted.stacked else [None]
        shape = wanted.shape[1:] if wanted.stacked else wanted.shape
        shape = shape[::-1] if wanted.transposed else shape
        for block in blocks:
            values = rng.standard_normal(shape).astype(np.float32)
            values = 1 + 0.2 * values if len(shape) == 1 else values * (0.7 if "embed" in wanted.source else 0.25)
            tensors[wanted.source.format(block)] = values
    return tensors


def write_model(folder: Path, files: int = 1, seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """A Hugging Face folder; of several files the first holds what is outside the blocks, then block by block."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = TINY | changes
    tensors = random_tensors(read_model_config(raw), seed)
    (folder / "config.json").write_text(json.dumps(raw))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        where = {}
        for name in tensors:
            block = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
            where[name] = f"model-{block % files + 1:05d}-of-{files:05d}.safetensors"
        for file in sorted(set(where.values())):
            save_file({name: tensors[name] for name in where if where[name] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    tiny_tokenizer().save_pretrained(folder)
    return tensors


def write_gguf(path: Path, seed: int = 0, pre: str = "smollm", **changes: Any) -> dict[str, np.ndarray]:
    """The same model as a .gguf file (float32 tensors, query and key rows interleaved as llama.cpp stores them)."""
    import gguf

    raw = TINY | changes
    config, family = read_model_config(raw), raw["model_type"]
    tensors = random_tensors(config, seed)
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = byte_vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(EOS - 1)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(EOS + 1)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}")
    for name, array in tensors.items():
        heads = {"q_proj.weight": config.n_heads, "k_proj.weight": config.n_kv_heads}.get(name.split(".", 4)[-1])
        if family == "llama" and heads is not None:
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _gguf_name(name: str) -> str:
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outside["lm_head.weight"] = "output.weight"
    if name in outside:
        return outside[name]
    _, _, block, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    return f"blk.{block}.{parts[part]}.{kind}"
