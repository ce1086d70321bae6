"""A scan's files: what a pass commits while it runs, and the product that this is merged into.

A pass commits a *state*, `shares/SHARE/state.parquet`: the statistics of all documents so far (the table that
`features.parquet` will be), and in the file's metadata what they are made with and where to go on. It is replaced
whole, by a rename. Where peaks are kept, a *piece*, `shares/SHARE/pieces/UNIT-FIRST-NEXT/`, holds the documents of one
stretch of a unit and their peaks; it exists once a state says that the pass is behind it. `finish` joins the states and
pieces of all shares into `documents.parquet`, `peaks.parquet`, `features.parquet` and, last, `scan.json`, with the same
bytes however the work was cut and shared.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fac_jax.errors import UserError
from fac_jax.packing import EncodedDocument, PackedBatch
from fac_jax.plain import from_plain, to_plain
from fac_jax.runs import write_text, writing
from fac_jax.scan.peaks import Acts, BatchPeaks
from fac_jax.scan.spans import EDGES, NO_ID, TEXTS, FeatureStats, Summary, empty_summary, merge_summaries
from fac_jax.scan.tally import id_names, id_numbers
from fac_jax.scan.units import UNIT_DOCUMENTS, Cursor, Share

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
    peaks: str
    """Whose peaks are kept, document by document: `all`, `none`, or the digest of a list of features."""


@dataclass(frozen=True)
class Counts:
    """Of documents that were scanned."""

    documents: int = 0
    tokens: int = 0
    content_tokens: int = 0

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        mine, its = to_plain(self), to_plain(other)
        return Counts(**{name: mine[name] + its[name] for name in mine})


@dataclass(frozen=True)
class State:
    """How far the pass over one share has come."""

    identity: Identity
    share: Share
    cursor: Cursor
    counts: Counts
    finished: bool
    skipped: tuple[str, ...]
    """Malformed rows, known when the pass has finished."""


def shares_folder(out: Path) -> Path:
    """Where passes commit, inside the product's folder."""
    return out / "shares"


def read_state(folder: Path) -> State | None:
    """State of a share's folder, without its statistics; None where nothing was committed yet."""
    file = folder / "state.parquet"
    try:
        metadata = pq.read_schema(file).metadata
        return from_plain(State, json.loads(metadata[b"fac_jax"]), "state")
    except FileNotFoundError:
        return None
    except (pa.ArrowException, ValueError, TypeError, KeyError, UserError) as error:
        raise UserError(f"{file} cannot be read ({error}); delete {folder} to scan this share again") from None


def read_identity(path: Path) -> Identity | None:
    """Identity of a finished scan or of a pass under way in `path`; None where there is neither."""
    file = path / "scan.json"
    if file.exists():
        try:
            return from_plain(Identity, json.loads(file.read_text(encoding="utf-8"))["identity"], "identity")
        except (ValueError, TypeError, KeyError, UserError) as error:
            raise UserError(f"{file} cannot be read ({error}); delete {path} to scan again") from None
    states = (read_state(folder) for folder in sorted(shares_folder(path).glob("*-of-*")))
    return next((state.identity for state in states if state is not None), None)


def check_identity(out: Path, identity: Identity) -> None:
    """Raise UserError when `out` holds a scan, or a part of one, that was made with something else."""
    there = read_identity(out)
    if there is not None and there != identity:
        old, new = to_plain(there), to_plain(identity)
        was, now = ({name: one[name] for name in old if old[name] != new[name]} for one in (old, new))
        raise UserError(
            f"the scan in {out} was made with {was}, the config asks {now}: delete the folder to scan again, "
            "or set another run.dir to keep both"
        )


def begin(out: Path, identity: Identity, share: Share) -> tuple[State, Summary]:
    """Where the pass over a share goes on. Raises UserError when the scan in `out` is of something else, or is shared
    out in another number of parts."""
    check_identity(out, identity)
    for other in shares_folder(out).glob("*-of-*"):
        if (state := read_state(other)) is not None and state.share.count != share.count:
            raise UserError(
                f"{other} is a share of {state.share.count}, this is one of {share.count}: go on with as many as it "
                f"was begun with, or delete {shares_folder(out)} to scan again"
            )
    folder = shares_folder(out) / share.name
    (folder / "pieces").mkdir(parents=True, exist_ok=True)
    state = read_state(folder) or State(identity, share, Cursor(0, 0), Counts(), False, ())
    behind = state.cursor.unit, state.cursor.documents
    for piece in (folder / "pieces").iterdir():  # written, but its state was not
        if piece.name.startswith(".") or (_place(piece)[0], _place(piece)[2]) > behind:
            shutil.rmtree(piece)
    file = folder / "state.parquet"
    if not file.exists():
        return state, empty_summary(identity.features, identity.top_spans)
    return state, summary_of(pq.read_table(file), identity.top_spans)


def commit(out: Path, state: State, summary: Summary) -> None:
    """From now on the pass goes on behind `state.cursor`, whatever happens."""
    table = features_table(summary).replace_schema_metadata({"fac_jax": json.dumps(to_plain(state))})
    folder = shares_folder(out) / state.share.name
    _write(folder / "state.parquet", table.schema, [table], FEATURES_PER_GROUP)


def write_piece(out: Path, share: Share, unit: int, scored: Sequence[tuple[PackedBatch, BatchPeaks]]) -> None:
    """Documents and peaks of consecutive batches of a unit, before the state that counts them is committed."""
    first, last = scored[0][0].first, scored[-1][0]
    name = f"{unit:08d}-{first:08d}-{last.first + len(last.documents):08d}"
    temporary = shares_folder(out) / share.name / "pieces" / f".{name}"
    temporary.mkdir()
    documents = [
        document_row(batch.first + i, encoded, mean_d)
        for batch, found in scored
        for i, (encoded, mean_d) in enumerate(zip(batch.documents, found.mean_nd, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(documents, DOCUMENTS), temporary / "documents.parquet")
    pq.write_table(pa.concat_tables([peak_rows(*one) for one in scored]), temporary / "peaks.parquet")
    os.replace(temporary, temporary.with_name(name))


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


def shares_of(folders: Iterable[Path]) -> list[Path]:
    """Folders of all the shares of one scan, in order, wherever they lie. Raises UserError for one that is not
    finished or not there, and for shares of different scans."""
    found: dict[int, tuple[Path, State]] = {}
    for folder in folders:
        state = read_state(folder)
        if state is None or not state.finished:
            raise UserError(f"{folder} is not finished: run its command again to go on with it")
        _, other = next(iter(found.values()), (folder, state))
        if (state.identity, state.share.count) != (other.identity, other.share.count):
            raise UserError(f"{folder} is a share of another scan than {next(iter(found.values()))[0]}")
        if state.share.index in found:
            raise UserError(f"{folder} and {found[state.share.index][0]} are the same share; name one of them")
        found[state.share.index] = folder, state
    if not found:
        raise UserError("no share of a scan is there")
    count = next(iter(found.values()))[1].share.count
    if lacking := [Share(index, count).name for index in range(count) if index not in found]:
        raise UserError(f"of {count} shares {', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing")
    return [found[index][0] for index in range(count)]


def finish(out: Path, shares: Sequence[Path]) -> None:
    """Join all the shares of a scan into the product; scan.json last."""
    states = [state for state in map(read_state, shares) if state is not None]
    identity = states[0].identity
    counts = reduce(Counts.plus, (state.counts for state in states))
    summaries = (summary_of(pq.read_table(folder / "state.parquet"), identity.top_spans) for folder in shares)
    summary = reduce(merge_summaries, summaries)
    pieces = all_pieces(shares, counts.documents) if identity.peaks != "none" else []
    write_product(out, identity, counts, summary, pieces, states[0].skipped)


def write_product(
    out: Path,
    identity: Identity,
    counts: Counts,
    summary: Summary,
    pieces: Sequence[tuple[int, Path]],
    skipped: Sequence[str],
) -> None:
    """The files of a finished scan, from the folders of its pieces, each with what its documents' ordinals lack."""
    ordinals: Mapping[str, int] | None = None
    if identity.peaks != "none":
        for name, schema, column, rows in (
            ("documents.parquet", DOCUMENTS, "index", DOCUMENTS_PER_GROUP),
            ("peaks.parquet", PEAKS, "document", PEAKS_PER_GROUP),
        ):
            _write(out / name, schema, _shifted([(by, folder / name) for by, folder in pieces], column, rows), rows)
        ordinals = _ordinals(out / "documents.parquet", summary.stats)
    _write(out / "features.parquet", FEATURES, [features_table(summary, ordinals)], FEATURES_PER_GROUP)
    found = {
        **to_plain(counts),
        "peaks": int(summary.stats.documents_f.sum()),
        "active_features": int(np.count_nonzero(summary.stats.documents_f)),
        "skipped_rows": len(skipped),
    }
    product = {
        "identity": to_plain(identity), "counts": found, "histogram_edges": EDGES.tolist(), "skipped": list(skipped)
    }  # fmt: skip
    write_text(out / "scan.json", json.dumps(product, indent=1))


def all_pieces(shares: Sequence[Path], documents: int) -> list[tuple[int, Path]]:
    """The pieces of all shares in the order of the corpus, each with the ordinal of its unit's first document. Raises
    UserError when one is gone."""
    found = sorted((_place(piece), piece) for folder in shares for piece in (folder / "pieces").iterdir())
    ends = [((-1, 0, UNIT_DOCUMENTS), Path()), *found]
    for ((left, _, after), _), ((unit, first, _), _) in pairwise(ends):
        expected = (left + 1, 0) if after == UNIT_DOCUMENTS else (left, after)
        if (unit, first) != expected:
            raise UserError(_gap(shares, expected[0] * UNIT_DOCUMENTS + expected[1], unit * UNIT_DOCUMENTS + first))
    (unit, _, after), _ = ends[-1]
    if (there := unit * UNIT_DOCUMENTS + after) != documents:
        raise UserError(_gap(shares, there, documents))
    return [(unit * UNIT_DOCUMENTS, folder) for (unit, _, _), folder in found]


def _gap(shares: Sequence[Path], first: int, after: int) -> str:
    return (
        f"the pieces in {', '.join(map(str, shares))} lack documents {first} to {after}: delete these folders to scan "
        "again"
    )


def _place(piece: Path) -> tuple[int, int, int]:
    """Unit, first and next document of a piece, by its name."""
    unit, first, after = map(int, piece.name.split("-"))
    return unit, first, after


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


def _ordinals(documents: Path, stats: FeatureStats) -> dict[str, int]:
    """Place in documents.parquet of each document that some feature has a span in; of several equal ones the first."""
    wanted = pa.array(id_names(np.unique(stats.id_fn[stats.id_fn != NO_ID])), pa.string())
    found: dict[str, int] = {}
    file = pq.ParquetFile(documents)
    for batch in file.iter_batches(batch_size=DOCUMENTS_PER_GROUP, columns=["index", "id"]):
        held = batch.filter(pc.is_in(batch["id"], value_set=wanted))
        for place, name in zip(held["index"].to_pylist(), held["id"].to_pylist(), strict=True):
            found.setdefault(name, place)
    return found


def _shifted(files: Iterable[tuple[int, Path]], column: str, rows: int) -> Iterator[pa.Table]:
    """The rows of several files, a few at a time; to a column of ordinals the file's number is added."""
    for by, file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=rows):
            place = batch.schema.get_field_index(column)
            yield pa.Table.from_batches([batch]).set_column(place, column, pc.add(batch[column], by))


def _write(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], rows_per_group: int) -> None:
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
