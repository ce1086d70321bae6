"""Rows into one store: buffered, shuffled, filtered, and committed shard by shard (layout: store.py)."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from fac_jax.activations.arrays import open_root, write_arrays, write_json
from fac_jax.activations.claim import claim
from fac_jax.activations.manifest import SPLITS, Cursor, Finished, Manifest, Part, Record, Sums, part_of, sums_of
from fac_jax.activations.rows import Rows, empty_rows, row_dtype, to_int8
from fac_jax.activations.store import committed, finished_key, part_path, read_record, record_key
from fac_jax.errors import UserError

log = logging.getLogger(__name__)
OBJECT_STORE_SHARDS = 4
"""Written at a time: by uploads of 20 MB/s each, 10 shards took 43 s one by one, and 22, 14 and 9 s by 2, 4 and 8
(2026-11-26). In a folder one thread is as fast as two (1 GiB in 1.4 to 2.0 s, 2 cores)."""
Buffer = tuple[Rows, Bool[np.ndarray, " b"]]
"""Memory for the rows of a shard, and for which of them are held out."""


class StoreWriter:
    """Appends rows to a store, as the only writer of that name; goes on after its last commit.

    A context: leaving it waits for the shards that are being written, and what is buffered after that is lost.
    Rows must come in the order of the corpus, from any batch at or before `cursor`: what is committed is left out.
    Threads write up to `shards_at_once` shards while the caller computes the next batches, and commit them in order;
    their errors come out of a later call. Raises UserError when another process is that writer.
    """

    def __init__(self, path: str | Path, manifest: Manifest, writer: str, shards_at_once: int | None = None) -> None:
        self._root, self._manifest, self._name = open_root(path), manifest, writer
        self._claim = claim(self._root, writer)
        try:
            self.shards = committed(self._root, manifest, writer)
            """Shards committed, or about to be."""
            last = read_record(self._root, writer, self.shards - 1) if self.shards else None
        except BaseException:
            self._claim.release()
            raise
        self.cursor = last.next if last is not None else Cursor()
        """Where the first row lies that was not committed when this writer was opened."""
        self.waited_s = 0.0
        """Seconds for which `append` had to wait, because `shards_at_once` were being written."""
        self._end = self.cursor
        self._filled = 0
        self._rows, self._held_out = self._buffer()
        self._at_once = shards_at_once or (OBJECT_STORE_SHARDS if self._root.folder is None else 1)
        self._threads = ThreadPoolExecutor(self._at_once, thread_name_prefix="store-writer")
        self._commits: deque[tuple[Future[None], Buffer]] = deque()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the shards that are being written; from now on another process may be this writer."""
        self._threads.shutdown()
        self._claim.release()

    def append(self, first: int, counts: Mapping[str, int], rows: Rows, held_out: Bool[np.ndarray, " b"]) -> None:
        """All rows of the batch that begins with document `first`; `counts` is as of before it.

        `held_out` says which rows are validation rows.
        """
        if first < self.cursor.first:
            return
        start = self.cursor.skip if first == self.cursor.first else 0
        while start < len(rows):
            stop = min(len(rows), start + self._manifest.shard_rows - self._filled)
            self._rows.fill(self._filled, rows.span(start, stop))
            self._held_out[self._filled : self._filled + stop - start] = held_out[start:stop]
            start, self._filled = stop, self._filled + stop - start
            if self._filled == self._manifest.shard_rows:
                self._begin_commit(Cursor(first, stop, dict(counts)))
        self._end = Cursor(first, len(rows), dict(counts))

    def finish(self, counts: Mapping[str, int]) -> None:
        """Commit what is buffered as a last, smaller shard, and note that there is no more to come."""
        if self._filled:
            self._begin_commit(self._end)
        while self._commits:
            self._wait()
        self._claim.check()
        write_json(self._root, finished_key(self._name), Finished(self.shards, dict(counts)))

    def _buffer(self) -> Buffer:
        rows, dtype = self._manifest.shard_rows, row_dtype(self._manifest.dtype)
        return empty_rows(rows, self._manifest.d_model, dtype), np.empty(rows, bool)

    def _begin_commit(self, following: Cursor) -> None:
        started = time.monotonic()
        free = self._wait() if len(self._commits) == self._at_once else self._buffer()
        self.waited_s += time.monotonic() - started
        before = self._commits[-1][0] if self._commits else None
        full = self._rows, self._held_out
        arguments = self.shards, self._rows.span(0, self._filled), self._held_out[: self._filled], following, before
        self._commits.append((self._threads.submit(self._write_shard, *arguments), full))
        self.shards += 1
        (self._rows, self._held_out), self._filled = free, 0

    def _wait(self) -> Buffer:
        """Wait for the oldest shard that is being written; its memory, which is free then."""
        commit, buffer = self._commits.popleft()
        commit.result()
        return buffer

    def _write_shard(
        self,
        number: int,
        rows: Rows,
        held_out: Bool[np.ndarray, " b"],
        following: Cursor,
        before: Future[None] | None,
    ) -> None:
        kept = self._not_outliers(rows)
        parts: dict[str, Part] = {}
        arrays: dict[str, np.ndarray] = {}
        for split in SPLITS:
            path, chosen = part_path(self._name, number, split), held_out == (split == "validation")
            # The order is drawn over all rows of the split, so that a filter changes no other row's place.
            order = np.random.default_rng([self._manifest.seed, *path.encode()]).permutation(np.flatnonzero(chosen))
            made, parts[split] = self._part(rows, order[kept[order]], int((chosen & ~kept).sum()))
            arrays |= {f"{path}/{name}": values for name, values in made.items() if len(values)}
        self._claim.check()
        write_arrays(self._root, arrays, self._manifest.form)
        if before is not None:
            before.result()  # committed in order: a record says that all before it are there
        self._claim.check()
        write_json(self._root, record_key(self._name, number), Record(parts, following))

    def _not_outliers(self, rows: Rows) -> Bool[np.ndarray, " b"]:
        """Rows whose norm is at most `norm_filter` medians of the shard: of the shard, because a restarted writer must
        decide alike."""
        if not self._manifest.norm_filter:
            return np.ones(len(rows), bool)
        squares_b = self._finite_sums(rows).squares_b
        return np.sqrt(squares_b) <= self._manifest.norm_filter * np.median(np.sqrt(squares_b))

    def _part(self, rows: Rows, order: Int64[np.ndarray, " n"], outliers: int) -> tuple[dict[str, np.ndarray], Part]:
        """The arrays of one split of a shard, and what its record says of them."""
        padded = empty_rows(self._manifest.form.padded(len(order)), rows.resid.shape[1], rows.resid.dtype)
        padded.resid[len(order) :] = 0
        part = rows.take(order, padded.span(0, len(order)))
        sums = self._finite_sums(part)
        columns = [part.doc, part.position.astype(np.uint64), part.token.astype(np.uint64)]
        resid, rounding = padded.resid, 0.0
        if self._manifest.dtype == "int8":
            resid, scale_b, rounding = to_int8(part.resid)
            columns.append(scale_b.view(np.uint32).astype(np.uint64))
        described = part_of(sums, outliers, rounding)
        return {"resid": resid, "origin": np.stack(columns, axis=1)}, described

    def _finite_sums(self, rows: Rows) -> Sums:
        """Sums over rows that are finite. Raises UserError for those that are not."""
        sums = sums_of(rows.resid)
        bad = np.flatnonzero(~np.isfinite(sums.squares_b))
        if len(bad):
            remedy = "check the weights, or set backbone.dtype to float32"
            if self._manifest.dtype == "float16":
                remedy = "float16 ends at 65,504 and massive activations exceed it: set harvest.dtype to bfloat16"
            raise UserError(
                f"the residual of document {rows.doc[bad[0]]:016x} at token {rows.position[bad[0]]} is not finite, and "
                f"{len(bad) - 1} more of {len(rows)} (layer {self._manifest.layer} of {self._manifest.model}): {remedy}"
            )
        return sums
