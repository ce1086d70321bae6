"""Texts that were just written are scored as the documents of a data set are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy.sparse import csr_array

from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.packing import EncodedDocument
from fac_jax.scan import scorer as module
from fac_jax.scan.scorer import open_scorer
from tests.word_tokenizer import word_tokenizer


def test_texts_are_scored_as_documents_of_the_anchor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan: Any = SimpleNamespace(folder=tmp_path, identity=SimpleNamespace(sae="sae-1", name="anchor"))
    text = "the vile dog is so very cruel and so is the cat"
    tokenizer = word_tokenizer(["<pad>", "<user>", *dict.fromkeys(text.split())])
    seen: list[list[int]] = []

    def peaks_of(encoded: Sequence[EncodedDocument], *_: object) -> csr_array:
        seen.extend(one.ids.tolist() for one in encoded)
        return csr_array((len(encoded), 6))

    opened = SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(digest="sae-1")
    monkeypatch.setattr(module, "load_scorer", lambda config, inputs: opened)
    monkeypatch.setattr(module, "peaks_of", peaks_of)
    config = Config(data={"anchor": DataSet(sources=(Source(path="texts.txt"),), max_tokens=8)})
    assert open_scorer(config, {}, scan, "anchor")([text]).shape == (1, 6)
    whole = tokenizer(f"<user> {text}")["input_ids"]
    assert seen == [whole[:8]], "under the chat template, cut as the anchor's documents are"
    opened[1].digest = "sae-2"
    with pytest.raises(UserError, match="was made with SAE sae-1, asked is SAE sae-2"):
        open_scorer(config, {}, scan, "anchor")
