"""The next batches, on the devices before a step asks for them, and how long steps waited for them all the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Moved = TypeVar("Moved")
DEPTH = 2
"""Batches ready beside the one that is trained on."""
PATIENCE_S = 2.0
"""Seconds that the end waits for a read in progress; a longer one ends by itself, and its batch is dropped."""


class Ahead(Generic[Moved]):
    """Batches in their order, each made ready by a thread."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        """Seconds that `__next__` waited for the thread, in all."""
        self._ready, self._free = SimpleQueue[tuple[bool, object]](), threading.Semaphore(DEPTH)
        self._stopped = False

    def __iter__(self) -> Iterator[Moved]:
        return self

    def __next__(self) -> Moved:
        started = time.monotonic()
        good, found = self._ready.get()
        self.waited_s += time.monotonic() - started
        if not good:
            raise found  # type: ignore[misc]
        self._free.release()
        return found  # type: ignore[return-value]

    def _fill(self, items: Iterator[Item], move: Callable[[Item], Moved]) -> None:
        try:
            while self._free.acquire() and not self._stopped:
                self._ready.put((True, move(next(items))))
        except BaseException as error:  # StopIteration too: the loop ends, or fails, where its thread did
            self._ready.put((False, error))


@contextmanager
def moving_ahead(items: Iterator[Item], move: Callable[[Item], Moved]) -> Iterator[Ahead[Moved]]:
    """`map(move, items)`, up to `DEPTH` of them ahead of the reader. What `items` raises, the reader gets in its place.

    `move` must start no program that other processes take part in.
    """
    ahead = Ahead[Moved]()
    thread = threading.Thread(target=ahead._fill, args=(items, move), name="prefetch")
    thread.start()
    try:
        yield ahead
    finally:
        ahead._stopped = True
        ahead._free.release()
        thread.join(PATIENCE_S)
