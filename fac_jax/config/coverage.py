"""`coverage`, `select`, `diversity`: what a data set covers, which documents would, and how diverse it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fac_jax.config.checks import check


@dataclass(frozen=True)
class CoverageConfig:
    """Set arithmetic over scans."""

    anchor: str = "anchor"
    """Data set that defines what could be covered (paper: HH-RLHF + HelpSteer2)."""
    seed: str = "seed"
    """Data set whose gaps are sought (paper: a 10% subset)."""
    threshold: float = 1.0
    """A feature is active on a sample when its peak exceeds this, strictly (paper: default 0.0, best in [1, 2])."""
    sweep: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Thresholds that the report shows side by side."""
    length_match_draws: int = 20
    """Seeded subsamples of the longer set for the length-matched figure."""
    bootstrap_draws: int = 200
    """Seeded resamples of the seed set's documents for the interval around its coverage."""

    def __post_init__(self) -> None:
        for name, floor in {"length_match_draws": 0, "bootstrap_draws": 1}.items():
            check(
                getattr(self, name) >= floor, f"coverage.{name} is {getattr(self, name)}; it must be at least {floor}"
            )


@dataclass(frozen=True)
class SelectConfig:
    """Existing documents that cover what the seed lacks."""

    source: str | None = None
    """Data set to pick from, which has to be scanned; by default coverage.anchor. --select.from is short for it."""
    target: Literal["missing", "relevant", "all"] = "missing"
    """Features to cover: those missing from the seed, all that are relevant to the task, or every one of the SAE."""
    method: Literal["greedy", "magnitude", "greed_select", "sim_scale", "random"] = "greedy"
    """greedy: most features not covered yet, within 1 - 1/e of the best; magnitude: the same for the height of their
    peaks; greed_select, sim_scale: rivals of arXiv 2502.14050, which look at every feature; random: the control."""
    budget: int | None = None
    """Documents, or tokens, that are taken at most; by default as many as add something."""
    cost: Literal["documents", "tokens"] = "documents"
    """What the budget counts: documents, or their content tokens (greedy then guarantees (1 - 1/e) / 2)."""
    similarity: float = 0.8
    """sim_scale: a document is left out when this share of its features, or more, is active on those taken before."""

    def __post_init__(self) -> None:
        check(
            self.budget is None or self.budget >= 1,
            f"select.budget is {self.budget}; it must be at least 1 of select.cost ({self.cost}), or absent for as "
            "many as add something",
        )
        check(0 < self.similarity <= 1, f"select.similarity is {self.similarity}; it must lie in (0, 1]")


@dataclass(frozen=True)
class DiversityConfig:
    """Metrics of diversity that others report, beside coverage."""

    embedding_model: str | None = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence encoder of the metrics of embeddings: a BERT in the layout of sentence-transformers (hub id, folder, or
    pkg://PACKAGE/FOLDER inside an installed package); null leaves them out."""
    embedded_tokens: int = 24_576
    """Rows are embedded, in a random order, until they have this many tokens; so many of the reference as well."""
    pos_model: str | None = "en_core_web_sm"
    """spaCy model (a package's name, or a folder) of the metrics of syntax, in the language of the texts; null leaves
    them out."""
    parsed_words: int = 40_000
    """Rows are tagged and parsed, in a random order, until they have this many words."""
    reference: str | None = None
    """Data set whose clusters are counted and whose density weighs distances in NovelSum; by default
    coverage.anchor."""
    clusters: int = 100
    """Clusters of the reference (code of arXiv 2502.17184: 100)."""
    pair_rows: int = 2_000
    """NovelSum, whose cost is quadratic: rows that are compared, at most."""

    def __post_init__(self) -> None:
        least = {"embedded_tokens": 512, "parsed_words": 1, "clusters": 2, "pair_rows": 2}
        for name, floor in least.items():
            check(
                getattr(self, name) >= floor, f"diversity.{name} is {getattr(self, name)}; it must be at least {floor}"
            )
