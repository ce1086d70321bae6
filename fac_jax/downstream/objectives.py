"""What is learned from labelled texts: a classifier, a reward, or the completions themselves. One loss each.

    classifier   softplus(z) - y z         z: the score of a text, y: 1 or 0
    reward       softplus(z_b - z_a)       Bradley-Terry (arXiv 1706.03741): a is the better of a pair
    completion   -log p(token)             of every token of a completion, given all before it

A score is linear in the final norm of a text's last token, as Hugging Face's classifiers read one. Losses are sums;
`weight` says how much a text, pair or token counts, so that the pieces of a batch add up to the batch (gradient
accumulation is exact). Pure functions of arrays.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fac_jax.backbone.model import Backbone, Tree, logits, residual, rms_norm

Objective = Literal["classifier", "reward", "completion"]


class Piece(NamedTuple):
    """Packed rows of some texts of a batch; what an objective does not need is there all the same, and ignored."""

    tokens_bt: Int[Array, "b t"]
    segments_bt: Int[Array, "b t"]
    """Texts of a row, from 1; 0 is padding."""
    positions_bt: Int[Array, "b t"]
    last_n: Int[Array, " n"]
    """Where each text ends, counted through all rows; a pair's better text comes right before its worse one."""
    there_n: Bool[Array, " n"]
    """False where there is no text."""
    label_n: Float[Array, " n"]
    weight_n: Float[Array, " n"]
    """How much each text counts; 0 where there is none."""
    target_bt: Int[Array, "b t"]
    """The token that follows."""
    target_weight_bt: Float[Array, "b t"]
    """0 where the token that follows is not learned."""


def loss_sum(
    model: Backbone, head_d: Float[Array, " d"], adapters: Tree | None, piece: Piece, objective: Objective
) -> Float[Array, ""]:
    """The sum of the objective's losses over a piece, each with its weight."""
    if objective == "completion":
        return _completion(model, adapters, piece)
    score_n = scores(model, head_d, adapters, piece)
    if objective == "classifier":
        each = jax.nn.softplus(score_n) - piece.label_n * score_n
        return jnp.sum(each * piece.weight_n)
    return jnp.sum(jax.nn.softplus(score_n[1::2] - score_n[::2]) * piece.weight_n[::2])


def scores(model: Backbone, head_d: Float[Array, " d"], adapters: Tree | None, piece: Piece) -> Float[Array, " n"]:
    """The score of every text."""
    return last_states(model, adapters, piece) @ head_d


def last_states(model: Backbone, adapters: Tree | None, piece: Piece) -> Float[Array, "n d"]:
    """Of every text the last token behind the final norm."""
    x_btd = _stream(model, adapters, piece)
    last_nd = x_btd.reshape(-1, x_btd.shape[-1])[piece.last_n]
    assert model.final_norm is not None
    return rms_norm(last_nd, model.final_norm[...], model.config.rms_eps)


def _completion(model: Backbone, adapters: Tree | None, piece: Piece) -> Float[Array, ""]:
    z_btv = logits(model, _stream(model, adapters, piece))
    chosen_bt = jnp.take_along_axis(z_btv, piece.target_bt[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(z_btv, axis=-1) - chosen_bt) * piece.target_weight_bt)


def _stream(model: Backbone, adapters: Tree | None, piece: Piece) -> Float[Array, "b t d"]:
    return residual(model, piece.tokens_bt, piece.segments_bt, piece.positions_bt, model.layers, adapters)
