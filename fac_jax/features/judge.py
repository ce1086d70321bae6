"""Which features matter for a task: the set F of the coverage formulas.

Reads the anchor's scan, the explanations and the task. Writes `relevance.parquet`, one row per feature that is active
on the anchor, and `relevance.json` (method, SAE, counts).

- Embedded method: a feature is relevant when its peaks are higher on positively labelled anchor documents (one-sided
  Mann-Whitney test, zeros included; Benjamini-Hochberg over all tested features). AUROC is the size of the effect.
- With `llm.url`, unless `judge.method` is embedded: a model reads explanation and spans and answers Yes, Probably,
  Maybe or No by the task's rubric, in several passes (`passes.py`). relevance.json then says how far the passes agree
  (`agreement.py`), and how many of the spans shown look as if they were written to sway a model (`injection.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool

from fac_jax.config.features import JudgeConfig
from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.features.explain import active_features
from fac_jax.features.passes import judge_with
from fac_jax.features.statistics import association, benjamini_hochberg
from fac_jax.features.task import load_task
from fac_jax.llm.generator import open_generator
from fac_jax.mesh import make_mesh
from fac_jax.runs import write_text, writing
from fac_jax.scan.parts import Identity
from fac_jax.scan.product import Scan, load_scan
from fac_jax.text import POSITIVE_ABOVE

RELEVANCE = pa.schema(
    {
        "feature": pa.int32(), "relevant": pa.bool_(), "method": pa.string(), "model": pa.string(),
        "status": pa.string(), "documents": pa.int64(), "auroc": pa.float64(), "p": pa.float64(), "q": pa.float64(),
        "label": pa.string(), "reason": pa.string(), "agreed": pa.bool_(), "labels": pa.list_(pa.string()),
        "reasons": pa.list_(pa.string()), "suspect_spans": pa.int32(), "raw": pa.list_(pa.string()),
        "error": pa.string(),
    }
)  # fmt: skip
"""`labels`, `reasons` and `raw` hold one entry for each pass; `agreed` is empty where there was but one."""
A_SERVER = "let a server judge (llm.url, with judge.method auto)"


def judge(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: judge every feature that is active on the anchor. Raises UserError without the labels or task it needs."""
    task, scan = load_task(config.judge.task), load_scan(inputs[f"scan:{config.coverage.anchor}"])
    method = config.method_of(config.judge)
    of_model: dict[str, Any] = {}
    if method == "embedded":
        rows = judge_embedded(scan, config.judge)
    else:
        explanations = pq.read_table(inputs["explanations"] / "explanations.parquet").to_pylist()
        generator = open_generator(config, make_mesh(config.mesh))
        rows, of_model = judge_with(generator, task, scan, explanations, config, out / "replies.jsonl")
    with writing(out / "relevance.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, RELEVANCE), temporary)
    counts = Counter(row["status"] for row in rows)
    summary = {
        "method": method,
        "task": task.name,
        "harmful": task.description.harmful,
        "metric": task.description.metric,
        "features": len(rows),
        "judged": counts["judged"],
        "not_judged": counts["not judged"],
        "failed": counts["failed"],
        "relevant": sum(row["relevant"] for row in rows),
        "labels": dict(sorted(Counter(row["label"] for row in rows if row.get("label")).items())),
        **of_model,
    }
    write_text(out / "relevance.json", json.dumps({**summary, "sae": scan.identity.sae}, indent=1))
    return summary


def judge_embedded(scan: Scan, config: JudgeConfig) -> list[dict[str, Any]]:
    """Rows by association with the labels; features active on fewer than `min_documents` of them are not tested."""
    labelled = ~np.isnan(scan.labels_n)
    positive_n = scan.labels_n[labelled] > POSITIVE_ABOVE
    name = scan.identity.name
    if not labelled.any():
        raise UserError(f"judge needs labels: data.{name} has none; set label/constant_label, or {A_SERVER}")
    if positive_n.all() or not positive_n.any():
        raise UserError(
            f"judge needs labels of both kinds: data.{name} has {positive_n.sum()} positive and {(~positive_n).sum()} "
            f"negative documents; add sources of the other kind, or {A_SERVER}"
        )
    peaks_nf = scan.peaks_nf[np.flatnonzero(labelled)]
    documents_f = np.bincount(peaks_nf.indices, minlength=peaks_nf.shape[1])
    tested = np.flatnonzero(documents_f >= max(1, config.min_documents))
    auroc_f, p_f = association(peaks_nf, positive_n)
    q_f = np.full(len(p_f), np.nan)
    q_f[tested] = benjamini_hochberg(p_f[tested])
    rows = []
    for feature in active_features(scan):
        row = {"feature": feature, "relevant": False, "method": "embedded", "documents": int(documents_f[feature])}
        if np.isnan(q_f[feature]):
            rows.append(
                {
                    **row,
                    "status": "not judged",
                    "reason": f"active on fewer than {config.min_documents} labelled documents",
                }
            )
        else:
            numbers = {"auroc": float(auroc_f[feature]), "p": float(p_f[feature]), "q": float(q_f[feature])}
            relevant = bool(q_f[feature] <= config.false_discovery_rate)
            rows.append({**row, **numbers, "status": "judged", "relevant": relevant})
    return rows


def relevant_features(folder: Path, scan: Scan) -> Bool[np.ndarray, " f"]:
    """F as a mask. Raises UserError when relevance was judged for another SAE than the scan's."""
    return relevant_mask(folder, scan.identity, scan.folder)


def relevant_mask(folder: Path, identity: Identity, scan: Path) -> Bool[np.ndarray, " f"]:
    """The same for a scan in the folder `scan`, of which only the identity was read."""
    sae = json.loads((folder / "relevance.json").read_text(encoding="utf-8"))["sae"]
    if sae != identity.sae:
        raise UserError(
            f"the features in {folder} were judged for SAE {sae}, the scan in {scan} was made with "
            f"{identity.sae}: run `fac judge CONFIG` again"
        )
    table = pq.read_table(folder / "relevance.parquet", columns=["feature", "relevant"])
    mask = np.zeros(identity.features, bool)
    mask[table["feature"].to_numpy()[table["relevant"].to_numpy()]] = True
    return mask


def what_makes_relevant(folder: Path) -> str:
    """What to do when no feature is relevant, by the method that judged them."""
    found = json.loads((folder / "relevance.json").read_text(encoding="utf-8"))
    if found["method"] == "embedded":
        return (
            "raise judge.false_discovery_rate, give the anchor more labelled documents, "
            "or train a wider SAE on more tokens"
        )
    return (
        f"of {found['features']} features the model judged {found['judged']} ({found['not_judged']} had no explanation "
        f"that held, {found['failed']} answers could not be read; {folder / 'relevance.parquet'} keeps them all): "
        "set llm.model to an abler one, or judge.relevant_label to a less sure label"
    )
