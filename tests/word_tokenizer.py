"""A tokenizer of whole words with a chat template: `<user>` before each turn."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Token i is `words[i]`; `<pad>` and `<user>` must be among them."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", additional_special_tokens=["<user>"])
    made.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    return made
