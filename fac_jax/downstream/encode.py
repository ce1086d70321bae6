"""A prompt and an answer to it as tokens under the backbone's chat template, and which of them are the answer's.

The text ends with the token that ends the assistant's turn: a reward is read there, and an instruction model has to
write it. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from fac_jax.downstream.pieces import Group, Text
from fac_jax.downstream.published import Example
from fac_jax.errors import UserError
from fac_jax.packing import rendered, special_ids
from fac_jax.text import ASSISTANT, Turn, make_document


@dataclass(frozen=True)
class Encoded:
    """Examples in tokens."""

    groups: tuple[Group, ...]
    """A text for each answer of an example."""
    cut: int
    """Texts that were longer than allowed."""


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_tokens: int, keep: Literal["start", "end"]
) -> Encoded:
    """Every answer behind its prompt. Of a text longer than `max_tokens` its start is kept, or its end.

    Raises UserError, with the row's place, where no token of an answer is left, and for a template that drops a turn.
    """
    groups, cut = [], 0
    for one in examples:
        texts = []
        for answer in one.answers:
            text = encode_answer(one, answer, tokenizer)
            if len(text.ids_t) > max_tokens:
                cut += 1
                kept = slice(max_tokens) if keep == "start" else slice(-max_tokens, None)
                text = Text(text.ids_t[kept], text.learned_t[kept])
            if not text.learned_t[1:].any():
                raise UserError(
                    f"{one.source}: the prompt alone has {max_tokens} tokens or more, so nothing of its answer is "
                    "left; raise the data set's max_tokens"
                )
            texts.append(text)
        groups.append(tuple(texts))
    return Encoded(tuple(groups), cut)


def encode_answer(example: Example, answer: str, tokenizer: PreTrainedTokenizerFast) -> Text:
    """The whole text; the answer, and what ends it, is what is learned."""
    document = make_document((*example.prompt, Turn(ASSISTANT, answer)), None, example.source)
    text, starts = rendered(document, tokenizer)
    encoding = tokenizer(
        text, add_special_tokens=tokenizer.chat_template is None, return_offsets_mapping=True
    )  # fmt: skip
    ids, offsets = np.asarray(encoding["input_ids"], np.int32), np.asarray(encoding["offset_mapping"]).reshape(-1, 2)
    behind = (offsets[:, 0] >= starts[-1] + len(answer)) & np.isin(ids, special_ids(tokenizer))
    if behind.any():
        end = int(np.argmax(behind)) + 1
        ids, offsets = ids[:end], offsets[:end]
    elif tokenizer.eos_token_id is not None:  # a template without an end, or no template
        ids = np.append(ids, np.int32(tokenizer.eos_token_id))
        offsets = np.append(offsets, [[len(text), len(text)]], axis=0)
    return Text(ids, offsets[:, 0] >= starts[-1])
