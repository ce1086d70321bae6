"""A language model's verdict on each feature: the rubric, the explanation and the spans, asked in several passes.

Every pass shows the same spans in another order (the first: best first), because a judge that is swayed by the order
has not judged. A feature that has fewer orders than `judge.passes` (one span: one order) is asked in those it has. The
verdict on a feature is
- `judged`: every pass could be read. Its label is the least sure one that any pass gave, so a feature is relevant only
  when all passes find it relevant; the labels and reasons of all passes are kept beside it.
- `failed`: a pass could not be read. Nobody knows whether it would have been the less sure one, so there is no label.
- `not judged`: no explanation, or one that its own check refused. Mismatched explanations hurt more than wrong labels
  (paper: AUPRC 58.85 against 59.69).

Spans may be written to sway the judge: `llm/question.py` keeps them data, `injection.py` counts those that look like
it. Reads the scan's spans; `ask.py` writes the log of replies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.features.agreement import agreement
from fac_jax.features.ask import ask
from fac_jax.features.injection import sign_of_injection
from fac_jax.features.spans import top_spans
from fac_jax.features.task import Task
from fac_jax.llm.client import Generator
from fac_jax.llm.question import label_schema, question
from fac_jax.llm.structured import Answer
from fac_jax.scan.product import Scan


def judge_with(
    generator: Generator,
    task: Task,
    scan: Scan,
    explanations: Sequence[Mapping[str, Any]],
    config: Config,
    log: Path,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of relevance.parquet, one for each explanation's feature, and what is to be said of all of them together."""
    labels, lowest, seed = task.description.labels, config.judge.relevant_label, config.run.seed
    if lowest not in labels[:-1]:
        raise UserError(f"judge.relevant_label is {lowest!r}; task {task.name!r} has the labels {', '.join(labels)}")
    judged = {row["feature"]: row for row in explanations if _not_judged(row, labels[-1]) is None}
    spans = top_spans(scan, list(judged), config.explain.spans)
    asked = {
        f"judge:{feature}:{number}": question(
            task.prompt("judge"),
            {"explanation": row["explanation"], "spans": [spans[feature][place] for place in order]},
            label_schema(labels),
            seed,
        )
        for feature, row in judged.items()
        for number, order in enumerate(orders(len(spans[feature]), config.judge.passes, seed, feature))
    }
    answers = ask(generator, asked, log, "judge")
    by_feature: dict[int, list[Answer]] = {}
    for key, answer in answers.items():
        by_feature.setdefault(int(key.split(":")[1]), []).append(answer)
    documents_f = np.bincount(scan.peaks_nf.indices, minlength=scan.identity.features)
    rows = []
    for explained in explanations:
        feature = explained["feature"]
        row = {
            "feature": feature, "relevant": False, "method": "llm", "model": generator.name,
            "documents": int(documents_f[feature]),
        }  # fmt: skip
        if feature in by_feature:
            suspect = sum(sign_of_injection(_text(span)) is not None for span in spans[feature])
            verdict = _verdict(by_feature[feature], labels, labels.index(lowest))
            rows.append({**row, **verdict, "suspect_spans": suspect})
        else:
            rows.append({**row, "status": "not judged", "reason": _not_judged(explained, labels[-1])})
    places = [[labels.index(label) for label in row["labels"]] for row in rows if row["status"] == "judged"]
    summary = {
        "passes": config.judge.passes,
        "disagreed": sum(row.get("agreed") is False for row in rows),
        "agreement": dataclasses.asdict(agreement(places, len(labels), labels.index(lowest))),
        "spans_shown": sum(map(len, spans.values())),
        "suspect_spans": sum(row.get("suspect_spans", 0) for row in rows),
    }
    return rows, summary


def orders(count: int, passes: int, seed: int, feature: int) -> list[tuple[int, ...]]:
    """Different orders of so many things, the given one first: one for each pass, or all when there are fewer."""
    random = np.random.default_rng([seed, feature])
    found = {tuple(range(count)): None}
    while len(found) < min(passes, math.factorial(count)):
        found[tuple(random.permutation(count).tolist())] = None
    return list(found)


def _verdict(answers: Sequence[Answer], labels: Sequence[str], lowest: int) -> dict[str, Any]:
    """What the passes say of one feature together."""
    values = [answer.value or {} for answer in answers]
    given = [value.get("label") for value in values]
    kept = {
        "labels": given, "reasons": [value.get("reason") for value in values], "raw": [one.raw for one in answers]
    }  # fmt: skip
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        return {**kept, "status": "failed", "error": errors[0]}
    place = max(labels.index(label) for label in given)
    label = labels[place]
    return {
        **kept, "status": "judged", "label": label, "reason": values[given.index(label)]["reason"],
        "relevant": place <= lowest, "agreed": len(set(given)) == 1 if len(given) > 1 else None,
    }  # fmt: skip


def _text(span: Mapping[str, Any]) -> str:
    return f"{span['before']}{span['token']}{span['after']}"


def _not_judged(explained: Mapping[str, Any], no: str) -> str | None:
    """Why a feature is not judged; None when it is."""
    if explained["status"] != "explained":
        return f"no explanation: {explained['status']}"
    if explained["verified"] is None and explained["method"] == "llm":
        return "the check of its explanation could not be read"
    return "its explanation does not fit its spans" if explained["verified"] == no else None
