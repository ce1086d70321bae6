"""A scan's files: pieces committed while a pass runs, and the product that they are merged into.

A piece is a folder `parts/FIRST-NEXT/` named by the document ordinals [FIRST, NEXT) it holds, written under a temporary
name and renamed into place whole; the next document to scan is the last piece's NEXT. `finish` merges all pieces into
`documents.parquet`, `peaks.parquet`, `features.parquet` and, last, `scan.json`, with the same bytes wherever the pass
was cut.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from fac_jax.errors import UserError
from fac_jax.packing import EncodedDocument, PackedBatch
from fac_jax.plain import to_plain
from fac_jax.runs import write_text, writing
from fac_jax.scan.peaks import Acts, BatchPeaks
from fac_jax.scan.spans import EDGES, FeatureStats, merge, span_text, stats_of

DOCUMENTS = pa.schema(
    {
        "index": pa.int64(), "id": pa.string(), "label": pa.float32(), "source": pa.string(),
        "turns": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})), "text": pa.string(),
        "tokens": pa.int32(), "content_tokens": pa.int32(),
        "token_ids": pa.list_(pa.int32()), "content": pa.list_(pa.bool_()), "mean_residual": pa.list_(pa.float32()),
    }
)  # fmt: skip
PEAKS = pa.schema(
    {
        "document": pa.int64(), "document_id": pa.string(), "feature": pa.int32(), "peak": pa.float32(),
        "position": pa.int32(), "token_id": pa.int32(),
    }
)  # fmt: skip
SPAN = pa.struct(
    {
        "document": pa.int64(), "document_id": pa.string(), "score": pa.float32(), "position": pa.int32(),
        "before": pa.string(), "token": pa.string(), "after": pa.string(),
    }
)  # fmt: skip
FEATURES = pa.schema(
    {
        "feature": pa.int32(), "max": pa.float32(), "documents": pa.int64(), "tokens": pa.int64(),
        "histogram": pa.list_(pa.int64()), "spans": pa.list_(SPAN),
    }
)  # fmt: skip
# Row groups of the product are cut by number of rows, so that its bytes do not depend on where pieces were cut.
DOCUMENTS_PER_GROUP, PEAKS_PER_GROUP = 2**14, 2**20


@dataclass(frozen=True)
class Identity:
    """What a scan is made with; scans are compared, merged and gone on with only where this agrees."""

    name: str
    """Data set."""
    data: str
    """Digest of the data set's settings."""
    model_digest: str
    layer: int
    sae: str
    """Digest of the SAE's parameters."""
    features: int
    k: int | None
    acts: Acts
    top_spans: int
    span_tokens: int


def read_identity(path: Path) -> Identity | None:
    """Identity of a finished scan or of a pass under way in `path`; None where there is neither."""
    for file in (path / "scan.json", path / "parts" / "identity.json"):
        if file.exists():
            try:
                return Identity(**json.loads(file.read_text(encoding="utf-8"))["identity"])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{file} cannot be read ({error}); delete {path} to scan again") from None
    return None


def begin(out: Path, identity: Identity) -> None:
    """Note what the pass is made with. Raises UserError when `out` holds one made with something else."""
    there = read_identity(out)
    if there is not None and there != identity:
        old, new = to_plain(there), to_plain(identity)
        was, now = ({name: one[name] for name in old if old[name] != new[name]} for one in (old, new))
        raise UserError(
            f"the scan in {out} was made with {was}, the config asks {now}: delete the folder to scan again, "
            "or set another run.dir to keep both"
        )
    (out / "parts").mkdir(parents=True, exist_ok=True)
    for stale in (out / "parts").glob(".*"):
        shutil.rmtree(stale)
    write_text(out / "parts" / "identity.json", json.dumps({"identity": to_plain(identity)}))


def pieces(out: Path) -> list[tuple[int, int, Path]]:
    """Committed pieces as (first, next, folder), in order. Raises UserError when one in the middle is gone."""
    found = []
    for folder in (out / "parts").iterdir():
        if folder.is_dir():
            first, _, after = folder.name.partition("-")
            found.append((int(first), int(after), folder))
    found.sort()
    for left, right in pairwise([(0, 0, out), *found]):
        if left[1] != right[0]:
            gap = f"documents {left[1]} to {right[0]}"
            raise UserError(f"{out / 'parts'} lacks the piece with {gap}: delete {out} to scan again")
    return found


def next_document(out: Path) -> int:
    """Ordinal of the first document that no piece holds."""
    return max((after for _, after, _ in pieces(out)), default=0)


def commit(out: Path, scored: Sequence[tuple[PackedBatch, BatchPeaks]]) -> None:
    """Write consecutive batches as one piece."""
    first, last = scored[0][0].first, scored[-1][0]
    folder = out / "parts" / f"{first:012d}-{last.first + len(last.documents):012d}"
    temporary = folder.with_name(f".{folder.name}")
    temporary.mkdir()
    documents = [
        document_row(batch.first + i, encoded, mean_d)
        for batch, found in scored
        for i, (encoded, mean_d) in enumerate(zip(batch.documents, found.mean_nd, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(documents, DOCUMENTS), temporary / "documents.parquet")
    pq.write_table(pa.concat_tables([peak_rows(*one) for one in scored]), temporary / "peaks.parquet")
    np.save(temporary / "tokens_f.npy", np.sum([found.tokens_f for _, found in scored], axis=0))
    os.replace(temporary, folder)


def document_row(index: int, encoded: EncodedDocument, mean_d: np.ndarray) -> dict[str, Any]:
    """A document as a row of documents.parquet."""
    document = encoded.document
    return {
        "index": index, "id": document.id, "label": document.label, "source": document.source,
        "turns": to_plain(document.turns), "text": document.text,
        "tokens": len(encoded.ids), "content_tokens": int(encoded.content.sum()),
        "token_ids": encoded.ids, "content": encoded.content, "mean_residual": mean_d,
    }  # fmt: skip


def peak_rows(batch: PackedBatch, found: BatchPeaks) -> pa.Table:
    """A batch's peaks as rows of peaks.parquet; documents by their ordinal in the corpus."""
    starts = np.cumsum([0, *(len(encoded.ids) for encoded in batch.documents)])
    tokens = np.concatenate([encoded.ids for encoded in batch.documents])
    ids = pa.array([encoded.document.id for encoded in batch.documents])
    columns = {
        "document": found.document + batch.first, "document_id": ids.take(pa.array(found.document)),
        "feature": found.feature, "peak": found.peak, "position": found.position,
        "token_id": tokens[starts[found.document] + found.position],
    }  # fmt: skip
    return pa.table(columns).cast(PEAKS)


def finish(out: Path, identity: Identity, tokenizer: PreTrainedTokenizerFast, skipped: Sequence[str]) -> None:
    """Merge the pieces into the product; scan.json last."""
    folders = [folder for _, _, folder in pieces(out)]
    empty = stats_of(*_columns(PEAKS.empty_table()), np.zeros(identity.features, np.int64), identity.top_spans)
    stats = reduce(merge, (_piece_stats(folder, identity) for folder in folders), empty)
    _write(out / "documents.parquet", DOCUMENTS, _tables(folders, "documents.parquet"), DOCUMENTS_PER_GROUP)
    _write(out / "peaks.parquet", PEAKS, _tables(folders, "peaks.parquet"), PEAKS_PER_GROUP)
    rows = feature_rows(stats, _best_documents(stats, folders), identity.span_tokens, tokenizer)
    _write(out / "features.parquet", FEATURES, [rows], identity.features)
    lengths = pq.read_table(out / "documents.parquet", columns=["tokens", "content_tokens"])
    counts = {
        "documents": lengths.num_rows,
        "tokens": int(lengths["tokens"].to_numpy().sum()),
        "content_tokens": int(lengths["content_tokens"].to_numpy().sum()),
        "peaks": int(stats.documents_f.sum()),
        "active_features": int(np.count_nonzero(stats.documents_f)),
        "skipped_rows": len(skipped),
    }
    product = {
        "identity": to_plain(identity), "counts": counts, "histogram_edges": EDGES.tolist(), "skipped": list(skipped)
    }  # fmt: skip
    write_text(out / "scan.json", json.dumps(product, indent=1))


def feature_rows(
    stats: FeatureStats, documents: dict[int, dict[str, Any]], span_tokens: int, tokenizer: PreTrainedTokenizerFast
) -> pa.Table:
    """features.parquet: one row per feature, spans cut from `documents` (rows of documents.parquet by ordinal)."""
    spans: list[list[dict[str, Any]]] = []
    for f in range(len(stats.max_f)):
        spans.append([])
        for j in np.flatnonzero(stats.document_fn[f] >= 0):
            document, position = int(stats.document_fn[f, j]), int(stats.position_fn[f, j])
            row = documents[document]
            text = span_text(row["token_ids"], row["content"], position, span_tokens, tokenizer)
            place = {"document": document, "document_id": row["id"], "position": position}
            spans[-1].append({**place, "score": float(stats.score_fn[f, j]), **text})
    columns = {
        "feature": np.arange(len(stats.max_f)), "max": stats.max_f,
        "documents": stats.documents_f, "tokens": stats.tokens_f,
        "histogram": pa.FixedSizeListArray.from_arrays(stats.histogram_fh.reshape(-1), stats.histogram_fh.shape[1]),
        "spans": pa.array(spans, pa.list_(SPAN)),
    }  # fmt: skip
    return pa.table(columns).cast(FEATURES)


def _piece_stats(folder: Path, identity: Identity) -> FeatureStats:
    columns = _columns(pq.read_table(folder / "peaks.parquet"))
    return stats_of(*columns, np.load(folder / "tokens_f.npy", allow_pickle=False), identity.top_spans)


def _columns(peaks: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    feature, peak, position, document = (peaks[name].to_numpy() for name in ("feature", "peak", "position", "document"))
    encoded = peaks["document_id"].combine_chunks().dictionary_encode()
    numbers = np.array([int(name, 16) for name in encoded.dictionary.to_pylist()], np.uint64)
    return feature, peak, position, document, numbers[encoded.indices.to_numpy()]


def _best_documents(stats: FeatureStats, folders: Iterable[Path]) -> dict[int, dict[str, Any]]:
    """Ids and tokens of the documents that some feature has a span in, by ordinal."""
    wanted = np.unique(stats.document_fn)
    found = {}
    for table in _tables(folders, "documents.parquet", ["index", "id", "token_ids", "content"]):
        for row in table.filter(np.isin(table["index"].to_numpy(), wanted)).to_pylist():
            row["token_ids"], row["content"] = np.array(row["token_ids"], np.int32), np.array(row["content"], bool)
            found[row["index"]] = row
    return found


def _tables(folders: Iterable[Path], name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    for folder in folders:
        yield pq.read_table(folder / name, columns=columns)


def _write(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], rows_per_group: int) -> None:
    with writing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        held = schema.empty_table()
        for table in tables:
            held = pa.concat_tables([held, table])
            while held.num_rows >= rows_per_group:
                writer.write_table(held.slice(0, rows_per_group).combine_chunks())
                held = held.slice(rows_per_group)
        writer.write_table(held.combine_chunks())
