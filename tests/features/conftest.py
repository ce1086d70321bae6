"""A finished scan of a toy corpus in which one feature fires on vile words and another on animals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fac_jax.features.spans import Passages, read_passages
from fac_jax.packing import encode, pack
from fac_jax.scan.parts import Identity
from fac_jax.scan.peaks import BatchPeaks
from fac_jax.scan.product import Scan
from fac_jax.text import Turn, make_document
from tests.scan.written_scan import write_scan
from tests.word_tokenizer import word_tokenizer

VILE, ANIMALS, PLAIN = ["vile", "cruel"], ["dog", "cat"], ["the", "a", "is", "was", "very", "so"]
WORDS = ["<pad>", "<user>", *VILE, *ANIMALS, *PLAIN]
FEATURES = 6
ON_VILE, ON_ANIMALS, ON_EVERYTHING, ON_ONE = range(4)  # the last two features never fire


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS)


@pytest.fixture
def make_scan(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Scan]:
    """`make_scan(count=..., labels=True, sae=...)`: documents with a vile word are labelled 1."""

    def make(count: int = 120, labels: bool = True, sae: str = "sae-1") -> Scan:
        generator = np.random.default_rng(0)
        documents = []
        for _ in range(count):
            vile, animal = generator.random(2) < 0.5
            words = [
                *generator.choice(PLAIN, 5),
                *generator.choice(VILE, int(vile)),
                *generator.choice(ANIMALS, int(animal)),
            ]
            text = " ".join(map(str, generator.permutation(words)))
            documents.append(make_document([Turn("user", text)], float(vile) if labels else None, "toy"))
        identity, scored = Identity("anchor", "data", "model", 3, sae, FEATURES, 2, "topk", 4, 8, "all"), []
        for batch in pack((encode(d, tokenizer, 32) for d in documents), 8, 128):
            rows = []
            for slot, encoded in enumerate(batch.documents):
                words = [WORDS[token] for token in encoded.ids]
                places = {
                    ON_VILE: [i for i, word in enumerate(words) if word in VILE],
                    ON_ANIMALS: [i for i, word in enumerate(words) if word in ANIMALS],
                    ON_EVERYTHING: [1],
                    ON_ONE: [1] if batch.first + slot == 7 else [],
                }
                rows += [(slot, f, 1 + i / 10, i) for f, at in places.items() for i in at[:1]]
            table = np.array(rows)
            whole = table[:, [0, 1, 3]].astype(np.int64).T
            tokens_f = np.bincount(whole[1], minlength=FEATURES)
            peak, position = table[:, 2].astype(np.float32), whole[2].astype(np.int32)
            means = np.zeros((len(batch.documents), 1), np.float32)  # nothing here asks for them
            scored.append((batch, BatchPeaks(whole[0], whole[1], peak, position, tokens_f, means)))
        return write_scan(tmp_path / "scans" / "anchor", identity, scored, tokenizer)

    return make


@pytest.fixture(scope="session")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Passages:
    """The toy scan of topics.py, read."""
    from tests.features.topics import make_topics_scan  # not to be had while this file itself is being imported

    return read_passages(make_topics_scan(tmp_path_factory.mktemp("topics") / "anchor"))
