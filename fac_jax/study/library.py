"""All documents of a study in one place: every cell is the seed and some rows of it.

Reads the scans of the seed, the anchor and what the arms wrote; embeds and parses their texts once. Writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32
from scipy.sparse import csr_array, vstack

from fac_jax.config.file import Config
from fac_jax.coverage import fac as arithmetic
from fac_jax.diversity import measure, syntax
from fac_jax.diversity.bert import load_encoder
from fac_jax.downstream.arms import check_disjoint, check_texts_disjoint
from fac_jax.downstream.classifier import Examples, head_scores, labelled
from fac_jax.errors import UserError
from fac_jax.features.judge import relevant_features
from fac_jax.scan.product import Scan, load_scans
from fac_jax.study.texts import IN_ORDER, ArmTexts, read_arms
from fac_jax.synthesis import cover
from fac_jax.text import USER, Document, Turn, make_document

SELECTION = "selection"
"""The arm that writes nothing."""
Rows = np.ndarray
"""Numbers of documents of a library."""


@dataclass(frozen=True)
class Coverage:
    """What coverage is counted in."""

    relevant_f: Bool[np.ndarray, " f"]
    anchor_f: Bool[np.ndarray, " f"]
    """Active on the anchor."""
    missing_f: Bool[np.ndarray, " f"]
    """Relevant, active on the anchor, and not on the seed."""
    threshold: float


@dataclass(frozen=True)
class Diverse:
    """Every document as metrics of diversity read it; None where a model is not here."""

    here: measure.Embedded | None
    reference: measure.Embedded | None
    centres_cd: Float32[np.ndarray, "c d"] | None
    """Of the reference's clusters."""
    parsed: syntax.Parsed | None


@dataclass(frozen=True)
class Library:
    """Labelled documents, each once: those of the seed first."""

    config: Config
    examples: Examples
    peaks_nf: csr_array
    seed: Rows
    pools: Sequence[Mapping[str, Rows]]
    """Rows of each arm's samples, by pool."""
    costs: Sequence[Mapping[str, ArmTexts]]
    coverage: Coverage
    diverse: Diverse
    agrees_n: Bool[np.ndarray, " n"]
    """Whether a head trained on the whole anchor gives a document the label that it has."""
    heldout: Examples
    model: str
    """Digest of the backbone that the scans were made with."""

    def added(self, arm: str, budget: int, place: int) -> Rows:
        """What an arm adds at a budget with the seed at `place` in study.seeds: fewer where it has no more."""
        rows = self.pools[place % len(self.pools)][arm]
        if arm not in IN_ORDER:
            rows = np.random.default_rng([self.config.study.seeds[place], 13]).permutation(rows)
        return rows[:budget]

    def take(self, rows: Rows) -> Examples:
        """Some of the documents."""
        one = self.examples
        return Examples(
            tuple(one.ids[row] for row in rows), one.x_nd[rows], one.positive_n[rows],
            tuple(one.tokens[row] for row in rows), tuple(one.texts[row] for row in rows),
        )  # fmt: skip


def read_library(config: Config, inputs: Mapping[str, Path]) -> Library:
    """Read scans and arms. Raises UserError where the seed or the held-out set lacks a class, or a document that is
    trained on is held out."""
    names = config.coverage.seed, config.coverage.anchor, "study_texts", config.finetune.heldout
    scans = load_scans(*(inputs[f"scan:{name}"] for name in names))
    parts = [labelled(scan) for scan in scans]
    for name, part in zip(names, parts, strict=True):
        if part is None or (name != "study_texts" and not part.has_both_classes):
            raise UserError(
                f"data set {name!r} has no labelled documents of both classes, and a study trains and measures "
                "classifiers; give its sources a label field"
            )
    seed, anchor, written, heldout = (part for part in parts if part is not None)
    examples = reduce(Examples.plus, (anchor, written), seed)
    held = list(zip(heldout.ids, heldout.texts, strict=True))
    check_disjoint(examples.ids, heldout.ids, "study", config.finetune.heldout)
    check_texts_disjoint(zip(examples.ids, examples.texts, strict=True), held, "study", config.finetune.heldout)
    place = {name: row for row, name in enumerate(examples.ids)}
    coverage = _coverage(config, inputs["relevance"], scans[0], scans[1])
    peaks_nf = _peaks(examples.ids, scans[:3])
    seed_rows = np.arange(len(seed.ids))
    costs, texts = read_arms(inputs["study:texts"]), _texts(inputs["study:texts"])
    ids = [make_document([Turn(USER, text)], None, "").id for text in texts]
    pools = [
        {name: np.array([place[ids[row]] for row in arm.rows], np.int64) for name, arm in p.items()} for p in costs
    ]
    if SELECTION in config.study.arms:
        picked = _selection(peaks_nf, [place[name] for name in anchor.ids], seed_rows, coverage, config)
        pools = [{**pool, SELECTION: picked} for pool in pools]
    return Library(
        config, examples, peaks_nf, seed_rows, pools, costs, coverage, _diverse(config, examples.texts),
        (head_scores(config, anchor, examples, seed).mean(0) > 0) == examples.positive_n, heldout,
        scans[0].identity.model_digest,
    )  # fmt: skip


def _coverage(config: Config, relevance: Path, seed: Scan, anchor: Scan) -> Coverage:
    threshold, relevant_f = config.coverage.threshold, relevant_features(relevance, anchor)
    anchor_f, seed_f = (arithmetic.active(scan.peaks_nf, threshold) for scan in (anchor, seed))
    return Coverage(relevant_f, anchor_f, arithmetic.missing(relevant_f, anchor_f, seed_f), threshold)


def _peaks(ids: Sequence[str], scans: Sequence[Scan]) -> csr_array:
    """Peaks of documents, each from the first scan that holds it."""
    rows: dict[str, int] = {}
    for row, name in enumerate(name for scan in scans for name in scan.ids_n.tolist()):
        rows.setdefault(name, row)
    stacked = csr_array(vstack([scan.peaks_nf for scan in scans], format="csr"))
    return stacked[[rows[name] for name in ids]]


def _texts(folder: Path) -> list[str]:
    lines = (folder / "study_texts.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]


def _selection(peaks_nf: csr_array, anchor: Sequence[int], seed: Rows, coverage: Coverage, config: Config) -> Rows:
    """Documents of the anchor by the rule that chooses among what is written."""
    rows = np.array(sorted(set(anchor) - set(seed.tolist())), np.int64)
    most = max(config.study.budgets)
    kept = cover.assign(peaks_nf[rows], np.flatnonzero(coverage.missing_f), coverage.threshold, most)
    return rows[[one.row for one in kept]]


def _diverse(config: Config, texts: Sequence[str]) -> Diverse:
    settings, here, there, centres_cd, parsed = config.diversity, None, None, None, None
    if settings.embedding_model is not None and measure.why_no_embeddings(settings.embedding_model) is None:
        encoder = load_encoder(settings.embedding_model)
        here, there = measure.embed(encoder, documents_of(texts)), measure.embed_reference(config, encoder)
        centres_cd = measure.centres_of(there, settings, config.run.seed)
    if settings.pos_model is not None and syntax.why_absent(settings.pos_model) is None:
        parsed = syntax.parse(texts, settings.pos_model)
    return Diverse(here, there, centres_cd, parsed)


def documents_of(texts: Sequence[str]) -> list[Document]:
    """Texts as metrics of diversity take them."""
    return [make_document([Turn(USER, text)], None, "") for text in texts]
