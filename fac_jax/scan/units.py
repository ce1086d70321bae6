"""A corpus in units that several processes, machines or commands share out, with the same result however many they are.

A unit is UNIT_DOCUMENTS consecutive documents of the data set, and no batch crosses from one into the next. So what is
computed of a unit depends on nothing but the unit: share 1 of 2 and share 2 of 2 together are what one process makes
alone, to the last bit. Every share reads the rows of all, so that documents seen twice count once, and tokenizes and
computes only its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fac_jax.distributed import START_S, beat
from fac_jax.text import Document

UNIT_DOCUMENTS = 2048
"""The last batch of a unit is rarely full: with 100 tokens a document and 4,096 a batch that costs a percent."""


@dataclass(frozen=True)
class Share:
    """Units index, index + count, ... of a corpus."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """As a folder's name, counted from 1: `1-of-2`."""
        return f"{self.index + 1}-of-{self.count}"


@dataclass(frozen=True)
class Cursor:
    """Where a pass goes on: in this unit, behind so many of its documents."""

    unit: int
    documents: int


def units(documents: Iterable[Document], share: Share, cursor: Cursor) -> Iterator[tuple[int, int, list[Document]]]:
    """Number, first document and documents of each unit of a share from `cursor` on; the first may be a unit's rest.

    Beats with every document that passes: between two units of a share lie those of all others.
    """
    held: list[Document] = []
    limit_s: float | None = START_S  # the first unit's batches compile, however many documents have passed before it
    for ordinal, document in enumerate(documents):
        unit, place = divmod(ordinal, UNIT_DOCUMENTS)
        if place == 0 and held:
            yield unit - 1, UNIT_DOCUMENTS - len(held), held
            held, limit_s = [], None
        beat("reading a document", limit_s)
        if unit % share.count == share.index and (unit, place) >= (cursor.unit, cursor.documents):
            held.append(document)
    if held:
        unit, place = divmod(ordinal, UNIT_DOCUMENTS)
        yield unit, place + 1 - len(held), held


def documents_left(total: int, share: Share, cursor: Cursor) -> int:
    """How many documents `units` gives of a corpus of `total`."""
    mine = range(share.index, -(-total // UNIT_DOCUMENTS), share.count)
    left = sum(min(UNIT_DOCUMENTS, total - unit * UNIT_DOCUMENTS) for unit in mine if unit >= cursor.unit)
    return left - (cursor.documents if cursor.unit in mine else 0)
