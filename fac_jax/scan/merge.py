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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fac_jax.errors import UserError
from fac_jax.plain import to_plain
from fac_jax.runs import writing_folder
from fac_jax.scan import parts
from fac_jax.scan.parts import Counts
from fac_jax.scan.product import Scan, load_scan
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
    scans = sorted(map(load_scan, folders), key=lambda scan: (scan.identity.data, scan.identity.files or ""))
    found = [scan.identity for scan in scans]
    for scan, identity in zip(scans, found, strict=True):
        ours, its = (to_plain(replace(one, name="", data="", files=None)) for one in (found[0], identity))
        if different := {name: its[name] for name in its if its[name] != ours[name]}:
            was = {name: ours[name] for name in different}
            raise UserError(
                f"{scan.folder} was scanned with {different}, {scans[0].folder} with {was}: scan one of them again"
            )
    for left, right in pairwise(found):
        if left.data == right.data and (left.files is None or left.files == right.files):
            raise UserError(f"data set {left.name!r} is named twice: its documents would count twice")
    first = found[0]
    if first.peaks != "none":
        _check_disjoint(scans)
    files = [one.files for one in found if one.files is not None]
    identity = replace(
        first, name="+".join(one.name for one in found), data="+".join(one.data for one in found),
        files="+".join(files) if len(files) == len(found) else None,
    )  # fmt: skip
    counts = [Counts(**{name: scan.counts[name] for name in to_plain(Counts())}) for scan in scans]
    offsets = np.cumsum([0, *(one.documents for one in counts)]).tolist()
    summaries = (summary_of(scan.features(), first.top_spans) for scan in scans)
    parts.write_product(
        out, identity, reduce(Counts.plus, counts), reduce(merge_summaries, summaries),
        [(by, scan.folder) for by, scan in zip(offsets, scans, strict=False)],
        [row for scan in scans for row in scan.skipped()],
    )  # fmt: skip


def _check_disjoint(scans: Sequence[Scan]) -> None:
    """Raise UserError when documents are in two scans: their features would be counted twice."""
    numbers = [np.unique(id_numbers(scan.documents("id")["id"].to_pylist())) for scan in scans]
    every = np.concatenate(numbers)
    folders = [str(scan.folder) for scan in scans]
    if twice := len(every) - len(np.unique(every)):
        raise UserError(
            f"{twice:,} documents are in more than one of {', '.join(folders)}, and would count twice: list "
            "the sources in one data set and scan that, where each content counts once"
        )
