"""Documents to packed batches of tokens.

A document becomes token ids under the model's chat template with a mask of the user's own words; several documents
share a packed row. The mask is computed from the template itself (paper: t0 skips the fixed prefix): the template is
rendered around placeholders, so whatever a model family puts before, between and after the turns is left out, and so
is every special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from fac_jax.config.activations import BackboneConfig
from fac_jax.config.data import DataSet
from fac_jax.errors import UserError
from fac_jax.text import USER, Document, read_documents

TOGETHER = 64
"""Documents that are tokenized at a time, on all cores: one by one they were what a scan on a GPU waited for. On two
cores 280,000 tokens a second of conversations of 470 instead of 120,000 (2026-11-26)."""


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


def encodable_documents(
    dataset: DataSet, name: str, tokenizer: PreTrainedTokenizerFast, skipped: list[str] | None = None
) -> Iterator[Document]:
    """`read_documents`; a row whose turns the chat template refuses is a malformed one, and has no number."""
    return read_documents(dataset, name, skipped, partial(template_pieces, tokenizer=tokenizer))


def encode(document: Document, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> EncodedDocument:
    """`encode_all` of one document."""
    return next(encode_all([document], tokenizer, max_tokens))


def encode_all(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Iterator[EncodedDocument]:
    """Token ids under the chat template, cut at `max_tokens`, with the mask of the user's own words.

    A model without a chat template gets the turns joined by blank lines. Documents are read and tokenized some at a
    time, on all cores.
    """
    special = np.array(special_ids(tokenizer))
    documents = iter(documents)
    while held := list(islice(documents, TOGETHER)):
        texts, starts = zip(*(rendered(document, tokenizer) for document in held), strict=True)
        encodings = tokenizer(
            list(texts), add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True,
            truncation=True, max_length=max_tokens, return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
        for document, start, ids, offsets in zip(
            held, starts, encodings["input_ids"], encodings["offset_mapping"], strict=True
        ):
            yield _masked(document, start, np.asarray(ids, np.int32), np.asarray(offsets).reshape(-1, 2), special)


def rendered(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[int]]:
    """The text under the template, and where in it the words of each turn start."""
    try:
        pieces = template_pieces(document, tokenizer)
    except UserError as error:
        raise UserError(f"{error}; leave the row out") from None
    parts, starts, length = [pieces[0]], [], len(pieces[0])
    for turn, piece in zip(document.turns, pieces[1:], strict=True):
        starts.append(length)
        parts += turn.content, piece
        length += len(turn.content) + len(piece)
    return "".join(parts), starts


def _masked(
    document: Document, starts: list[int], ids: np.ndarray, offsets: np.ndarray, special: np.ndarray
) -> EncodedDocument:
    """The document with its masks; `offsets` [t, 2] are where in the text each token starts and stops."""
    stops = np.array([start + len(turn.content) for start, turn in zip(starts, document.turns, strict=True)])
    own = np.array([turn.role == USER for turn in document.turns])
    turn = np.maximum(np.searchsorted(starts, offsets[:, 0], side="right") - 1, 0)
    # A token counts when all of it lies inside the words.
    inside = (offsets[:, 0] >= starts[0]) & (offsets[:, 1] <= stops[turn]) & (offsets[:, 1] > offsets[:, 0])
    is_special = np.isin(ids, special)
    content, others = inside & own[turn] & ~is_special, inside & ~own[turn] & ~is_special
    dropped = {"special": int(is_special.sum()), "other_turns": int(others.sum())}
    dropped["template"] = len(ids) - int(content.sum()) - sum(dropped.values())
    return EncodedDocument(document, ids, content, dropped)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *added})


def template_pieces(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the template puts before, between and after the turns. Raises UserError where it refuses or drops one."""
    roles = tuple(turn.role for turn in document.turns)
    try:
        pieces = _pieces(tokenizer, tokenizer.chat_template, roles)
    except TemplateError as error:
        raise UserError(f"{document.source}: the chat template refuses turns of {', '.join(roles)} ({error})") from None
    if len(pieces) <= len(roles):
        raise UserError(f"{document.source}: the chat template drops a {roles[len(pieces)]!r} turn")
    return pieces


@lru_cache(2**12)
def _pieces(tokenizer: PreTrainedTokenizerFast, template: str | None, roles: tuple[str, ...]) -> list[str]:
    """`template_pieces` for turns of these roles: one piece more than there are turns, or less where it drops one."""
    if template is None:
        return ["", *["\n\n"] * (len(roles) - 1), ""]
    marks = [f"\ue000{index}\ue001" for index in range(len(roles))]  # private use: in no real text
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    pieces: list[str] = []
    for mark in marks:
        before, found, rendered = rendered.partition(mark)
        if not found:
            return pieces
        pieces.append(before)
    return [*pieces, rendered]


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
        if first_fit_decreasing([len(one.ids) for one in held], rows, row_tokens) is None:
            yield _batch(held[:-1], rows, row_tokens, first)
            first += len(held) - 1
            held, total, longest = [item], len(item.ids), len(item.ids)
    if held:
        yield _batch(held, rows, row_tokens, first)


def first_fit_decreasing(lengths: Sequence[int], rows: int, row_tokens: int) -> list[int] | None:
    """Row of each item, longest first into the first row with room; None when they do not all fit."""
    if sum(lengths) > rows * row_tokens:
        return None
    room, placed = [row_tokens] * rows, [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r in range(rows) if room[r] >= lengths[index]), None)
        if row is None:
            return None
        room[row] -= lengths[index]
        placed[index] = row
    return placed


def _batch(items: list[EncodedDocument], rows: int, row_tokens: int, first: int) -> PackedBatch:
    placement = first_fit_decreasing([len(item.ids) for item in items], rows, row_tokens)
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
    encoded = encode_all(encodable_documents(dataset, name, tokenizer), tokenizer, dataset.max_tokens)
    return pack(encoded, geometry.rows_per_batch, geometry.row_tokens)


def equal_part(row_tokens: int, most: int) -> int:
    """Tokens of the largest equal parts of a row that hold at most `most` tokens, or 1."""
    return next(length for length in range(max(1, min(most, row_tokens)), 0, -1) if row_tokens % length == 0)
