"""Where in a corpus the windows of live rows begin, and the documents from there on.

Of every `streams` training documents each stream is dealt one, in random order, the same in every pass. (Dealt in turn,
streams would drift apart where long and short documents alternate, and what waits for the slower ones would fill the
memory.) A stream's documents are packed by themselves, pass after pass over the corpus, and a window is the next so
many rows of what comes out. So a window begins `skip` rows into the packed batch that begins with a certain document of
a certain pass; `positions/PROCESS.jsonl` has a line for each. Nothing here needs the backbone: how many rows a packed
batch has is known without it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fac_jax.activations.store import writer_name
from fac_jax.distributed import Process
from fac_jax.errors import UserError
from fac_jax.packing import PackedBatch
from fac_jax.plain import from_plain, to_plain
from fac_jax.runs import whole_lines
from fac_jax.text import Document

DEALT = 2
"""Raised when documents are dealt to streams in another way, so that what was noted before means other documents."""


@dataclass(frozen=True)
class Position:
    """A place in a stream: `skip` rows into the packed batch that begins with its document `document` of a pass."""

    epoch: int = 0
    document: int = 0
    skip: int = 0


class Dealer:
    """The documents of several streams from one reading of the corpus: streams that take turns keep pace in it."""

    def __init__(self, read: Callable[[], Iterable[Document]], streams: int, starts: Mapping[int, Position]) -> None:
        """Each stream begins with the first document of the batch that its position lies in."""
        self._read, self._streams, self._starts = read, streams, starts
        self._waiting = {index: deque[Document | None]() for index in starts}
        self._reading = self._deal(min(start.epoch for start in starts.values()))

    def documents(self, index: int) -> Iterator[Document]:
        """What is left of a stream's pass; the next call begins with the next pass."""
        while True:
            while not self._waiting[index]:
                next(self._reading)
            document = self._waiting[index].popleft()
            if document is None:
                return
            yield document

    def _deal(self, epoch: int) -> Iterator[None]:
        for number in count(epoch):
            for ordinal, document in enumerate(self._read()):
                round_, place = divmod(ordinal, self._streams)
                if place == 0:
                    order = np.random.default_rng(round_).permutation(self._streams).tolist()
                self._give(order[place], number, round_, document)
                yield
            for index, start in self._starts.items():
                if number >= start.epoch:
                    self._waiting[index].append(None)
            yield

    def _give(self, index: int, epoch: int, ordinal: int, document: Document) -> None:
        start = self._starts.get(index)
        if start is not None and (epoch, ordinal) >= (start.epoch, start.document):
            self._waiting[index].append(document)


class Piece(NamedTuple):
    """Rows [start, stop) of a packed batch, all in one window of a stream."""

    stream: int
    batch: PackedBatch
    start: int
    stop: int
    following: Position | None
    """Where the next window begins, if this is the last piece of one."""


def cut(stream: int, batches: Iterable[tuple[int, PackedBatch]], skip: int, rows: int) -> Iterator[Piece]:
    """A stream's (pass, batch) in pieces of windows of `rows` rows; `skip` rows of the first batch are left out."""
    wanted = rows
    for epoch, batch in batches:
        start, skip, end = skip, 0, int(batch.content.sum())
        while start < end:
            stop = min(end, start + wanted)
            wanted -= stop - start
            yield Piece(stream, batch, start, stop, None if wanted else Position(epoch, batch.first, stop))
            start, wanted = stop, wanted or rows


class Positions:
    """Where the windows of each stream begin, as far as is known: in memory, and a line each in a file a process.

    So processes share a folder and no file, and all of them know what any has noted when they start.
    """

    def __init__(self, folder: Path, streams: Iterable[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{writer_name(Process.index)}.jsonl"
        whole_lines(self._file)  # takes off what a kill cut short
        noted = {(one.stream, one.window): one.begins for file in folder.glob("p*.jsonl") for one in _notes(file)}
        self._known = {index: [Position()] for index in streams}
        for index, known in self._known.items():
            while (index, len(known)) in noted:
                known.append(noted[index, len(known)])

    def count(self, index: int) -> int:
        """Windows of a stream whose beginning is known."""
        return len(self._known[index])

    def of(self, index: int, window: int) -> Position:
        """Where a window begins."""
        return self._known[index][window]

    def last(self, index: int) -> Position:
        """Where the last window begins that is known."""
        return self._known[index][-1]

    def note(self, index: int, window: int, position: Position) -> None:
        """Say where a window begins, if that is not known yet."""
        if window == len(self._known[index]):
            self._known[index].append(position)
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(to_plain(_Note(index, window, position, DEALT))) + "\n")


@dataclass(frozen=True)
class _Note:
    """A line of a file of positions."""

    stream: int
    window: int
    begins: Position
    dealt: int = 1
    """How documents are dealt to streams: DEALT; 1, in turn, in lines from before it was noted."""


def _notes(file: Path) -> Iterator[_Note]:
    """Another process may be writing the last line."""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            try:
                note = from_plain(_Note, json.loads(line), str(file))
            except ValueError as error:
                raise UserError(f"{file} is damaged ({error}): delete it, its positions will be found anew") from None
            if note.dealt != DEALT:
                raise UserError(
                    f"{file} is of a version of fac_jax that dealt documents to streams in another way: delete the "
                    "folder of the training to start it again"
                )
            yield note
