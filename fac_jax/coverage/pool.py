"""Documents to pick from: their peaks above the threshold, sparse, read from a scan that need not fit in memory.

Reads `scan.json`, `documents.parquet` and `peaks.parquet` of a finished scan, the latter by row groups, of which only
peaks above the threshold of wanted features stay: 8 bytes each, and as many again while they are sorted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int, Int32, Int64
from scipy.sparse import csr_array

from fac_jax.errors import UserError
from fac_jax.plain import digest
from fac_jax.scan.product import load_scan


@dataclass(frozen=True)
class Pool:
    """n documents sorted by id, so that "the smaller id" is "the first", whatever the order of the scan."""

    peaks_nf: csr_array
    """Peaks above the threshold, float32 [n, features]; features that were not asked for have none."""
    document_n: Int64[np.ndarray, " n"]
    """Ordinal of each document in the scan."""
    id_n: np.ndarray
    """Document ids, as text."""
    tokens_n: Int64[np.ndarray, " n"]
    """Content tokens."""


def read_pool(folder: Path, wanted_f: Bool[np.ndarray, " f"], threshold: float) -> Pool:
    """The documents of a scan with their peaks above `threshold`, strictly, of the features in `wanted_f`."""
    if not threshold >= 0:
        raise UserError(f"the threshold is {threshold}; peaks are at least 0, so it must be at least 0")
    _check_kept(folder, wanted_f)
    documents = pq.read_table(folder / "documents.parquet", columns=["id", "content_tokens"])
    count_n = np.zeros(documents.num_rows, np.int64)
    features, peaks = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for document, feature, peak in read_peaks(folder):
        counted = (peak > threshold) & wanted_f[feature]
        if counted.any():
            document = document[counted]
            first = document[0]
            count_n[first : document[-1] + 1] += np.bincount(document - first)
            features.append(feature[counted])
            peaks.append(peak[counted])
    start_n = np.concatenate([[0], np.cumsum(count_n)])
    start_n = start_n.astype(np.int32 if start_n[-1] < 2**31 else np.int64)  # scipy's indices take the wider type
    scanned = csr_array(
        (np.concatenate(peaks), np.concatenate(features), start_n), shape=(documents.num_rows, len(wanted_f))
    )
    del features, peaks
    order = pc.sort_indices(documents["id"]).to_numpy().astype(np.int64)
    return Pool(
        peaks_nf=scanned[order],
        document_n=order,
        id_n=np.array(documents["id"].to_pylist(), dtype=str)[order],
        tokens_n=documents["content_tokens"].to_numpy().astype(np.int64)[order],
    )


def _check_kept(folder: Path, wanted_f: Bool[np.ndarray, " f"]) -> None:
    """Raise UserError when the scan did not keep, document by document, the peaks of all that is wanted."""
    kept = load_scan(folder).identity.peaks
    if kept == "none":
        raise UserError(
            f"the scan in {folder} kept no single documents, and documents are picked by their peaks: run `fac scan "
            f"CONFIG --data {folder.name} --scan.peaks all`"
        )
    if kept not in ("all", digest(np.flatnonzero(wanted_f).tolist())):
        raise UserError(
            f"the scan in {folder} kept the peaks of other features than the {np.count_nonzero(wanted_f):,} sought: "
            f"run `fac scan CONFIG --data {folder.name} --scan.peaks all`"
        )


def read_peaks(
    folder: Path,
) -> Iterator[tuple[Int64[np.ndarray, " m"], Int32[np.ndarray, " m"], Float32[np.ndarray, " m"]]]:
    """Document, feature and peak of all peaks of a scan, sorted by document, one row group at a time."""
    path = folder / "peaks.parquet"
    if not path.exists():
        raise UserError(
            f"{path} is not there, and documents are picked by their peaks: run `fac scan CONFIG --data {folder.name}` "
            "again so that the scan keeps them"
        )
    last = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["document", "feature", "peak"])
            document, feature, peak = (table[name].to_numpy() for name in ("document", "feature", "peak"))
            if len(document) and (document[0] < last or np.any(document[1:] < document[:-1])):
                raise UserError(
                    f"{path} is not sorted by document (row group {group}): it is damaged or from elsewhere; delete "
                    f"{folder} and run `fac scan CONFIG --data {folder.name}`"
                )
            last = document[-1] if len(document) else last
            yield document, feature, peak


def read_documents_at(folder: Path, ordinals: Int[np.ndarray, " n"], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Those rows of a scan's `documents.parquet`, in the order asked; only row groups that hold one are read."""
    found: dict[int, dict[str, Any]] = {}
    first = 0
    with pq.ParquetFile(folder / "documents.parquet") as file:
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            here = ordinals[(ordinals >= first) & (ordinals < after)]
            if len(here):
                rows = file.read_row_group(group, columns=list(columns)).take(here - first).to_pylist()
                found.update(zip(here.tolist(), rows, strict=True))
            first = after
    return [found[ordinal] for ordinal in ordinals.tolist()]
