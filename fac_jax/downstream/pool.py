"""Documents to one vector each: the mean, over the content tokens, of the frozen backbone's residual.

Documents are packed several to a row as everywhere else; the mean is taken on the device, so that a batch sends home
one row per document and not one per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fac_jax.backbone.weights import Loaded
from fac_jax.config import BackboneConfig
from fac_jax.errors import UserError
from fac_jax.packing import PackedBatch, encode, pack
from fac_jax.progress import progress
from fac_jax.text import Document


def pooled_residuals(
    documents: Sequence[Document], loaded: Loaded, geometry: BackboneConfig, max_tokens: int, title: str
) -> Float[np.ndarray, "n d"]:
    """Mean over content tokens of the residual after `geometry.layer` blocks; one float32 row per document, in order.

    Raises UserError for a document that has no content token within its first `max_tokens` tokens.
    """
    residual = loaded.residual_fn(geometry.layer)
    encoded = (encode(document, loaded.tokenizer, max_tokens) for document in documents)
    rows = []
    with progress(title, total=len(documents), unit="documents") as bar:
        for batch in pack(encoded, geometry.rows_per_batch, geometry.row_tokens):
            slot_bt = _content_slots(batch, max_tokens)
            resid_btd = residual(batch.tokens, batch.segments, batch.positions)
            count = len(batch.documents)
            rows.append(np.asarray(segment_mean(resid_btd, slot_bt, _slots(count)))[:count])
            bar.advance(count)
    return np.concatenate(rows)


@partial(jax.jit, static_argnums=2)
def segment_mean(resid_btd: Float[Array, "b t d"], slot_bt: Int[Array, "b t"], slots: int) -> Float[Array, "n d"]:
    """Mean residual per slot in float32 (n = `slots`); tokens with slot -1 count for nothing, an empty slot is 0."""
    flat = jnp.where(slot_bt < 0, slots, slot_bt).reshape(-1)
    resid = resid_btd.reshape(-1, resid_btd.shape[-1]).astype(jnp.float32)
    total = jax.ops.segment_sum(resid, flat, num_segments=slots + 1)[:slots]
    count = jax.ops.segment_sum(jnp.ones(flat.shape, jnp.float32), flat, num_segments=slots + 1)[:slots]
    return total / jnp.maximum(count, 1)[:, None]


def _content_slots(batch: PackedBatch, max_tokens: int) -> Int[np.ndarray, "b t"]:
    """Which document each content token belongs to; -1 on template, prefix, special tokens and padding."""
    slot_bt = np.where(batch.content, batch.slot, -1)
    empty = set(range(len(batch.documents))) - set(np.unique(slot_bt).tolist())
    if empty:
        document = batch.documents[min(empty)].document
        raise UserError(
            f"document {document.id} ({document.source}) has no content token within its first {max_tokens} tokens; "
            "raise the data set's max_tokens or leave the document out"
        )
    return slot_bt


def _slots(count: int) -> int:
    """The next power of two from 16 on: batches of different numbers of documents share few compilations."""
    return 1 << max(4, (count - 1).bit_length())
