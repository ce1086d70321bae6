"""A backbone whose residual is a word's embedding, so that every mean can be checked by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NICE, VILE = ["good", "kind", "calm"], ["bad", "vile", "cruel"]
PLAIN = ["the", "a", "dog", "cat", "is", "was", "very"]
WORDS = ["<pad>", "<user>", *NICE, *VILE, *PLAIN]


@dataclass(frozen=True)
class ToyBackbone:
    """Offers what the pooling reads of a loaded backbone."""

    tokenizer: PreTrainedTokenizerFast
    table_vd: np.ndarray

    def residual_fn(self, layer: int) -> Callable[..., Any]:
        table = jnp.asarray(self.table_vd * layer)
        return lambda tokens, segments, positions: jnp.take(table, tokens, axis=0)

    def mean(self, text: str, layer: int) -> np.ndarray:
        return np.mean([self.table_vd[WORDS.index(word)] * layer for word in text.split()], axis=0)

    def sentences(self, seed: int, n: int) -> list[dict[str, Any]]:
        """Rows of text and label, half of them with a vile word."""
        generator = np.random.default_rng(seed)
        rows = []
        for i in range(n):
            words = [*generator.choice(PLAIN, size=5), generator.choice(VILE if i % 2 else NICE)]
            rows.append({"text": " ".join(map(str, words)), "label": bool(i % 2)})
        return list({row["text"]: row for row in rows}.values())


@pytest.fixture(scope="session")
def toy() -> ToyBackbone:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", additional_special_tokens=["<user>"])
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    table = np.random.default_rng(0).normal(size=(len(WORDS), 12)).astype(np.float32)
    table[[WORDS.index(word) for word in VILE], 0] += 6.0
    return ToyBackbone(tokenizer, table)
