"""What is scanned of a unit between two commits: statistics on the device, and on the host what is kept of documents.

Its size is bounded: it ends after a minute, or before if it holds much.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from fac_jax.backbone.weights import Loaded
from fac_jax.distributed import beat
from fac_jax.packing import EncodedDocument, PackedBatch
from fac_jax.scan import parts
from fac_jax.scan.parts import Counts, Identity, State
from fac_jax.scan.peaks import BatchPeaks, Table, collect
from fac_jax.scan.spans import Summary, extend, span_texts
from fac_jax.scan.tally import count, new_tally, places, positions, slots, stats
from fac_jax.scan.units import Cursor

COMMIT_S = 60.0
"""Seconds between commits: a kill loses at most so much work."""
COMMIT_DOCUMENTS, COMMIT_PEAKS = 2**14, 2**24
"""Documents, and peaks kept of single documents (24 bytes each), that end a stretch in any case."""


class Stretch:
    """What is scanned of a unit between two commits."""

    def __init__(self, identity: Identity, loaded: Loaded, kept_f: Bool[np.ndarray, " f"]) -> None:
        self._identity, self._loaded, self._kept_f = identity, loaded, kept_f
        self.tally = new_tally(identity.features, identity.top_spans, loaded.mesh)
        self._documents: list[EncodedDocument] = []
        self._scored: list[tuple[PackedBatch, BatchPeaks]] = []
        self._next, self._since = 0, time.monotonic()

    def add(self, batch: PackedBatch, tables: Sequence[Table]) -> None:
        """Count a batch, on the device; what is kept of single documents comes to the host."""
        done = 0
        for table in tables:
            size = table.peaks.peak_sf.shape[0]
            ids = [encoded.document.id for encoded in batch.documents[done : done + size]]
            which = slots(ids, len(self._documents) + done, size)
            self.tally = count(self.tally, table.peaks, which, mesh=self._loaded.mesh)
            done += size
        if self._kept_f.any():
            self._scored.append((batch, collect(batch, tables, self._kept_f)))
        else:
            jax.block_until_ready(tables[-1].mean_sd)  # else the host would run ahead, with a table for every batch
        self._documents.extend(batch.documents)
        self._next = batch.first + len(batch.documents)
        beat(f"scanning {self._identity.name}")

    def is_long(self) -> bool:
        """Whether it is time to commit."""
        return (
            time.monotonic() - self._since > COMMIT_S
            or len(self._documents) >= COMMIT_DOCUMENTS
            or sum(len(found.peak) for _, found in self._scored) >= COMMIT_PEAKS
        )

    def commit(self, out: Path, unit: int, state: State, summary: Summary) -> tuple[State, Summary]:
        """Write it; returns the state and the statistics behind it. An empty stretch changes nothing."""
        if not self._documents:
            return state, summary
        if self._scored:
            parts.write_piece(out, state.share, unit, self._scored)
        summary = extend(summary, stats(self.tally), self._cut)
        lengths = [(1, len(one.ids), int(one.content.sum())) for one in self._documents]
        counts = state.counts.plus(Counts(*np.sum(lengths, axis=0).tolist()))
        state = replace(state, cursor=Cursor(unit, self._next), counts=counts)
        parts.commit(out, state, summary)
        return state, summary

    def _cut(self, spans: Int64[np.ndarray, " m"]) -> pa.Table:
        """Words of spans by their `span_fn`; those that several features share are cut once."""
        longest = max(len(one.ids) for one in self._documents)
        where = places(self.tally)[spans].astype(np.int64) * longest + positions(self.tally)[spans]
        wanted, inverse = np.unique(where, return_inverse=True)
        place_m, position_m = np.divmod(wanted, longest)
        length = self._identity.span_tokens
        return span_texts(self._documents, place_m, position_m, length, self._loaded.tokenizer).take(inverse)
