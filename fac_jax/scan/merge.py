"""`fac scan merge INTO FROM FROM...`: several scans to one, without running the model.

What is merged are either the shares of one data set, scanned by several commands in run directories of their own: the
result is what one command would have made, byte by byte. Or finished scans of different data sets, made with the same
model and SAE: the result is the scan of all their documents together. In whatever order they are named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fac_jax.errors import UserError
from fac_jax.plain import to_plain
from fac_jax.runs import writing_folder
from fac_jax.scan import parts
from fac_jax.scan.parts import Counts, Identity
from fac_jax.scan.spans import merge_summaries
from fac_jax.scan.tables import summary_of
from fac_jax.scan.tally import id_numbers


def merge_scans(into: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Write the scan of all of `folders` into `into`, which must be empty or absent; returns its counts.

    Raises UserError for a folder that holds no scan, for shares that are not all there, for scans of different models,
    SAEs or settings, and for data sets that have documents in common, where that can be seen.
    """
    finished = [folder for folder in folders if (folder / "scan.json").exists()]
    for folder in folders:
        if folder not in finished and not parts.shares_folder(folder).is_dir():
            raise UserError(f"{folder} holds neither a finished scan (scan.json) nor shares of one (shares/)")
    if finished and len(finished) < len(folders):
        rest = ", ".join(str(folder) for folder in folders if folder not in finished)
        raise UserError(f"{finished[0]} is a finished scan and {rest} is not: finish it first with `fac scan`")
    with writing_folder(into) as temporary:
        if finished:
            _merge_finished(temporary, finished)
        else:
            shares = [share for folder in folders for share in sorted(parts.shares_folder(folder).glob("*-of-*"))]
            parts.finish(temporary, parts.shares_of(shares))
    counts: dict[str, Any] = json.loads((into / "scan.json").read_text(encoding="utf-8"))["counts"]
    return counts


def _merge_finished(out: Path, folders: Sequence[Path]) -> None:
    products = {folder: json.loads((folder / "scan.json").read_text(encoding="utf-8")) for folder in folders}
    identities = {folder: parts.read_identity(folder) for folder in folders}
    ordered = sorted(folders, key=lambda folder: _data(identities[folder]))
    found = [identity for folder in ordered if (identity := identities[folder]) is not None]
    for folder, identity in zip(ordered, found, strict=True):
        ours, its = (to_plain(replace(one, name="", data="")) for one in (found[0], identity))
        if different := {name: its[name] for name in its if its[name] != ours[name]}:
            was = {name: ours[name] for name in different}
            raise UserError(f"{folder} was scanned with {different}, {ordered[0]} with {was}: scan one of them again")
    for left, right in zip(found, found[1:], strict=False):
        if left.data == right.data:
            raise UserError(f"data set {left.name!r} is named twice: its documents would count twice")
    first = found[0]
    if first.peaks != "none":
        _check_disjoint(ordered)
    identity = replace(first, name="+".join(one.name for one in found), data="+".join(one.data for one in found))
    counts = [Counts(**{name: products[folder]["counts"][name] for name in to_plain(Counts())}) for folder in ordered]
    offsets = np.cumsum([0, *(one.documents for one in counts)]).tolist()
    summaries = (
        summary_of(pq.read_table(folder / "features.parquet"), first.top_spans) for folder in ordered
    )  # fmt: skip
    parts.write_product(
        out, identity, reduce(Counts.plus, counts), reduce(merge_summaries, summaries),
        list(zip(offsets, ordered, strict=False)), [row for folder in ordered for row in products[folder]["skipped"]],
    )  # fmt: skip


def _data(identity: Identity | None) -> str:
    assert identity is not None
    return identity.data


def _check_disjoint(folders: Sequence[Path]) -> None:
    """Raise UserError when documents are in two scans: their features would be counted twice."""
    numbers: list[np.ndarray] = []
    for folder in folders:
        ids = pq.read_table(folder / "documents.parquet", columns=["id"])["id"].to_pylist()
        numbers.append(np.unique(id_numbers(ids)))
    every = np.concatenate(numbers)
    if twice := len(every) - len(np.unique(every)):
        raise UserError(
            f"{twice:,} documents are in more than one of {', '.join(map(str, folders))}, and would count twice: list "
            "the sources in one data set and scan that, where each content counts once"
        )
