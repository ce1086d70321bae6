"""A real activation store of 1,000 rows that a small SAE can learn."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from fac_jax.activations.manifest import Manifest
from fac_jax.activations.rows import Rows
from fac_jax.activations.store import complete_store, create_store
from fac_jax.activations.writer import StoreWriter

WIDTH = 16


def rows_of(step: int, b: int = 32, layer: int = 3) -> Rows:
    rng = np.random.default_rng(step)
    basis = np.random.default_rng(96 + layer).standard_normal((24, WIDTH))
    x_bd = (rng.random((b, 24)) < 0.2) * rng.exponential(size=(b, 24)) @ basis * 3 + 1
    ids = np.arange(b)
    return Rows(
        x_bd.astype(ml_dtypes.bfloat16),
        (ids // 4 + 1000 * step).astype(np.uint64),
        ids.astype(np.int32),
        ids.astype(np.int32),
    )


def make_store(path: Path, layer: int = 3) -> Path:
    """Write the store, of model tiny and one layer, a quarter of its rows held out."""
    described = Manifest(
        model="tiny", model_digest="0123", layer=layer, d_model=WIDTH, compute_dtype="float32", tokenizer_digest="t",
        corpus_digest="c", shard_rows=256, seed=0, writers=1,
    )  # fmt: skip
    create_store(path, described)
    with StoreWriter(path, described, "p0000") as writer:
        for batch in range(4):
            rows = rows_of(batch, 250, layer)
            writer.append(batch, {}, rows, rows.doc % 4 == 3)
        writer.finish({})
    complete_store(path, ["p0000"])
    return path
