"""One packed batch to peaks: g_i(x) = max over the content tokens t of document x of act_i(x, t), and where it is;
and the mean residual of each document, which costs next to nothing here and a whole backbone pass anywhere else.

Activations are the SAE's own (`topk`, the paper's formula; an SAE with a threshold keeps what exceeds it) or those of
the paper's code (`relu`: top-k and threshold off). They never exist for a whole batch: the content tokens of each row
are brought to its front and folded chunk by chunk into one maximum per (document, feature), so that neither the chat
template nor padding costs an SAE encode. Runs on the device; what comes back is sparse. Reads and writes no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Int64

from fac_jax.backbone.weights import Loaded
from fac_jax.mesh import FEATURE, sharding
from fac_jax.packing import PackedBatch, equal_part
from fac_jax.sae.checkpoint import LoadedSae
from fac_jax.sae.model import SAE, above_threshold, pre_activations
from fac_jax.sae.topk import top_k

Acts = Literal["topk", "relu"]
CHUNK_ELEMENTS = 2**25  # of pre-activations [tokens, features] at a time: 128 MiB in float32
TABLE_ELEMENTS = 2**26  # of peaks [documents, features] at a time, at most
TOKENS_PER_SLOT = 32  # a chat template alone is often longer, so a second pass over a batch is rare
NOWHERE = np.iinfo(np.int32).max


@dataclass(frozen=True)
class BatchPeaks:
    """Every peak above 0 of one batch, sorted by document and feature, and each document's mean residual."""

    document: Int64[np.ndarray, " n"]
    """Index into the batch's documents."""
    feature: Int64[np.ndarray, " n"]
    peak: Float32[np.ndarray, " n"]
    position: Int32[np.ndarray, " n"]
    """Token of the document at which the peak is reached; the first one, when several tie."""
    tokens_f: Int64[np.ndarray, " f"]
    """Content tokens on which each feature is active."""
    mean_nd: Float32[np.ndarray, "documents d"]
    """Mean residual over the content tokens of each document; 0 for one without any."""


class Peaks(NamedTuple):
    """What is known of s documents so far: peaks (0 when inactive), where they are, and active tokens per feature."""

    peak_sf: Float[Array, "s f"]
    position_sf: Int[Array, "s f"]
    tokens_f: Int[Array, " f"]


class Table(NamedTuple):
    """What a pass over a batch finds about s documents."""

    peaks: Peaks
    mean_sd: Float[Array, "s d"]
    """Mean residual over content tokens, float32."""


def dispatch(batch: PackedBatch, loaded: Loaded, sae: LoadedSae, acts: Acts) -> list[Table]:
    """Start the device on a batch; `collect` waits for it. One table per `slots` documents, nearly always one."""
    resid_btd = loaded.residual_fn(sae.layer)(batch.tokens, batch.segments, batch.positions)
    return tables_of(batch, resid_btd, sae, acts, loaded.mesh)


def tables_of(
    batch: PackedBatch, resid_btd: Float[Array, "b t d"], sae: LoadedSae, acts: Acts, mesh: Mesh
) -> list[Table]:
    """The part of `dispatch` behind the backbone: encoder, top-k, and one peak for each document and feature."""
    order_bt = np.argsort(~batch.content, axis=1, kind="stable").astype(np.int32)  # content first, in its order
    slot_bt = np.take_along_axis(np.where(batch.content, batch.slot, -1), order_bt, axis=1)
    position_bt = np.take_along_axis(batch.positions, order_bt, axis=1)
    rows, row_tokens = batch.tokens.shape
    slots = max(8, min(rows * row_tokens // TOKENS_PER_SLOT, TABLE_ELEMENTS // sae.features))
    chunk = chunk_length(rows, row_tokens, sae.features)
    longest = int(batch.content.sum(axis=1).max(initial=0))
    return [
        fold(
            sae.sae, resid_btd, order_bt, slot_bt - first, position_bt, -(-longest // chunk),
            acts=acts, k=sae.k, slots=slots, chunk=chunk, mesh=mesh,
        )
        for first in range(0, len(batch.documents), slots)
    ]  # fmt: skip


def collect(batch: PackedBatch, tables: Sequence[Table], kept_f: Bool[np.ndarray, " f"] | None = None) -> BatchPeaks:
    """Wait for the tables of `dispatch` and make them sparse; of the features of `kept_f`, by default of all."""
    peak_sf, position_sf = (
        np.concatenate([np.asarray(getattr(table.peaks, name)) for table in tables])[: len(batch.documents)]
        for name in ("peak_sf", "position_sf")
    )
    document, feature = np.nonzero(peak_sf if kept_f is None else np.where(kept_f, peak_sf, 0))
    return BatchPeaks(
        document=document,
        feature=feature,
        peak=peak_sf[document, feature],
        position=position_sf[document, feature],
        tokens_f=np.sum([np.asarray(table.peaks.tokens_f) for table in tables], axis=0, dtype=np.int64),
        mean_nd=np.concatenate([np.asarray(table.mean_sd) for table in tables])[: len(batch.documents)],
    )


def chunk_length(rows: int, row_tokens: int, features: int) -> int:
    """Tokens of each row encoded at a time: the largest divisor of the row that stays within CHUNK_ELEMENTS."""
    return equal_part(row_tokens, CHUNK_ELEMENTS // (rows * features))


@partial(jax.jit, static_argnames=("acts", "k", "slots", "chunk", "mesh"))
def fold(
    sae: SAE,
    resid_btd: Float[Array, "b t d"],
    order_bt: Int[Array, "b t"],
    slot_bt: Int[Array, "b t"],
    position_bt: Int[Array, "b t"],
    chunks: Int[Array, ""],
    *,
    acts: Acts,
    k: int | None,
    slots: int,
    chunk: int,
    mesh: Mesh,
) -> Table:
    """Peaks and mean residual per slot over the first `chunks` chunks of every row, content tokens first.

    `slot_bt` outside [0, slots) counts for nothing. `k` is None for an SAE with a threshold. `chunks` is traced: one
    compile serves every batch, and a batch of short texts costs less than one of long texts.
    """
    content_btd = jnp.take_along_axis(resid_btd, order_bt[:, :, None], axis=1)
    slot_bt = jnp.where(slot_bt < 0, slots, slot_bt)  # a negative index would count from the end
    features = sae.w_fd.shape[0]
    by_feature = sharding(mesh, None, FEATURE)

    def step(index: Array, table: Peaks) -> Peaks:
        def part(x: Array) -> Array:
            cut = jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1)
            return cut.reshape(-1, *cut.shape[2:])

        pre_bf = pre_activations(sae, part(content_btd))
        slot_b, position_b = part(slot_bt), part(position_bt)
        if acts == "relu":
            return _raise_rows(table, jax.nn.relu(pre_bf), slot_b, position_b)
        if k is None:
            return _raise_rows(table, above_threshold(sae, pre_bf), slot_b, position_b)
        pre_bk, idx_bk = top_k(pre_bf, k, mesh)
        return _raise_entries(table, jax.nn.relu(pre_bk), idx_bk, slot_b, position_b)

    empty = Peaks(
        jax.lax.with_sharding_constraint(jnp.zeros((slots, features), jnp.float32), by_feature),
        jax.lax.with_sharding_constraint(jnp.full((slots, features), NOWHERE, jnp.int32), by_feature),
        jax.lax.with_sharding_constraint(jnp.zeros(features, jnp.int32), sharding(mesh, FEATURE)),
    )
    return Table(jax.lax.fori_loop(0, chunks, step, empty), _segment_mean(content_btd, slot_bt, slots))


def _segment_mean(x_btd: Array, slot_bt: Array, slots: int) -> Array:
    """Mean per slot in float32; rows of a slot outside [0, slots) are dropped, an empty slot is 0."""
    total_sd = jnp.zeros((slots, x_btd.shape[-1])).at[slot_bt].add(x_btd.astype(jnp.float32), mode="drop")
    count_s = jnp.zeros(slots).at[slot_bt].add(1, mode="drop")
    return total_sd / jnp.maximum(count_s, 1)[:, None]


def _raise_entries(table: Peaks, acts_bk: Array, idx_bk: Array, slot_b: Array, position_b: Array) -> Peaks:
    counted_bk = (acts_bk > 0) & (slot_b < table.peak_sf.shape[0])[:, None]
    tokens_f = table.tokens_f.at[idx_bk].add(counted_bk)
    # What was not selected is not touched: the table may be a hundred times as large.
    at = slot_b[:, None], idx_bk
    old_bk = table.peak_sf.at[at].get(mode="fill", fill_value=jnp.inf)
    peak_sf = table.peak_sf.at[at].max(acts_bk, mode="drop")
    now_bk = peak_sf.at[at].get(mode="fill", fill_value=-1)
    position_sf = table.position_sf.at[at].max(jnp.where(now_bk > old_bk, NOWHERE, -1), mode="drop")
    return Peaks(peak_sf, _first(position_sf, at, acts_bk, now_bk, position_b), tokens_f)


def _raise_rows(table: Peaks, acts_bf: Array, slot_b: Array, position_b: Array) -> Peaks:
    counted_bf = (acts_bf > 0) & (slot_b < table.peak_sf.shape[0])[:, None]
    peak_sf = table.peak_sf.at[slot_b].max(acts_bf, mode="drop")
    now_bf = peak_sf.at[slot_b].get(mode="fill", fill_value=-1)
    position_sf = jnp.where(peak_sf > table.peak_sf, NOWHERE, table.position_sf)
    position_sf = _first(position_sf, (slot_b,), acts_bf, now_bf, position_b)
    return Peaks(peak_sf, position_sf, table.tokens_f + counted_bf.sum(axis=0))


def _first(position_sf: Array, at: tuple[Array, ...], acts: Array, now: Array, position_b: Array) -> Array:
    """Positions with the first token that reaches the peak `now`; NOWHERE stands where the old one was forgotten."""
    reaches = (acts > 0) & (acts == now)
    return position_sf.at[at].min(jnp.where(reaches, position_b[:, None], NOWHERE), mode="drop")
