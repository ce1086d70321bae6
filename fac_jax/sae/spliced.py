"""The backbone with an SAE spliced in: how well it predicts, and what it writes. The device half of `splice.py`.

    x   = residual after `layer` blocks
    x'  = the SAE's reconstruction of x where a mask says so, x elsewhere
    the blocks above `layer`, the final norm and the unembedding go on from x'

Reads a whole backbone and an SAE; writes nothing. Rows are split over the mesh's `data` axis.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from fac_jax.backbone.model import Backbone, logits, residual, run_blocks
from fac_jax.mesh import DATA, sharding
from fac_jax.packing import equal_part
from fac_jax.sae.model import SAE, decode, encode

WAYS = ("clean", "spliced", "zero", "mean")
"""What stands in the content tokens' residuals: they themselves, the SAE's reconstruction, zero, the mean residual."""
CHUNK_ELEMENTS = 2**25  # of logits or pre-activations at a time: 128 MiB in float32


class Losses(NamedTuple):
    """Of the prediction that each token of a batch makes of the next one in its row, in nats; w counts WAYS."""

    cross_entropy_wbt: Float[Array, "w b t"]
    divergence_bt: Float[Array, "b t"]
    """KL(clean || spliced) between the two distributions over the vocabulary."""


def substitute(
    sae: SAE, x_btd: Float[Array, "b t d"], mask_bt: Bool[Array, "b t"], k: int | None, mesh: Mesh | None
) -> Float[Array, "b t d"]:
    """The SAE's reconstruction where the mask holds, the residual itself elsewhere. `k` is None with a threshold."""
    b, t, d = x_btd.shape
    chunk = equal_part(t, CHUNK_ELEMENTS // (b * sae.w_fd.shape[0]))

    def reconstruct(start: Array) -> Array:
        x_bcd = jax.lax.dynamic_slice_in_dim(x_btd, start, chunk, axis=1)
        return decode(sae, encode(sae, x_bcd.reshape(-1, d), k, mesh=mesh)).reshape(b, chunk, d)

    x_hat_nbcd = jax.lax.map(reconstruct, jnp.arange(0, t, chunk))
    return jnp.where(mask_bt[:, :, None], jnp.moveaxis(x_hat_nbcd, 0, 1).reshape(b, t, d), x_btd)


@partial(jax.jit, static_argnames=("layer", "k", "mesh"))
def token_losses(
    model: Backbone,
    sae: SAE,
    tokens_bt: Int[Array, "b t"],
    segments_bt: Int[Array, "b t"],
    positions_bt: Int[Array, "b t"],
    content_bt: Bool[Array, "b t"],
    mean_d: Float[Array, " d"] | None,
    *,
    layer: int,
    k: int | None,
    mesh: Mesh,
) -> Losses:
    """Losses of every way; without `mean_d` those of all ways but the last. b must be a multiple of mesh.data.

    The blocks below `layer` run once, those above once a way. Content tokens are replaced, all others keep their
    residual. What a row's last token predicts, and what lies across two documents, means nothing: see `splice.counted`.
    """
    rows = partial(jax.lax.with_sharding_constraint, shardings=sharding(mesh, DATA))
    tokens_bt, segments_bt, positions_bt, content_bt = map(rows, (tokens_bt, segments_bt, positions_bt, content_bt))
    x_btd = residual(model, tokens_bt, segments_bt, positions_bt, layer)
    fills = [jnp.zeros_like(x_btd[0, 0])] if mean_d is None else [jnp.zeros_like(mean_d), mean_d]
    ways = [x_btd, substitute(sae, x_btd, content_bt, k, mesh)]
    ways += [jnp.where(content_bt[:, :, None], fill_d, x_btd) for fill_d in fills]
    x_wbtd = jax.lax.map(
        lambda x_btd: run_blocks(model, x_btd, segments_bt, positions_bt, layer, model.layers), jnp.stack(ways)
    )
    next_bt = jnp.roll(tokens_bt, -1, axis=1)
    b, t = tokens_bt.shape
    chunk = equal_part(t, CHUNK_ELEMENTS // (len(ways) * b * model.config.vocab))

    def measure(start: Array) -> Losses:
        x_wbcd = jax.lax.dynamic_slice_in_dim(x_wbtd, start, chunk, axis=2)
        next_bc = jax.lax.dynamic_slice_in_dim(next_bt, start, chunk, axis=1)
        log_wbcv = jax.nn.log_softmax(jax.vmap(partial(logits, model))(x_wbcd))
        next_wbc1 = jnp.broadcast_to(next_bc[None, :, :, None], (*log_wbcv.shape[:3], 1))
        cross_entropy_wbc = -jnp.take_along_axis(log_wbcv, next_wbc1, axis=-1)[..., 0]
        clean_bcv, spliced_bcv = log_wbcv[:2]
        return Losses(cross_entropy_wbc, jnp.sum(jnp.exp(clean_bcv) * (clean_bcv - spliced_bcv), axis=-1))

    found = jax.lax.map(measure, jnp.arange(0, t, chunk))
    losses = Losses(
        jnp.moveaxis(found.cross_entropy_wbt, 0, 2).reshape(-1, b, t),
        jnp.moveaxis(found.divergence_bt, 0, 1).reshape(b, t),
    )
    return jax.lax.with_sharding_constraint(losses, sharding(mesh))  # every host reads them


@partial(jax.jit, static_argnames=("layer", "k"))
def greedy_answers(
    model: Backbone,
    sae: SAE,
    tokens_t: Int[Array, " t"],
    content_t: Bool[Array, " t"],
    prompt: Int[Array, ""],
    end: Int[Array, ""],
    stop_ids: Int[Array, " n"],
    *,
    layer: int,
    k: int | None,
) -> Int[Array, "2 t"]:
    """The most probable tokens after `tokens_t[:prompt]`, up to `end`: from the clean backbone, then with the SAE.

    The SAE replaces the residual of the prompt's content tokens and of every generated token. Stops when both rows
    have produced one of `stop_ids`; what follows such a token in a row means nothing. Every step runs over all t
    tokens: for one short answer that is simpler than a cache, and as fast.
    """
    places_bt = jnp.broadcast_to(jnp.arange(tokens_t.shape[0]), (2, tokens_t.shape[0]))
    segments_bt = jnp.ones_like(places_bt)
    mask_bt = (content_t | (places_bt >= prompt)) & jnp.asarray([[False], [True]])

    def going(carry: tuple[Array, Array, Array]) -> Array:
        place, _, done_b = carry
        return (place < end) & ~done_b.all()

    def advance(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        place, tokens_bt, done_b = carry
        x_btd = substitute(sae, residual(model, tokens_bt, segments_bt, places_bt, layer), mask_bt, k, None)
        x_btd = run_blocks(model, x_btd, segments_bt, places_bt, layer, model.layers)
        last_b1d = jax.lax.dynamic_slice_in_dim(x_btd, place - 1, 1, axis=1)
        token_b = jnp.argmax(logits(model, last_b1d)[:, 0], axis=-1).astype(tokens_bt.dtype)
        return place + 1, tokens_bt.at[:, place].set(token_b), done_b | jnp.isin(token_b, stop_ids)

    begin = (prompt, jnp.broadcast_to(tokens_t, places_bt.shape), jnp.zeros(2, bool))
    return jax.lax.while_loop(going, advance, begin)[1]
