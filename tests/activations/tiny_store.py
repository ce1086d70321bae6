"""A small store whose rows are known, for the tests of this folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fac_jax.activations.manifest import Manifest
from fac_jax.activations.rows import Rows
from fac_jax.activations.store import complete_store, create_store
from fac_jax.activations.writer import StoreWriter

WIDTH = 16


def manifest(shard_rows: int = 512, layer: int = 14, writers: int = 1) -> Manifest:
    return Manifest(
        model="tiny", model_digest="0123456789abcdef", layer=layer, d_model=WIDTH, compute_dtype="float32",
        tokenizer_digest="t", corpus_digest="c", shard_rows=shard_rows, seed=0, writers=writers,
    )  # fmt: skip


def batch_rows(index: int, rows: int) -> tuple[Rows, np.ndarray]:
    """Rows of batch `index`, each unlike any other, a quarter of them held out by document."""
    token = np.arange(index * rows, (index + 1) * rows, dtype=np.int32)
    doc = (token // 50).astype(np.uint64) + np.uint64(2**63)
    resid = np.random.default_rng(index).standard_normal((rows, WIDTH)) + index
    made = Rows(resid.astype(ml_dtypes.bfloat16), doc, (token % 50).astype(np.int32), token)
    return made, doc % 4 == 3


def fill(
    path: Path | str, described: Manifest, batches: int, rows: int, step: int = 10, shards_at_once: int | None = None
) -> None:
    """Write `batches` batches that begin at documents 0, `step`, ..., and complete the store."""
    create_store(path, described)
    with StoreWriter(path, described, "p0000", shards_at_once) as writer:
        for index in range(batches):
            writer.append(index * step, {"batches": index}, *batch_rows(index, rows))
        writer.finish({"batches": batches})
    complete_store(path, ["p0000"])


def contents(path: Path) -> dict[str, str]:
    """SHA-256 of every file below `path`, but for those that say who is writing."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.parent.name != "claims")
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def announce_appends() -> None:
    """In a process that a test will kill: print a line after every batch that a writer took."""
    append = StoreWriter.append

    def told(self: StoreWriter, first: int, *arguments: Any) -> None:
        append(self, first, *arguments)
        if first >= self.cursor.first:
            print("appended", flush=True)

    StoreWriter.append = told  # type: ignore[method-assign]
