"""One pass of backbone and SAE over a corpus: what coverage, explanations and synthesis are computed from.

Reads a data set, the backbone below the SAE's layer, and an SAE folder. Writes into the product folder
- `features.parquet`: one row per feature: maximum, documents and tokens on which it is active, histogram, top spans;
- `scan.json`, last: what it was made with (scans of different SAEs are never compared), counts, histogram edges;
and unless `scan.peaks` is none
- `documents.parquet`: ordinal, id, label, source, turns, text, token ids, mask of content tokens, their counts, and
  the mean over the content tokens of the residual that the SAE reads;
- `peaks.parquet`: every peak above 0, sorted by document and feature: document, feature, peak, position, token id.
Scan once, ask many times: everything after this stage is arithmetic over these files. Memory is that of the statistics,
whatever the corpus. A pass that was killed goes on behind what it last committed (`parts.py`); several processes, or
several commands, each take a share of the corpus (`units.py`).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Float64, Int32, Int64
from scipy.sparse import csr_array, vstack

from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config import BackboneConfig, Config, DataSet, Source
from fac_jax.distributed import Process, beat, is_first, wait_for_all
from fac_jax.errors import Unfinished, UserError
from fac_jax.mesh import own_mesh
from fac_jax.packing import EncodedDocument, PackedBatch, check_fits, encode, pack
from fac_jax.plain import digest
from fac_jax.progress import Bar, progress
from fac_jax.sae.checkpoint import LoadedSae, load_sae
from fac_jax.scan import parts
from fac_jax.scan.parts import Counts, Identity, State, read_identity, shares_folder
from fac_jax.scan.peaks import Acts, BatchPeaks, Table, collect, dispatch
from fac_jax.scan.spans import TEXTS, Summary, extend, span_text
from fac_jax.scan.tally import count, new_tally, places, positions, slots, stats
from fac_jax.scan.units import Cursor, Share, documents_left, units
from fac_jax.text import read_documents

COMMIT_S = 60.0
"""Seconds between commits: a kill loses at most so much work."""
COMMIT_DOCUMENTS = 16_384
"""Documents after which a pass commits in any case: their tokens are in memory until then."""


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

    def _read(self, name: str, columns: list[str] | None) -> pa.Table:
        if self.identity.peaks == "none":
            raise UserError(
                f"the scan in {self.folder} kept no single documents (scan.peaks none): run `fac scan CONFIG --data "
                f"{self.identity.name} --scan.peaks all`, or name a file of features whose peaks to keep"
            )
        return pq.read_table(self.folder / name, columns=columns)


def scan(config: Config, out: Path, inputs: Mapping[str, Path], name: str, peaks: str = "all") -> dict[str, Any]:
    """Stage: scan the data set `name`, or the set of that name which synthesis wrote when `inputs` has "synthesis".

    `peaks` says whose peaks are kept document by document, as `scan.peaks` does.

    Raises UserError for an empty data set, an SAE of another width or layer than the backbone's, and a folder that
    holds a scan made with something else. What synthesis wrote may be empty: then nothing passed its filter. Raises
    Unfinished where other commands still have shares to scan.
    """
    dataset = written_dataset(config, inputs["synthesis"], name) if "synthesis" in inputs else config.dataset(name)
    share = _share(config)
    loaded, sae = load_scorer(config, inputs)
    kept, kept_f = kept_features(peaks, sae.features)
    identity = Identity(
        name, digest(dataset), loaded.digest, sae.layer, sae.digest, sae.features, sae.k,
        config.scan.acts, config.scan.top_spans, config.scan.span_tokens, kept,
    )  # fmt: skip
    parts.check_identity(out, identity)
    if not (out / "scan.json").exists():
        empty = "synthesis" in inputs and not _has_rows(dataset)
        scan_share(config, out, identity, kept_f, loaded, sae, share, None if empty else dataset)
        beat(f"scanning {name}: waiting for the other shares", math.inf)  # they may be longer; the dead have no pulse
        wait_for_all(f"{name} is scanned")
        if is_first():
            parts.finish(out, _finished_shares(out, share))
    wait_for_all(f"the scan of {name} is there")
    if is_first():
        shutil.rmtree(shares_folder(out), ignore_errors=True)
    return json.loads((out / "scan.json").read_text(encoding="utf-8"))["counts"]


def _share(config: Config) -> Share:
    index, total = config.scan.share_of
    if Process.count == 1:
        return Share(index, total)
    if total > 1:
        raise UserError(f"scan.share is {config.scan.share}: with several processes each takes its own; leave it out")
    return Share(Process.index, Process.count)


def _finished_shares(out: Path, share: Share) -> list[Path]:
    """All shares; raises Unfinished when some are still to be made."""
    folders = [shares_folder(out) / Share(index, share.count).name for index in range(share.count)]
    states = map(parts.read_state, folders)
    left = [folder.name for folder, state in zip(folders, states, strict=True) if state is None or not state.finished]
    if left:
        raise Unfinished(
            f"share {share.name} is scanned; {', '.join(left)} {'is' if len(left) == 1 else 'are'} not finished in "
            f"{shares_folder(out)}: scan them with --scan.share, in this run directory or in others that `fac scan "
            "merge` then joins"
        )
    return folders


def kept_features(setting: str, features: int) -> tuple[str, Bool[np.ndarray, " f"]]:
    """Whose peaks are kept document by document: what the identity says of it, and a mask over features.

    Raises UserError for a file that lists no features, or one that the SAE does not have.
    """
    if setting in ("all", "none"):
        return setting, np.full(features, setting == "all")
    try:
        listed = np.unique(pq.read_table(setting, columns=["feature"])["feature"].to_numpy())
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(
            f"scan.peaks is {setting!r}; it must be all, none, or a parquet file with a column `feature`, such as "
            f"coverage/missing.parquet ({error})"
        ) from None
    if len(listed) == 0 or listed[0] < 0 or listed[-1] >= features:
        found = f"features {listed[0]} to {listed[-1]}" if len(listed) else "no feature"
        raise UserError(f"scan.peaks: {setting} lists {found}; the SAE has {features:,}")
    kept_f = np.zeros(features, bool)
    kept_f[listed] = True
    return digest(listed.tolist()), kept_f


def scan_share(
    config: Config,
    out: Path,
    identity: Identity,
    kept_f: Bool[np.ndarray, " f"],
    loaded: Loaded,
    sae: LoadedSae,
    share: Share,
    dataset: DataSet | None,
) -> None:
    """Scan one share of a data set from its last commit to its end; None is a data set without rows."""
    state, summary = parts.begin(out, identity, share)
    if state.finished:
        return
    skipped: list[str] = []
    if dataset is not None:
        name, geometry = identity.name, config.backbone
        check_fits(dataset, name, geometry)
        documents = read_documents(dataset, name, skipped)
        with progress(f"scan {name}", _documents_left(dataset, state), "documents") as bar:
            for unit, first, held in units(documents, share, state.cursor):
                encoded = (encode(document, loaded.tokenizer, dataset.max_tokens) for document in held)
                corpus = pack(encoded, geometry.rows_per_batch, geometry.row_tokens, first)
                stretch = Stretch(identity, loaded, kept_f)
                for batch, tables in _counted(dispatched(corpus, loaded, sae, identity.acts), bar):
                    stretch.add(batch, tables)
                    if stretch.is_long():
                        state, summary = stretch.commit(out, unit, state, summary)
                        stretch = Stretch(identity, loaded, kept_f)
                state, summary = stretch.commit(out, unit, state, summary)
    parts.commit(out, replace(state, finished=True, skipped=tuple(skipped)), summary)


class Stretch:
    """What is scanned of a unit between two commits."""

    def __init__(self, identity: Identity, loaded: Loaded, kept_f: Bool[np.ndarray, " f"]) -> None:
        self._identity, self._loaded, self._kept_f = identity, loaded, kept_f
        self.tally = new_tally(identity.features, identity.top_spans, loaded.mesh)
        self._documents: list[EncodedDocument] = []
        self._scored: list[tuple[PackedBatch, BatchPeaks]] = []
        self._next, self._since = 0, time.monotonic()

    def add(self, batch: PackedBatch, tables: Sequence[Table]) -> None:
        """Count a batch, on the device; what is kept of single documents comes to the host."""
        done = 0
        for table in tables:
            size = table.peaks.peak_sf.shape[0]
            ids = [encoded.document.id for encoded in batch.documents[done : done + size]]
            which = slots(ids, len(self._documents) + done, size)
            self.tally = count(self.tally, table.peaks, which, mesh=self._loaded.mesh)
            done += size
        if self._kept_f.any():
            self._scored.append((batch, collect(batch, tables, self._kept_f)))
        else:
            jax.block_until_ready(tables[-1].mean_sd)  # else the host would run ahead, with a table for every batch
        self._documents.extend(batch.documents)
        self._next = batch.first + len(batch.documents)
        beat(f"scanning {self._identity.name}")

    def is_long(self) -> bool:
        """Whether it is time to commit."""
        return time.monotonic() - self._since > COMMIT_S or len(self._documents) >= COMMIT_DOCUMENTS

    def commit(self, out: Path, unit: int, state: State, summary: Summary) -> tuple[State, Summary]:
        """Write it; returns the state and the statistics behind it. An empty stretch changes nothing."""
        if not self._documents:
            return state, summary
        if self._scored:
            parts.write_piece(out, state.share, unit, self._scored)
        summary = extend(summary, stats(self.tally), self._cut)
        lengths = [(1, len(one.ids), int(one.content.sum())) for one in self._documents]
        counts = state.counts.plus(Counts(*np.sum(lengths, axis=0).tolist()))
        state = replace(state, cursor=Cursor(unit, self._next), counts=counts)
        parts.commit(out, state, summary)
        return state, summary

    def _cut(self, spans: Int64[np.ndarray, " m"]) -> pa.Table:
        """Words of spans by their `span_fn`; those that several features share are cut once."""
        where = np.stack([places(self.tally)[spans], positions(self.tally)[spans]], axis=1)
        wanted, inverse = np.unique(where, axis=0, return_inverse=True)
        rows = []
        for place, position in wanted.tolist():
            one = self._documents[place]
            rows.append(span_text(one.ids, one.content, position, self._identity.span_tokens, self._loaded.tokenizer))
        return pa.Table.from_pylist(rows, TEXTS).take(inverse.reshape(-1))


def load_scorer(config: Config, inputs: Mapping[str, Path]) -> tuple[Loaded, LoadedSae]:
    """The backbone up to `backbone.layer` and the SAE of `scan.sae` or of the run, checked to fit each other."""
    mesh = own_mesh(config.mesh, jax.local_devices())
    loaded = load_backbone(config.backbone.model, config.backbone.layer, config.backbone.dtype, mesh)
    folder = Path(config.scan.sae) if config.scan.sae else inputs["sae"]
    return loaded, load_sae(folder, mesh, loaded.config.d_model, config.backbone.layer, loaded.digest)


def written_dataset(config: Config, synthesis: Path, name: str) -> DataSet:
    """A set that synthesis wrote (`kept`, `random`), cut at as many tokens as the seed."""
    source = Source(path=str(synthesis / f"{name}.jsonl"), format="jsonl", text="text", label="label")
    return DataSet(sources=(source,), max_tokens=config.dataset(config.coverage.seed).max_tokens)


def dispatched(
    corpus: Iterable[PackedBatch], loaded: Loaded, sae: LoadedSae, acts: Acts
) -> Iterator[tuple[PackedBatch, list[Table]]]:
    """Each batch with its tables. The device works on the next batch while the caller looks at this one."""
    waiting = None
    for batch in corpus:
        started = (batch, dispatch(batch, loaded, sae, acts))
        if waiting is not None:
            yield waiting
        waiting = started
    if waiting is not None:
        yield waiting


def peaks_of(
    encoded: Sequence[EncodedDocument], loaded: Loaded, sae: LoadedSae, acts: Acts, geometry: BackboneConfig
) -> csr_array:
    """Peaks above 0 of documents held in memory, float32 [documents, features]: how synthesis scores candidates."""
    rows = [csr_array((0, sae.features), dtype=np.float32)]
    corpus = pack(encoded, geometry.rows_per_batch, geometry.row_tokens)
    for batch, tables in dispatched(corpus, loaded, sae, acts):
        found, shape = collect(batch, tables), (len(batch.documents), sae.features)
        rows.append(csr_array((found.peak, (found.document, found.feature)), shape=shape))
    return csr_array(vstack(rows, format="csr"))


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


def _has_rows(dataset: DataSet) -> bool:
    with open(dataset.sources[0].path, encoding="utf-8") as lines:
        return any(line.strip() for line in lines)


def _documents_left(dataset: DataSet, state: State) -> int | None:
    """For the ETA; unknown where bad rows are skipped, so that each of them is logged once."""
    if dataset.on_bad_row == "skip":
        return None
    total = sum(1 for _ in read_documents(dataset, state.identity.name))
    return documents_left(total, state.share, state.cursor)


def _counted(scored: Iterable[tuple[PackedBatch, list[Table]]], bar: Bar) -> Iterator[tuple[PackedBatch, list[Table]]]:
    tokens, started = 0, time.monotonic()
    for batch, tables in scored:
        yield batch, tables
        tokens += int((batch.segments > 0).sum())
        bar.advance(len(batch.documents), f"{tokens / (time.monotonic() - started):,.0f} tokens/s")
