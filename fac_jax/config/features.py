"""`scan`, `explain` and `judge`: features over a corpus, what they mean, and which of them a task needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fac_jax.config.checks import check


@dataclass(frozen=True)
class ScanConfig:
    """Corpus to per-feature statistics and per-sample peaks."""

    acts: Literal["topk", "relu"] = "topk"
    """Which activations count: topk, the SAE's own (paper's formula; an SAE with a threshold keeps what exceeds it), or
    relu, with top-k and threshold off (paper's code)."""
    sae: str | None = None
    """SAE to scan with: folder, official .pth file, SAELens folder, or hub id; by default the run's own."""
    top_spans: int = 10
    """Top-scoring spans kept per feature (code: 10)."""
    span_tokens: int = 32
    """Tokens of a span, activating token included (code: 32)."""
    peaks: str = "all"
    """Features whose peaks are kept document by document, with the documents: all, none (statistics and spans only,
    whose size does not depend on the corpus), or a parquet file with a column `feature` (coverage/missing.parquet). Of
    the sets that the pipeline itself needs (anchor, seed, held-out, select.source, synthesised) all are kept."""
    share: str = "1/1"
    """Part of the data set that this command scans, such as 1/2 and 2/2. At the same time, on one machine or several:
    each with a run.dir of its own, and `fac scan merge` joins them; in one run.dir one after another, and the last one
    finishes the scan. Changes nothing in the product."""

    @property
    def share_of(self) -> tuple[int, int]:
        """Index from 0, and count."""
        index, _, count = self.share.partition("/")
        return int(index) - 1, int(count)

    def __post_init__(self) -> None:
        index, slash, count = self.share.partition("/")
        fits = index.isdecimal() and bool(slash) and count.isdecimal() and 1 <= int(index) <= int(count)
        check(fits, f"scan.share is {self.share!r}; it must be INDEX/COUNT, counted from 1, such as 2/4")
        for name, floor in {"top_spans": 1, "span_tokens": 1}.items():
            check(getattr(self, name) >= floor, f"scan.{name} is {getattr(self, name)}; it must be at least {floor}")


@dataclass(frozen=True)
class ExplainConfig:
    """Features to text, and how well the text tells where a feature is active."""

    method: Literal["auto", "embedded"] = "auto"
    """Who explains. auto: the server at llm.url, or without one the embedded method; embedded: that in any case, for a
    server whose model can write and no more."""
    protocol: Literal["quantiles", "paper"] = "quantiles"
    """LLM method, which spans explain a feature. quantiles: half of them the strongest, the others from equal strata of
    the documents left, so that an explanation fits weak activations too, for as many requests; paper: the strongest,
    the last 10 tokens of each."""
    spans: int = 10
    """Spans shown per feature (code: 10)."""
    tokens: int = 8
    """Tokens named per feature by the embedded method."""
    features: int | None = None
    """LLM method: features that are explained, drawn with run.seed; by default all that are active on the anchor. The
    others are not judged either, so they never count as relevant: for a trial, or a server that is paid for."""
    scored_features: int | None = None
    """Features whose explanation is scored on held-out documents, drawn with run.seed; by default all. LLM method:
    4 requests for each with 10 scored spans, beside the 2 that explain it and check the explanation."""
    scored_spans: int = 10
    """Held-out spans of each kind that a score is made from (activating and silent; marked rightly and wrongly), at
    most. A request rates 10 spans."""
    control_features: int = 100
    """LLM method: features of those scored that are also scored by another feature's explanation, which must come out
    at 0.5; as many requests for each as a score. The embedded method does it for all: it costs nothing there."""
    generation_features: int | None = None
    """Features for which texts are written from the explanation alone and scored by the SAE, drawn with run.seed; by
    default 50 where a server explains, and none elsewhere: the backbone writes a text or two a second on a CPU."""
    generation_texts: int = 4
    """Texts for each of them: as many requests."""

    def __post_init__(self) -> None:
        least = {"spans": 1, "tokens": 1, "scored_spans": 3, "generation_texts": 1}
        counted = dict.fromkeys(("features", "scored_features", "control_features", "generation_features"), 0)
        for name, floor in {**least, **counted}.items():
            value = getattr(self, name)
            check(value is None or value >= floor, f"explain.{name} is {value}; it must be at least {floor}")


@dataclass(frozen=True)
class JudgeConfig:
    """Features to task relevance."""

    task: str = "toxicity"
    """Name of a task in fac_jax/features/tasks, or the path of a folder that holds one's own (README.md there)."""
    method: Literal["auto", "embedded"] = "auto"
    """Who judges. auto: the server at llm.url, or without one the embedded method, which needs labels; embedded: that
    in any case, for a server whose model can write and no more."""
    false_discovery_rate: float = 0.05
    """Embedded method: level of the Benjamini-Hochberg procedure."""
    min_documents: int = 3
    """Embedded method: features active on fewer anchor documents are not tested."""
    relevant_label: Literal["Yes", "Probably", "Maybe"] = "Maybe"
    """LLM method: lowest label that counts as relevant (paper: Maybe)."""
    passes: int = 2
    """LLM method: how often each feature is judged, each time with its spans in another order (paper: once). The least
    sure label counts, and how far the passes agree is reported. Each pass costs a request a feature; 1 halves the cost
    and leaves agreement unknown."""

    def __post_init__(self) -> None:
        check(self.passes >= 1, f"judge.passes is {self.passes}; it must be at least 1")
