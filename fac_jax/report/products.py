"""Everything the report shows, read from a run directory: records, metrics, coverage, missing features, kept samples.

The only module of the report that knows files. A product whose stage has not run is None or empty: the page then says
which command makes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.llm.ledger import read_ledger
from fac_jax.runs import Record, read_record

Row = Mapping[str, Any]
STAGES = (
    "activations",
    "sae",
    "splice",
    "sweep",
    "explanations",
    "relevance",
    "coverage",
    "synthesis",
    "evaluation",
    "selection",
    "finetune",
    "steering",
)
"""Stages with a folder of their own name; scans lie in scans/NAME, diversity and ablations likewise."""
TESTS = ("detection", "fuzzing")
"""Tests of explanations."""


@dataclass(frozen=True)
class Span:
    """A piece of a document around its activating token."""

    score: float
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Missing:
    """A relevant feature that the anchor activates and the seed does not."""

    feature: int
    anchor_peak: float
    anchor_documents: int
    explanation: Row
    """Row of explanations.parquet, empty when there is none."""
    relevance: Row
    """Row of relevance.parquet, empty when there is none."""
    spans: Sequence[Span]
    """Best anchor spans."""
    kept_peak: float | None
    """Highest activation on kept samples; None before they are scanned."""


@dataclass(frozen=True)
class Kept:
    """A kept sample with the activation that proves it."""

    text: str
    feature: int
    """Missing feature that it is kept for."""
    written_for: int
    """Missing feature whose prompt it answers; not always the same."""
    about: str | None
    """What prompts say of the feature that it is kept for."""
    peak: float
    step: int
    covers: Sequence[int]
    """Other missing features that it activates."""
    span: Span | None
    """Where the feature peaks; None before the kept samples are scanned, or beyond the feature's top spans."""


@dataclass(frozen=True)
class RunView:
    """A run as the report sees it."""

    dir: Path
    config: Config
    records: Mapping[str, Record]
    curve: Sequence[Row]
    """Lines of metrics.jsonl."""
    sae: Row | None
    """The SAE's config.json."""
    splice: Row | None
    """The language model's losses with the SAE spliced in, and a sample answer."""
    sweep: Row | None
    """sweep.json: several SAEs side by side."""
    diversity: Mapping[str, Row]
    """diversity.json of each data set by name."""
    scans: Mapping[str, Row]
    """scan.json of each data set by name."""
    coverage: Row | None
    missing: Sequence[Missing]
    aurocs: Mapping[str, Sequence[float]]
    """Of each test of TESTS, the scores of the explanations that it was made for."""
    synthesis: Row | None
    """Summary of the stage: what was written, rejected, kept."""
    kept: Sequence[Kept]
    evaluation: Row | None
    selection: Sequence[Row] | None
    finetune: Row | None
    """eval.json of a classifier."""
    reward: Row | None
    """eval.json of a reward model."""
    completions: Row | None
    """eval.json of an instruction model."""
    steering: Row | None
    """eval.json of `fac steer`."""
    study: Row | None
    """study.json: ways to add samples, side by side."""
    ablations: Mapping[str, Row]
    """ablation.json of each ablation by name."""
    ledger: Sequence[Row]
    """What each answer of a server cost; empty when none was asked."""
    outdated: Sequence[str] = ()
    """Stages whose product was made from other settings or inputs than the config has now; it is shown as it is."""

    @property
    def task(self) -> str:
        """Name of the task; of one's own, that of its folder."""
        return self.summary("relevance").get("task", self.config.judge.task)

    @property
    def harmful(self) -> bool:
        """Whether the task is about harm, so that explanations are hidden as well; until it is known, it may be."""
        return self.summary("relevance").get("harmful", True)

    @property
    def threshold(self) -> float:
        """A feature is active above this: the coverage that is shown was measured with it, whatever is asked now."""
        return self.coverage["threshold"] if self.coverage else self.config.coverage.threshold

    def after(self, arm: str) -> Row | None:
        """Coverage of seed, seed+random or seed+kept at the chosen threshold; None before it is evaluated."""
        if self.evaluation is None:
            return None
        chosen, rows = self.evaluation["threshold"], self.evaluation["rows"]
        return next((row for row in rows if row["set"] == arm and row["threshold"] == chosen), None)

    def summary(self, stage: str) -> Row:
        """Summary of a finished stage, empty for one that has not run."""
        return self.records[stage].summary if stage in self.records else {}


def read_records(run_dir: Path) -> dict[str, Record]:
    """Records of the finished stages that a report shows."""
    records = {name: read_record(folder) for name, folder in _folders(run_dir).items()}
    return {name: record for name, record in records.items() if record is not None}


def _folders(run_dir: Path) -> dict[str, Path]:
    """Where the product of each stage is, or would be."""
    named = {**{name: run_dir / name for name in STAGES}, "study": run_dir / "study" / "cells"}
    scans, diversity, ablations = (
        {f"{kind}:{folder.name}": folder for folder in sorted((run_dir / place).glob("*"))}
        for kind, place in (("scan", "scans"), ("diversity", "diversity"), ("ablation", "ablations"))
    )
    return {**scans, **named, **diversity, **ablations}


def read_view(run_dir: Path, config: Config, outdated: Sequence[str] = ()) -> RunView:
    """Read what there is. Raises UserError for a file that is there and cannot be read."""
    records = read_records(run_dir)
    done = {name: folder for name, folder in _folders(run_dir).items() if name in records}

    def each(kind: str, file: str) -> dict[str, Row]:
        return {n.removeprefix(kind): _json(folder / file) for n, folder in done.items() if n.startswith(kind)}

    return RunView(
        dir=run_dir,
        config=config,
        records=records,
        curve=_lines(done["sae"] / "metrics.jsonl") if "sae" in done else [],
        sae=_json(done["sae"] / "config.json") if "sae" in done else None,
        splice=_json(done["splice"] / "splice.json") if "splice" in done else None,
        sweep=_json(done["sweep"] / "sweep.json") if "sweep" in done else None,
        diversity=each("diversity:", "diversity.json"),
        scans=each("scan:", "scan.json"),
        coverage=_json(done["coverage"] / "coverage.json") if "coverage" in done else None,
        missing=_missing(done, config),
        aurocs=_aurocs(done),
        synthesis=records["synthesis"].summary if "synthesis" in done else None,
        kept=_kept(done),
        evaluation=_json(done["evaluation"] / "coverage.json") if "evaluation" in done else None,
        selection=read_rows(done["selection"] / "selected.parquet") if "selection" in done else None,
        finetune=_trained(done, records, "auprc", "classifier"),
        reward=_trained(done, records, "preference accuracy", "reward"),
        completions=_trained(done, records, "win rate", "completions"),
        ablations=each("ablation:", "ablation.json"),
        study=_json(done["study"] / "study.json") if "study" in done else None,
        steering=_json(done["steering"] / "eval.json") if "steering" in done else None,
        ledger=read_ledger(run_dir),
        outdated=outdated,
    )


def _trained(done: Mapping[str, Path], records: Mapping[str, Record], metric: str, kind: str) -> Row | None:
    """eval.json of what the task is measured by; the product may be left from another task."""
    judged = records["relevance"].summary.get("metric", "auprc") if "relevance" in records else metric
    if "finetune" not in done or judged != metric:
        return None
    found = _json(done["finetune"] / "eval.json")
    return found if found.get("kind", "classifier") == kind else None  # a classifier's does not say


def _missing(done: Mapping[str, Path], config: Config) -> list[Missing]:
    if "coverage" not in done:
        return []
    rows = read_rows(done["coverage"] / "missing.parquet")
    features = [row["feature"] for row in rows]
    explained = _by_feature(done, "explanations", "explanations.parquet", features)
    judged = _by_feature(done, "relevance", "relevance.parquet", features)
    anchor = _by_feature(done, f"scan:{config.coverage.anchor}", "features.parquet", features)
    kept = _by_feature(done, "scan:kept", "features.parquet", features, ["feature", "max"])
    return [
        Missing(
            feature=row["feature"],
            anchor_peak=row["anchor_peak"],
            anchor_documents=row["anchor_documents"],
            explanation=explained.get(row["feature"], {}),
            relevance=judged.get(row["feature"], {}),
            spans=[_span(span) for span in anchor.get(row["feature"], {}).get("spans", [])],
            kept_peak=kept.get(row["feature"], {"max": 0.0})["max"] if "scan:kept" in done else None,
        )
        for row in rows
    ]


def _aurocs(done: Mapping[str, Path]) -> dict[str, list[float]]:
    if "explanations" not in done:
        return {}
    names = {test: f"{test}_auroc" for test in TESTS}
    rows = read_rows(done["explanations"] / "explanations.parquet", list(names.values()))
    return {test: [row[name] for row in rows if row[name] is not None] for test, name in names.items()}


def _kept(done: Mapping[str, Path]) -> list[Kept]:
    if "synthesis" not in done:
        return []
    rows = read_rows(done["synthesis"] / "samples.parquet")
    covers = {r["id"]: r["covers"] for r in read_rows(done["synthesis"] / "candidates.parquet", ["id", "covers"])}
    scanned: dict[str, str] = {}
    if "scan:kept" in done:  # the scan knows a sample by its text: its document ids are hashes of the content
        scanned = {r["text"]: r["id"] for r in read_rows(done["scan:kept"] / "documents.parquet", ["text", "id"])}
    of_feature = _by_feature(done, "scan:kept", "features.parquet", [row["feature"] for row in rows])
    found = []
    for row in rows:
        spans = of_feature.get(row["feature"], {}).get("spans", [])
        here = [span for span in spans if span["document_id"] == scanned.get(row["text"].strip())]
        found.append(
            Kept(
                text=row["text"],
                feature=row["feature"],
                written_for=row["written_for"],
                about=row["about"],
                peak=row["peak"],
                step=row["step"],
                covers=[feature for feature in covers[row["id"]] if feature != row["feature"]],
                span=_span(here[0]) if here else None,
            )
        )
    return found


def _span(row: Row) -> Span:
    return Span(row["score"], row["before"], row["token"], row["after"])


def _by_feature(
    done: Mapping[str, Path], stage: str, file: str, features: Iterable[int], columns: list[str] | None = None
) -> dict[int, Row]:
    """Rows of a per-feature table for some features; empty when the stage has not run."""
    if stage not in done:
        return {}
    rows = read_rows(done[stage] / file, columns, filters=[("feature", "in", sorted(set(features)) or [-1])])
    return {row["feature"]: row for row in rows}


def read_rows(
    path: Path, columns: list[str] | None = None, filters: list[tuple[str, str, Any]] | None = None
) -> list[Row]:
    """Rows of a product's table. Raises UserError where it cannot be read."""
    try:
        return pq.read_table(path, columns=columns, filters=filters).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run its stage again") from None


def _json(path: Path) -> Row:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run its stage again") from None


def _lines(path: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run its stage again") from None
