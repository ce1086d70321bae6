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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fac_jax.errors import UserError, first_line
from fac_jax.packing import PackedBatch
from fac_jax.plain import from_plain, to_plain
from fac_jax.runs import write_text
from fac_jax.scan.peaks import Acts, BatchPeaks
from fac_jax.scan.spans import EDGES, Summary, empty_summary, merge_summaries
from fac_jax.scan.tables import (
    DOCUMENTS,
    DOCUMENTS_PER_GROUP,
    FEATURES,
    FEATURES_PER_GROUP,
    PEAKS,
    PEAKS_PER_GROUP,
    document_row,
    features_table,
    ordinals_of,
    peak_rows,
    shifted,
    summary_of,
    write_table,
)
from fac_jax.scan.units import UNIT_DOCUMENTS, Cursor, Share


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
    files: str | None = None
    """Digest of the fingerprints of the data set's files; None in a scan that was begun before it was noted."""


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
    if there is None:
        return
    was, now = _differences(there, identity)
    if was:
        raise UserError(
            f"the scan in {out} was made with {was}, the config asks {now}: delete the folder to scan again, "
            "or set another run.dir to keep both"
        )


def check_whole(out: Path, identity: Identity) -> None:
    """Raise UserError when a finished scan in `out` lacks a table, or has one without its end."""
    for name in ("features", *(("documents", "peaks") if identity.peaks != "none" else ())):
        try:
            pq.read_metadata(out / f"{name}.parquet")
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{out / name}.parquet is missing or damaged ({first_line(error)}): delete {out} to scan again"
            ) from None


def _differences(one: Identity, other: Identity) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two identities disagree on, as each has it; files that one of them did not note may be the other's."""
    if one.files is None or other.files is None:
        one, other = replace(one, files=None), replace(other, files=None)
    mine, its = to_plain(one), to_plain(other)
    names = [name for name in mine if mine[name] != its[name]]
    return {name: mine[name] for name in names}, {name: its[name] for name in names}


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
    write_table(folder / "state.parquet", table.schema, [table], FEATURES_PER_GROUP)


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


def shares_of(folders: Iterable[Path]) -> list[Path]:
    """Folders of all the shares of one scan, in order, wherever they lie. Raises UserError for one that is not
    finished or not there, and for shares of different scans."""
    found: dict[int, tuple[Path, State]] = {}
    for folder in folders:
        state = read_state(folder)
        if state is None or not state.finished:
            raise UserError(f"{folder} is not finished: run its command again to go on with it")
        for there, other in found.values():
            was, its = _differences(other.identity, state.identity)
            if was:
                raise UserError(
                    f"{folder} is a share of another scan than {there}, with {its} instead of {was}: scan one of them "
                    "again (`files` stands for the content of the data set's files)"
                )
            if state.share.count != other.share.count:
                raise UserError(
                    f"{folder} is one of {state.share.count} shares, {there} one of {other.share.count}: scan one of "
                    "them again with the other's number"
                )
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
            write_table(out / name, schema, shifted([(by, folder / name) for by, folder in pieces], column, rows), rows)
        ordinals = ordinals_of(out / "documents.parquet", summary.stats)
    write_table(out / "features.parquet", FEATURES, [features_table(summary, ordinals)], FEATURES_PER_GROUP)
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
