"""The activation store: rows of the residual stream on disk or in an object store, and where each row came from.

Writes, below one folder or URL (what the JSON files hold is in manifest.py):

    manifest.json                       what the rows are; once the harvest is complete also totals and the shard list
    arrays/WRITER/NUMBER/SPLIT/resid    bfloat16 [rows, d_model]
    arrays/WRITER/NUMBER/SPLIT/origin   uint64 [rows, 3]: document id, position in the document, token id
    records/WRITER/NUMBER.json          commit record: only with it does the shard exist
    finished/WRITER.json                this writer saw the end of its part of the corpus

A shard holds the training and the validation rows of one stretch of the corpus, as arrays of their own. It is written
whole, under a path of its own, and then committed by one atomic write of its record, which also says where the next
shard begins. So a kill at any moment loses no row and doubles none, writers share nothing, and a restarted writer
makes the same bytes. Rows are shuffled inside a shard, because readers fetch blocks and neighbouring rows of one
document are far from independent.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Bool, Float64, Int32, Int64, UInt64

from fac_jax.activations.arrays import (
    BLOCK_ROWS,
    CACHE_BYTES,
    Root,
    begin_read,
    open_array,
    open_root,
    read_json,
    storage,
    write_arrays,
    write_json,
)
from fac_jax.activations.manifest import (
    Cursor,
    Finished,
    Manifest,
    Part,
    Record,
    Totals,
    check_holds,
    identity,
    reduce_parts,
    squared_norms,
    summarise,
)
from fac_jax.errors import UserError

log = logging.getLogger(__name__)
Split = Literal["train", "validation"]

SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Rows:
    """Rows of the store. `doc` is the document id as a number: `f"{doc:016x}"` is `Document.id`."""

    resid: BFloat16[np.ndarray, "b d"]
    doc: UInt64[np.ndarray, " b"]
    position: Int32[np.ndarray, " b"]
    token: Int32[np.ndarray, " b"]

    def __len__(self) -> int:
        return len(self.resid)

    def take(self, index: Int64[np.ndarray, " n"], into: Rows | None = None) -> Rows:
        """The rows at `index`, in new arrays or in those of `into`."""
        if into is None:
            into = empty_rows(len(index), self.resid.shape[1])
        for f in dataclasses.fields(self):
            source, target = getattr(self, f.name), getattr(into, f.name)
            if source.dtype == ml_dtypes.bfloat16:  # numpy moves its own types 4 times as fast
                source, target = source.view(np.uint16), target.view(np.uint16)
            np.take(source, index, axis=0, out=target, mode="clip")  # "clip": with "raise" numpy buffers the output
        return into

    def span(self, start: int, stop: int) -> Rows:
        """Rows [start, stop), without a copy."""
        return Rows(self.resid[start:stop], self.doc[start:stop], self.position[start:stop], self.token[start:stop])


def empty_rows(rows: int, d_model: int) -> Rows:
    """Arrays to be filled."""
    resid = np.empty((rows, d_model), ml_dtypes.bfloat16)
    return Rows(resid, np.empty(rows, np.uint64), np.empty(rows, np.int32), np.empty(rows, np.int32))


def create_store(path: str | Path, manifest: Manifest) -> None:
    """Begin the store, or go on with one that is there. Raises UserError when that one holds something else."""
    root = open_root(path)
    there = read_json(root, "manifest.json", Manifest)
    if there is None:
        write_json(root, "manifest.json", manifest)
    else:
        check_holds(there, path, "harvest into another run.dir, or delete that folder", **identity(manifest))


def read_manifest(path: str | Path) -> Manifest:
    """The manifest. Raises UserError when there is no store at `path` or it was written by a newer version."""
    manifest = read_json(open_root(path), "manifest.json", Manifest)
    if manifest is None:
        raise UserError(f"no activation store at {path}: run `fac harvest` first or set train.store")
    return manifest


class StoreWriter:
    """Appends rows to a store, as the only writer of that name; goes on after its last commit.

    A context: leaving it waits for the shard that is being written, and what is buffered after that is lost.
    Rows must come in the order of the corpus, from any batch at or before `cursor`: what is committed is left out.
    Shards are written by a thread while the caller computes the next batches; its errors come out of a later call.
    """

    def __init__(self, path: str | Path, manifest: Manifest, writer: str) -> None:
        self._root, self._manifest, self._name = open_root(path), manifest, writer
        self.shards = _committed(self._root, manifest, writer)
        """Shards committed, or about to be."""
        self.cursor = _read_record(self._root, writer, self.shards - 1).next if self.shards else Cursor()
        """Where the first row lies that was not committed when this writer was opened."""
        self._end = self.cursor
        self._filled = 0
        self._new_buffer()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._commit: Future[None] | None = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()

    def append(self, first: int, counts: Mapping[str, int], rows: Rows, held_out: Bool[np.ndarray, " b"]) -> None:
        """All rows of the batch that begins with document `first`; `counts` is as of before it.

        `held_out` says which rows are validation rows.
        """
        if first < self.cursor.first:
            return
        start = self.cursor.skip if first == self.cursor.first else 0
        while start < len(rows):
            stop = min(len(rows), start + self._manifest.shard_rows - self._filled)
            space = slice(self._filled, self._filled + stop - start)
            for f in dataclasses.fields(Rows):
                getattr(self._rows, f.name)[space] = getattr(rows, f.name)[start:stop]
            self._held_out[space] = held_out[start:stop]
            start, self._filled = stop, space.stop
            if self._filled == self._manifest.shard_rows:
                self._begin_commit(Cursor(first, stop, dict(counts)))
        self._end = Cursor(first, len(rows), dict(counts))

    def finish(self, counts: Mapping[str, int]) -> None:
        """Commit what is buffered as a last, smaller shard, and note that there is no more to come."""
        if self._filled:
            self._begin_commit(self._end)
        self._wait()
        write_json(self._root, _finished_key(self._name), Finished(self.shards, dict(counts)))

    def _new_buffer(self) -> None:
        self._rows = empty_rows(self._manifest.shard_rows, self._manifest.d_model)
        self._held_out = np.empty(self._manifest.shard_rows, bool)
        self._filled = 0

    def _begin_commit(self, following: Cursor) -> None:
        self._wait()
        arguments = self.shards, self._rows.span(0, self._filled), self._held_out[: self._filled], following
        self._commit = self._thread.submit(self._write_shard, *arguments)
        self.shards += 1
        self._new_buffer()

    def _wait(self) -> None:
        if self._commit is not None:
            self._commit.result()

    def _write_shard(self, number: int, rows: Rows, held_out: Bool[np.ndarray, " b"], following: Cursor) -> None:
        chosen = {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}
        parts: dict[str, Part] = {}
        arrays: dict[str, np.ndarray] = {}
        for split in SPLITS:
            path = _part_path(self._name, number, split)
            order = np.random.default_rng([self._manifest.seed, *path.encode()]).permutation(chosen[split])
            part = rows.take(order)
            squares_b = squared_norms(part.resid)
            self._check_finite(part, squares_b)
            parts[split] = summarise(part.resid, squares_b)
            if len(part):
                origin = np.stack([part.doc, part.position.astype(np.uint64), part.token.astype(np.uint64)], axis=1)
                arrays |= {f"{path}/resid": part.resid, f"{path}/origin": origin}
        write_arrays(self._root, arrays)
        write_json(self._root, _record_key(self._name, number), Record(parts, following))

    def _check_finite(self, rows: Rows, squares_b: Float64[np.ndarray, " b"]) -> None:
        bad = np.flatnonzero(~np.isfinite(squares_b))
        if len(bad):
            raise UserError(
                f"the residual of document {rows.doc[bad[0]]:016x} at token {rows.position[bad[0]]} is not finite, and "
                f"{len(bad) - 1} more of {len(rows)} (layer {self._manifest.layer} of {self._manifest.model}): "
                "check the weights, or set backbone.dtype to float32"
            )


def finished_counts(path: str | Path, writer: str) -> dict[str, int] | None:
    """What `writer` counted, if it finished and all its shards are there; otherwise None: it has to go on."""
    root = open_root(path)
    finished = read_json(root, _finished_key(writer), Finished)
    if finished is None or _committed(root, read_manifest(path), writer) < finished.shards:
        return None
    return finished.counts


def complete_store(path: str | Path, writers: Sequence[str]) -> Totals:
    """Reduce the commit records to totals and write them into the manifest: from now on the store can be read."""
    root, manifest = open_root(path), read_manifest(path)
    parts: dict[str, list[tuple[str, Part]]] = {split: [] for split in SPLITS}
    counts: dict[str, int] = {}
    for writer in writers:
        finished = read_json(root, _finished_key(writer), Finished)
        if finished is None:
            raise UserError(f"store at {path}: writer {writer} has not finished; run `fac harvest` again")
        for number in range(finished.shards):
            for split, part in _read_record(root, writer, number).parts.items():
                parts[split] += [(_part_path(writer, number, split), part)] if part.rows else []
        counts = {name: counts.get(name, 0) + value for name, value in finished.counts.items()}
    totals = Totals({split: reduce_parts(parts[split], manifest.d_model) for split in SPLITS}, counts)
    write_json(root, "manifest.json", dataclasses.replace(manifest, totals=totals))
    return totals


class StoreReader:
    """One split of a complete store, read in blocks of up to `BLOCK_ROWS` rows. Threads may share it."""

    def __init__(self, path: str | Path, split: Split = "train") -> None:
        """Raises UserError when there is no store, it is not complete, or the split is empty."""
        self._root, self.path, self.split = open_root(path, CACHE_BYTES), str(path), split
        self.manifest = read_manifest(path)
        if self.manifest.totals is None:
            raise UserError(f"store at {path} is not complete: run `fac harvest` again, it goes on where it stopped")
        totals = self.manifest.totals.splits[split]
        if totals.rows == 0:
            raise UserError(
                f"store at {path} has no {split} rows: harvest more documents, or change harvest.validation_fraction"
            )
        self.rows, self.d_model = totals.rows, self.manifest.d_model
        self.mean: Float64[np.ndarray, " d"] = np.asarray(totals.mean)
        self.mean_square, self.median_norm = totals.mean_square, totals.norm_quantiles["0.5"]
        self._parts = totals.parts
        per_shard = [-(-rows // BLOCK_ROWS) for _, rows in totals.parts]
        self._shard_of = np.repeat(np.arange(len(per_shard)), per_shard)
        self._start_of = np.concatenate([np.arange(n) for n in per_shard]) * BLOCK_ROWS
        left = np.asarray([rows for _, rows in totals.parts])[self._shard_of] - self._start_of
        self.block_rows: Int64[np.ndarray, " n"] = np.minimum(left, BLOCK_ROWS)
        """Rows of each block: only the last block of a shard can be short."""
        self._arrays: dict[int, tuple[Any, Any]] = {}

    def read_blocks(self, blocks: Sequence[int] | Int64[np.ndarray, " n"]) -> Rows:
        """The rows of these blocks, in this order. Raises UserError naming a shard that is missing or damaged."""
        sizes = self.block_rows[np.asarray(blocks)]
        ends = sizes.cumsum()
        rows = empty_rows(int(ends[-1]), self.d_model)
        origin_b3 = np.empty((len(rows), 3), np.uint64)
        reads = []
        for block, size, end in zip(blocks, sizes, ends, strict=True):
            start, stop = int(self._start_of[block]), int(self._start_of[block] + size)
            resid, origin = self._open_part(int(self._shard_of[block]))
            reads.append(begin_read(resid, start, stop, rows.resid[end - size : end]))
            reads.append(begin_read(origin, start, stop, origin_b3[end - size : end]))
        for index, read in enumerate(reads):
            path = self._parts[self._shard_of[blocks[index // 2]]][0]
            record = path.replace("arrays", "records", 1).removesuffix(f"/{self.split}") + ".json"
            remedy = f"delete {record} and stage.json there, then run `fac harvest` again, which makes the shard anew"
            with storage(f"shard {path} of the store at {self.path}", remedy):
                read.result()
        return Rows(rows.resid, origin_b3[:, 0], origin_b3[:, 1].astype(np.int32), origin_b3[:, 2].astype(np.int32))

    def _open_part(self, shard: int) -> tuple[Any, Any]:
        if shard not in self._arrays:
            path, rows = self._parts[shard]
            self._arrays[shard] = _open_part(self._root, path, rows, self.d_model)
        return self._arrays[shard]


def _part_path(writer: str, number: int, split: str) -> str:
    return f"arrays/{writer}/{number:06d}/{split}"


def _record_key(writer: str, number: int) -> str:
    return f"records/{writer}/{number:06d}.json"


def _finished_key(writer: str) -> str:
    return f"finished/{writer}.json"


def _read_record(root: Root, writer: str, number: int) -> Record:
    key = _record_key(writer, number)
    record = read_json(root, key, Record)
    if record is None:
        raise UserError(f"{root.url}/{key} is missing: run `fac harvest` again, it makes the shard anew")
    return record


def _committed(root: Root, manifest: Manifest, writer: str) -> int:
    """How many leading shards of a writer have a record and files that open: it goes on after them.

    One row is read of each array: the index of its blocks stands at its end, so a missing or truncated file shows.
    """
    number = 0
    while (record := read_json(root, _record_key(writer, number), Record)) is not None:
        for split, part in record.parts.items():
            path = _part_path(writer, number, split)
            try:
                with storage(path, "it is made anew"):
                    for array in _open_part(root, path, part.rows, manifest.d_model) if part.rows else ():
                        array[:1].read().result()
            except UserError as error:
                log.warning("store at %s: %s", root.url, error)
                return number
        number += 1
    return number


def _open_part(root: Root, path: str, rows: int, d_model: int) -> tuple[Any, Any]:
    resid = open_array(root, f"{path}/resid", rows, d_model, "bfloat16")
    return resid, open_array(root, f"{path}/origin", rows, 3, "uint64")
