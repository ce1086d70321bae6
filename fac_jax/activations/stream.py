"""Store to training batches: shuffled, the same for every reader, resumable from one integer.

Reads blocks of an activation store. Batch `step` is a pure function of (store, seed, batch size, step), so the state of
a training run's data is its step. Every epoch the blocks are permuted, dealt to `streams`, and each stream's rows are
mixed in windows of blocks; a batch is an equal share of every stream, one after the other. As the writer shuffled rows
within shards, the rows of a batch are nearly independent: a batch of 4,096 takes 32 rows of each of 128 blocks, which
lie in shards of 229 documents of 286 tokens: the variance of a per-document effect on it is 1 + 32 / 229 = 1.14 times
that of independent rows (and 1.14 is what test_stream.py measures).

Streams are what several hosts share: a host whose devices hold some rows of a batch reads only the streams that those
come from, and the batch is the same for every number of hosts.

The only module that uses grain.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import grain
import numpy as np
from jaxtyping import Int64

from fac_jax.activations.reader import StoreReader
from fac_jax.activations.rows import Rows, empty_rows
from fac_jax.errors import UserError

WINDOW_BLOCKS = 128  # mixed together, over all streams: about 128 MiB, of which four are kept
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def batches(
    reader: StoreReader,
    batch_rows: int,
    seed: int,
    start_step: int = 0,
    streams: int = 1,
    spans: Sequence[tuple[int, int]] | None = None,
    with_origin: bool = True,
) -> grain.DatasetIterator[tuple[int, Rows]]:
    """Endless (step, rows) from `start_step` on, read ahead by threads.

    `spans` says which rows of each batch are wanted here, as (start, stop) in order; by default all. The iterator has
    grain's `get_state` and `set_state`. Raises UserError when the sizes do not fit.
    """
    batch = batch_function(reader, batch_rows, seed, streams, spans, with_origin)
    steps = grain.MapDataset.range(start_step, sys.maxsize // 2)
    return iter(steps.map(lambda step: (int(step), batch(int(step)))).to_iter_dataset(READ))


def batch_function(
    reader: StoreReader,
    batch_rows: int,
    seed: int,
    streams: int = 1,
    spans: Sequence[tuple[int, int]] | None = None,
    with_origin: bool = True,
) -> Callable[[int], Rows]:
    """The pure function step -> the wanted rows; threads may call it. Neighbouring steps share their reads."""
    if batch_rows % streams:
        raise UserError(f"batch_rows {batch_rows} must be a multiple of streams {streams}: change train.batch_rows")
    if len(reader.block_rows) < streams:
        raise UserError(f"store at {reader.path} has {len(reader.block_rows)} blocks, fewer than {streams} streams")
    share, wanted = batch_rows // streams, shares(batch_rows, streams, spans)
    window_blocks = max(1, WINDOW_BLOCKS // streams)
    mine = {index: _Stream(reader, seed, index, streams, window_blocks, with_origin) for index, _, _ in wanted}
    count = sum(stop - start for _, start, stop in wanted)

    def batch(step: int) -> Rows:
        rows = empty_rows(count, reader.d_model, reader.dtype, with_origin)
        parts = [mine[index].begin(step * share + start, stop - start) for index, start, stop in wanted]
        filled = 0
        for take in itertools.chain.from_iterable(parts):  # every read has begun by now
            filled += take(filled, rows)
        return rows

    return batch


def shares(batch_rows: int, streams: int, spans: Sequence[tuple[int, int]] | None = None) -> list[tuple[int, int, int]]:
    """(stream, start, stop) in order: which rows of a stream's share of a batch are among those of `spans`."""
    share = batch_rows // streams
    return [
        (index, max(start, index * share) - index * share, min(stop, (index + 1) * share) - index * share)
        for start, stop in spans or [(0, batch_rows)]
        for index in range(start // share, -(-stop // share))
    ]


def streams_for(reader: StoreReader, batch_rows: int, most: int) -> int:
    """The largest number of streams up to `most` that the store has blocks for and that divides a batch."""
    return next(n for n in range(min(most, len(reader.block_rows)), 0, -1) if batch_rows % n == 0)


@dataclass(frozen=True)
class _Epoch:
    """One pass of a stream: its blocks in order, and where each window's rows begin (with their number at the end)."""

    blocks: Int64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " w"]


class _Stream:
    """An endless sequence of rows: blocks perm[index::streams] of epoch 0, of epoch 1, ..., mixed window by window."""

    def __init__(
        self, reader: StoreReader, seed: int, index: int, streams: int, window_blocks: int, with_origin: bool
    ) -> None:
        self._reader, self._seed, self._index, self._streams = reader, seed, index, streams
        self._window_blocks, self._with_origin = window_blocks, with_origin
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._window, self._lock = lru_cache(maxsize=4)(self._begin_window), Lock()
        self._epoch_starts = [0]

    def begin(self, row: int, count: int) -> list[Callable[[int, Rows], int]]:
        """Ask for the `count` rows of the sequence from `row` on.

        Each function of the result copies the next of them into the given rows from the given one on, and says how many
        they were.
        """
        parts: list[Callable[[int, Rows], int]] = []
        while count:
            number, offset = self._locate(row)
            starts = self._epoch(number).starts
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            size = min(count, int(starts[window + 1]) - offset)
            parts.append(self._part(number, window, offset - int(starts[window]), size))
            row, count = row + size, count - size
        return parts

    def _part(self, number: int, window: int, offset: int, size: int) -> Callable[[int, Rows], int]:
        """Rows [offset, offset + size) of a mixed window."""
        with self._lock:  # threads that want the same window share one reading of it
            read, order = self._window(number, window)
            if window + 2 < len(self._epoch(number).starts):
                self._window(number, window + 1)  # is read while this one is used

        def take(start: int, into: Rows) -> int:
            read().take(order[offset : offset + size], into.span(start, start + size))
            return size

        return take

    def _locate(self, row: int) -> tuple[int, int]:
        """Epoch of a row, and its offset there. Epochs of a stream differ in length, because some blocks are short."""
        starts = self._epoch_starts
        while starts[-1] <= row:
            starts = [*starts, starts[-1] + int(self._epoch(len(starts) - 1).starts[-1])]
        self._epoch_starts = starts
        number = int(np.searchsorted(starts, row, side="right")) - 1
        return number, row - starts[number]

    def _make_epoch(self, number: int) -> _Epoch:
        permutation = np.random.default_rng([self._seed, number]).permutation(len(self._reader.block_rows))
        blocks = permutation[self._index :: self._streams]
        sizes = self._reader.block_rows[blocks]
        ends = np.add.reduceat(sizes, np.arange(0, len(blocks), self._window_blocks)).cumsum()
        return _Epoch(blocks, np.concatenate([[0], ends]))

    def _begin_window(self, number: int, window: int) -> tuple[Callable[[], Rows], Int64[np.ndarray, " n"]]:
        """The reading of a window, begun, and the order in which its rows come."""
        epoch = self._epoch(number)
        blocks = epoch.blocks[window * self._window_blocks :][: self._window_blocks]
        rows = int(epoch.starts[window + 1] - epoch.starts[window])
        order = np.random.default_rng([self._seed, number, self._index, window]).permutation(rows)
        return self._reader.begin(blocks, self._with_origin), order
