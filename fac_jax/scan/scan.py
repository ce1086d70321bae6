"""One pass of backbone and SAE over a corpus: what coverage, explanations and synthesis are computed from.

Reads a data set, the backbone below the SAE's layer, and an SAE folder. Writes into the product folder
- `documents.parquet`: ordinal, id, label, source, turns, text, token ids, mask of content tokens, their counts, and
  the mean over the content tokens of the residual that the SAE reads;
- `peaks.parquet`: every peak above 0, sorted by document and feature: document, feature, peak, position, token id;
- `features.parquet`: one row per feature: maximum, documents and tokens on which it is active, histogram, top spans;
- `scan.json`, last: what it was made with (scans of different SAEs are never compared), counts, histogram edges.
Scan once, ask many times: everything after this stage is arithmetic over these files. A pass that was killed goes on
behind its last committed piece (`parts.py`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64, Int32, Int64
from scipy.sparse import csr_array, vstack

from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config import BackboneConfig, Config, DataSet, Source
from fac_jax.errors import UserError
from fac_jax.mesh import make_mesh
from fac_jax.packing import EncodedDocument, PackedBatch, batches, pack
from fac_jax.plain import digest
from fac_jax.progress import Bar, progress
from fac_jax.sae.checkpoint import LoadedSae, load_sae
from fac_jax.scan.parts import Identity, begin, commit, finish, next_document, read_identity
from fac_jax.scan.peaks import Acts, BatchPeaks, collect, dispatch
from fac_jax.text import read_documents

PART_BATCHES = 16
"""Batches between commits: a kill loses at most this much work."""


@dataclass(frozen=True)
class Scan:
    """A finished scan of n documents, in the order of the corpus, with m peaks above 0."""

    folder: Path
    identity: Identity
    peaks_nf: csr_array
    """Peaks, float32 [n, features]; column indices sorted within a row."""
    positions_m: Int32[np.ndarray, " m"]
    """Token position of each stored peak, aligned with `peaks_nf.data`."""
    token_ids_m: Int32[np.ndarray, " m"]
    """Token of each stored peak, aligned with `peaks_nf.data`."""
    ids_n: np.ndarray
    """Document ids, as text."""
    labels_n: Float64[np.ndarray, " n"]
    """NaN where a document has no label."""
    content_tokens_n: Int64[np.ndarray, " n"]

    def documents(self, *columns: str) -> pa.Table:
        """`documents.parquet`, or some of its columns."""
        return pq.read_table(self.folder / "documents.parquet", columns=list(columns) or None)

    def mean_residuals(self) -> Float32[np.ndarray, "n d"]:
        """Mean residual over each document's content tokens; 0 for one without any."""
        column = self.documents("mean_residual")["mean_residual"].combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1 if len(column) else 0)

    def features(self, *columns: str) -> pa.Table:
        """`features.parquet`, or some of its columns."""
        return pq.read_table(self.folder / "features.parquet", columns=list(columns) or None)


def scan(config: Config, out: Path, inputs: Mapping[str, Path], name: str) -> dict[str, Any]:
    """Stage: scan the data set `name`, or the set of that name which synthesis wrote when `inputs` has "synthesis".

    Raises UserError for an empty data set, an SAE of another width or layer than the backbone's, and a folder that
    holds a scan made with something else. What synthesis wrote may be empty: then nothing passed its filter.
    """
    dataset = written_dataset(config, inputs["synthesis"], name) if "synthesis" in inputs else config.dataset(name)
    loaded, sae = load_scorer(config, inputs)
    identity = Identity(
        name, digest(dataset), loaded.digest, sae.layer, sae.digest, sae.features, sae.k,
        config.scan.acts, config.scan.top_spans, config.scan.span_tokens,
    )  # fmt: skip
    begin(out, identity)
    if not (out / "scan.json").exists():
        skipped: list[str] = []
        if "synthesis" not in inputs or _has_rows(dataset):
            first = next_document(out)
            corpus = batches(dataset, name, loaded.tokenizer, config.backbone, first, skipped)
            with progress(f"scan {name}", _documents_left(dataset, name, first), "documents") as bar:
                scored = _counted(score(corpus, loaded, sae, config.scan.acts), bar)
                for group in _grouped(scored, PART_BATCHES):
                    commit(out, group)
        finish(out, identity, loaded.tokenizer, skipped)
    shutil.rmtree(out / "parts")
    return json.loads((out / "scan.json").read_text(encoding="utf-8"))["counts"]


def load_scorer(config: Config, inputs: Mapping[str, Path]) -> tuple[Loaded, LoadedSae]:
    """The backbone up to `backbone.layer` and the SAE of `scan.sae` or of the run, checked to fit each other."""
    mesh = make_mesh(config.mesh)
    loaded = load_backbone(config.backbone.model, config.backbone.layer, config.backbone.dtype, mesh)
    folder = Path(config.scan.sae) if config.scan.sae else inputs["sae"]
    return loaded, load_sae(folder, mesh, loaded.config.d_model, config.backbone.layer, loaded.digest)


def written_dataset(config: Config, synthesis: Path, name: str) -> DataSet:
    """A set that synthesis wrote (`kept`, `random`), cut at as many tokens as the seed."""
    source = Source(path=str(synthesis / f"{name}.jsonl"), format="jsonl", text="text", label="label")
    return DataSet(sources=(source,), max_tokens=config.dataset(config.coverage.seed).max_tokens)


def score(
    corpus: Iterable[PackedBatch], loaded: Loaded, sae: LoadedSae, acts: Acts
) -> Iterator[tuple[PackedBatch, BatchPeaks]]:
    """Peaks of each batch. The device works on the next batch while the host makes this one sparse."""
    waiting = None
    for batch in corpus:
        started = (batch, dispatch(batch, loaded, sae, acts))
        if waiting is not None:
            yield waiting[0], collect(*waiting)
        waiting = started
    if waiting is not None:
        yield waiting[0], collect(*waiting)


def peaks_of(
    encoded: Sequence[EncodedDocument], loaded: Loaded, sae: LoadedSae, acts: Acts, geometry: BackboneConfig
) -> csr_array:
    """Peaks above 0 of documents held in memory, float32 [documents, features]: how synthesis scores candidates."""
    rows = [csr_array((0, sae.features), dtype=np.float32)]
    for batch, found in score(pack(encoded, geometry.rows_per_batch, geometry.row_tokens), loaded, sae, acts):
        shape = (len(batch.documents), sae.features)
        rows.append(csr_array((found.peak, (found.document, found.feature)), shape=shape))
    return csr_array(vstack(rows, format="csr"))


def load_scan(folder: Path) -> Scan:
    """Read a finished scan. Raises UserError when it is not there."""
    if not (folder / "scan.json").exists():
        raise UserError(f"{folder} holds no finished scan (no scan.json): run `fac scan CONFIG --data {folder.name}`")
    identity = read_identity(folder)
    assert identity is not None
    documents = pq.read_table(folder / "documents.parquet", columns=["id", "label", "content_tokens"])
    peaks = pq.read_table(folder / "peaks.parquet", columns=["document", "feature", "peak", "position", "token_id"])
    document, feature, peak, position, token_id = (column.to_numpy() for column in peaks.columns)
    starts = np.concatenate([[0], np.cumsum(np.bincount(document, minlength=documents.num_rows))])
    return Scan(
        folder=folder,
        identity=identity,
        peaks_nf=csr_array((peak, feature, starts), shape=(documents.num_rows, identity.features)),
        positions_m=position,
        token_ids_m=token_id,
        ids_n=np.array(documents["id"].to_pylist(), dtype=str),
        labels_n=documents["label"].to_numpy().astype(np.float64),
        content_tokens_n=documents["content_tokens"].to_numpy().astype(np.int64),
    )


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


def _has_rows(dataset: DataSet) -> bool:
    with open(dataset.sources[0].path, encoding="utf-8") as lines:
        return any(line.strip() for line in lines)


def _documents_left(dataset: DataSet, name: str, first: int) -> int | None:
    """For the ETA; unknown where bad rows are skipped, so that each of them is logged once."""
    if dataset.on_bad_row == "skip":
        return None
    return sum(1 for _ in read_documents(dataset, name)) - first


def _counted(scored: Iterable[tuple[PackedBatch, BatchPeaks]], bar: Bar) -> Iterator[tuple[PackedBatch, BatchPeaks]]:
    tokens, started = 0, time.monotonic()
    for batch, found in scored:
        tokens += int((batch.segments > 0).sum())
        bar.advance(len(batch.documents), f"{tokens / (time.monotonic() - started):,.0f} tokens/s")
        yield batch, found


def _grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
