"""Training batches straight from the backbone: a mixing buffer in memory instead of a store.

Reads the data set that a harvest would, and the backbone below `backbone.layer`; the rows are those of a store (content
tokens of documents that are not held out). Batch `step` is a pure function of (config, corpus, step).

Training document i belongs to stream i mod `streams`. A stream packs its documents by themselves, pass after pass over
the corpus, and cuts the rows that come out into windows of equal length. The windows of one number, of all streams, are
the buffer: a batch takes an equal share of every stream, from its window in a random order. A thread computes the next
windows while these are trained on. Of several hosts each computes the streams that its devices' rows come from.

Mixed is what one buffer holds, so batches are not as good as a store's: with documents of m rows, the variance of a
per-document effect on a batch of b rows is about 1 + (m - 1) b / n times that of independent rows. For m = 64 and the
default buffer of n = 131,072 rows, test_live.py finds 1.11 at b = 256 and 2.84 at b = 4,096; eight times the buffer
brings the latter down to 1.25 (a store, with documents of 286 rows: 1.14, test_stream.py).

Writes, into the folder of the product: `live.json`, statistics of the first window of stream 0, which stand for all
rows; and `positions/PROCESS.jsonl`, where in the corpus each window begins, for a run that goes on. What is not noted
there, it finds by tokenising alone: how many rows a packed batch has is known without the model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Float, Float64, Int64

from fac_jax.activations.harvest import BATCH_S, content_rows, held_out
from fac_jax.activations.manifest import sums_of
from fac_jax.activations.positions import Dealer, Piece, Position, Positions, cut
from fac_jax.activations.rows import Rows, empty_rows, row_dtype
from fac_jax.activations.stream import shares
from fac_jax.backbone.weights import load_backbone
from fac_jax.config.file import Config
from fac_jax.distributed import beat, from_first, is_first, wait_for_all
from fac_jax.errors import UserError
from fac_jax.mesh import own_mesh, starting
from fac_jax.packing import PackedBatch, encodable_documents, encode_all, pack
from fac_jax.plain import from_plain, to_plain
from fac_jax.runs import write_text
from fac_jax.text import Document

log = logging.getLogger(__name__)
STATISTICS = "live.json"
HELD_OUT_ROWS = 8_192

Result = TypeVar("Result")
Window = tuple[Rows, Int64[np.ndarray, " n"]]
"""Rows of a stream as they come, and the order in which batches take them."""


@dataclass(frozen=True)
class Statistics:
    """What is known of the rows before the first step, and of which model."""

    model: str
    model_digest: str
    tokenizer_digest: str
    layer: int
    rows: int
    """Rows that the figures are of."""
    mean: tuple[float, ...]
    """Mean residual [d_model]."""
    mean_square: float
    """Mean squared norm."""
    median_norm: float


class Closed(Exception):
    """Rows were asked for, or being computed, when training ended."""


class LiveRows:
    """The rows of one training. `spans` says which of each batch are wanted here, as (start, stop); by default all."""

    def __init__(self, config: Config, out: Path, spans: Sequence[tuple[int, int]] | None = None) -> None:
        """Loads the backbone, computes the held-out rows and, the first time, the statistics.

        Raises UserError for a corpus without training or held-out rows, and for statistics of another model.
        """
        settings = config.train
        if config.harvest.norm_filter:
            raise UserError(
                f"harvest.norm_filter {config.harvest.norm_filter} filters the rows of a store, and train.activations "
                "is live: leave it out, train.norm_filter leaves such rows out of the loss"
            )
        self._config, self._out = config, out
        most = min(settings.streams, settings.batch_rows)
        self.streams = next(n for n in range(most, 0, -1) if settings.batch_rows % n == 0)
        self.share = settings.batch_rows // self.streams
        windows = -(-settings.steps // (settings.live_buffer_rows // settings.batch_rows))
        self.batches_per_window = -(-settings.steps // windows)  # equal, so that the last one is used up too
        self.window_rows = self.batches_per_window * self.share
        """Of one stream."""
        self._wanted = shares(settings.batch_rows, self.streams, spans)
        self._own = sorted({index for index, _, _ in self._wanted})
        self._positions = Positions(out / "positions", self._own)
        self._mesh, backbone = own_mesh(config.mesh, jax.local_devices()), config.backbone
        self.loaded = load_backbone(backbone.model, backbone.layer, backbone.dtype, self._mesh)
        self.dtype = row_dtype(config.harvest.dtype)
        self._ready: dict[int, Future[dict[int, Window]]] = {}
        self._making: tuple[int, Iterator[dict[int, tuple[Rows, Position]]]] | None = None
        self._closed, self._worker = False, ThreadPoolExecutor(1, "live")
        try:
            self.held_out_bd = self._held_out_rows()
            self.statistics = self._read_statistics()
        except BaseException:
            self.close()
            raise

    @property
    def mean(self) -> Float64[np.ndarray, " d"]:
        """Mean residual."""
        return np.asarray(self.statistics.mean)

    def batches(self, step: int) -> Iterator[tuple[int, Rows]]:
        """(step, rows) from `step` on, endlessly."""
        for number in count(step):
            yield number, self.batch(number)

    def batch(self, step: int) -> Rows:
        """The wanted rows of a batch; fast for steps in order."""
        number, place = divmod(step, self.batches_per_window)
        windows = self._windows(number)
        rows = empty_rows(sum(stop - start for _, start, stop in self._wanted), self.loaded.config.d_model, self.dtype)
        filled, first = 0, place * self.share
        for index, start, stop in self._wanted:
            found, order = windows[index]
            found.take(order[first + start : first + stop], rows.span(filled, filled + stop - start))
            filled += stop - start
        return rows

    def whole_epochs(self) -> int:
        """Whole passes over the corpus before the end of the last window that was computed."""
        return min(self._positions.last(index).epoch for index in self._own)

    def close(self) -> None:
        """Stop computing; whoever waits for rows gets `Closed`."""
        self._closed = True
        self._worker.shutdown(cancel_futures=True)

    def _windows(self, number: int) -> dict[int, Window]:
        """This process's windows of one number; the next ones are begun, unless training ends before them."""
        last = (self._config.train.steps - 1) // self.batches_per_window
        self._ready = {ready: future for ready, future in self._ready.items() if ready in (number, number + 1)}
        for wanted in (number, number + 1):
            if wanted not in self._ready and wanted <= max(last, number):
                self._ready[wanted] = self._worker.submit(self._make, wanted)
        return self._ready[number].result()

    def _make(self, number: int) -> dict[int, Window]:
        if self._making is not None and self._making[0] == number:
            windows = self._making[1]
        else:
            windows = self._from(self._find(number))
        self._making = None
        made = next(windows)
        for index, (_, following) in made.items():
            self._positions.note(index, number + 1, following)
        self._making = number + 1, windows
        orders = {i: np.random.default_rng([self._config.run.seed, number, i]) for i in made}
        return {i: (rows, orders[i].permutation(self.window_rows)) for i, (rows, _) in made.items()}

    def _from(self, positions: Mapping[int, Position]) -> Iterator[dict[int, tuple[Rows, Position]]]:
        """Windows of several streams from these positions on, each with the position after it."""
        dealer = Dealer(self._training_documents, self.streams, positions)
        streams = {index: self._pieces(index, dealer, position) for index, position in positions.items()}
        kept: dict[int, tuple[PackedBatch, Rows]] = {}  # of each stream, the batch that its last window ended in
        while True:
            yield self._window(streams, kept)

    def _window(
        self, streams: Mapping[int, Iterator[Piece]], kept: dict[int, tuple[PackedBatch, Rows]]
    ) -> dict[int, tuple[Rows, Position]]:
        """The next window of each stream; the device is at the next batch while the host takes the rows of one."""
        made, filled = dict[int, tuple[Rows, Position]](), 0
        window = empty_rows(0, 0)
        for piece, rows in _one_ahead(self._begin_piece(piece, kept) for piece in _of_one_window(streams)):
            if not filled:
                window = empty_rows(self.window_rows, self.loaded.config.d_model, self.dtype)
            window.fill(filled, rows.span(piece.start, piece.stop))
            filled += piece.stop - piece.start
            if piece.following is not None:
                made[piece.stream], kept[piece.stream] = (window, piece.following), (piece.batch, rows)
                filled = 0
        return made

    def _begin_piece(
        self, piece: Piece, kept: Mapping[int, tuple[PackedBatch, Rows]]
    ) -> Callable[[], tuple[Piece, Rows]]:
        """The piece with the rows of its batch, which may be there from the window before."""
        batch, rows = kept.get(piece.stream, (None, None))
        if rows is not None and batch is piece.batch:
            there = piece, rows
            return lambda: there
        begun = self._begin(piece.batch)
        return lambda: (piece, begun())

    def _find(self, number: int) -> dict[int, Position]:
        """Where this process's windows of one number begin: as noted, or found by tokenising from what is noted."""
        short = {i: self._positions.last(i) for i in self._own if self._positions.count(i) <= number}
        if short:
            log.info("positions of windows up to %d are not noted: they are found by tokenising", number)
            dealer = Dealer(self._training_documents, self.streams, short)
            pieces = {i: self._pieces(i, dealer, position) for i, position in short.items()}
            following = {i: (p.following for p in found if p.following) for i, found in pieces.items()}
            while short:  # in turns, as streams share a reading
                fewest = min(map(self._positions.count, short))
                for index in [one for one in short if self._positions.count(one) == fewest]:
                    self._positions.note(index, fewest, next(following[index]))
                    if fewest == number:
                        del short[index]
        return {index: self._positions.of(index, number) for index in self._own}

    def _pieces(self, index: int, dealer: Dealer, position: Position) -> Iterator[Piece]:
        return cut(index, self._packed(index, dealer, position), position.skip, self.window_rows)

    def _packed(self, index: int, dealer: Dealer, position: Position) -> Iterator[tuple[int, PackedBatch]]:
        """(pass, batch) of a stream, endlessly, from the batch that a position lies in."""
        geometry, first = self._config.backbone, position.document
        for epoch in count(position.epoch):
            rows = 0
            for batch in self._pack(dealer.documents(index), geometry.rows_per_batch, first):
                rows += int(batch.content.sum())
                yield epoch, batch
            if not rows and not first:
                raise UserError(
                    f"data.{self._config.harvest.data}: part {index} of {self.streams} of its training documents has "
                    "no content token: give it more documents, or lower train.streams"
                )
            first = 0

    def _pack(self, documents: Iterable[Document], rows: int, first: int = 0) -> Iterator[PackedBatch]:
        dataset, tokenizer = self._config.dataset(self._config.harvest.data), self.loaded.tokenizer
        encoded = encode_all(documents, tokenizer, dataset.max_tokens)
        for batch in pack(encoded, rows, self._config.backbone.row_tokens, first):
            if self._closed:
                raise Closed
            beat("a packed batch", BATCH_S)
            yield batch

    def _begin(self, batch: PackedBatch) -> Callable[[], Rows]:
        """Begin to compute the content rows of a batch; what is returned waits for them."""
        compute = self.loaded.residuals_fn((self._config.backbone.layer,), str(self.dtype))
        with starting(self._mesh):
            (resid_btd,) = compute(batch.tokens, batch.segments, batch.positions)
        fraction = self._config.harvest.validation_fraction
        return lambda: content_rows(batch, np.asarray(resid_btd), fraction)[0]

    def _documents(self, want_held_out: bool) -> Iterator[Document]:
        harvest = self._config.harvest
        dataset = self._config.dataset(harvest.data)
        for document in encodable_documents(dataset, harvest.data, self.loaded.tokenizer):
            if held_out(document.id, harvest.validation_fraction) == want_held_out:
                yield document

    def _training_documents(self) -> Iterator[Document]:
        return self._documents(want_held_out=False)

    def _held_out_rows(self) -> Float[np.ndarray, "b d"]:
        """The first content rows of held-out documents, at most `HELD_OUT_ROWS`."""
        found, rows = [], 0
        batches = self._pack(self._documents(want_held_out=True), self._config.backbone.rows_per_batch)
        for computed in _one_ahead(self._begin(batch) for batch in batches):
            found.append(computed.resid)
            rows += len(computed)
            if rows >= HELD_OUT_ROWS:
                break
        if not rows:
            harvest = self._config.harvest
            raise UserError(
                f"data.{harvest.data} has no content token in held-out documents: give it more documents, or raise "
                f"harvest.validation_fraction ({harvest.validation_fraction})"
            )
        return np.concatenate(found)[:HELD_OUT_ROWS]

    def _read_statistics(self) -> Statistics:
        """Those in the product's folder, made by the first process if they are not there yet."""
        path, loaded, config = self._out / STATISTICS, self.loaded, self._config
        if from_first(not path.exists()):
            windows = self._windows(0)  # needed for the first step, by every process
            if is_first():
                rows = windows[0][0] if 0 in windows else next(self._from({0: Position()}))[0][0]
                write_text(path, json.dumps(to_plain(self._measured(rows)), indent=1, allow_nan=False))
            wait_for_all("live statistics are there")
        found = read_statistics(self._out)
        asked = {"model_digest": loaded.digest, "tokenizer_digest": loaded.tokenizer_digest}
        for name, value in {**asked, "layer": config.backbone.layer}.items():
            if getattr(found, name) != value:
                raise UserError(
                    f"{path} is of {name} {getattr(found, name)}, the backbone has {value}: delete {self._out} to "
                    "train afresh, or name the backbone it was begun with"
                )
        return found

    def _measured(self, rows: Rows) -> Statistics:
        sums, loaded, backbone = sums_of(rows.resid), self.loaded, self._config.backbone
        if not np.isfinite(sums.sum_d).all():
            raise UserError(
                f"residuals of {backbone.model} after {backbone.layer} blocks are not finite in {loaded.dtype} "
                f"(rows in {self.dtype}): set backbone.dtype to float32, and harvest.dtype to bfloat16"
            )
        return Statistics(
            model=backbone.model,
            model_digest=loaded.digest,
            tokenizer_digest=loaded.tokenizer_digest,
            layer=backbone.layer,
            rows=len(rows),
            mean=tuple((sums.sum_d / len(rows)).tolist()),
            mean_square=float(sums.squares_d.sum() / len(rows)),
            median_norm=float(np.sqrt(np.median(sums.squares_b))),
        )


def read_statistics(product: Path) -> Statistics:
    """The statistics that a live training noted in the folder of its product."""
    return from_plain(Statistics, json.loads((product / STATISTICS).read_text(encoding="utf-8")), STATISTICS)


def _one_ahead(begun: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """What each call returns, waited for when the next one has begun."""
    waiting: Callable[[], Result] | None = None
    for following in begun:
        if waiting is not None:
            yield waiting()
        waiting = following
    if waiting is not None:
        yield waiting()


def _of_one_window(streams: Mapping[int, Iterator[Piece]]) -> Iterator[Piece]:
    """Pieces of one window of each stream, one stream after the other."""
    for pieces in streams.values():
        for piece in pieces:
            yield piece
            if piece.following is not None:
                break
