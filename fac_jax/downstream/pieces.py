"""Texts to train on, packed: a batch becomes pieces of one shape, however long its texts are.

Texts of a group (a pair of answers, or one text alone) stay in one piece; several share a row, told apart by segment as
in a harvest. A piece has as many rows as `backbone.rows_per_batch`, so one program serves all batches; a batch that
needs several pieces is accumulated. Pure functions of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from fac_jax.downstream.objectives import Piece
from fac_jax.errors import UserError
from fac_jax.packing import first_fit_decreasing


@dataclass(frozen=True)
class Text:
    """One text in tokens."""

    ids_t: Int[np.ndarray, " t"]
    learned_t: Bool[np.ndarray, " t"]
    """Tokens whose probability is learned, where completions are; the first token never is."""
    label: float = 0.0
    weight: float = 1.0
    """How much it counts, where texts are scored."""


Group = tuple[Text, ...]
"""One text; or the better and the worse answer of a pair."""


def pack_batch(batch: Sequence[Group], rows: int, row_tokens: int, room: int) -> list[Piece]:
    """The groups of a batch in as few pieces as taking them in order gives, each [rows, row_tokens] with room for
    `room` groups. Raises UserError for texts that are longer than a row, or together than a piece."""
    slots = room * len(batch[0])
    pieces, held = [], list[Group]()
    for group in batch:
        if held and _placed([*held, group], rows, row_tokens) is None:
            pieces.append(_piece(held, slots, rows, row_tokens))
            held = []
        held.append(group)
        if _placed(held, rows, row_tokens) is None:
            raise UserError(
                f"texts of {' and '.join(str(len(text.ids_t)) for text in group)} tokens do not fit {rows} rows of "
                f"{row_tokens}: cut them shorter, or raise backbone.row_tokens or backbone.rows_per_batch"
            )
    return [*pieces, _piece(held, slots, rows, row_tokens)]


def rows_for(batch: Sequence[Group], least: int, most: int, row_tokens: int) -> int:
    """The smallest of least, 2 least, 4 least, ... rows that hold the batch in one piece, `most` where none does: short
    texts then do not pay for a whole batch of padding, and few shapes are compiled."""
    rows = least
    while rows < most and _placed(batch, rows, row_tokens) is None:
        rows *= 2
    return min(rows, most)


def _placed(groups: Sequence[Group], rows: int, row_tokens: int) -> list[int] | None:
    return first_fit_decreasing([len(text.ids_t) for group in groups for text in group], rows, row_tokens)


def _piece(groups: Sequence[Group], slots: int, rows: int, row_tokens: int) -> Piece:
    placed = _placed(groups, rows, row_tokens)
    assert placed is not None
    tokens, segments, positions, targets = np.zeros((4, rows, row_tokens), np.int32)
    learned = np.zeros((rows, row_tokens), np.float32)
    last, there, (label, weight) = np.zeros(slots, np.int32), np.zeros(slots, bool), np.zeros((2, slots), np.float32)
    used, count = [0] * rows, [0] * rows
    for slot, (row, text) in enumerate(zip(placed, (text for group in groups for text in group), strict=True)):
        start, length = used[row], len(text.ids_t)
        span = slice(start, start + length)
        used[row] += length
        count[row] += 1
        tokens[row, span], segments[row, span], positions[row, span] = text.ids_t, count[row], np.arange(length)
        targets[row, start : start + length - 1] = text.ids_t[1:]
        learned[row, start : start + length - 1] = text.learned_t[1:]
        last[slot], there[slot] = row * row_tokens + start + length - 1, True
        label[slot], weight[slot] = text.label, text.weight
    return Piece(tokens, segments, positions, last, there, label, weight, targets, learned)
