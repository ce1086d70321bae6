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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool

from fac_jax.backbone.weights import Loaded
from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config
from fac_jax.distributed import Process, beat, is_first, wait_for_all
from fac_jax.errors import Unfinished, UserError
from fac_jax.packing import PackedBatch, check_fits, encodable_documents, encode_all, pack
from fac_jax.plain import digest
from fac_jax.progress import Bar, progress
from fac_jax.sae.checkpoint import LoadedSae
from fac_jax.scan import parts
from fac_jax.scan.parts import Identity, State, shares_folder
from fac_jax.scan.peaks import Table
from fac_jax.scan.scorer import dispatched, load_scorer
from fac_jax.scan.stretch import Stretch
from fac_jax.scan.units import Share, documents_left, units
from fac_jax.text import count_documents, files_digest

WRITERS = {"kept": "synthesis", "random": "synthesis", "study_texts": "study:texts"}
"""Data sets that a run writes itself, and the stage that writes each."""


def scan(config: Config, out: Path, inputs: Mapping[str, Path], name: str, peaks: str = "all") -> dict[str, Any]:
    """Stage: scan the data set `name`, or the set of that name which synthesis wrote when `inputs` has "synthesis".

    `peaks` says whose peaks are kept document by document, as `scan.peaks` does.

    Raises UserError for an empty data set, an SAE of another width or layer than the backbone's, and a folder that
    holds a scan made with something else. What synthesis wrote may be empty: then nothing passed its filter. Raises
    Unfinished where other commands still have shares to scan.
    """
    written = inputs.get(WRITERS.get(name, ""))
    dataset = config.dataset(name) if written is None else written_dataset(config, written, name)
    share = _share(config)
    loaded, sae = load_scorer(config, inputs)
    kept, kept_f = kept_features(peaks, sae.features)
    identity = Identity(
        name, digest(dataset), loaded.digest, sae.layer, sae.digest, sae.features, sae.k,
        config.scan.acts, config.scan.top_spans, config.scan.span_tokens, kept, files_digest(dataset),
    )  # fmt: skip
    parts.check_identity(out, identity)
    if (out / "scan.json").exists():
        parts.check_whole(out, identity)
    else:
        empty = written is not None and not _has_rows(dataset)
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
            f"{shares_folder(out)}: scan them with --scan.share, one after another in this run directory, or at the "
            "same time in others that `fac scan merge` then joins"
        )
    return parts.shares_of(folders)


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
        documents = encodable_documents(dataset, name, loaded.tokenizer, skipped)
        with progress(f"scan {name}", _left(dataset, state), "documents") as bar:
            for unit, first, held in units(documents, share, state.cursor):
                encoded = encode_all(held, loaded.tokenizer, dataset.max_tokens)
                corpus = pack(encoded, geometry.rows_per_batch, geometry.row_tokens, first)
                stretch = Stretch(identity, loaded, kept_f)
                for batch, tables in _counted(dispatched(corpus, loaded, sae, identity.acts), bar):
                    stretch.add(batch, tables)
                    if stretch.is_long():
                        state, summary = stretch.commit(out, unit, state, summary)
                        stretch = Stretch(identity, loaded, kept_f)
                state, summary = stretch.commit(out, unit, state, summary)
    parts.commit(out, replace(state, finished=True, skipped=tuple(skipped)), summary)


def written_dataset(config: Config, folder: Path, name: str) -> DataSet:
    """A set that another stage wrote (synthesis: `kept`, `random`; a study: `texts`), cut at as many tokens as the
    seed."""
    source = Source(path=str(folder / f"{name}.jsonl"), format="jsonl", text="text", label="label")
    return DataSet(sources=(source,), max_tokens=config.dataset(config.coverage.seed).max_tokens)


def _has_rows(dataset: DataSet) -> bool:
    with open(dataset.sources[0].path, encoding="utf-8") as lines:
        return any(line.strip() for line in lines)


def _left(dataset: DataSet, state: State) -> int | None:
    """Documents to come, for the ETA, where they are counted."""
    total = count_documents(dataset, state.identity.name)
    return None if total is None else documents_left(total, state.share, state.cursor)


def _counted(scored: Iterable[tuple[PackedBatch, list[Table]]], bar: Bar) -> Iterator[tuple[PackedBatch, list[Table]]]:
    tokens, started = 0, time.monotonic()
    for batch, tables in scored:
        yield batch, tables
        tokens += int((batch.segments > 0).sum())
        bar.advance(len(batch.documents), f"{tokens / (time.monotonic() - started):,.0f} tokens/s")
