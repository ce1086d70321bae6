"""Sampling continuations of many prompts at once: a key-value cache, refilled slots, nucleus sampling.

Reads a whole backbone (`load_backbone(..., layers=None)`) and token ids; writes nothing.

- A fixed number of slots decodes together, as a step costs one reading of all weights however many rows it serves; a
  finished slot is given the next prompt at once, so a long continuation keeps nobody waiting.
- What all prompts begin with is computed once, and a prompt asked for several times (other seeds) once. Prompts enter
  the cache in chunks of one shape, so the number of compilations does not depend on their lengths: two per cache size.
- A row's randomness comes from its own seed and its own count of tokens; its neighbours only share the arithmetic. The
  same call gives the same tokens; another mix of prompts may round a logit differently, and so turn a near tie.
- A prompt may be steered: a vector is added to the residual of its last token and of every token after it. Prompts that
  begin alike share their cache all the same, as what lies in it is not steered.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fac_jax.backbone.decode import PREFILL_TOKENS, Cache, Decoder, Rows, Sampling, make_decoder
from fac_jax.backbone.weights import Loaded
from fac_jax.errors import UserError
from fac_jax.mesh import DATA

PREFILL_ROWS = 4  # prompts that enter the cache together


def generate(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
    batch: int,
    stop_ids: Collection[int],
    on_done: Callable[[int, list[int]], None] | None = None,
    steer: Sequence[Float[np.ndarray, " d"] | None] | None = None,
    layer: int | None = None,
) -> list[list[int]]:
    """Continue every prompt; the answer lists new tokens only, in the order of `prompts`, without the stop token.

    A continuation shorter than `max_new_tokens` was ended by one of `stop_ids`. Temperature 0 takes the most probable
    token. `seeds` (one a prompt, taken modulo 2^32) fix the sampling; `batch` slots decode together; `on_done`
    is told each continuation as it ends. `steer` (one a prompt, None: not steered) is added after `layer` blocks from
    the prompt's last token on.

    Raises UserError for a backbone loaded only in part, an empty prompt, an id outside the vocabulary, lists of
    different lengths, settings out of range, and a prompt that does not leave room for `max_new_tokens`.
    """
    _check(loaded, prompts, max_new_tokens, temperature, top_p, seeds, batch)
    steer_nd = _steering(loaded, len(prompts), steer, layer)
    if not prompts or not max_new_tokens:
        return [[] for _ in prompts]
    bodies = [tuple(prompt[:-1]) for prompt in prompts]
    shared = _common_length(bodies)
    size = _cache_size(max(map(len, prompts)) + max_new_tokens, shared, max(map(len, bodies)))
    slots = -(-batch // loaded.mesh.shape[DATA]) * loaded.mesh.shape[DATA]
    decoder = loaded.compiled.get("decoder") or loaded.compiled.setdefault("decoder", make_decoder(loaded))
    sampling = Sampling(temperature, top_p, np.asarray(sorted(stop_ids) or [-1], np.int32))

    answers: list[list[int]] = [[] for _ in prompts]
    waiting = _prefilled(decoder, bodies, shared, size)
    left = len(prompts)
    rows, cache = _empty_rows(slots, size), decoder.empty_cache(slots, size, True)
    owner: list[int | None] = [None] * slots
    while left or any(request is not None for request in owner):
        for slot in range(slots):
            if owner[slot] is None and left:
                request, prefilled, row = next(waiting)
                cache = decoder.insert(cache, prefilled, slot, row)
                _seat(rows, slot, prompts[request], max_new_tokens, seeds[request])
                owner[slot], left = request, left - 1
        keep = slots - max(1, slots // 4) if left else 0
        steering: tuple[Any, Any] = (None, None)
        if steer_nd is not None:  # an empty slot may have anybody's vector
            steering = layer, steer_nd[[request or 0 for request in owner]]
        cache, out = decoder.decode(cache, rows, sampling, keep, temperature == 0, *steering)
        rows = Rows(*(np.array(value) for value in out))
        for slot, served in enumerate(owner):
            if served is not None and rows.done_b[slot]:
                answers[served], owner[slot] = _continuation(rows, slot, stop_ids), None
                if on_done is not None:
                    on_done(served, answers[served])
    return answers


def _check(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
    batch: int,
) -> None:
    if loaded.model.final_norm is None:
        raise UserError(
            f"generation needs the whole model, but {loaded.model.layers} of {loaded.config.n_layers} blocks "
            "are loaded: load the backbone with layers=None"
        )
    if len(seeds) != len(prompts):
        raise UserError(f"{len(prompts)} prompts came with {len(seeds)} seeds; give one to each")
    if max_new_tokens < 0 or temperature < 0 or not 0 < top_p <= 1 or batch < 1:
        raise UserError(
            f"max_new_tokens {max_new_tokens} and temperature {temperature} must not be negative, "
            f"top_p {top_p} must lie in (0, 1] and batch {batch} must be at least 1"
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty; it needs one token at least")
        if not 0 <= min(prompt) <= max(prompt) < loaded.config.vocab:
            raise UserError(f"prompt {number} has a token outside the vocabulary of {loaded.config.vocab}")
        if len(prompt) + max_new_tokens > loaded.config.max_positions:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and {max_new_tokens} more are asked, but the model's "
                f"context is {loaded.config.max_positions}; shorten the prompt or lower max_new_tokens"
            )


def _steering(
    loaded: Loaded, prompts: int, steer: Sequence[Float[np.ndarray, " d"] | None] | None, layer: int | None
) -> Float[np.ndarray, "n d"] | None:
    """A vector for every prompt, zeros where it is not steered; None where none is."""
    if steer is None or all(vector_d is None for vector_d in steer):
        return None
    if len(steer) != prompts:
        raise UserError(f"{prompts} prompts came with {len(steer)} vectors to steer by; give one, or None, to each")
    most, width = loaded.config.n_layers, loaded.config.d_model
    if layer is None or not 1 <= layer <= most:
        raise UserError(f"steering after {layer} blocks was asked for; the model has blocks 1 to {most}")
    steer_nd = np.zeros((prompts, width), np.float32)
    for number, vector_d in enumerate(steer):
        if vector_d is not None:
            if vector_d.shape != (width,) or not np.isfinite(vector_d).all():
                raise UserError(
                    f"prompt {number} is steered by a vector of shape {vector_d.shape}; it must hold {width} finite "
                    "numbers, the model's width"
                )
            steer_nd[number] = vector_d
    return steer_nd


def _common_length(bodies: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with: those of the first and the last in sorted order."""
    low, high = min(bodies), max(bodies)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def _cache_size(tokens: int, shared: int, longest: int) -> int:
    """Positions that hold `tokens` and every whole chunk of the prompts."""
    chunks = shared + math.ceil((longest - shared) / PREFILL_TOKENS) * PREFILL_TOKENS
    return padded_size(max(tokens, chunks, math.ceil(shared / PREFILL_TOKENS) * PREFILL_TOKENS))


def padded_size(tokens: int) -> int:
    """Smallest of 64, 128, 192, 256, 384, 512, 768, ... that is no less than `tokens`: few sizes, few compilations."""
    power = 2 ** max(6, math.ceil(math.log2(tokens)))
    return power * 3 // 4 if tokens <= power * 3 // 4 and power >= 256 else power


def _empty_rows(slots: int, size: int) -> Rows:
    index_b, prompt_b, end_b = np.zeros((3, slots), np.int32)
    seed_b, done_b = np.zeros(slots, np.uint32), np.ones(slots, bool)
    return Rows(np.zeros((slots, size), np.int32), index_b, prompt_b, end_b, seed_b, done_b)


def _seat(rows: Rows, slot: int, prompt: Sequence[int], max_new_tokens: int, seed: int) -> None:
    rows.tokens_bs[slot, : len(prompt)] = prompt
    rows.index_b[slot], rows.prompt_b[slot] = len(prompt) - 1, len(prompt)
    rows.end_b[slot] = len(prompt) + max_new_tokens
    rows.seed_b[slot], rows.done_b[slot] = seed % 2**32, False


def _continuation(rows: Rows, slot: int, stop_ids: Collection[int]) -> list[int]:
    tokens = rows.tokens_bs[slot, rows.prompt_b[slot] : rows.index_b[slot] + 1].tolist()
    return tokens[:-1] if tokens[-1] in stop_ids else tokens


def _prefilled(
    decoder: Decoder, bodies: Sequence[tuple[int, ...]], shared: int, size: int
) -> Iterator[tuple[int, Cache, int]]:
    """Requests with a cache and its row that hold their prompt's body; equal prompts one after the other."""
    prefix = _prefill(decoder, decoder.empty_cache(PREFILL_ROWS, size, False), [bodies[0][:shared]] * PREFILL_ROWS, 0)
    requests: dict[tuple[int, ...], list[int]] = {}
    for request, body in enumerate(bodies):
        requests.setdefault(body, []).append(request)
    distinct = deque(requests)
    while distinct:
        group = [distinct.popleft() for _ in range(min(PREFILL_ROWS, len(distinct)))]
        cache = _prefill(decoder, jax.tree.map(jnp.copy, prefix), group, shared)
        for row, body in enumerate(group):
            for request in requests[body]:
                yield request, cache, row


def _prefill(decoder: Decoder, cache: Cache, bodies: Sequence[tuple[int, ...]], start: int) -> Cache:
    """Enter every body's tokens from position `start` on, chunk by chunk. What a chunk writes beyond a body's end is
    never seen: decoding overwrites a position before it looks at it."""
    while start < max(map(len, bodies)):
        chunk = np.zeros((PREFILL_ROWS, PREFILL_TOKENS), np.int32)
        for row, body in enumerate(bodies):
            part = body[start : start + PREFILL_TOKENS]
            chunk[row, : len(part)] = part
        cache = decoder.prefill(cache, chunk, start)
        start += PREFILL_TOKENS
    return cache
