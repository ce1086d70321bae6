"""A scan in which each feature fires on one word: explanations of it can be right, and wrong ones are wrong by chance.

Documents hold a few topic words, each drawn without regard to the others, among plain ones. Feature j peaks at topic
word j, with a strength of its own in each document; behind those come the features of the plain words, and last those
that never fire.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from fac_jax.packing import encode, pack
from fac_jax.scan.parts import Identity
from fac_jax.scan.peaks import BatchPeaks
from fac_jax.scan.product import Scan
from fac_jax.text import Turn, make_document
from tests.scan.written_scan import write_scan
from tests.word_tokenizer import word_tokenizer

TOPICS, SILENT, WIDTH, SPAN_TOKENS = 150, 2, 16, 8
TOPIC_WORDS = [f"topic{index}" for index in range(TOPICS)]
PLAIN = [f"plain{index}" for index in range(30)]
FIRES_ON = TOPIC_WORDS + PLAIN
"""Word of each feature that fires."""
FEATURES = len(FIRES_ON) + SILENT
WORDS = ["<pad>", "<user>", *PLAIN, *TOPIC_WORDS]


def topics_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS)


def decoder() -> np.ndarray:
    """Decoder directions, float32 [features, width]."""
    return np.random.default_rng(5).normal(size=(FEATURES, WIDTH)).astype(np.float32)


def make_topics_scan(folder: Path, count: int = 1_000) -> Scan:
    """A finished scan in `folder` of documents of two user turns each."""
    random, tokenizer = np.random.default_rng(3), topics_tokenizer()
    documents = []
    for _ in range(count):
        turns = []
        for _ in range(2):
            size = int(random.integers(4, 16))
            words = [*random.choice(PLAIN, size), *random.choice(TOPIC_WORDS, 3)]
            turns.append(Turn("user", " ".join(map(str, random.permutation(words)))))
        documents.append(make_document(turns, None, "topics"))
    identity = Identity("anchor", "data", "model", 3, "sae-1", FEATURES, 2, "topk", 4, SPAN_TOKENS, "all")
    scored = []
    for batch in pack((encode(document, tokenizer, 64) for document in documents), 8, 128):
        rows = []
        for slot, encoded in enumerate(batch.documents):
            words = [WORDS[token] for token in encoded.ids]
            for feature in sorted({FIRES_ON.index(word) for word in words if word in FIRES_ON}):
                rows.append((slot, feature, random.uniform(0.5, 9), words.index(FIRES_ON[feature])))
        slots, features, peaks, positions = (np.array(column) for column in zip(*rows, strict=True))
        tokens_f = np.bincount(features, minlength=FEATURES)
        means = np.zeros((len(batch.documents), 1), np.float32)
        found = BatchPeaks(slots, features, peaks.astype(np.float32), positions.astype(np.int32), tokens_f, means)
        scored.append((batch, found))
    return write_scan(folder, identity, scored, tokenizer)
