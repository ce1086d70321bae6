"""Finished scans written by hand, small enough to check every number."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax.scan.parts import Identity
from fac_jax.scan.tables import DOCUMENTS, PEAKS


@pytest.fixture
def write_scan(tmp_path: Path) -> Callable[..., Path]:
    """`write_scan(name, peaks, tokens=..., sae=...)`: a scan whose documents are called NAME-0, NAME-1, ..."""

    def write(name: str, peaks: np.ndarray, tokens: list[int] | None = None, sae: str = "sae-1") -> Path:
        folder = tmp_path / "scans" / name
        folder.mkdir(parents=True)
        documents = [
            {"index": i, "id": f"{name}-{i}", "content_tokens": (tokens or [10] * len(peaks))[i],
             "text": f"text {name} {i}", "turns": [{"role": "user", "content": f"text {name} {i}"}]}
            for i in range(len(peaks))
        ]  # fmt: skip
        rows = [
            {
                "document": d,
                "document_id": f"{name}-{d}",
                "feature": f,
                "peak": peaks[d, f],
                "position": 0,
                "token_id": 0,
            }
            for d, f in np.argwhere(peaks).tolist()
        ]
        pq.write_table(pa.Table.from_pylist(documents, DOCUMENTS), folder / "documents.parquet")
        pq.write_table(pa.Table.from_pylist(rows, PEAKS), folder / "peaks.parquet")
        tokens_f = pa.array(np.count_nonzero(peaks, axis=0), pa.int64())
        pq.write_table(pa.table({"feature": range(len(tokens_f)), "tokens": tokens_f}), folder / "features.parquet")
        identity = Identity(name, "data", "model", 3, sae, peaks.shape[1], 2, "topk", 10, 32, "all")
        counts = {"documents": len(documents)}
        (folder / "scan.json").write_text(json.dumps({"identity": dataclasses.asdict(identity), "counts": counts}))
        return folder

    return write


@pytest.fixture
def write_features(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """`write_features(relevant)`: relevance and explanations of those features."""

    def write(relevant: list[int], sae: str = "sae-1") -> dict[str, Path]:
        relevance, explanations = tmp_path / "relevance", tmp_path / "explanations"
        for folder in (relevance, explanations):
            folder.mkdir()
        table = pa.table(
            {"feature": pa.array([*relevant, 5], pa.int32()), "relevant": [True] * len(relevant) + [False]}
        )
        pq.write_table(table, relevance / "relevance.parquet")
        (relevance / "relevance.json").write_text(json.dumps({"sae": sae, "method": "embedded"}))
        table = pa.table({"feature": relevant, "explanation": [f"fires on: {f}" for f in relevant[:-1]] + [None]})
        pq.write_table(table, explanations / "explanations.parquet")
        return {"relevance": relevance, "explanations": explanations}

    return write
