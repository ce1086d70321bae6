"""A run as one HTML file that opens from disk: no network, no script, no font or image from elsewhere.

Reads the run directory; writes report/index.html. Everything that came from a corpus, a model or a config is escaped
(`markup.py`), and a content security policy forbids scripts and loads besides, so that hostile text stays text.
Passages and samples are blurred until asked for, and so are explanations where the task is about harm. Stages that have
not run are named, with the command that runs them.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fac_jax import __version__
from fac_jax.config.file import Config
from fac_jax.report import apparatus, gain, gap
from fac_jax.report.ablations import ablations
from fac_jax.report.blocks import Section, render
from fac_jax.report.costs import costs
from fac_jax.report.diversity import diversity
from fac_jax.report.explanations import explanations
from fac_jax.report.figures import STYLE
from fac_jax.report.markup import Html, tag
from fac_jax.report.products import RunView, read_view
from fac_jax.report.steering import steering
from fac_jax.report.study import study
from fac_jax.report.sweep import sweep
from fac_jax.report.tuned import tuned
from fac_jax.report.verdict import headline, key_numbers, notice, verdict
from fac_jax.runs import write_text


def report(config: Config, out: Path, inputs: Mapping[str, Path], outdated: Sequence[str] = ()) -> dict[str, Any]:
    """Stage: write `out`/index.html for the run directory that holds `out`. Reads whatever stages are done; those that
    are `outdated` are shown as they are, and named."""
    view = read_view(out.parent, config, outdated)
    write_text(out / "index.html", page(view))
    return {"page": "index.html", "findings": verdict(view), "outdated": list(outdated)}


def page(view: RunView) -> str:
    """The whole document."""
    style = Html(STYLE.read_text(encoding="utf-8"))
    digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", headline(view)),
        tag("style", style),
    )
    sections = _sections(view)
    main = tag("main", map(render, sections))
    body = tag("body", _header(view), _bar(sections), main, _footer(view))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _sections(view: RunView) -> list[Section]:
    """Findings first, then how they were made."""
    return [
        gap.coverage(view),
        gap.missing(view),
        gain.kept(view),
        *(tuned(view) or [gain.classifier(view)]),
        *steering(view),
        *study(view),
        gain.selection(view),
        explanations(view),
        apparatus.what_was_run(view),
        apparatus.training(view),
        *ablations(view),
        *sweep(view),
        *diversity(view),
        *costs(view),
        apparatus.methods(view),
        apparatus.limits(view),
        apparatus.provenance(view),
    ]


def _header(view: RunView) -> Html:
    kicker = (
        f"fac_jax {__version__} · {view.dir.name} · {view.config.backbone.model}, layer {view.config.backbone.layer}"
    )
    tiles = [
        tag(
            "div",
            tag("dt", k.name),
            tag("dd", k.value, class_="figure-number"),
            tag("dd", k.under, class_="under"),
            class_="tile",
        )
        for k in key_numbers(view)
    ]
    return tag(
        "header",
        tag("p", kicker, class_="kicker"),
        tag("p", said, class_="notice") if (said := notice(view)) else None,
        tag("h1", headline(view)),
        tag("p", " ".join(verdict(view)) or "No stage with findings has run yet.", class_="verdict"),
        tag("dl", tiles, class_="tiles") if tiles else None,
    )


def _bar(sections: list[Section]) -> Html:
    links = [tag("a", section.short, href=f"#{section.id}") for section in sections]
    switch = tag("label", tag("input", type="checkbox", id="reveal"), "Show all texts", class_="switch")
    return tag("div", tag("div", tag("nav", links, aria_label="Sections"), switch), class_="bar")


def _footer(view: RunView) -> Html:
    latest = max((record.finished for record in view.records.values()), default=None)
    return tag(
        "footer",
        f"State of the run at {latest}. " if latest else None,
        "This file needs no network and runs no script. It holds text that may be harmful: share it with care.",
    )
