"""fac_jax's store and stream, and raw files of the same rows, in a process of its own: for `fac bench activations`.

    python -m fac_jax.scale.store_contender '{"part": "write", "contender": "store", "d_model": 576, "rows": 100000,
                                              "folder": EMPTY}'
    python -m fac_jax.scale.store_contender '{"part": "read", "contender": "stream", "batch_rows": 4096, "passes": 3,
                                              "folder": WRITTEN}'

The last line it prints is JSON: seconds (of each pass), rows, peak memory in bytes. Writing is timed until the bytes
are on the disk; reading finds them in the page cache.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fac_jax.activations.manifest import Manifest, rows_per_block
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.rows import Rows
from fac_jax.activations.store import complete_store, create_store, writer_name
from fac_jax.activations.stream import WINDOW_BLOCKS, batches, streams_for
from fac_jax.activations.writer import StoreWriter
from fac_jax.config.activations import HarvestConfig
from fac_jax.config.sae import TrainConfig
from fac_jax.runs import versions

WRITER = writer_name(0)
APPENDED = 2048  # rows at a time: the content of 8 x 512 tokens
POOL = 8192  # random rows, written again and again
CHUNK_BYTES = 2**24

Pieces = tuple[int, Iterator[Any]]
"""How many rows there are, and an endless iterator of arrays of them."""


def main() -> None:
    """Time what the argument describes."""
    asked = json.loads(sys.argv[1])
    found = {"write": write, "read": read}[asked["part"]](asked)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**found, "peak_bytes": peak, "version": f"numpy {versions()['numpy']}"}))


def write(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Random rows to the disk."""
    pool = random_rows(asked["d_model"])
    os.sync()  # what others left to be written
    started = time.perf_counter()
    WRITERS[asked["contender"]](Path(asked["folder"]), pool, asked["rows"])
    return {"seconds": [time.perf_counter() - started], "count": asked["rows"]}


def random_rows(d: int) -> Rows:
    """Normal rows."""
    resid_nd = np.random.default_rng(0).standard_normal((POOL, d), np.float32).astype(ml_dtypes.bfloat16)
    token = np.arange(POOL, dtype=np.int32)
    return Rows(resid_nd, token.astype(np.uint64), token, token)


def write_store(folder: Path, pool: Rows, rows: int) -> None:
    """As a harvest of one writer does."""
    d = pool.resid.shape[1]
    manifest = Manifest(
        model="random", model_digest="", layer=1, d_model=d, compute_dtype="bfloat16", tokenizer_digest="",
        corpus_digest="", shard_rows=HarvestConfig().shard_rows, seed=0, writers=1,
        block_rows=rows_per_block(d, "bfloat16"),
    )  # fmt: skip
    create_store(folder, manifest)
    with StoreWriter(folder, manifest, WRITER) as writer:
        for first, span in spans(pool, rows):
            writer.append(first, {}, span, np.zeros(len(span), bool))
        writer.finish({})
    complete_store(folder, [WRITER])


def write_memmap(folder: Path, pool: Rows, rows: int) -> None:
    """One file, without checksums, shuffling or origin."""
    shape = rows, pool.resid.shape[1]
    values = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.uint16, shape)
    for first, span in spans(pool, rows):
        values[first : first + len(span)] = span.resid.view(np.uint16)
    values.flush()  # msync: onto the disk


def spans(pool: Rows, rows: int) -> Iterator[tuple[int, Rows]]:
    """Number of its first row, and rows, of each batch that is appended."""
    for first in range(0, rows, APPENDED):
        start = first % POOL
        yield first, pool.span(start, start + min(APPENDED, rows - first))


def read(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`passes` times as many rows as there are."""
    folder, batch_rows = Path(asked["folder"]), asked["batch_rows"]
    warm_page_cache(folder)
    total, pieces = READERS[asked["contender"]](folder, batch_rows)
    next(pieces)
    seconds, rows = [], 0
    for _ in range(asked["passes"]):
        started, rows = time.perf_counter(), 0
        while rows < total:
            rows += len(next(pieces))
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "count": rows}


def warm_page_cache(folder: Path) -> None:
    """Read every file once."""
    chunk = bytearray(CHUNK_BYTES)
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(chunk):
                    pass


def read_stream(folder: Path, batch_rows: int) -> Pieces:
    """Batches as training gets them."""
    reader = StoreReader(folder)
    streams = streams_for(reader, batch_rows, TrainConfig().streams)
    found = batches(reader, batch_rows, seed=0, streams=streams, with_origin=False)
    return reader.rows, (rows.resid for _, rows in found)


def read_raw(folder: Path, batch_rows: int) -> Pieces:
    """The same blocks, as many at a time as the stream mixes, in the order read."""
    reader = StoreReader(folder)
    numbers = random_blocks(len(reader.block_rows))
    return reader.rows, (reader.read_blocks(blocks, with_origin=False).resid for blocks in numbers)


def read_memmap_rows(folder: Path, batch_rows: int) -> Pieces:
    """A permutation of all rows: the best shuffle, while the file fits the page cache."""
    values, generator = np.load(folder / "rows.npy", mmap_mode="r"), np.random.default_rng(0)
    orders = (generator.permutation(len(values)) for _ in itertools.count())
    starts = range(0, len(values), batch_rows)
    return len(values), (values[order[start : start + batch_rows]] for order in orders for start in starts)


def read_memmap_blocks(folder: Path, batch_rows: int) -> Pieces:
    """Blocks as of the store, copied out of one file."""
    values = np.load(folder / "rows.npy", mmap_mode="r")
    size = rows_per_block(values.shape[1], "bfloat16")

    def piece(blocks: np.ndarray) -> np.ndarray:
        return np.concatenate([values[block * size : (block + 1) * size] for block in blocks])

    return len(values), map(piece, random_blocks(-(-len(values) // size)))


def random_blocks(count: int) -> Iterator[np.ndarray]:
    """Numbers of blocks, `WINDOW_BLOCKS` at a time, permutation after permutation."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(count)
        yield from (order[start : start + WINDOW_BLOCKS] for start in range(0, count, WINDOW_BLOCKS))


WRITERS = {"store": write_store, "memmap": write_memmap}
READERS: dict[str, Callable[[Path, int], Pieces]] = {
    "raw": read_raw,
    "stream": read_stream,
    "memmap_rows": read_memmap_rows,
    "memmap_blocks": read_memmap_blocks,
}


if __name__ == "__main__":
    main()
