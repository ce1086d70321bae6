"""How fluent a reply is: the mean negative log likelihood of its tokens given its prompt, in nats a token.

    nats(reply | prompt) = -1/m sum_i log p(reply_i | prompt, reply_1 .. reply_{i-1})

under the backbone as it is, whatever steered the writer: steering too hard shows as a high figure. A text that repeats
itself has a low one: the figure says that a model could have written the text, not that it is good.

Reads a whole backbone; writes nothing. Texts of about the same length are computed together, in a few shapes.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from fac_jax.backbone.generate import padded_size
from fac_jax.backbone.model import Backbone, logits, residual
from fac_jax.backbone.weights import Loaded
from fac_jax.errors import UserError
from fac_jax.mesh import DATA, sharding

ROWS = 4  # texts in one pass: what lies in memory is small even where the vocabulary is large
TOGETHER = 64  # positions of each text whose logits are computed at once; divides every `padded_size`


def nats_per_token(
    loaded: Loaded, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> Float32[np.ndarray, " n"]:
    """A figure for each reply, in their order; NaN where a reply has no token.

    Raises UserError for a backbone loaded only in part, an empty prompt, and a text longer than the model's context.
    """
    if loaded.model.final_norm is None:
        raise UserError("fluency needs the whole model: load the backbone with layers=None")
    for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        if not prompt or len(prompt) + len(reply) > loaded.config.max_positions:
            raise UserError(
                f"text {number} has {len(prompt)} tokens of prompt and {len(reply)} of reply; the prompt needs one at "
                f"least, and the model's context is {loaded.config.max_positions}"
            )
    found_n = np.full(len(replies), np.nan, np.float32)
    rows = -(-ROWS // loaded.mesh.shape[DATA]) * loaded.mesh.shape[DATA]
    order = sorted((n for n, reply in enumerate(replies) if reply), key=lambda n: len(prompts[n]) + len(replies[n]))
    for first in range(0, len(order), rows):
        group = order[first : first + rows]
        longest = padded_size(max(len(prompts[n]) + len(replies[n]) for n in group))
        asked = padded_size(max(len(replies[n]) for n in group))
        tokens_bt = np.zeros((rows, longest), np.int32)
        at_br, next_br = np.zeros((2, rows, asked), np.int32)
        for row, n in enumerate(group):
            prompt, reply = prompts[n], replies[n]
            tokens_bt[row, : len(prompt) + len(reply)] = [*prompt, *reply]
            at_br[row, : len(reply)] = np.arange(len(reply)) + len(prompt) - 1
            next_br[row, : len(reply)] = reply
        nats_br = np.asarray(_surprise(loaded.model, tokens_bt, at_br, next_br, mesh=loaded.mesh))
        for row, n in enumerate(group):
            found_n[n] = nats_br[row, : len(replies[n])].mean(dtype=np.float64)
    return found_n


@partial(jax.jit, static_argnames="mesh")
def _surprise(
    model: Backbone,
    tokens_bt: Int[Array, "b t"],
    at_br: Int[Array, "b r"],
    next_br: Int[Array, "b r"],
    *,
    mesh: Mesh,
) -> Float[Array, "b r"]:
    """-log p(next) after the token at each position `at`. What lies behind that in the row is not seen."""
    tokens_bt = jax.lax.with_sharding_constraint(tokens_bt, sharding(mesh, DATA))
    positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    x_btd = residual(model, tokens_bt, jnp.ones_like(tokens_bt), positions_bt, model.layers)
    x_brd = jnp.take_along_axis(x_btd, at_br[:, :, None], axis=1)

    def measure(start: Array) -> Array:
        """Of a few positions: the logits of all would be many times larger than everything else."""
        x_bcd = jax.lax.dynamic_slice_in_dim(x_brd, start, TOGETHER, axis=1)
        next_bc = jax.lax.dynamic_slice_in_dim(next_br, start, TOGETHER, axis=1)
        log_bcv = jax.nn.log_softmax(logits(model, x_bcd))
        return -jnp.take_along_axis(log_bcv, next_bc[:, :, None], axis=-1)[:, :, 0]

    found = jax.lax.map(measure, jnp.arange(0, at_br.shape[1], TOGETHER))
    nats_br = jnp.moveaxis(found, 0, 1).reshape(at_br.shape)
    return jax.lax.with_sharding_constraint(nats_br, sharding(mesh))  # every host reads it
