"""`fac coverage A --vs B`: what either of two scanned data sets covers that the other does not, and what neither does.

Reads two finished scans of the same model and SAE; statistics suffice, single documents are not needed. Compares all
features of the SAE, or those that a `relevance` product calls relevant. Writes, where asked, `compare.json` (figures),
`compare.parquet` (a row per feature, with spans of the set that covers it); the command line adds a figure of the
curves, `compare.svg`, and prints it all in short.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int, Int64
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fac_jax.coverage.fac import curve_sizes, expected_covered
from fac_jax.errors import UserError
from fac_jax.features.judge import relevant_features
from fac_jax.runs import write_text, writing
from fac_jax.scan.product import Scan, load_scans
from fac_jax.scan.spans import EDGES

SIDES = ("both", "only_a", "only_b", "neither")
SPAN = pa.struct({"score": pa.float32(), "before": pa.string(), "token": pa.string(), "after": pa.string()})
COMPARED = pa.schema(
    {
        "feature": pa.int32(), "side": pa.string(), "a_max": pa.float32(), "b_max": pa.float32(),
        "a_documents_low": pa.int64(), "a_documents_high": pa.int64(),
        "b_documents_low": pa.int64(), "b_documents_high": pa.int64(), "spans": pa.list_(SPAN),
    }
)  # fmt: skip
CURVE_POINTS = 60
SHOWN = 10
"""Features of each side that are printed."""


def compare(
    folder_a: Path, folder_b: Path, threshold: float, relevance: Path | None = None, spans: int = 3
) -> tuple[dict[str, Any], pa.Table]:
    """Figures, and a row per feature: those of `relevance`, or all of the SAE.

    A feature is covered where its maximum exceeds the threshold, which is exact at any threshold. How many documents
    exceed it is exact at an edge of the scans' histograms, and otherwise between two numbers; what is expected of fewer
    documents takes the lower one. Raises UserError for scans that cannot be compared.
    """
    if not threshold >= 0:
        raise UserError(f"the threshold is {threshold}; peaks are at least 0, so it must be at least 0")
    if spans < 0:
        raise UserError(f"{spans} passages of each feature were asked for; name a number of at least 0")
    if relevance is not None and not (relevance / "relevance.json").is_file():
        raise UserError(
            f"{relevance} holds no relevance product (no relevance.json): name the folder `relevance` of a run, which "
            "`fac judge CONFIG` makes"
        )
    a, b = load_scans(folder_a, folder_b)
    asked_f = np.ones(a.identity.features, bool) if relevance is None else relevant_features(relevance, a)
    asked = np.flatnonzero(asked_f)
    max_a, max_b = (scan.features("max")["max"].to_numpy()[asked] for scan in (a, b))
    side = _sides(max_a, max_b, threshold)
    counts_a, counts_b = (documents_above(scan, threshold) for scan in (a, b))
    figures = {
        "features": len(asked), "relevance": None if relevance is None else str(relevance),
        "sae": a.identity.sae, "acts": a.identity.acts,
        **_counts(max_a, max_b, threshold),
        "a": _set(a, counts_a[0][asked], max_a > threshold), "b": _set(b, counts_b[0][asked], max_b > threshold),
        "same_documents": _same_documents(a, b, counts_a[0][asked], counts_b[0][asked]),
        "sweep": [_counts(max_a, max_b, level) for level in sorted({0.0, threshold, *EDGES.tolist()})],
        "curves": [_curve(scan, counts[0][asked]) for scan, counts in ((a, counts_a), (b, counts_b))],
    }  # fmt: skip
    table = pa.table(
        {
            "feature": asked, "side": side, "a_max": max_a, "b_max": max_b,
            "a_documents_low": counts_a[0][asked], "a_documents_high": counts_a[1][asked],
            "b_documents_low": counts_b[0][asked], "b_documents_high": counts_b[1][asked],
            "spans": _spans(a, b, asked, side, spans),
        }
    ).cast(COMPARED)  # fmt: skip
    return figures, table


def _sides(max_a: Float32[np.ndarray, " m"], max_b: Float32[np.ndarray, " m"], threshold: float) -> np.ndarray:
    """Which of SIDES each feature is on."""
    covers_a, covers_b = max_a > threshold, max_b > threshold
    return np.select([covers_a & covers_b, covers_a, covers_b], SIDES[:3], SIDES[3])


def _counts(max_a: Float32[np.ndarray, " m"], max_b: Float32[np.ndarray, " m"], threshold: float) -> dict[str, Any]:
    """Features on each side, at one threshold."""
    side = _sides(max_a, max_b, threshold)
    return {"threshold": threshold, **{name: int((side == name).sum()) for name in SIDES}}


def documents_above(scan: Scan, threshold: float) -> tuple[Int64[np.ndarray, " f"], Int64[np.ndarray, " f"]]:
    """At least and at most so many documents of each feature have a peak above `threshold`, strictly.

    Both are equal where the threshold is 0 or an edge of the histogram.
    """
    columns = scan.features("documents", "histogram", "max")
    features = columns.num_rows
    histogram_fh = columns["histogram"].combine_chunks().flatten().to_numpy().reshape(features, -1)
    at_least_fe = np.cumsum(histogram_fh[:, ::-1], axis=1)[:, ::-1]  # [:, j]: peaks in bin j and above
    documents_f, max_f = columns["documents"].to_numpy(), columns["max"].to_numpy()
    if threshold == 0:
        return documents_f, documents_f
    place = int(np.searchsorted(EDGES, threshold, side="left"))  # EDGES[place - 1] < threshold <= EDGES[place]
    high_f = at_least_fe[:, place]
    if place < len(EDGES) and EDGES[place] == threshold:
        high_f = low_f = at_least_fe[:, place + 1]
    else:
        low_f = at_least_fe[:, place + 1] if place < len(EDGES) else np.zeros(features, np.int64)
    covered_f = max_f > threshold
    return np.where(covered_f, np.maximum(low_f, 1), 0), np.where(covered_f, high_f, 0)


def write(out: Path, figures: dict[str, Any], table: pa.Table) -> None:
    """`compare.json` and `compare.parquet` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with writing(out / "compare.parquet") as temporary:
        pq.write_table(table, temporary)
    write_text(out / "compare.json", json.dumps(figures, indent=1, allow_nan=False))


def printed(figures: dict[str, Any], table: pa.Table, unsafe: bool) -> Group:
    """What a terminal shows: the figures, and the strongest features of either side; passages only when `unsafe`."""
    a, b = figures["a"], figures["b"]
    what = "features" if figures["relevance"] is None else "relevant features"
    title = Text(f"peaks above {figures['threshold']:g}, of {figures['features']:,} {what}")
    sets = Table("", a["name"], b["name"], box=None)
    for name in ("documents", "content_tokens", "covered", "documents_for_half"):
        sets.add_row(name.replace("_", " "), *("–" if one[name] is None else f"{one[name]:,}" for one in (a, b)))
    same = figures["same_documents"]
    sets.add_row(f"covered by {same['documents']:,} documents, expected", *(f"{same[one]:,.0f}" for one in ("a", "b")))
    words = {
        "both": "both cover", "only_a": f"only {a['name']} covers", "only_b": f"only {b['name']} covers",
        "neither": "neither covers",
    }  # fmt: skip
    lines = [Text(""), *(Text(f"{words[name]}: {figures[name]:,}") for name in SIDES)]
    parts: list[Any] = [title, sets, *lines]
    for name, column in (("only_a", "a_max"), ("only_b", "b_max")):
        rows = table.filter(pa.array(np.asarray(table["side"]) == name)).sort_by([(column, "descending")])
        if rows.num_rows:
            best = Table("feature", "peak", "passage", box=None)
            for row in rows.slice(0, SHOWN).to_pylist():
                best.add_row(str(row["feature"]), f"{row[column]:.1f}", _passage(row["spans"], unsafe))
            parts += [Text(f"\n{words[name]}, highest first"), best]
    if not unsafe:
        parts.append(Text("\npassages are hidden, as they may be harmful: --show-unsafe prints them"))
    return Group(*parts)


def _passage(spans: list[dict[str, Any]], unsafe: bool) -> Text:
    if not spans or not unsafe:
        return Text("" if unsafe else "hidden")
    before, token, after = (" ".join(f"|{spans[0][name]}|".split())[1:-1] for name in ("before", "token", "after"))
    return Text.assemble(before, (token, "bold"), after)


def _set(scan: Scan, documents_f: Int[np.ndarray, " f"], covers_f: Bool[np.ndarray, " f"]) -> dict[str, Any]:
    """Size and reach of one side; documents_for_half: in expectation, so many of its own cover half of what it does."""
    total, covered = scan.counts["documents"], int(covers_f.sum())
    sizes = curve_sizes(total, 200)
    enough = expected_covered(documents_f, total, sizes) >= covered / 2 if covered else np.zeros(len(sizes), bool)
    return {
        "name": scan.identity.name, "documents": total, "content_tokens": scan.counts["content_tokens"],
        "covered": covered, "documents_for_half": int(sizes[np.argmax(enough)]) if enough.any() else None,
    }  # fmt: skip


def _curve(scan: Scan, documents_f: Int[np.ndarray, " f"]) -> dict[str, Any]:
    """Features that so many of a set's documents cover, in expectation, and the content tokens that these have."""
    total = scan.counts["documents"]
    sizes = curve_sizes(total, CURVE_POINTS)
    tokens = sizes * (scan.counts["content_tokens"] / max(total, 1))
    covered = expected_covered(documents_f, total, sizes)
    return {"documents": sizes.tolist(), "content_tokens": tokens.tolist(), "covered": covered.tolist()}


def _same_documents(a: Scan, b: Scan, documents_a: np.ndarray, documents_b: np.ndarray) -> dict[str, float]:
    """Features that either covers with as many documents as the smaller has, in expectation: size explains no more."""
    size = min(a.counts["documents"], b.counts["documents"])
    found = {
        name: float(expected_covered(documents_f, scan.counts["documents"], np.array([size]))[0])
        for name, scan, documents_f in (("a", a, documents_a), ("b", b, documents_b))
    }
    return {"documents": size, **found}


def _spans(a: Scan, b: Scan, asked: Int[np.ndarray, " m"], side: np.ndarray, count: int) -> pa.Array:
    """Of each feature asked the first spans of the scan that covers it, A's where both do; none where neither does."""
    from_b, from_neither = side == "only_b", side == "neither"
    found = [
        _spans_of(a, asked[~from_b & ~from_neither], count),
        _spans_of(b, asked[from_b], count),
        pa.array([[]], pa.list_(SPAN)),
    ]
    place = np.select(
        [from_neither, from_b],
        [len(found[0]) + len(found[1]), len(found[0]) + np.cumsum(from_b) - 1],
        np.cumsum(~from_b & ~from_neither) - 1,
    )
    return pa.concat_arrays(found).take(pa.array(place))


def _spans_of(scan: Scan, features: Int[np.ndarray, " m"], count: int) -> pa.Array:
    """The first `count` spans of each of these features, which rise; a row group is read at a time."""
    found, first = [pa.array([], pa.list_(SPAN))], 0
    with pq.ParquetFile(scan.folder / "features.parquet") as file:
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            here = features[(features >= first) & (features < after)] - first
            lists = file.read_row_group(group, columns=["spans"])["spans"].combine_chunks().take(pa.array(here))
            found.append(pc.list_slice(lists, 0, count).cast(pa.list_(SPAN)))
            first = after
    return pa.concat_arrays(found)
