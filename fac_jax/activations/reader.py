"""Rows out of one store, block by block (layout: store.py)."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64

from fac_jax.activations.arrays import CACHE_BYTES, Root, begin_read, open_root, storage
from fac_jax.activations.manifest import Split
from fac_jax.activations.rows import Rows, empty_rows, from_int8, row_dtype
from fac_jax.activations.store import open_part, origin_width, read_manifest, read_quarantine, record_of
from fac_jax.errors import UserError

log = logging.getLogger(__name__)
OPEN_PARTS = 256  # kept open; a store of 1 TB has 8,000 shards


def _once(function: Callable[[], Rows]) -> Callable[[], Rows]:
    """`function` called by the first thread that asks; the others wait for its result, or raise its error."""
    lock, found = Lock(), Future[Rows]()

    def call() -> Rows:
        with lock:
            if not found.done():
                try:
                    found.set_result(function())
                except BaseException as error:
                    found.set_exception(error)
        return found.result()

    return call


class StoreReader:
    """One split of a complete store, read in blocks of up to `manifest.block_rows` rows. Threads may share it."""

    def __init__(
        self, path: str | Path, split: Split = "train", on_bad_chunk: Literal["stop", "skip"] = "stop"
    ) -> None:
        """`on_bad_chunk: skip` leaves out what is quarantined, and says how much that is.

        Raises UserError when there is no store, it is not complete, the split is empty, or it holds a quarantined
        block that is not to be skipped.
        """
        self.path, self.split = str(path), split
        self.manifest = read_manifest(path)
        if self.manifest.totals is None:
            raise UserError(f"store at {path} is not complete: run `fac harvest` again, it goes on where it stopped")
        totals = self.manifest.totals.splits[split]
        if totals.rows == 0:
            raise UserError(
                f"store at {path} has no {split} rows: harvest more documents, or change harvest.validation_fraction"
            )
        self._roots = [open_root(member, CACHE_BYTES) for member in self.manifest.members or (str(path),)]
        self.d_model = self.manifest.d_model
        self.dtype = row_dtype(self.manifest.dtype)
        self.mean: Float64[np.ndarray, " d"] = np.asarray(totals.mean)
        self.mean_square, self.median_norm = totals.mean_square, totals.norm_quantiles["0.5"]
        self._parts = totals.parts
        block = self.manifest.block_rows
        per_shard = [-(-rows // block) for _, rows in totals.parts]
        self._shard_of = np.repeat(np.arange(len(per_shard)), per_shard)
        self._start_of = np.concatenate([np.arange(n) for n in per_shard]) * block
        left = np.asarray([rows for _, rows in totals.parts])[self._shard_of] - self._start_of
        self.block_rows: Int64[np.ndarray, " n"] = np.minimum(left, block)
        """Rows of each block: only the last block of a shard can be short."""
        self.left_out = self._leave_out(on_bad_chunk)
        """Rows of quarantined blocks, which are not read."""
        self.rows = int(self.block_rows.sum())
        self._open, self._lock = OrderedDict[int, tuple[Any, Any]](), Lock()

    def read_blocks(self, blocks: Sequence[int] | Int64[np.ndarray, " n"], with_origin: bool = True) -> Rows:
        """The rows of these blocks, in this order. Raises UserError naming a shard that is missing or damaged."""
        return self.begin(blocks, with_origin)()

    def begin(self, blocks: Sequence[int] | Int64[np.ndarray, " n"], with_origin: bool = True) -> Callable[[], Rows]:
        """Ask for these blocks; calling the result waits for them. Threads may share it: all get the same rows."""
        sizes = self.block_rows[np.asarray(blocks)]
        ends, rounded = sizes.cumsum(), self.manifest.dtype == "int8"
        rows = empty_rows(int(ends[-1]), self.d_model, self.dtype, with_origin)
        rounded_bd = np.empty((len(rows), self.d_model), np.int8) if rounded else rows.resid
        reads_origin = with_origin or rounded  # the scales of int8 rows lie beside it
        origin_bc = np.empty((len(rows) if reads_origin else 0, origin_width(self.manifest)), np.uint64)
        reads: list[tuple[int, Any]] = []
        for block, size, end in zip(blocks, sizes, ends, strict=True):
            start, stop = int(self._start_of[block]), int(self._start_of[block] + size)
            resid, origin = self._open_part(int(self._shard_of[block]))
            reads.append((int(block), begin_read(resid, start, stop, rounded_bd[end - size : end])))
            if reads_origin:
                reads.append((int(block), begin_read(origin, start, stop, origin_bc[end - size : end])))

        def wait() -> Rows:
            for block, read in reads:
                with storage(*self._blame(block)):
                    read.result()
            if rounded:
                from_int8(rounded_bd, origin_bc[:, 3].astype(np.uint32).view(np.float32), rows.resid)
            if with_origin:
                rows.doc[:], rows.position[:], rows.token[:] = origin_bc[:, 0], origin_bc[:, 1], origin_bc[:, 2]
            return rows

        return _once(wait)

    def _leave_out(self, on_bad_chunk: str) -> int:
        """Take quarantined blocks off the list; returns their rows."""
        bad = np.zeros(len(self.block_rows), bool)
        for member, root in enumerate(self._roots):
            prefix = f"{member}:" if self.manifest.members else ""
            for path, blocks in read_quarantine(root).items():
                here = [index for index, (part, _) in enumerate(self._parts) if part == prefix + path]
                bad |= np.isin(self._shard_of, here) & np.isin(self._start_of // self.manifest.block_rows, blocks)
        rows = int(self.block_rows[bad].sum())
        if rows and on_bad_chunk == "stop":
            raise UserError(
                f"store at {self.path}: {bad.sum()} quarantined blocks hold {rows:,} of {self.block_rows.sum():,} "
                f"{self.split} rows (`fac store verify` found them damaged and says how to mend them); to go on "
                "without them, set train.on_bad_chunk to skip"
            )
        if rows:
            log.warning("store at %s: %s rows in %d quarantined blocks are left out", self.path, f"{rows:,}", bad.sum())
        kept = ~bad
        if not kept.any():
            raise UserError(f"store at {self.path}: every {self.split} block is quarantined; harvest again")
        self._shard_of, self._start_of, self.block_rows = (
            of[kept] for of in (self._shard_of, self._start_of, self.block_rows)
        )
        return rows

    def _blame(self, block: int) -> tuple[str, str]:
        """What a failed read was about, and what to do."""
        root, path = self._where(int(self._shard_of[block]))
        number = int(self._start_of[block]) // self.manifest.block_rows
        return (
            f"block {number} of shard {path} of the store at {root.url}",
            f"delete {record_of(path)} and the run's activations/stage.json, then run `fac harvest` again, which makes "
            "that shard and those after it anew; or run "
            f"`fac store verify {root.url}`, which finds all damage, and train on without it",
        )

    def _where(self, shard: int) -> tuple[Root, str]:
        """The store that a shard's part lies in, and its path there."""
        member, colon, path = self._parts[shard][0].rpartition(":")
        return self._roots[int(member) if colon else 0], path

    def _open_part(self, shard: int) -> tuple[Any, Any]:
        with self._lock:
            if shard not in self._open:
                root, path = self._where(shard)
                self._open[shard] = open_part(root, path, self._parts[shard][1], self.manifest)
                while len(self._open) > OPEN_PARTS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return self._open[shard]
