"""Existing documents that cover what a seed set lacks: what can be had without a generator.

Reads the scan of the data set to pick from and the features that are sought (`coverage/missing.parquet`, the relevant
ones, or none: all). Writes
- `selected.parquet`: documents in the order in which they are taken, each with the features that it covers first;
- `selected.jsonl`: the same as a data set like any other;
- `selection.json`: how they were chosen, what is covered of how much, and the curve.
The methods are in `choose.py`, what they choose from in `pool.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from fac_jax.config.coverage import SelectConfig
from fac_jax.config.file import Config
from fac_jax.coverage import choose
from fac_jax.coverage.choose import Budget, Pick
from fac_jax.coverage.pool import Pool, read_documents_at, read_pool
from fac_jax.errors import UserError
from fac_jax.features.judge import relevant_mask
from fac_jax.runs import write_text, writing
from fac_jax.scan.product import load_scan

SELECTED = pa.schema(
    {
        "rank": pa.int64(), "document": pa.int64(), "document_id": pa.string(), "text": pa.string(),
        "label": pa.float32(), "features": pa.list_(pa.int32()), "covered": pa.int64(),
    }
)  # fmt: skip
CURVE_POINTS = 200
"""Points of the curve at most; small ranks are all there."""


def select(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: documents of one scan that together activate the features sought, most useful first."""
    name = config.select.source or config.coverage.anchor
    folder = inputs[f"scan:{name}"]
    target_f = target_features(config, folder, inputs)
    # the rivals look at every feature; what the others do not look at is not kept
    wanted_f = np.ones_like(target_f) if config.select.method in ("greed_select", "sim_scale") else target_f
    pool = read_pool(folder, wanted_f, config.coverage.threshold)
    picks = pick(pool, target_f, config.select, config.run.seed)
    covered = np.cumsum([len(one.features) for one in picks], dtype=np.int64)
    rows = np.array([one.row for one in picks], np.int64)
    _write(out, folder, pool, picks, covered)
    tokens = np.cumsum(pool.tokens_n[rows])
    at = curve_ranks(len(picks))
    summary = {
        "source": name, "method": config.select.method, "target": config.select.target,
        "features": int(np.count_nonzero(target_f)),
        "coverable": int(np.count_nonzero(target_f & choose.coverable(pool))),
        "covered": int(covered[-1]) if len(picks) else 0,
        "documents": len(picks), "tokens": int(tokens[-1]) if len(picks) else 0,
    }  # fmt: skip
    half = next((rank + 1 for rank, count in enumerate(covered.tolist()) if 2 * count >= summary["features"]), 0)
    product = {
        **summary, "threshold": config.coverage.threshold, "budget": config.select.budget, "cost": config.select.cost,
        "pool": len(pool.document_n),
        "curve": {"documents": (at + 1).tolist(), "tokens": tokens[at].tolist(), "covered": covered[at].tolist()},
    }  # fmt: skip
    write_text(out / "selection.json", json.dumps(product, indent=1))
    return {**summary, "documents_for_half": half}


def pick(pool: Pool, target_f: Bool[np.ndarray, " f"], config: SelectConfig, seed: int) -> list[Pick]:
    """The documents that `config.method` takes within `config.budget`, and what each adds to the target.

    Without a budget the choice ends with the document that covers the last feature that any document covers.
    """
    count = len(pool.document_n)
    cost_n = np.maximum(pool.tokens_n, 1) if config.cost == "tokens" else np.ones(count, np.int64)
    budget = Budget(cost_n, config.budget)
    if config.method == "greedy":
        rows = choose.greedy(pool, budget)
    elif config.method == "magnitude":
        rows = choose.magnitude(pool, budget)
    elif config.method == "greed_select":
        rows = choose.greed_select(pool, budget)
    elif config.method == "sim_scale":
        rows = choose.sim_scale(pool, budget, config.similarity)
    else:
        rows = choose.random(pool, budget, seed)
    return choose.covering(pool, rows, target_f, until_covered=config.budget is None)


def target_features(config: Config, folder: Path, inputs: Mapping[str, Path]) -> Bool[np.ndarray, " f"]:
    """Features that are sought, as a mask. Raises UserError when they are those of another SAE than the scan's."""
    identity = load_scan(folder).identity
    if config.select.target == "all":
        return np.ones(identity.features, bool)
    if config.select.target == "relevant":
        return relevant_mask(inputs["relevance"], identity, folder)
    measured = json.loads((inputs["coverage"] / "coverage.json").read_text(encoding="utf-8"))["sae"]
    if measured != identity.sae:
        raise UserError(
            f"what is missing was measured with SAE {measured}, the scan in {folder} was made with {identity.sae}: run "
            f"`fac scan CONFIG --data {identity.name}` again"
        )
    target_f = np.zeros(identity.features, bool)
    target_f[pq.read_table(inputs["coverage"] / "missing.parquet", columns=["feature"])["feature"].to_numpy()] = True
    return target_f


def curve_ranks(count: int) -> Int[np.ndarray, " points"]:
    """Ranks at which the curve is kept: the first ones, then ever fewer, and the last."""
    if count <= CURVE_POINTS:
        return np.arange(count)
    return np.unique(np.rint(np.geomspace(1, count, CURVE_POINTS)).astype(np.int64)) - 1


def _write(out: Path, folder: Path, pool: Pool, picks: list[Pick], covered: Int[np.ndarray, " picks"]) -> None:
    ordinals = pool.document_n[[one.row for one in picks]]
    documents = read_documents_at(folder, ordinals, ["text", "label", "turns"])
    rows = [
        {
            "rank": rank, "document": int(ordinals[rank]), "document_id": str(pool.id_n[one.row]),
            "text": document["text"], "label": document["label"], "features": one.features,
            "covered": int(covered[rank]),
        }
        for rank, (one, document) in enumerate(zip(picks, documents, strict=True))
    ]  # fmt: skip
    with writing(out / "selected.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SELECTED), temporary)
    lines = ({"text": document["turns"], "label": document["label"]} for document in documents)
    write_text(out / "selected.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
