"""`fac samples list | show`: what synthesis kept, and all that one sample can say for itself.

Why it was written (which feature was missing, and what that feature is), from what (the contrastive pair), by whom
(generator, prompt digest, seed), and the activation that it is kept for: the token, its score, and every other missing
feature that it activates. Of a reply that was not kept: why. Reads the run directory. Text of a task about harm is
shown only to who asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fac_jax.backbone.weights import load_tokenizer
from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.plain import suggest
from fac_jax.report.markup import visible
from fac_jax.report.products import Row, RunView, read_rows, read_view
from fac_jax.scan.spans import span_text

HIDDEN = "hidden: it may be harmful, --show-unsafe prints it"


@dataclass(frozen=True)
class Feature:
    """A missing feature that a sample activates."""

    feature: int
    about: str | None
    """Its explanation."""
    peak: float
    """On the sample."""
    relevance: str
    """Why it belongs to the task."""
    anchor_peak: float
    anchor_documents: int
    """Documents of the anchor that activate it."""
    seed_peak: float | None
    """Highest on the seed set, where it is not above the threshold; None where there is no scan of it."""


@dataclass(frozen=True)
class Activation:
    """Where the feature peaks in the sample, as the scan of the kept samples found it."""

    score: float
    position: int
    """Of the token, in the text under the chat template."""
    token_id: int
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Story:
    """One reply of the writer, and what became of it."""

    id: str
    text: str
    outcome: str
    """`kept`, or why it was not."""
    threshold: float
    written_for: int
    """Missing feature whose prompt it answers."""
    kept_for: Feature | None
    """None where it is not kept."""
    covers: tuple[Feature, ...]
    """The other missing features that it activates, strongest first; without the scan of the kept samples their peaks
    are not known, and 0."""
    adds: tuple[int, ...]
    """Those that no sample kept before it activates."""
    activation: Activation | None
    """None before `fac evaluate`, and where it is not kept."""
    pair: Row | None
    """Strong and weak candidate that its prompt showed, in step 2."""
    reply: Row
    """Generator, prompt digest, seed, raw text, what was mended, tokens: a row of candidates.parquet."""


def read_story(run_dir: Path, config: Config, name: str) -> tuple[Story, bool]:
    """All that is known of the reply `name`, and whether its task is about harm. Raises UserError when there is none of
    that name."""
    view = _view(run_dir, config)
    folder = run_dir / "synthesis"
    replies = {row["id"]: row for row in read_rows(folder / "candidates.parquet")}
    if name not in replies:
        raise UserError(
            f"synthesis wrote no {name!r}{suggest(name, replies)}; `fac samples list CONFIG` names what is kept"
        )
    reply = replies[name]
    kept = next((row for row in read_rows(folder / "samples.parquet") if row["id"] == name), None)
    pairs = {row["feature"]: row for row in read_rows(folder / "pairs.parquet")} if reply["step"] == 2 else {}
    peaks, activation = ({}, None) if kept is None else _scanned(run_dir, config, kept)
    features = _features(view, run_dir, config, [*(reply["covers"] or []), *([kept["feature"]] if kept else [])], peaks)
    others = [features[one] for one in reply["covers"] or [] if kept is None or one != kept["feature"]]
    story = Story(
        id=name,
        text=reply["text"],
        outcome="kept" if kept else _why_not(reply, view.threshold),
        threshold=view.threshold,
        written_for=reply["feature"],
        kept_for=features[kept["feature"]] if kept else None,
        covers=tuple(sorted(others, key=lambda one: -one.peak)),
        adds=tuple(kept["adds"]) if kept else (),
        activation=activation,
        pair=pairs.get(reply["feature"]),
        reply={key: value for key, value in reply.items() if key not in ("text", "covers", "kept", "valid")},
    )
    return story, view.harmful


def listing(run_dir: Path, config: Config, unsafe: bool) -> RenderableType:
    """Every kept sample in a line, most useful first."""
    view = _view(run_dir, config)
    hidden = view.harmful and not unsafe
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("sample", "kept for", "peak", "adds", "covers", "step", *([] if hidden else ["text"])):
        table.add_column(column, justify="right" if column in ("kept for", "peak", "adds", "covers") else "left")
    rows = read_rows(run_dir / "synthesis" / "samples.parquet")
    for row, one in zip(rows, view.kept, strict=True):
        cells = [row["id"], str(one.feature), f"{one.peak:.2f}", str(len(row["adds"])), str(1 + len(one.covers))]
        text = [] if hidden else [Text(visible(" ".join(one.text.split())), overflow="ellipsis", no_wrap=True)]
        table.add_row(*cells, str(one.step), *text)
    title = (
        f"{len(rows)} samples kept, for {len({row['feature'] for row in rows})} features missing at {view.threshold:g}"
    )
    said = [Text("texts are hidden: they may be harmful, --show-unsafe prints them")] if hidden else []
    return Group(Text(title, style="bold"), table, *said, Text("fac samples show CONFIG SAMPLE tells the story of one"))


def printed(story: Story, harmful: bool) -> RenderableType:
    """The story, for people; with `harmful` no text of the task is shown."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()

    def line(label: str, *said: str | Text) -> None:
        table.add_row(label, Text.assemble(*(one if isinstance(one, Text) else visible(one) for one in said)))

    def safe(text: str | None) -> str:
        return HIDDEN if harmful else f"“{text}”" if text else "no explanation"

    line("text", safe(story.text))
    for name, value in json.loads(story.reply["fields"] or "{}").items():
        line(f"  {name}", safe(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    line("outcome", story.outcome)
    if (one := story.kept_for) is not None:
        line("kept for", f"feature {one.feature}: {safe(one.about)}")
        line("relevant", one.relevance)
        seed = "" if one.seed_peak is None else f"; the seed set reaches {one.seed_peak:.2f}"
        line(
            "was missing",
            f"{one.anchor_documents:,} anchor documents exceed {story.threshold:g}, up to {one.anchor_peak:.2f}{seed}",
        )
        line("activates", f"{one.peak:.2f} when it was chosen", *_where(story.activation, harmful))
    if story.covers:
        line(
            "activates too",
            ", ".join(f"{one.feature}" + (f" ({one.peak:.2f})" if one.peak else "") for one in story.covers),
        )
    if story.adds:
        line("first to", f"activate {', '.join(map(str, story.adds))}")
    line("written for", f"feature {story.written_for}, step {story.reply['step']}, draw {story.reply['index']}")
    if (multiple := story.reply.get("steer")) is not None:  # products from before there was steering lack it
        line("steered", f"towards feature {story.written_for}, by {multiple:g} times its anchor peak")
    for side in ("strong", "weak") if story.pair else ():
        pair: Mapping[str, Any] = story.pair or {}
        if pair[side]:
            line(f"  {side}", f"{pair[side]}, peak {pair[f'{side}_peak']:.2f}: {safe(pair[f'{side}_text'])}")
    reply = story.reply
    line("writer", f"{reply['generator']} ({reply['model']}), ended with {reply['finish_reason']!r}")
    line("prompt", f"digest {reply['prompt_digest']}, seed {reply['seed']}")
    line("tokens", f"{reply['prompt_tokens']:,} read, {reply['completion_tokens']:,} written")
    if reply["mended"]:
        line("mended", ", ".join(reply["mended"]))
    return Group(Text(story.id, style="bold"), table)


def _view(run_dir: Path, config: Config) -> RunView:
    view = read_view(run_dir, config)
    if view.synthesis is None:
        raise UserError(f"{run_dir} holds no samples: run `fac synthesize CONFIG` first")
    return view


def _why_not(reply: Row, threshold: float) -> str:
    if reply["reason"] is not None:
        return f"rejected: {reply['reason']}"
    if not reply["covers"]:
        best = f"feature {reply['best_feature']} with {reply['best_peak']:.2f}"
        return f"a sample, but it activates nothing that is missing above {threshold:g}; it comes nearest to {best}"
    return "a sample, but others that are kept activate what it does, and more, or more clearly"


def _features(
    view: RunView, run_dir: Path, config: Config, wanted: list[int], peaks: Mapping[int, float]
) -> dict[int, Feature]:
    missing = {one.feature: one for one in view.missing}
    if gone := [feature for feature in wanted if feature not in missing]:
        raise UserError(
            f"feature {gone[0]} is not missing any more, as coverage was measured again: run `fac synthesize`"
        )
    scan = run_dir / "scans" / config.coverage.seed / "features.parquet"
    rows = read_rows(scan, ["feature", "max"], [("feature", "in", wanted or [-1])]) if scan.exists() else []
    seed_peaks = {row["feature"]: row["max"] for row in rows}
    found = {}
    for feature in wanted:
        one = missing[feature]
        found[feature] = Feature(
            feature=feature,
            about=one.explanation.get("explanation"),
            peak=peaks.get(feature, 0.0),
            relevance=_relevance(one.relevance),
            anchor_peak=one.anchor_peak,
            anchor_documents=one.anchor_documents,
            seed_peak=seed_peaks.get(feature),
        )
    return found


def _relevance(row: Row) -> str:
    if not row:
        return "not judged"
    if row["label"]:
        return f"judged {row['label']!r} by {row['model']}" + (f": {row['reason']}" if row["reason"] else "")
    shown = f"AUROC {row['auroc']:.2f}, q {row['q']:.2g}, on {row['documents']:,} documents"
    return f"peaks tell the task's labels: {shown}"


def _scanned(run_dir: Path, config: Config, kept: Row) -> tuple[dict[int, float], Activation | None]:
    """Peaks of a kept sample on every feature, and where that of the one that it is kept for is; once it is scanned."""
    folder, peaks = run_dir / "scans" / "kept", {kept["feature"]: kept["peak"]}
    if not (folder / "scan.json").exists():
        return peaks, None
    # The scan knows a sample by its text: its document ids are hashes of the content.
    documents = read_rows(folder / "documents.parquet", ["index", "text", "token_ids", "content"])
    document = next((one for one in documents if one["text"] == kept["text"].strip()), None)
    if document is None:
        return peaks, None
    found = read_rows(folder / "peaks.parquet", filters=[("document", "=", document["index"])])
    peaks |= {row["feature"]: row["peak"] for row in found if row["feature"] != kept["feature"]}
    at = next((row for row in found if row["feature"] == kept["feature"]), None)
    if at is None:
        return peaks, None
    ids, content = np.array(document["token_ids"]), np.array(document["content"], bool)
    span = span_text(ids, content, at["position"], config.scan.span_tokens, load_tokenizer(config.backbone.model))
    return peaks, Activation(at["peak"], at["position"], at["token_id"], **span)


def _where(activation: Activation | None, harmful: bool) -> list[str | Text]:
    if activation is None:
        return ["; `fac evaluate` finds the token"]
    said: list[str | Text] = [f", {activation.score:.2f} in the scan, at token {activation.position}"]
    if not harmful:
        before, token, after = activation.before, activation.token, activation.after
        space = token[: len(token) - len(token.lstrip())]
        said += [f": …{before}{space}«", Text(visible(token.strip()), style="bold"), f"»{after}…"]
    return said
