"""The device half of generation: a key-value cache that chunks of prompts enter, and the decoding loop.

Reads a whole backbone; writes nothing. Everything here is a pure function of arrays and compiles once per cache size,
and once more where a row is steered: a vector of its own is then added to the residual of every token it is fed.
Blocks are unrolled, not scanned: on CPU a scan copies every block's weights out of the stack at every step, which takes
two to five times as long as the step itself. That needs each block's weights as arrays of their own: a second copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from fac_jax.backbone.config import ModelConfig
from fac_jax.backbone.model import Backbone, Tree, apply_block, attention, embed, logits
from fac_jax.backbone.weights import Loaded
from fac_jax.mesh import DATA, FEATURE, sharding

PREFILL_TOKENS = 64  # tokens of each prompt that enter the cache in one call
STEPS_PER_CALL = 32  # decoding steps between two looks of the host
HEAD = 256  # most probable tokens among which the nucleus is sought before the whole vocabulary is looked at

# One (keys [b, k, h, s], values [b, k, s, h]) per block. bfloat16 lies there as its bits: XLA's CPU backend updates
# bfloat16 in place by converting the whole array to float32 and back.
Cache = tuple[tuple[Array, Array], ...]


class Rows(NamedTuple):
    """The slots of one decoding batch; a slot's tokens lie at their positions, prompt and continuation together."""

    tokens_bs: Int[Any, "b s"]
    index_b: Int[Any, " b"]
    """Position of the last token there is: the next step feeds it to the model."""
    prompt_b: Int[Any, " b"]
    """Prompt length."""
    end_b: Int[Any, " b"]
    """Prompt length plus the most tokens wanted."""
    seed_b: Int[Any, " b"]
    done_b: Bool[Any, " b"]


class Sampling(NamedTuple):
    """How the next token is chosen; traced, so that changing it compiles nothing."""

    temperature: float
    top_p: float
    stop_ids: Int[Any, " n"]


class Steering(NamedTuple):
    """What is added to the residual of the tokens that are fed."""

    layer: int
    """Blocks applied before it is added; static."""
    vector_bd: Float[Any, "b d"]
    """Zeros for a row that is not steered."""


@dataclass(frozen=True)
class Decoder:
    """Compiled functions over one backbone's parameters."""

    empty_cache: Callable[[int, int, bool], Cache]
    """(rows, positions, rows over `data`) -> cache."""
    prefill: Callable[[Cache, Any, int], Cache]
    """(cache, tokens [b, PREFILL_TOKENS], start): the tokens take the positions from start on. Donates the cache."""
    insert: Callable[[Cache, Cache, int, int], Cache]
    """(cache, prefilled, slot, row): the row of `prefilled` becomes the slot of `cache`, which is donated."""
    decode: Callable[[Cache, Rows, Sampling, int, bool, int | None, Any], tuple[Cache, Rows]]
    """(cache, rows, sampling, keep, greedy, layer, steer [b, d]): steps until no more than `keep` rows go on. `steer`
    is added after `layer` blocks; both are None where no row is steered. Donates the cache."""


def make_decoder(loaded: Loaded) -> Decoder:
    """Decoder of a whole backbone on its mesh: slots over `data`, key-value heads over `feature` where it divides."""
    config, mesh = loaded.config, loaded.mesh
    graph, state = nnx.split(loaded.model)
    blocks = unrolled(loaded.model)
    heads = FEATURE if config.n_kv_heads % mesh.shape[FEATURE] == 0 else None
    alone, shared = sharding(mesh, None, heads, None, None), sharding(mesh, DATA, heads, None, None)

    def empty_cache(rows: int, positions: int, over_data: bool) -> Cache:
        return zero_cache(config, blocks, rows, positions, shared if over_data else alone)

    def prefill(cache: Cache, tokens_bt: Array, start: Array, state: Any, blocks: list[Tree]) -> Cache:
        cache = extend(nnx.merge(graph, state), blocks, cache, tokens_bt, start)[1]
        return jax.lax.with_sharding_constraint(cache, alone)

    def insert(cache: Cache, prefilled: Cache, slot: Array, row: Array) -> Cache:
        def copy(into: Array, source: Array) -> Array:
            taken = jax.lax.dynamic_slice_in_dim(source, row, 1)
            return jax.lax.dynamic_update_slice_in_dim(into, taken, slot, axis=0)

        return jax.lax.with_sharding_constraint(jax.tree.map(copy, cache, prefilled), shared)

    def run(
        cache: Cache,
        rows: Rows,
        sampling: Sampling,
        keep: Array,
        greedy: bool,
        layer: int | None,
        steer_bd: Array | None,
        state: Any,
        blocks: list[Tree],
    ) -> tuple[Cache, Rows]:
        steer = None if layer is None or steer_bd is None else Steering(layer, steer_bd)
        cache, rows = decode(nnx.merge(graph, state), blocks, cache, rows, sampling, keep, greedy, steer)
        return jax.lax.with_sharding_constraint(cache, shared), jax.lax.with_sharding_constraint(rows, sharding(mesh))

    compiled_prefill = jax.jit(prefill, donate_argnums=0)
    compiled_run = jax.jit(run, donate_argnums=0, static_argnums=(4, 5))
    return Decoder(
        empty_cache=empty_cache,
        prefill=lambda cache, tokens_bt, start: compiled_prefill(cache, tokens_bt, start, state, blocks),
        insert=jax.jit(insert, donate_argnums=0),
        decode=lambda *arguments: compiled_run(*arguments, state, blocks),
    )


def unrolled(model: Backbone) -> list[Tree]:
    """Every block's arrays by themselves, as `extend` takes them."""
    stacked = model.stacked(0, model.layers)
    return [_take(stacked, i) for i in range(model.layers)]


def zero_cache(
    config: ModelConfig, blocks: list[Tree], rows: int, positions: int, placed: NamedSharding | None = None
) -> Cache:
    """A cache that holds nothing yet."""
    dtype = _bits(jnp.zeros((), blocks[0]["w_k"].dtype)).dtype
    keys = (rows, config.n_kv_heads, config.head_dim, positions)
    values = (rows, config.n_kv_heads, positions, config.head_dim)
    return tuple((jnp.zeros(keys, dtype, device=placed), jnp.zeros(values, dtype, device=placed)) for _ in blocks)


@jax.jit
def _take(stacked: Tree, i: Array) -> Tree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), stacked)


def extend(
    model: Backbone,
    blocks: list[Tree],
    cache: Cache,
    tokens_bt: Int[Array, "b t"],
    start: Int[Array, "..."],
    steer: Steering | None = None,
) -> tuple[Float[Array, "b t d"], Cache]:
    """Feed tokens that take the positions from `start` on (one for all rows, or one a row and t = 1), all steered.

    Returns the last block's residual and the cache with their keys and values. A token sees every position up to its
    own, so whatever lies beyond must be overwritten before it is reached.
    """
    b, t = tokens_bt.shape
    positions_bt = jnp.broadcast_to(jnp.reshape(start, (-1, 1)) + jnp.arange(t), (b, t))
    back_bts = positions_bt[:, :, None] - jnp.arange(cache[0][0].shape[-1])
    x_btd, kept = embed(model, tokens_bt), []
    for applied, (block, (keys, values)) in enumerate(zip(blocks, cache, strict=True), 1):

        def attend(
            q: Array, k: Array, v: Array, block: Tree = block, keys: Array = keys, values: Array = values
        ) -> tuple[Array, tuple[Array, Array]]:
            keys, values = _write(keys, _bits(k), start, axis=3), _write(values, _bits(v), start, axis=2)
            mask_bts = (back_bts >= 0) & (back_bts < block["window"])
            return attention(q, _floats(keys, k.dtype), _floats(values, v.dtype), mask_bts), (keys, values)

        x_btd, pair = apply_block(model.config, block, x_btd, positions_bt, attend)
        if steer is not None and applied == steer.layer:
            x_btd = x_btd + steer.vector_bd[:, None]
        kept.append(pair)
    return x_btd, tuple(kept)


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _floats(x: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(x, dtype)


def _write(cache: Array, new: Array, start: Array, axis: int) -> Array:
    """`new` into `cache` along its position axis (2 or 3), at `start`."""
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, start, axis)
    rows = jnp.arange(cache.shape[0])
    if axis == 3:
        return cache.at[rows, :, :, start].set(new[:, :, :, 0], unique_indices=True, mode="promise_in_bounds")
    return cache.at[rows, :, start].set(new[:, :, 0], unique_indices=True, mode="promise_in_bounds")


def decode(
    model: Backbone,
    blocks: list[Tree],
    cache: Cache,
    rows: Rows,
    sampling: Sampling,
    keep: Array,
    greedy: bool,
    steer: Steering | None = None,
) -> tuple[Cache, Rows]:
    """Step all rows until no more than `keep` of them go on, or STEPS_PER_CALL steps are done.

    A row is done with a stop token or at `end_b`; it then stays as it is, though it is computed along. The first token
    fed is a prompt's last, so steering begins with it: its residual yields the first new token.
    """
    numbers = jnp.arange(rows.done_b.shape[0])

    def going(carry: tuple[Array, Cache, Rows]) -> Array:
        step, _, rows = carry
        return (step < STEPS_PER_CALL) & (jnp.sum(~rows.done_b) > keep)

    def advance(carry: tuple[Array, Cache, Rows]) -> tuple[Array, Cache, Rows]:
        step, cache, rows = carry
        fed_b1 = rows.tokens_bs[numbers, rows.index_b][:, None]
        x_btd, cache = extend(model, blocks, cache, fed_b1, rows.index_b, steer)
        next_b = rows.index_b + 1
        logits_bv = logits(model, x_btd)[:, 0]
        if greedy:
            token_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        else:
            keys_b = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(rows.seed_b), next_b - rows.prompt_b)
            token_b = sample(logits_bv / sampling.temperature, sampling.top_p, keys_b, rows.done_b)
        ended = jnp.isin(token_b, sampling.stop_ids) | (next_b + 1 >= rows.end_b)
        old_b = rows.tokens_bs[numbers, next_b]  # only a done row can be at its end: read clipped, write dropped
        rows = rows._replace(
            tokens_bs=rows.tokens_bs.at[numbers, next_b].set(jnp.where(rows.done_b, old_b, token_b)),
            index_b=jnp.where(rows.done_b, rows.index_b, next_b),
            done_b=rows.done_b | ended,
        )
        return step + 1, cache, rows

    return jax.lax.while_loop(going, advance, (jnp.int32(0), cache, rows))[1:]


def sample(
    logits_bv: Float[Array, "b v"], top_p: Array, keys_b: Array, ignored_b: Bool[Array, " b"]
) -> Int[Array, " b"]:
    """One token a row from its nucleus: the shortest head of the sorted probabilities whose mass reaches `top_p`.

    The nucleus is sought among the HEAD most probable tokens; only if some row (not in `ignored_b`) has a wider one is
    the whole vocabulary looked at, and then for that row alone, so a row's choice never depends on another's.
    """
    head = min(HEAD, logits_bv.shape[-1])
    values, ids = jax.lax.top_k(logits_bv, head)
    total_b = jax.nn.logsumexp(logits_bv, axis=-1, keepdims=True)
    mass = jnp.cumsum(jnp.exp(values - total_b), axis=-1)
    last_b = jnp.sum(mass < top_p, axis=-1, keepdims=True)  # index of the nucleus's last member; head when it is wider
    inside_b = last_b[:, 0] < head
    nucleus_b = jnp.take_along_axis(mass, jnp.minimum(last_b, head - 1), axis=-1)
    drawn_b = jax.vmap(jax.random.uniform)(keys_b)[:, None] * nucleus_b
    picked_b = jnp.minimum(jnp.sum(mass <= drawn_b, axis=-1, keepdims=True), last_b)
    narrow_b = jnp.take_along_axis(ids, jnp.minimum(picked_b, head - 1), axis=-1)[:, 0]
    enough = jnp.all(inside_b | ignored_b)
    wide_b = jax.lax.cond(enough, lambda: narrow_b, lambda: _sample_wide(logits_bv - total_b, top_p, keys_b))
    return jnp.where(inside_b, narrow_b, wide_b)


def _sample_wide(log_bv: Float[Array, "b v"], top_p: Array, keys_b: Array) -> Int[Array, " b"]:
    """A nucleus of any width without a sort: the highest probability threshold whose mass still reaches `top_p`, by
    bisection over the bits of positive floats (their order as integers is their order), then the Gumbel-max trick."""
    p_bv = jnp.exp(log_bv)
    bits_bv = jax.lax.bitcast_convert_type(p_bv, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        reached = jnp.sum(jnp.where(bits_bv >= middle, p_bv, 0), axis=-1, keepdims=True) >= top_p
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle - 1)

    none = jnp.zeros((log_bv.shape[0], 1), jnp.int32)
    one = jax.lax.bitcast_convert_type(jnp.ones_like(none, jnp.float32), jnp.int32)
    threshold, _ = jax.lax.fori_loop(0, 31, halve, (none, one))
    noise_bv = jax.vmap(lambda key: jax.random.gumbel(key, log_bv.shape[1:]))(keys_b)
    return jnp.argmax(jnp.where(bits_bv >= threshold, log_bv + noise_bv, -jnp.inf), axis=-1).astype(jnp.int32)
