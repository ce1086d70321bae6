"""The report's twin for the terminal: the same findings and numbers.

Passages are shown only to who asks for them (`--show-unsafe`), and so are explanations where the task is about harm;
samples stay in the report. Reads the run directory. Text that came from a corpus or a model is shown as plain text:
rich markup and terminal escapes in it have no effect.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fac_jax.config import load_config
from fac_jax.report.costs import said
from fac_jax.report.explanations import agreed, interval, suspects
from fac_jax.report.markup import visible
from fac_jax.report.products import TESTS, Missing, RunView, Span, read_view
from fac_jax.report.verdict import ARMS, headline, percent, verdict

SHOWN = 8
"""Missing features listed."""
BEFORE, AFTER = 50, 20
"""Characters of a passage before and after its activating token."""
QUALITY = {"fvu": "FVU", "normalised_loss": "normalised loss", "l0": "L0", "dead_fraction": "dead"}
"""Held-out metrics of the autoencoder that are shown."""
SPLICED = {
    "ce_clean": "clean",
    "ce_spliced": "spliced",
    "ce_zero": "zero",
    "ce_mean": "mean",
    "loss_recovered": "loss recovered",
    "kl": "KL",
}
"""Losses with the autoencoder inside the language model that are shown."""


def summary(run_dir: Path, unsafe: bool = False) -> RenderableType:
    """What `fac run` prints at its end. Raises UserError when `run_dir` holds no run."""
    return render(read_view(run_dir, load_config(run_dir / "config.yaml")), unsafe)


def render(view: RunView, unsafe: bool = False) -> RenderableType:
    """Headline, findings, and a table for each part that has run. `unsafe`: with text that may be harmful."""
    relevance = view.summary("relevance")
    findings = [*verdict(view), agreed(relevance), suspects(relevance), said(view) if view.ledger else None]
    sentences = [Padding(Text(f"• {sentence}"), (0, 0, 0, 2)) for sentence in findings if sentence]
    tables = (
        _training(view), _spliced(view), _explanations(view), _coverage(view), _missing(view, unsafe),
        _classifier(view),
    )  # fmt: skip
    spaced = [part for table in tables if table for part in (Text(), table)]
    return Group(Text(), Text(headline(view), style="bold"), *sentences, *spaced, Text())


def _table(title: str, *columns: str) -> Table:
    """A table without frame; the first column is text, the others numbers."""
    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right")
    return table


def _training(view: RunView) -> Table | None:
    if view.sae is None:
        return None
    metrics = {name: view.sae["metrics"][key] for key, name in QUALITY.items()}
    table = _table("Autoencoder, on held-out rows", "features", "K", *metrics)
    table.add_row(
        f"{view.sae['features']:,}", str(view.sae["k"] or "threshold"), *(f"{value:.3g}" for value in metrics.values())
    )
    return table


def _spliced(view: RunView) -> Table | None:
    if view.splice is None:
        return None
    shown = {name: "–" if view.splice[key] is None else f"{view.splice[key]:.3f}" for key, name in SPLICED.items()}
    title = f"Language model's cross entropy with the autoencoder, {view.splice['tokens']:,} held-out predictions"
    table = _table(title, "documents", *shown)
    table.add_row(f"{view.splice['documents']:,}", *shown.values())
    return table


def _explanations(view: RunView) -> Table | None:
    summary = view.summary("explanations")
    if not any(summary.get(f"{test}_auroc") for test in TESTS):
        return None
    table = _table("Explanations on held-out documents, mean AUROC (95% interval)", "test", "explained", "shuffled")
    for test in TESTS:
        table.add_row(test, interval(summary.get(f"{test}_auroc")), interval(summary.get(f"control_{test}_auroc")))
    if summary.get("generation"):
        found = summary["generation"]
        named = f"share of texts written from it with a peak above {found['threshold']:g}"
        table.add_row(named, interval(found["generation_score"]), interval(found["generation_control"]))
    return table


def _coverage(view: RunView) -> Table | None:
    if view.evaluation is None:
        if view.coverage is None:
            return None
        table = _table("Coverage of the seed set", "threshold", "anchor", "missing", "FAC")
        for row in view.coverage["sweep"]:
            table.add_row(
                f"{row['threshold']:g}",
                f"{row['anchor_features']:,}",
                f"{row['missing_features']:,}",
                percent(row["fac"]),
            )
        return table
    table = _table(f"Coverage at threshold {view.threshold:g}", "set", "documents", "FAC", "missing features hit")
    for arm in ARMS[:3]:
        found = view.after(arm)
        if found:
            hit = "–" if arm == "seed" else percent(found["target_hit_rate"])
            table.add_row(arm, f"{found['documents']:,}", percent(found["fac"]), hit)
    return table


def _missing(view: RunView, unsafe: bool) -> Table | None:
    if not view.missing:
        return None
    title = f"Missing features ({min(SHOWN, len(view.missing))} of {len(view.missing):,})"
    hidden = view.harmful and not unsafe
    if hidden:
        title += "; what they are about may be harmful: the report blurs it, --show-unsafe shows it here"
    table = _table(title, *(["feature"] if hidden else ["explanation", "feature"]), "anchor peak", "kept peak")
    for item in view.missing[:SHOWN]:
        kept = "–" if item.kept_peak is None else f"{item.kept_peak:.2f}"
        about = _said(item)
        if unsafe and item.spans:
            about.append_text(_passage(item.spans[0]))
        table.add_row(*([] if hidden else [about]), str(item.feature), f"{item.anchor_peak:.2f}", kept)
    return table


def _passage(best: Span) -> Text:
    """The strongest anchor passage in a line of its own, its activating token marked."""
    before, token, after = (" ".join(visible(part).split()) for part in (best.before, best.token, best.after))
    line = Text(f"\n  …{before[-BEFORE:]} ", style="dim")
    return line.append(token, style="not dim bold").append(f" {after[:AFTER]}…")


def _said(item: Missing) -> Text:
    """The explanation in one line, whatever is in it."""
    said = ", ".join(t.strip() for t in item.explanation.get("fires_on") or []) or item.explanation.get("explanation")
    line = Text(" ".join(visible(said).split()) if said else "(no explanation)", style="" if said else "dim")
    line.truncate(60, overflow="ellipsis")
    return line


def _classifier(view: RunView) -> Table | None:
    if view.finetune is None:
        return None
    heldout = view.finetune["heldout"]
    title = f"Classifier on {heldout['documents']:,} held-out documents (a random scorer: {heldout['base_rate']:.3f})"
    table = _table(title, "trained on", "documents", "AUPRC", "AUROC")
    for arm in ARMS:
        row = view.finetune["arms"][arm]
        numbers = [
            f"{row[m]['mean']:.3f} ± {row[m]['sd']:.3f}" if m in row else "not trained" for m in ("auprc", "auroc")
        ]
        table.add_row(arm, f"{row['documents']:,}", *numbers)
    return table
