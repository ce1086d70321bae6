"""Existing documents that cover what is missing: the baseline that needs no generator.

Reads the anchor's scan and `coverage/missing.parquet`; writes `selected.parquet` (documents in the order in which they
are taken, each with what it adds) and `selected.jsonl` (a data set like any other).

Greedy maximum coverage: the document with the most features not covered yet, again and again. For every budget the
documents taken so far cover at least 1 - 1/e = 63% of what the best choice of as many could (Nemhauser, Wolsey, Fisher
1978), and no polynomial algorithm does better in general. Lazy: a gain never grows, so a stale one is an upper bound.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from scipy.sparse import csr_array

from fac_jax.config import Config
from fac_jax.runs import write_text, writing
from fac_jax.scan.scan import load_scan

SELECTED = pa.schema(
    {
        "rank": pa.int64(), "document": pa.int64(), "document_id": pa.string(), "text": pa.string(),
        "label": pa.float32(), "features": pa.list_(pa.int32()), "covered": pa.int64(),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Pick:
    """One document taken, and the features that it covers first."""

    row: int
    features: list[int]


def select(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: anchor documents that together activate every missing feature, most useful first."""
    anchor = load_scan(inputs[f"scan:{config.coverage.anchor}"])
    missing = pq.read_table(inputs["coverage"] / "missing.parquet", columns=["feature"])["feature"].to_numpy()
    picks = greedy_cover(anchor.peaks_nf, missing, config.coverage.threshold, anchor.ids_n.tolist())
    documents = (
        anchor.documents("text", "label", "turns").take(np.array([pick.row for pick in picks], np.int64)).to_pylist()
    )
    covered = np.cumsum([len(pick.features) for pick in picks]).tolist()
    rows = [
        {
            "rank": rank, "document": pick.row, "document_id": str(anchor.ids_n[pick.row]), "text": document["text"],
            "label": document["label"], "features": pick.features, "covered": covered[rank],
        }
        for rank, (pick, document) in enumerate(zip(picks, documents, strict=True))
    ]  # fmt: skip
    with writing(out / "selected.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SELECTED), temporary)
    lines = ({"text": document["turns"], "label": document["label"]} for document in documents)
    write_text(out / "selected.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    half = next((rank + 1 for rank, count in enumerate(covered) if 2 * count >= len(missing)), 0)
    return {
        "missing": len(missing), "covered": covered[-1] if covered else 0,
        "documents": len(picks), "documents_for_half": half,
    }  # fmt: skip


def greedy_cover(
    peaks_nf: csr_array, features: Int[np.ndarray, " m"], threshold: float, ids: Sequence[str]
) -> list[Pick]:
    """Documents until nothing more can be covered; equal gains go to the smaller id, whatever the order of the rows."""
    wanted = peaks_nf[:, features]
    spans = (slice(start, stop) for start, stop in pairwise(wanted.indptr))
    active = [wanted.indices[span][wanted.data[span] > threshold] for span in spans]
    open_m = np.ones(len(features), bool)
    heap = [(-len(columns), ids[row], row) for row, columns in enumerate(active) if len(columns)]
    heapq.heapify(heap)
    picks = []
    while heap:
        bound, name, row = heapq.heappop(heap)
        new = active[row][open_m[active[row]]]
        if len(new) == -bound:  # the bound is exact, and no other document's bound is better
            open_m[new] = False
            picks.append(Pick(row, sorted(features[new].tolist())))
        elif len(new):
            heapq.heappush(heap, (-len(new), name, row))
    return picks
