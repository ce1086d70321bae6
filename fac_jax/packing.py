"""Documents to packed batches of tokens.

A document becomes token ids under the model's chat template with a mask of the user's own words; several documents
share a packed row. The mask is computed from the template itself (paper: t0 skips the fixed prefix): the template is
rendered around placeholders, so whatever a model family puts before, between and after the turns is left out, and so
is every special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from fac_jax.config import BackboneConfig, DataSet
from fac_jax.errors import UserError
from fac_jax.text import USER, Document, read_documents


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids [t] (int32) of a document under the chat template; `content` [t] is True on the user's own words."""

    document: Document
    ids: np.ndarray
    content: np.ndarray
    dropped: dict[str, int]
    """Tokens that are not content, by reason: `special`, `other_turns` (their words), `template` (the rest)."""


@dataclass(frozen=True)
class PackedBatch:
    """Documents packed into rows; arrays are [b, t]. Padding has segment 0 and slot -1; `slot` indexes `documents`."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    content: np.ndarray
    slot: np.ndarray
    documents: tuple[EncodedDocument, ...]
    first: int
    """Ordinal of the first document: `pack` of the documents from it on, with this `first`, begins with this batch."""


def encode(document: Document, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> EncodedDocument:
    """Token ids under the chat template, cut at `max_tokens`, with the mask of the user's own words.

    A model without a chat template gets the turns joined by blank lines.
    """
    pieces = _template_pieces(document, tokenizer)
    text, spans = pieces[0], []
    for turn, piece in zip(document.turns, pieces[1:], strict=True):
        spans.append((turn.role == USER, len(text), len(text) + len(turn.content)))
        text += turn.content + piece
    encoding = tokenizer(
        text, add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True, truncation=True,
        max_length=max_tokens,
    )  # fmt: skip
    ids = np.asarray(encoding["input_ids"], np.int32)
    offsets = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    special, words = np.isin(ids, _special_ids(tokenizer)), {True: np.zeros(len(ids), bool)}
    words[False] = words[True].copy()
    for own, start, stop in spans:  # a token counts when all of it lies inside the words
        words[own] |= (offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 1] > offsets[:, 0])
    content, others = words[True] & ~special, words[False] & ~special
    dropped = {"special": int(special.sum()), "other_turns": int(others.sum())}
    dropped["template"] = len(ids) - int(content.sum()) - sum(dropped.values())
    return EncodedDocument(document, ids, content, dropped)


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *added})


def _template_pieces(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the template puts before, between and after the turns' contents: one piece more than there are turns."""
    count = len(document.turns)
    if tokenizer.chat_template is None:
        return ["", *["\n\n"] * (count - 1), ""]
    marks = [f"\ue000{index}\ue001" for index in range(count)]  # private use: in no real text
    messages = [{"role": turn.role, "content": mark} for turn, mark in zip(document.turns, marks, strict=True)]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    pieces: list[str] = []
    for mark in marks:
        before, found, rendered = str(rendered).partition(mark)
        if not found:
            raise UserError(
                f"{document.source}: the chat template drops a {messages[len(pieces)]['role']!r} turn; leave it out"
            )
        pieces.append(before)
    return [*pieces, str(rendered)]


def pack(encoded: Iterable[EncodedDocument], rows: int, row_tokens: int, first: int = 0) -> Iterator[PackedBatch]:
    """Documents in order into batches of `rows` x `row_tokens`, none straddling two batches.

    A batch takes documents as long as first-fit-decreasing places them all, so it depends on nothing but where it
    starts: a resumed pass makes the same batches. Longer documents than a row are a UserError.
    """
    held: list[EncodedDocument] = []
    total = longest = 0
    for item in encoded:
        if len(item.ids) > row_tokens:
            raise UserError(
                f"{item.document.source}: {len(item.ids)} tokens do not fit a row of {row_tokens}; "
                "lower the data set's max_tokens or raise backbone.row_tokens"
            )
        held.append(item)
        total, longest = total + len(item.ids), max(longest, len(item.ids))
        if total <= rows * (row_tokens - longest):  # it is placed: where it is not, every row is filled further
            continue
        if _first_fit_decreasing(held, rows, row_tokens) is None:
            yield _batch(held[:-1], rows, row_tokens, first)
            first += len(held) - 1
            held, total, longest = [item], len(item.ids), len(item.ids)
    if held:
        yield _batch(held, rows, row_tokens, first)


def _first_fit_decreasing(items: list[EncodedDocument], rows: int, row_tokens: int) -> list[int] | None:
    """Row of each item, or None when they do not all fit."""
    lengths = [len(item.ids) for item in items]
    if sum(lengths) > rows * row_tokens:
        return None
    room, placed = [row_tokens] * rows, [0] * len(items)
    for index in sorted(range(len(items)), key=lambda i: (-lengths[i], i)):
        row = next((r for r in range(rows) if room[r] >= lengths[index]), None)
        if row is None:
            return None
        room[row] -= lengths[index]
        placed[index] = row
    return placed


def _batch(items: list[EncodedDocument], rows: int, row_tokens: int, first: int) -> PackedBatch:
    placement = _first_fit_decreasing(items, rows, row_tokens)
    assert placement is not None
    shape = (rows, row_tokens)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    content, slot = np.zeros(shape, bool), np.full(shape, -1, np.int32)
    used, count = [0] * rows, [0] * rows
    for index, (item, row) in enumerate(zip(items, placement, strict=True)):
        length = len(item.ids)
        span = slice(used[row], used[row] + length)
        used[row] += length
        count[row] += 1
        tokens[row, span], content[row, span] = item.ids, item.content
        segments[row, span], slot[row, span] = count[row], index
        positions[row, span] = np.arange(length)
    return PackedBatch(tokens, segments, positions, content, slot, tuple(items), first)


def check_fits(dataset: DataSet, name: str, geometry: BackboneConfig) -> None:
    """Raise UserError when documents may be longer than a packed row."""
    if dataset.max_tokens > geometry.row_tokens:
        raise UserError(
            f"data.{name}.max_tokens is {dataset.max_tokens}, more than backbone.row_tokens {geometry.row_tokens}; "
            "lower the first"
        )


def batches(
    dataset: DataSet, name: str, tokenizer: PreTrainedTokenizerFast, geometry: BackboneConfig
) -> Iterator[PackedBatch]:
    """Packed batches of a whole data set."""
    check_fits(dataset, name, geometry)
    encoded = (encode(document, tokenizer, dataset.max_tokens) for document in read_documents(dataset, name))
    return pack(encoded, geometry.rows_per_batch, geometry.row_tokens)


def equal_part(row_tokens: int, most: int) -> int:
    """Tokens of the largest equal parts of a row that hold at most `most` tokens, or 1."""
    return next(length for length in range(max(1, min(most, row_tokens)), 0, -1) if row_tokens % length == 0)
