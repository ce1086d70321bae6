"""Statistics of every feature over one stretch of a corpus, kept on the device and sharded over features.

`count` adds a batch's table of peaks (`peaks.py`); `stats` brings the result to the host, where stretches are merged
(`spans.py`). What it holds depends on the number of features and spans, never on how many documents passed. Nothing of
size [batch, features] leaves the device for it. Equal scores are ranked by document id, so that the order of the
documents does not matter. Ids of 64 bits are two halves here, as JAX has 32-bit integers unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt, UInt64

from fac_jax.mesh import FEATURE, sharding
from fac_jax.scan.peaks import NOWHERE, Peaks
from fac_jax.scan.spans import EDGES, FeatureStats

LAST = np.uint32(2**32 - 1)  # half of NO_ID


class Spans(NamedTuple):
    """The best documents of each feature, by (score descending, id, position); score 0 where there is none."""

    score_fn: Float[Array, "f n"]
    high_fn: UInt[Array, "f n"]
    low_fn: UInt[Array, "f n"]
    place_fn: Int[Array, "f n"]
    """Which document of the stretch it is, -1 for none."""
    position_fn: Int[Array, "f n"]


class Tally(NamedTuple):
    """What is known of a stretch of the corpus so far."""

    max_f: Float[Array, " f"]
    documents_f: Int[Array, " f"]
    tokens_f: Int[Array, " f"]
    above_fe: Int[Array, "f e"]
    """Documents whose peak exceeds each edge of the histogram."""
    spans: Spans


class Slots(NamedTuple):
    """Which documents the s slots of a table are, for `count`."""

    by_id_s: Int[Array, " s"]
    """Slots in the order of their documents' ids."""
    high_s: UInt[Array, " s"]
    low_s: UInt[Array, " s"]
    place_s: Int[Array, " s"]


def new_tally(features: int, top: int, mesh: Mesh) -> Tally:
    """Of nothing yet, born sharded over features."""

    def empty() -> Tally:
        spans = Spans(
            jnp.zeros((features, top), jnp.float32),
            jnp.full((features, top), LAST, jnp.uint32),
            jnp.full((features, top), LAST, jnp.uint32),
            jnp.full((features, top), -1, jnp.int32),
            jnp.full((features, top), NOWHERE, jnp.int32),
        )
        none_f, none_fe = jnp.zeros(features, jnp.int32), jnp.zeros((features, len(EDGES)), jnp.int32)
        return Tally(jnp.zeros(features, jnp.float32), none_f, none_f, none_fe, spans)

    return jax.jit(empty, out_shardings=sharding(mesh, FEATURE))()


def slots(ids: Sequence[str], first_place: int, size: int) -> Slots:
    """The slots of a table whose first documents are those of `ids`, place `first_place` of the stretch and on."""
    id_s = np.full(size, 2**64 - 1, np.uint64)
    id_s[: len(ids)] = id_numbers(ids)
    high_s, low_s = (id_s >> np.uint64(32)).astype(np.uint32), id_s.astype(np.uint32)
    place_s = np.arange(first_place, first_place + size, dtype=np.int32)
    return Slots(np.argsort(id_s, kind="stable").astype(np.int32), high_s, low_s, place_s)


def id_numbers(ids: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """Document ids, 16 hex digits each, as numbers."""
    return np.frombuffer(bytes.fromhex("".join(ids)), ">u8").astype(np.uint64)


def id_names(numbers: UInt64[np.ndarray, " n"]) -> list[str]:
    """What `id_numbers` made numbers of."""
    digits = numbers.astype(">u8").tobytes().hex()
    return [digits[start : start + 16] for start in range(0, len(digits), 16)]


@partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def count(tally: Tally, table: Peaks, slots: Slots, *, mesh: Mesh) -> Tally:
    """`tally` with the documents of one table; slots without a document have no peak above 0 and change nothing."""
    by_feature = jax.lax.with_sharding_constraint(
        (table.peak_sf[slots.by_id_s].T, table.position_sf[slots.by_id_s].T), sharding(mesh, FEATURE)
    )
    peak_fs, position_fs = jax.lax.optimization_barrier(by_feature)  # else every use would transpose it again
    return Tally(
        max_f=jnp.maximum(tally.max_f, peak_fs.max(axis=1)),
        documents_f=tally.documents_f + (peak_fs > 0).sum(axis=1, dtype=jnp.int32),
        tokens_f=tally.tokens_f + table.tokens_f,
        above_fe=tally.above_fe + _above(table.peak_sf),
        spans=_best(tally.spans, peak_fs, position_fs, slots),
    )


def stats(tally: Tally) -> FeatureStats:
    """On the host. `span_fn` is feature x n + rank, for whoever cuts the spans; see `places`."""
    host = jax.tree.map(np.asarray, tally)
    score_fn, high_fn, low_fn, place_fn, position_fn = host.spans
    documents_f = host.documents_f.astype(np.int64)
    # Those above each edge, once more with 0 before and without the last: their differences are the bins.
    above_fe = np.concatenate([documents_f[:, None], host.above_fe], axis=1)
    there = place_fn >= 0
    return FeatureStats(
        max_f=host.max_f,
        documents_f=documents_f,
        tokens_f=host.tokens_f.astype(np.int64),
        histogram_fh=above_fe - np.pad(above_fe[:, 1:], ((0, 0), (0, 1))),
        score_fn=score_fn,
        id_fn=high_fn.astype(np.uint64) << np.uint64(32) | low_fn,
        position_fn=np.where(there, position_fn, -1).astype(np.int64),
        span_fn=np.where(there, np.arange(there.size).reshape(there.shape), -1),
    )


def places(tally: Tally) -> Int[np.ndarray, " fn"]:
    """Document of the stretch for each `span_fn` of `stats(tally)`."""
    return np.asarray(tally.spans.place_fn).reshape(-1)


def positions(tally: Tally) -> Int[np.ndarray, " fn"]:
    """Position of the activating token for each `span_fn` of `stats(tally)`."""
    return np.asarray(tally.spans.position_fn).reshape(-1)


def _above(peak_sf: Array) -> Array:
    """Documents above each edge, [f, e], a few documents at a time: 65,536 features of 128 documents take 40 ms on two
    cores, where a sum over the documents for each edge takes 750."""

    def more(above_ef: Array, peak_f: Array) -> tuple[Array, None]:
        return above_ef + (peak_f > edges_e1), None

    edges_e1 = jnp.asarray(EDGES, jnp.float32)[:, None]
    none_ef = jnp.zeros((len(EDGES), peak_sf.shape[1]), jnp.int32)
    return jax.lax.scan(more, none_ef, peak_sf, unroll=8)[0].T


def _best(spans: Spans, peak_fs: Array, position_fs: Array, slots: Slots) -> Spans:
    """The best of those known and of a table's columns, which stand in the order of their ids: top-k's tie rule."""
    top = min(spans.score_fn.shape[1], peak_fs.shape[1])
    score_fn, at_fn = jax.lax.top_k(peak_fs, top)
    there_fn = score_fn > 0

    def taken(values_s: Array, empty: int | np.uint32) -> Array:
        return jnp.where(there_fn, values_s[slots.by_id_s][at_fn], jnp.asarray(empty, values_s.dtype))

    position_fn = jnp.where(there_fn, jnp.take_along_axis(position_fs, at_fn, axis=1), NOWHERE)
    new = Spans(
        score_fn, taken(slots.high_s, LAST), taken(slots.low_s, LAST), taken(slots.place_s, -1), position_fn
    )  # fmt: skip
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), spans, new)
    keys = (-both.score_fn, both.high_fn, both.low_fn, both.position_fn)
    ordered = jax.lax.sort((*keys, both.place_fn), dimension=1, num_keys=4)
    worse_fn, high_fn, low_fn, position_fn, place_fn = (one[:, : spans.score_fn.shape[1]] for one in ordered)
    return Spans(-worse_fn, high_fn, low_fn, place_fn, position_fn)
