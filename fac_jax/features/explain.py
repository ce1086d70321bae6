"""Features to text (paper, section on interpreting features).

Reads the anchor's scan and the SAE; with the embedded method the whole backbone too, with `llm.url` a server. Writes
`explanations.parquet`, one row per feature that is active on the anchor (and `replies.jsonl` with a server).

status: `explained`; `cannot tell` (no token stands out, or the model says so: an honest answer, and not a failure);
`failed` (the reply could not be read; it is kept, and the feature stays without explanation).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fac_jax.backbone.weights import load_backbone
from fac_jax.config import Config
from fac_jax.features.ask import Answer, ask, label_schema, object_schema, question
from fac_jax.features.embedded import decoded, fires_on, heldout_auroc, promotes, read_corpus, wording
from fac_jax.features.task import Task, load_task
from fac_jax.llm.client import Generator, open_generator
from fac_jax.mesh import make_mesh
from fac_jax.runs import writing
from fac_jax.sae.checkpoint import load_sae
from fac_jax.scan.scan import Scan, load_scan

EXPLANATIONS = pa.schema(
    {
        "feature": pa.int32(), "method": pa.string(), "model": pa.string(), "status": pa.string(),
        "explanation": pa.string(), "fires_on": pa.list_(pa.string()), "promotes": pa.list_(pa.string()),
        "heldout_auroc": pa.float64(), "verified": pa.string(), "raw": pa.string(), "error": pa.string(),
    }
)  # fmt: skip
EXPLAIN = object_schema(
    verdict={"type": "string", "enum": ["explained", "cannot tell"]}, explanation={"type": "string", "maxLength": 400}
)


def explain(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: explain every feature that is active on the anchor."""
    scan = load_scan(inputs[f"scan:{config.coverage.anchor}"])
    if config.llm.url is None:
        rows = explain_embedded(config, scan, Path(config.scan.sae) if config.scan.sae else inputs["sae"])
    else:
        generator = open_generator(config, make_mesh(config.mesh))
        rows = explain_with(generator, load_task(config.judge.task), scan, config.explain.spans, out / "replies.jsonl")
    with writing(out / "explanations.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, EXPLANATIONS), temporary)
    return _summary(rows)


def explain_embedded(config: Config, scan: Scan, sae_folder: Path) -> list[dict[str, Any]]:
    """Rows by over-represented tokens and logit lens. Raises UserError when the scan was made with another SAE."""
    mesh = make_mesh(config.mesh)
    loaded = load_backbone(config.backbone.model, None, config.backbone.dtype, mesh)
    sae = load_sae(sae_folder, mesh, loaded.config.d_model, config.backbone.layer)
    load_scan(scan.folder, sae=sae.digest)
    corpus, limit = read_corpus(scan), config.explain.tokens
    fires = fires_on(scan, corpus, limit, np.ones(len(scan.ids_n), bool))
    scores = heldout_auroc(scan, corpus, limit)
    promoted = promotes(loaded, sae)
    rows = []
    for feature in active_features(scan):
        named = decoded(fires[feature], loaded.tokenizer), decoded(promoted[feature].tolist(), loaded.tokenizer)
        text = wording(*named)
        rows.append({
            "feature": feature, "method": "embedded", "status": "cannot tell" if text is None else "explained",
            "explanation": text, "fires_on": named[0], "promotes": named[1],
            "heldout_auroc": None if np.isnan(scores[feature]) else float(scores[feature]),
        })  # fmt: skip
    return rows


def explain_with(generator: Generator, task: Task, scan: Scan, spans: int, log: Path) -> list[dict[str, Any]]:
    """Rows by a language model: it explains the top spans of each feature, then checks its explanation against them."""
    shown = top_spans(scan, active_features(scan), spans)
    asked = {
        f"explain:{feature}": question(task.prompt("explain"), {"spans": items}, EXPLAIN)
        for feature, items in shown.items()
    }
    answers = ask(generator, asked, log, "explain")
    explained = {feature: _explanation(answers[f"explain:{feature}"]) for feature in shown}
    labels = label_schema(task.description.labels)
    checks = {
        f"verify:{feature}": question(task.prompt("verify"), {"explanation": text, "spans": shown[feature]}, labels)
        for feature, text in explained.items()
        if text is not None
    }
    checked = ask(generator, checks, log, "verify")
    return [
        _row(feature, text, answers[f"explain:{feature}"], checked.get(f"verify:{feature}"), generator.name)
        for feature, text in explained.items()
    ]


def active_features(scan: Scan) -> list[int]:
    """Features with a peak above 0 on some document."""
    return np.unique(scan.peaks_nf.indices).tolist()


def top_spans(scan: Scan, features: Sequence[int], count: int) -> dict[int, list[dict[str, Any]]]:
    """The best spans of some features, as they are shown to a language model."""
    table = scan.features("feature", "spans")
    table = table.take(np.asarray(features, np.int64))  # row f is feature f
    return {
        feature: [
            {"before": s["before"], "token": s["token"], "after": s["after"], "activation": round(s["score"], 2)}
            for s in spans[:count]
        ]
        for feature, spans in zip(table["feature"].to_pylist(), table["spans"].to_pylist(), strict=True)
    }


def _explanation(answer: Answer) -> str | None:
    if answer.value is None or answer.value["verdict"] != "explained":
        return None
    return answer.value["explanation"].strip() or None


def _row(feature: int, text: str | None, answer: Answer, check: Answer | None, model: str) -> dict[str, Any]:
    """`verified` stays empty when the second reply could not be read: an explanation is not assumed to be right."""
    status = "failed" if answer.value is None else "cannot tell" if text is None else "explained"
    return {
        "feature": feature, "method": "llm", "model": model, "status": status, "explanation": text,
        "verified": check.value["label"] if check is not None and check.value is not None else None,
        "raw": answer.raw, "error": answer.error or (check.error if check is not None else None),
    }  # fmt: skip


def _summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows = list(rows)
    counts = Counter(row["status"] for row in rows)
    scores = [row["heldout_auroc"] for row in rows if row.get("heldout_auroc") is not None]
    return {
        "method": rows[0]["method"] if rows else None,
        "features": len(rows),
        **{status.replace(" ", "_"): counts[status] for status in ("explained", "cannot tell", "failed")},
        "median_heldout_auroc": float(np.median(scores)) if scores else None,
    }
