"""The forward pass of Llama, Qwen2 and Mistral: one pre-norm decoder with rotary attention and a gated MLP.

Reads token ids packed into rows (several documents a row, told apart by segment), computes the residual stream after
any number of blocks and, from the last, logits. Writes nothing. Blocks are one `lax.scan` over stacked parameters, so
compile time does not grow with depth; matrices are stored [in, out], the transpose of Hugging Face's layout.

Sharding: attention heads and MLP units lie along `feature` where that axis divides them and are replicated where it
does not; every parameter is replicated along `data`, which splits rows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fac_jax.backbone.config import ModelConfig
from fac_jax.errors import UserError
from fac_jax.mesh import FEATURE

Tree = dict[str, Any]
# Given queries, keys and values of one block: what attention read, and whatever the caller wants kept of that block.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
NO_WINDOW = np.int32(2**30)


@dataclass(frozen=True)
class Parameter:
    """Shape, placement and Hugging Face name of one parameter; `{}` in the name is the block of a stacked one."""

    shape: tuple[int, ...]
    spec: P
    source: str
    norm: bool = False
    """Scales and biases stay float32 in every compute type: they are small and multiply float32 values."""

    @property
    def stacked(self) -> bool:
        """One slice per block along the first axis."""
        return "{}" in self.source

    @property
    def transposed(self) -> bool:
        """Matrices of the blocks are the transposes of the files'."""
        return self.stacked and len(self.shape) == 3


def parameters(config: ModelConfig, layers: int, head: bool, feature: int) -> dict[str, Parameter]:
    """Every parameter of a backbone of `layers` blocks, with the unembedding if `head`, on `feature` shards."""
    d, f, v, n = config.d_model, config.d_ff, config.vocab, layers
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    # Heads are split only in whole key-value groups: query heads then find their keys on their own shard.
    heads = FEATURE if config.n_kv_heads % feature == 0 else None
    units = FEATURE if f % feature == 0 else None
    words = FEATURE if v % feature == 0 else None
    block = "model.layers.{}."
    table = {
        "embed_vd": Parameter((v, d), P(words, None), "model.embed_tokens.weight"),
        "attention_norm": Parameter((n, d), P(), block + "input_layernorm.weight", norm=True),
        "w_q": Parameter((n, d, q), P(None, None, heads), block + "self_attn.q_proj.weight"),
        "w_k": Parameter((n, d, kv), P(None, None, heads), block + "self_attn.k_proj.weight"),
        "w_v": Parameter((n, d, kv), P(None, None, heads), block + "self_attn.v_proj.weight"),
        "w_o": Parameter((n, q, d), P(None, heads, None), block + "self_attn.o_proj.weight"),
        "mlp_norm": Parameter((n, d), P(), block + "post_attention_layernorm.weight", norm=True),
        "w_gate": Parameter((n, d, f), P(None, None, units), block + "mlp.gate_proj.weight"),
        "w_up": Parameter((n, d, f), P(None, None, units), block + "mlp.up_proj.weight"),
        "w_down": Parameter((n, f, d), P(None, units, None), block + "mlp.down_proj.weight"),
    }
    if config.qkv_bias:
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            table[f"b_{name}"] = Parameter((n, width), P(None, heads), f"{block}self_attn.{name}_proj.bias", norm=True)
    if head:
        table["final_norm"] = Parameter((d,), P(), "model.norm.weight", norm=True)
        if not config.tie_embeddings:
            table["unembed_vd"] = Parameter((v, d), P(words, None), "lm_head.weight")
    return table


class Backbone(nnx.Module):
    """Embedding, the first `layers` blocks (stacked) and, when loaded whole, final norm and unembedding."""

    def __init__(self, config: ModelConfig, arrays: Mapping[str, Array]) -> None:
        """`arrays` are named and shaped as `parameters` says."""
        self.config = config
        self.layers: int = arrays["w_q"].shape[0]
        self.embed_vd = nnx.Param(arrays["embed_vd"])
        outside = ("embed_vd", "final_norm", "unembed_vd")
        self.blocks = nnx.Dict({name: nnx.Param(value) for name, value in arrays.items() if name not in outside})
        self.final_norm = nnx.Param(arrays["final_norm"]) if "final_norm" in arrays else None
        self.unembed_vd = nnx.Param(arrays["unembed_vd"]) if "unembed_vd" in arrays else None

    def stacked(self, first: int, last: int) -> Tree:
        """Raw arrays of blocks `first` to `last` - 1, with each block's attention window."""
        if last > self.layers:
            raise UserError(f"residual after {last} blocks asked of a backbone of which {self.layers} are loaded")
        windows = [NO_WINDOW if window is None else window for window in self.config.sliding_windows[first:last]]
        arrays = {name: value[...] for name, value in self.blocks.items()}
        if (first, last) != (0, self.layers):
            arrays = {name: value[first:last] for name, value in arrays.items()}
        return arrays | {"window": jnp.asarray(windows, jnp.int32)}


def residual(
    model: Backbone,
    tokens_bt: Int[Array, "b t"],
    segments_bt: Int[Array, "b t"],
    positions_bt: Int[Array, "b t"],
    layer: int,
    adapters: Tree | None = None,
) -> Float[Array, "b t d"]:
    """Residual stream after `layer` blocks, float32: Hugging Face `hidden_states[layer]` for all layers but the last.

    At `layer == n_layers` it is the stream *before* the final norm, where Hugging Face's last entry is after it.
    Attention stays inside a segment and looks back only; positions restart with each document. `adapters`: see
    `run_blocks`.
    """
    return run_blocks(model, embed(model, tokens_bt), segments_bt, positions_bt, 0, layer, adapters)


def run_blocks(
    model: Backbone,
    x_btd: Float[Array, "b t d"],
    segments_bt: Int[Array, "b t"],
    positions_bt: Int[Array, "b t"],
    first: int,
    last: int,
    adapters: Tree | None = None,
) -> Float[Array, "b t d"]:
    """Residual stream after `last` blocks, float32, from the stream after `first` blocks.

    `adapters` are arrays [last - first, ...] that `project` adds to the blocks' matrices. With them the blocks are
    computed again in the backward pass, so that training keeps one residual a block and nothing in between.
    """

    def step(x_btd: Array, block: Tree) -> tuple[Array, None]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return causal_attention(q, k, v, segments_bt, positions_bt, block["window"]), None

        return apply_block(model.config, block, x_btd, positions_bt, attend)

    blocks = model.stacked(first, last) | (adapters or {})
    return jax.lax.scan(step if adapters is None else jax.checkpoint(step), x_btd, blocks)[0]


def logits(model: Backbone, resid_btd: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
    """Final norm and unembedding of a residual, float32."""
    if model.final_norm is None:
        raise UserError(
            f"logits need the whole model, but only {model.layers} blocks are loaded: load with layers=None"
        )
    unembed_vd = (model.embed_vd if model.unembed_vd is None else model.unembed_vd)[...]
    normed = rms_norm(resid_btd, model.final_norm[...], model.config.rms_eps)
    return product("btd,vd->btv", normed.astype(unembed_vd.dtype), unembed_vd)


def embed(model: Backbone, tokens_bt: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Residual stream before the first block. It is float32 in every compute type: only products are rounded."""
    return model.embed_vd[...][tokens_bt].astype(jnp.float32)


def apply_block(
    config: ModelConfig, block: Tree, x_btd: Float[Array, "b t d"], positions_bt: Int[Array, "b t"], attend: Attend
) -> tuple[Float[Array, "b t d"], Any]:
    """One block; `attend` decides what the queries may see, and its second result is handed on."""
    b, t, _ = x_btd.shape
    kv, group, width = config.n_kv_heads, config.n_heads // config.n_kv_heads, config.head_dim
    normed = rms_norm(x_btd, block["attention_norm"], config.rms_eps)
    q, k, v = (project(block, name, normed) for name in "qkv")
    if config.qkv_bias:
        q, k, v = q + block["b_q"], k + block["b_k"], v + block["b_v"]
    cos, sin = rotary(config, positions_bt)
    q = rotate(q.reshape(b, t, kv * group, width), cos, sin) / math.sqrt(width)
    q_bkgth = q.reshape(b, t, kv, group, width).transpose(0, 2, 3, 1, 4)
    k_bkht = rotate(k.reshape(b, t, kv, width), cos, sin).transpose(0, 2, 3, 1)
    v_bkth = v.reshape(b, t, kv, width).transpose(0, 2, 1, 3)
    dtype = block["w_q"].dtype
    read_bkgth, kept = attend(q_bkgth.astype(dtype), k_bkht.astype(dtype), v_bkth.astype(dtype))
    x_btd = x_btd + project(block, "o", read_bkgth.transpose(0, 3, 1, 2, 4).reshape(b, t, -1))
    normed = rms_norm(x_btd, block["mlp_norm"], config.rms_eps)
    hidden = jax.nn.silu(project(block, "gate", normed)) * project(block, "up", normed)
    return x_btd + project(block, "down", hidden), kept


def project(block: Tree, name: str, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
    """x W of one of the block's matrices and, where the block has adapters for it, their scale * drop(x) A B."""
    y = matmul(x, block[f"w_{name}"])
    if f"lora_a_{name}" not in block:
        return y
    if f"lora_keep_{name}" in block:  # only while training; the mask is of this block, matrix and step
        key, kept = jax.random.wrap_key_data(block[f"lora_keep_{name}"]), block["lora_kept"]
        x = jnp.where(chosen(key, kept, x.shape), x / kept, 0)
    dtype = block[f"w_{name}"].dtype
    low = matmul(x, block[f"lora_a_{name}"].astype(dtype))
    return y + block["lora_scale"] * matmul(low, block[f"lora_b_{name}"].astype(dtype))


def chosen(key: PRNGKeyArray, share: Float[Array, ""], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Each with chance `share`, to 2^-16: two draws from one random word, as drawing is a fifth of a step on a CPU."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*shape[:-1], -1)[..., : shape[-1]]
    return halves < (share * 2**16).astype(jnp.uint32)


def matmul(x: Float[Array, "... i"], w_io: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """x @ w in w's type, accumulated and returned in float32 (bf16 results are several times slower on XLA's CPU)."""
    return product("...i,io->...o", x.astype(w_io.dtype), w_io)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(axes: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum of two arrays of one type, accumulated and returned in float32, whose gradients are products in that
    type as well.

    Left to JAX they would be of the float32 cotangent and a bf16 operand, which no hardware multiplies: XLA widens the
    operand, and a LoRA step in bf16 took 1.9 times as long as in float32 on a CPU, where now it takes less.
    """
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _product_forward(axes: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(axes, x, y), (x, y)


def _product_backward(axes: str, operands: tuple[Array, Array], out: Array) -> tuple[Array, Array]:
    (x, y), (of_x, of_y, of_out) = operands, axes.replace("->", ",").split(",")
    out = out.astype(x.dtype)
    x_bar = jnp.einsum(f"{of_out},{of_y}->{of_x}", out, y, preferred_element_type=jnp.float32)
    y_bar = jnp.einsum(f"{of_x},{of_out}->{of_y}", x, out, preferred_element_type=jnp.float32)
    return x_bar.astype(x.dtype), y_bar.astype(y.dtype)


product.defvjp(_product_forward, _product_backward)


def rms_norm(x: Float[Array, "... d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "... d"]:
    """x / sqrt(mean(x^2) + eps) * scale, in float32."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotary(config: ModelConfig, positions_bt: Int[Array, "b t"]) -> tuple[Array, Array]:
    """Cosine and sine [b, t, 1, head_dim / 2] of each position's angles, in float32."""
    angles = positions_bt[:, :, None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def inverse_frequencies(config: ModelConfig) -> Float[np.ndarray, " half"]:
    """theta^(-2i / head_dim), stretched as the model's scaling says (Llama 3.1: arXiv 2407.21783, section 3.4.2)."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # full turns over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)  # 0: slow angles, stretched fully; 1: fast ones, left alone
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rotate(x: Float[Array, "b t n h"], cos: Array, sin: Array) -> Float[Array, "b t n h"]:
    """Rotate the pairs (i, i + h/2) of every head: Hugging Face's layout, not the interleaved one of the GGUF files."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(
    q_bkgth: Float[Array, "b k g t h"],
    k_bkht: Float[Array, "b k h t"],
    v_bkth: Float[Array, "b k t h"],
    segments_bt: Int[Array, "b t"],
    positions_bt: Int[Array, "b t"],
    window: Int[Array, ""],
) -> Float[Array, "b k g t h"]:
    """Attention inside each segment, backwards only; positions grow along a row within a segment.

    Queries go in at most 8 blocks of 128 or more, each against the keys up to its own end: two to three times faster
    than one square of scores at 512 tokens on CPU, and the scores of a whole row never exist.
    """
    t = segments_bt.shape[1]
    size = max(128, -(-t // 8))
    read = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        back = positions_bt[:, start:stop, None] - positions_bt[:, None, :stop]
        same = segments_bt[:, start:stop, None] == segments_bt[:, None, :stop]
        mask_bts = same & (back >= 0) & (back < window)
        read.append(attention(q_bkgth[:, :, :, start:stop], k_bkht[..., :stop], v_bkth[:, :, :stop], mask_bts))
    return jnp.concatenate(read, axis=3)


def attention(
    q_bkgth: Float[Array, "b k g t h"],
    k_bkhs: Float[Array, "b k h s"],
    v_bksh: Float[Array, "b k s h"],
    mask_bts: Bool[Array, "b t s"],
) -> Float[Array, "b k g t h"]:
    """Softmax attention of g (already scaled) query heads on each key-value head; keys and values are never repeated.

    The layouts are those in which XLA's CPU products need no transposing: a decoding step is 9 times faster than
    with [b, s, k, h].
    """
    b, k, g, t, h = q_bkgth.shape
    scores = product("bkqh,bkhs->bkqs", q_bkgth.reshape(b, k, g * t, h), k_bkhs)
    scores = jnp.where(mask_bts[:, None, None], scores.reshape(b, k, g, t, -1), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v_bksh.dtype).reshape(b, k, g * t, -1)
    read = product("bkqs,bksh->bkqh", weights, v_bksh)
    return read.reshape(b, k, g, t, h) / total
