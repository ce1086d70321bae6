"""A .gguf file read as if it were a Hugging Face folder: config mapping, tensors in Hugging Face layout, tokenizer.

Reads one .gguf file (architectures llama, which Mistral files carry too, and qwen2); writes nothing. Quantised tensors
are expanded to float32 one at a time. Query and key rows of llama files are stored interleaved and are put back.
"""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fac_jax.errors import UserError

CONTROL = 3  # tokenizer.ggml.token_type of special tokens
SUFFIXES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


@functools.lru_cache(maxsize=2)
def _open(path: Path) -> GGUFReader:
    """Opened once: parsing the vocabulary takes seconds."""
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path}: not a readable .gguf file ({error}); download it again") from None


def _field(path: Path, key: str, default: Any = None) -> Any:
    found = _open(path).fields.get(key)
    return default if found is None else found.contents()


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; names it does not know stay as they are, and are refused by the loader."""
    if not name.startswith("blk."):
        return SUFFIXES.get(name, name)
    _, block, suffix = name.split(".", 2)
    return f"model.layers.{block}.{SUFFIXES[suffix]}" if suffix in SUFFIXES else name


def read_config(path: Path) -> dict[str, Any]:
    """The metadata as a Hugging Face config mapping; keys that the file lacks are None and refused by the reader."""
    family = _field(path, "general.architecture")
    if family not in ("llama", "qwen2"):
        raise UserError(f"{path}: GGUF architecture {family!r}; llama (Mistral included) and qwen2 are read")
    names = {tensor.name for tensor in _open(path).tensors}
    if "rope_freqs.weight" in names or _field(path, f"{family}.rope.scaling.type", "none") != "none":
        raise UserError(
            f"{path}: scaled rotary frequencies are not read from GGUF; use the Hugging Face folder of this model"
        )

    def get(key: str) -> Any:
        return _field(path, f"{family}.{key}")

    vocab = next(int(t.shape[1]) for t in _open(path).tensors if t.name == "token_embd.weight")
    return {
        "model_type": family,
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]],
        "vocab_size": vocab,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "hidden_act": "silu",
        "rms_norm_eps": float(np.float32(get("attention.layer_norm_rms_epsilon")).astype(str)),
        "rope_theta": get("rope.freq_base") or 10_000.0,  # llama.cpp's default where the file says nothing
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": _field(path, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(path, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(path, "tokenizer.ggml.padding_token_id"),
    }


class GgufTensors:
    """Tensors of a .gguf file under Hugging Face names, shapes and row order."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path
        self._tensors = {_hf_name(tensor.name): tensor for tensor in _open(path).tensors}
        self._permuted = {}
        if _field(path, "general.architecture") == "llama":
            heads = _field(path, "llama.attention.head_count")
            self._permuted = {
                "q_proj.weight": heads,
                "k_proj.weight": _field(path, "llama.attention.head_count_kv", heads),
            }

    def names(self) -> set[str]:
        """Hugging Face names of all tensors."""
        return set(self._tensors)

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes as [out, in]."""
        return {n: tuple(int(s) for s in self._tensors[n].shape[::-1]) for n in names if n in self._tensors}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """One slice, float32; the tensor is expanded whole, as its blocks know no slices."""
        tensor = self._tensors[name]
        w = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(tensor.shape[::-1])
        heads = next((n for suffix, n in self._permuted.items() if name.endswith(suffix)), None)
        if heads is not None:
            w = w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        return w[index]

    def digest(self) -> str:
        """Hash of every tensor's name, type, shape and first bytes."""
        state = hashlib.sha256()
        for tensor in _open(self._path).tensors:
            state.update(f"{tensor.name} {tensor.tensor_type.name} {tensor.shape.tolist()}".encode())
            state.update(np.ascontiguousarray(tensor.data.reshape(-1)[:4096]).tobytes())
        return state.hexdigest()


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the metadata, with special tokens and chat template, as a transformers fast tokenizer."""
    kind = (_field(path, "tokenizer.ggml.model"), _field(path, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise UserError(
            f"{path}: GGUF tokenizer {kind[0]}/{kind[1]} is not read; use the Hugging Face folder of this model"
        )
    tokens = _field(path, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(path, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(path, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def named(key: str) -> str | None:
        index = _field(path, f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding") or named("eos"),
        chat_template=_field(path, "tokenizer.chat_template"),
        model_max_length=_field(path, f"{_field(path, 'general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
    )
