"""The tables of a scan: their columns, rows made of what was scanned, files that do not depend on how it was cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fac_jax.packing import EncodedDocument, PackedBatch
from fac_jax.plain import to_plain
from fac_jax.runs import writing
from fac_jax.scan.peaks import BatchPeaks
from fac_jax.scan.spans import NO_ID, TEXTS, FeatureStats, Summary, empty_summary
from fac_jax.scan.tally import id_names, id_numbers

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
DOCUMENTS_PER_GROUP, PEAKS_PER_GROUP, FEATURES_PER_GROUP = 2**14, 2**20, 2**16


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
    """A batch's peaks as rows of peaks.parquet; documents by their ordinal in the unit."""
    starts = np.cumsum([0, *(len(encoded.ids) for encoded in batch.documents)])
    tokens = np.concatenate([encoded.ids for encoded in batch.documents])
    ids = pa.array([encoded.document.id for encoded in batch.documents])
    columns = {
        "document": found.document + batch.first, "document_id": ids.take(pa.array(found.document)),
        "feature": found.feature, "peak": found.peak, "position": found.position,
        "token_id": tokens[starts[found.document] + found.position],
    }  # fmt: skip
    return pa.table(columns).cast(PEAKS)


def features_table(summary: Summary, ordinals: Mapping[str, int] | None = None) -> pa.Table:
    """features.parquet: one row per feature. `ordinals` are the places in documents.parquet, where there is one."""
    stats = summary.stats
    there = stats.span_fn >= 0
    ids = id_names(stats.id_fn[there])
    places = [None] * len(ids) if ordinals is None else [ordinals[name] for name in ids]
    columns = [
        pa.array(places, pa.int64()), pa.array(ids, pa.string()), pa.array(stats.score_fn[there]),
        pa.array(stats.position_fn[there].astype(np.int32)),
        *(summary.texts[name].combine_chunks() for name in TEXTS.names),
    ]  # fmt: skip
    spans = pa.StructArray.from_arrays(columns, fields=list(SPAN))
    starts = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
    histogram = pa.FixedSizeListArray.from_arrays(stats.histogram_fh.reshape(-1), stats.histogram_fh.shape[1])
    return pa.table(
        {
            "feature": np.arange(len(stats.max_f)), "max": stats.max_f,
            "documents": stats.documents_f, "tokens": stats.tokens_f,
            "histogram": histogram, "spans": pa.ListArray.from_arrays(starts, spans),
        }
    ).cast(FEATURES)  # fmt: skip


def summary_of(table: pa.Table, top_spans: int) -> Summary:
    """What `features_table` put into a table."""
    table = table.combine_chunks()
    features = table.num_rows
    empty = empty_summary(features, top_spans).stats
    lists = table["spans"].combine_chunks()
    spans = lists.flatten()
    count_f = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    there = np.arange(top_spans) < count_f[:, None]

    def filled(empty_fn: np.ndarray, values: np.ndarray) -> np.ndarray:
        table_fn = empty_fn.copy()
        table_fn[there] = values
        return table_fn

    position, score = (spans.field(name).to_numpy() for name in ("position", "score"))
    return Summary(
        FeatureStats(
            max_f=table["max"].to_numpy(), documents_f=table["documents"].to_numpy(),
            tokens_f=table["tokens"].to_numpy(),
            histogram_fh=table["histogram"].combine_chunks().flatten().to_numpy().reshape(features, -1),
            score_fn=filled(empty.score_fn, score),
            id_fn=filled(empty.id_fn, id_numbers(spans.field("document_id").to_pylist())),
            position_fn=filled(empty.position_fn, position),
            span_fn=filled(empty.span_fn, np.arange(len(spans))),
        ),
        pa.table({name: spans.field(name) for name in TEXTS.names}),
    )  # fmt: skip


def ordinals_of(documents: Path, stats: FeatureStats) -> dict[str, int]:
    """Place in documents.parquet of each document that some feature has a span in; of several equal ones the first."""
    wanted = pa.array(id_names(np.unique(stats.id_fn[stats.id_fn != NO_ID])), pa.string())
    found: dict[str, int] = {}
    file = pq.ParquetFile(documents)
    for batch in file.iter_batches(batch_size=DOCUMENTS_PER_GROUP, columns=["index", "id"]):
        held = batch.filter(pc.is_in(batch["id"], value_set=wanted))
        for place, name in zip(held["index"].to_pylist(), held["id"].to_pylist(), strict=True):
            found.setdefault(name, place)
    return found


def shifted(files: Iterable[tuple[int, Path]], column: str, rows: int) -> Iterator[pa.Table]:
    """The rows of several files, a few at a time; to a column of ordinals the file's number is added."""
    for by, file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=rows):
            place = batch.schema.get_field_index(column)
            yield pa.Table.from_batches([batch]).set_column(place, column, pc.add(batch[column], by))


def write_table(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], rows_per_group: int) -> None:
    with writing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in _regrouped(tables, schema, rows_per_group):
            writer.write_table(table)


def _regrouped(tables: Iterable[pa.Table], schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows`, the last one shorter or empty."""
    held = schema.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table])
        while held.num_rows >= rows:
            yield held.slice(0, rows).combine_chunks()
            held = held.slice(rows)
    yield held.combine_chunks()
