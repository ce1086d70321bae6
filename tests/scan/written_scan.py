"""A finished scan on disk, of peaks that a test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from fac_jax.packing import PackedBatch
from fac_jax.scan import parts
from fac_jax.scan.parts import Counts, Identity
from fac_jax.scan.peaks import BatchPeaks
from fac_jax.scan.product import Scan, load_scan
from fac_jax.scan.spans import TEXTS, extend, span_text
from fac_jax.scan.tally import id_numbers
from fac_jax.scan.units import Share
from tests.scan.reference_stats import stats_of


def altered(scan: Scan, **values: object) -> Scan:
    """The scan with other peaks, ids or labels than its files have."""
    other = replace(scan)
    vars(other).update(values)
    return other


def write_scan(
    folder: Path,
    identity: Identity,
    scored: Sequence[tuple[PackedBatch, BatchPeaks]],
    tokenizer: PreTrainedTokenizerFast,
) -> Scan:
    """Write the product that a pass which found these peaks makes."""
    folder.mkdir(parents=True, exist_ok=True)
    state, summary = parts.begin(folder, identity, Share(0, 1))
    for batch, found in scored:
        parts.write_piece(folder, state.share, 0, [(batch, found)])
        ids = id_numbers([encoded.document.id for encoded in batch.documents])
        rows = np.arange(len(found.peak))
        part = stats_of(
            found.feature, found.peak, found.position.astype(np.int64), rows, ids[found.document], found.tokens_f,
            identity.top_spans,
        )  # fmt: skip

        def cut(spans: np.ndarray, batch: PackedBatch = batch, found: BatchPeaks = found) -> pa.Table:
            which = [(batch.documents[found.document[row]], int(found.position[row])) for row in spans.tolist()]
            texts = [span_text(one.ids, one.content, at, identity.span_tokens, tokenizer) for one, at in which]
            return pa.Table.from_pylist(texts, TEXTS)

        summary = extend(summary, part, cut)
        for one in batch.documents:
            counted = Counts(1, len(one.ids), int(one.content.sum()))
            state = replace(state, counts=state.counts.plus(counted))
    parts.commit(folder, replace(state, finished=True), summary)
    parts.finish(folder, [parts.shares_folder(folder) / state.share.name])
    return load_scan(folder)
