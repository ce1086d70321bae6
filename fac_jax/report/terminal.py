"""The report's twin for the terminal: the same findings and numbers.

Passages are shown only to who asks for them (`--show-unsafe`), and so are explanations where the task is about harm;
samples stay in the report. Reads the run directory. Text that came from a corpus or a model is shown as plain text:
rich markup and terminal escapes in it have no effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fac_jax.config.file import load_config
from fac_jax.report.costs import said
from fac_jax.report.explanations import agreed, interval, suspects
from fac_jax.report.markup import visible
from fac_jax.report.products import TESTS, Missing, RunView, Span, read_view
from fac_jax.report.verdict import ARMS, headline, notice, percent, verdict

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


def summary(run_dir: Path, outdated: Sequence[str] = (), unsafe: bool = False) -> RenderableType:
    """What `fac run` prints at its end. Raises UserError when `run_dir` holds no run."""
    return render(read_view(run_dir, load_config(run_dir / "config.yaml"), outdated), unsafe)


def render(view: RunView, unsafe: bool = False) -> RenderableType:
    """Headline, findings, and a table for each part that has run. `unsafe`: with text that may be harmful."""
    relevance = view.summary("relevance")
    findings = [*verdict(view), agreed(relevance), suspects(relevance), said(view) if view.ledger else None]
    sentences = [Padding(Text(f"• {sentence}"), (0, 0, 0, 2)) for sentence in findings if sentence]
    tables = (
        _training(view), _spliced(view), _explanations(view), _coverage(view), _missing(view, unsafe),
        _classifier(view), _reward(view), _instructions(view),
    )  # fmt: skip
    spaced = [part for table in tables if table for part in (Text(), table)]
    first = [Text(outdated, style="yellow")] if (outdated := notice(view)) else []
    return Group(*first, Text(), Text(headline(view), style="bold"), *sentences, *spaced, Text())


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Group:
    """A table without frame; the first column is text, the others numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return Group(Text(title, style="bold"), table)  # a title of the table's own would be broken to its width


def _training(view: RunView) -> Group | None:
    if view.sae is None:
        return None
    metrics = {name: f"{view.sae['metrics'][key]:.3g}" for key, name in QUALITY.items()}
    row = [f"{view.sae['features']:,}", str(view.sae["k"] or "threshold"), *metrics.values()]
    return _table("Autoencoder, on held-out rows", ["features", "K", *metrics], [row])


def _spliced(view: RunView) -> Group | None:
    if view.splice is None:
        return None
    shown = {name: "–" if view.splice[key] is None else f"{view.splice[key]:.3f}" for key, name in SPLICED.items()}
    title = f"Language model's cross entropy with the autoencoder, {view.splice['tokens']:,} held-out predictions"
    return _table(title, ["documents", *shown], [[f"{view.splice['documents']:,}", *shown.values()]])


def _explanations(view: RunView) -> Group | None:
    summary = view.summary("explanations")
    if not any(summary.get(f"{test}_auroc") for test in TESTS):
        return None
    pairs = {f"{test}, mean AUROC": (f"{test}_auroc", f"control_{test}_auroc") for test in TESTS}
    rows = [[name, *(interval(summary.get(key)) for key in keys)] for name, keys in pairs.items()]
    if summary.get("generation"):
        found = summary["generation"]
        name = f"texts written from it with a peak above {found['threshold']:g}"
        rows.append([name, interval(found["generation_score"]), interval(found["generation_control"])])
    title = "Explanations, tested on documents that they were not made from (95% intervals)"
    return _table(title, ["test", "its own explanation", "another's"], rows)


def _coverage(view: RunView) -> Group | None:
    if view.coverage is None:
        return None
    if view.evaluation is None:
        keys = ("anchor_features", "missing_features")
        rows = [
            [f"{row['threshold']:g}", *(f"{row[key]:,}" for key in keys), percent(row["fac"])]
            for row in view.coverage["sweep"]
        ]
        return _table("Coverage of the seed set", ["threshold", "anchor", "missing", "FAC"], rows)
    rows = [
        [
            arm,
            f"{found['documents']:,}",
            percent(found["fac"]),
            "–" if arm == "seed" else percent(found["target_hit_rate"]),
        ]
        for arm in ARMS[:3]
        if (found := view.after(arm))
    ]
    return _table(
        f"Coverage at threshold {view.threshold:g}", ["set", "documents", "FAC", "missing features hit"], rows
    )


def _missing(view: RunView, unsafe: bool) -> Group | None:
    if not view.missing:
        return None
    title = f"Missing features ({min(SHOWN, len(view.missing))} of {len(view.missing):,})"
    hidden = view.harmful and not unsafe
    if hidden:
        title += "; what they are about may be harmful: the report blurs it, --show-unsafe prints it"
    rows: list[list[str | Text]] = []
    for item in view.missing[:SHOWN]:
        about = _said(item)
        if unsafe and item.spans:
            about.append_text(_passage(item.spans[0]))
        kept = "–" if item.kept_peak is None else f"{item.kept_peak:.2f}"
        rows.append([*([] if hidden else [about]), str(item.feature), f"{item.anchor_peak:.2f}", kept])
    columns = ["feature", "anchor peak", "kept peak"]
    return _table(title, columns if hidden else ["explanation", *columns], rows)


def _passage(best: Span) -> Text:
    """The strongest anchor passage in a line of its own, its activating token marked."""
    before, token, after = (re.sub(r"\s+", " ", visible(part)) for part in (best.before, best.token, best.after))
    line = Text(f"\n  …{before[-BEFORE:]}", style="dim")
    return line.append(token, style="not dim bold").append(f"{after[:AFTER]}…")


def _said(item: Missing) -> Text:
    """The explanation in one line, whatever is in it."""
    said = ", ".join(t.strip() for t in item.explanation.get("fires_on") or []) or item.explanation.get("explanation")
    line = Text(" ".join(visible(said).split()) if said else "(no explanation)", style="" if said else "dim")
    line.truncate(60, overflow="ellipsis")
    return line


def _classifier(view: RunView) -> Group | None:
    if view.finetune is None:
        return None
    heldout = view.finetune["heldout"]
    title = f"Classifier on {heldout['documents']:,} held-out documents (a random scorer: {heldout['base_rate']:.3f})"
    rows = []
    for arm in ARMS:
        row = view.finetune["arms"][arm]
        numbers = [
            f"{row[m]['mean']:.3f} ± {row[m]['sd']:.3f}" if m in row else "not trained" for m in ("auprc", "auroc")
        ]
        rows.append([arm, f"{row['documents']:,}", *numbers])
    return _table(title, ["trained on", "documents", "AUPRC", "AUROC"], rows)


def _reward(view: RunView) -> Group | None:
    if view.reward is None:
        return None
    rows = []
    for arm, row in view.reward["arms"].items():
        spreads = (row["accuracy"], row["score"])
        figures = [f"{one['mean']:.1%} ± {100 * one['sd']:.1f}" if one else "–" for one in spreads]
        rows.append([arm, f"{row['pairs']:,}", *figures])
    title = f"Reward on {view.reward['heldout']['pairs']:,} held-out pairs (a tie is not a win)"
    return _table(title, ["trained on", "pairs", "accuracy", "RewardBench"], rows)


def _instructions(view: RunView) -> Group | None:
    if view.completions is None:
        return None
    rows = [
        [
            arm, f"{row['instructions']:,}" if "instructions" in row else "untrained",
            f"{row['nats_per_token']['mean']:.3f} ± {row['nats_per_token']['sd']:.3f}",
        ]
        for arm, row in view.completions["arms"].items()
    ]  # fmt: skip
    title = f"Instruction model on {view.completions['heldout']['instructions']:,} held-out answers"
    return _table(title, ["trained on", "instructions", "nats a token"], rows)
