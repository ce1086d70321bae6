"""A finished scan, read: what coverage, explanations and synthesis are computed from (`scan.py` lists its files)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64, Int32, Int64
from scipy.sparse import csr_array

from fac_jax.errors import UserError
from fac_jax.scan.parts import Identity, read_identity


@dataclass(frozen=True)
class Scan:
    """A finished scan of n documents, in the order of the corpus, with m peaks above 0.

    What concerns single documents raises UserError where the scan kept none (`scan.peaks none`).
    """

    folder: Path
    identity: Identity
    counts: dict[str, int]
    """Documents, tokens, content_tokens, peaks, active_features, skipped_rows."""

    @cached_property
    def peaks_nf(self) -> csr_array:
        """Peaks, float32 [n, features]; column indices sorted within a row."""
        return self._peaks[0]

    @cached_property
    def positions_m(self) -> Int32[np.ndarray, " m"]:
        """Token position of each stored peak, aligned with `peaks_nf.data`."""
        return self._peaks[1]

    @cached_property
    def token_ids_m(self) -> Int32[np.ndarray, " m"]:
        """Token of each stored peak, aligned with `peaks_nf.data`."""
        return self._peaks[2]

    @cached_property
    def ids_n(self) -> np.ndarray:
        """Document ids, as text."""
        return np.array(self.documents("id")["id"].to_pylist(), dtype=str)

    @cached_property
    def labels_n(self) -> Float64[np.ndarray, " n"]:
        """NaN where a document has no label."""
        return self.documents("label")["label"].to_numpy().astype(np.float64)

    @cached_property
    def content_tokens_n(self) -> Int64[np.ndarray, " n"]:
        """Content tokens of each document."""
        return self.documents("content_tokens")["content_tokens"].to_numpy().astype(np.int64)

    @cached_property
    def _peaks(self) -> tuple[csr_array, np.ndarray, np.ndarray]:
        table = self._read("peaks.parquet", ["document", "feature", "peak", "position", "token_id"])
        document, feature, peak, position, token_id = (column.to_numpy() for column in table.columns)
        starts = np.concatenate([[0], np.cumsum(np.bincount(document, minlength=self.counts["documents"]))])
        shape = (self.counts["documents"], self.identity.features)
        return csr_array((peak, feature, starts), shape=shape), position, token_id

    def documents(self, *columns: str) -> pa.Table:
        """`documents.parquet`, or some of its columns."""
        return self._read("documents.parquet", list(columns) or None)

    def mean_residuals(self) -> Float32[np.ndarray, "n d"]:
        """Mean residual over each document's content tokens; 0 for one without any."""
        column = self.documents("mean_residual")["mean_residual"].combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1 if len(column) else 0)

    def features(self, *columns: str) -> pa.Table:
        """`features.parquet`, or some of its columns."""
        return pq.read_table(self.folder / "features.parquet", columns=list(columns) or None)

    def skipped(self) -> list[str]:
        """Malformed rows that were left out, each with its place."""
        skipped: list[str] = json.loads((self.folder / "scan.json").read_text(encoding="utf-8"))["skipped"]
        return skipped

    def _read(self, name: str, columns: list[str] | None) -> pa.Table:
        if self.identity.peaks == "none":
            raise UserError(
                f"the scan in {self.folder} kept no single documents (scan.peaks none): run `fac scan CONFIG --data "
                f"{self.identity.name} --scan.peaks all`, or name a file of features whose peaks to keep"
            )
        return pq.read_table(self.folder / name, columns=columns)


def load_scan(folder: Path) -> Scan:
    """Read a finished scan. Raises UserError when it is not there."""
    if not (folder / "scan.json").exists():
        raise UserError(f"{folder} holds no finished scan (no scan.json): run `fac scan CONFIG --data {folder.name}`")
    identity = read_identity(folder)
    assert identity is not None
    return Scan(folder, identity, json.loads((folder / "scan.json").read_text(encoding="utf-8"))["counts"])


def check_sae(scan: Scan, sae: str) -> None:
    """Raises UserError when a scan was made with another SAE than that of digest `sae`."""
    if scan.identity.sae != sae:
        raise UserError(
            f"the scan in {scan.folder} was made with SAE {scan.identity.sae}, asked is SAE {sae}: "
            f"run `fac scan CONFIG --data {scan.identity.name}` again, or set scan.sae to the one it was made with"
        )


def load_scans(*folders: Path) -> list[Scan]:
    """Scans that are to be compared. Raises UserError unless model, layer, SAE and kind of activation are the same."""
    scans = [load_scan(folder) for folder in folders]
    for one in scans[1:]:
        for field in ("model_digest", "layer", "sae", "acts"):
            there, here = getattr(scans[0].identity, field), getattr(one.identity, field)
            if there != here:
                raise UserError(
                    f"the scan in {one.folder} was made with {field} {here}, that in {scans[0].folder} with {there}, "
                    f"so they cannot be compared: run `fac scan CONFIG --data {one.identity.name}` again"
                )
    return scans
