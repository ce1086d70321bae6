"""Coverage of real scans: before synthesis (what the seed misses), and after it (what the new samples add).

`coverage` reads the anchor's and the seed's scans, the relevant features and the explanations; it writes
`coverage.json`, `coverage.parquet` (one row per threshold) and `missing.parquet` (what is synthesised or selected for).
`evaluate` reads the scans of the kept and of the random generations as well, and writes `coverage.json` with one row
per set and threshold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int
from scipy.sparse import csr_array, vstack

from fac_jax.config.file import Config
from fac_jax.coverage import fac as arithmetic
from fac_jax.coverage.validity import validity
from fac_jax.errors import UserError
from fac_jax.features.judge import relevant_features, what_makes_relevant
from fac_jax.runs import write_text, writing
from fac_jax.scan.product import Scan, load_scans

CURVE_POINTS = 25
MISSING = pa.schema(
    {
        "feature": pa.int32(), "anchor_peak": pa.float32(), "anchor_documents": pa.int64(),
        "top_document": pa.string(), "explanation": pa.string(),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """Documents whose coverage is measured: their peaks [n, features] and lengths [n] in content tokens."""

    peaks_nf: csr_array
    tokens_n: Int[np.ndarray, " n"]

    def plus(self, other: Samples) -> Samples:
        """Both together."""
        peaks = csr_array(vstack([self.peaks_nf, other.peaks_nf], format="csr"))
        return Samples(peaks, np.concatenate([self.tokens_n, other.tokens_n]))

    def only(self, rows: Int[np.ndarray, " chosen"]) -> Samples:
        """Some of the documents."""
        return Samples(self.peaks_nf[rows], self.tokens_n[rows])


def samples(scan: Scan) -> Samples:
    """All documents of a scan."""
    return Samples(scan.peaks_nf, scan.content_tokens_n)


def coverage(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: what the seed covers of what the anchor shows could be covered, at every threshold.

    Raises UserError when no feature is relevant, or the scans and the relevance are not of one SAE.
    """
    names = config.coverage.anchor, config.coverage.seed
    anchor, seed = load_scans(*(inputs[f"scan:{name}"] for name in names))
    relevant_f = relevant_features(inputs["relevance"], anchor)
    if not relevant_f.any():
        raise UserError(
            f"no feature is relevant to the task {config.judge.task!r}, so there is nothing to cover: "
            + what_makes_relevant(inputs["relevance"])
        )
    rows = [before(config, relevant_f, samples(anchor), samples(seed), threshold) for threshold in thresholds(config)]
    chosen = next(row for row in rows if row["threshold"] == config.coverage.threshold)
    missing = missing_rows(relevant_f, anchor, seed, config.coverage.threshold, _explanations(inputs["explanations"]))
    with writing(out / "missing.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(missing, MISSING), temporary)
    with writing(out / "coverage.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist([_flat(row) for row in rows]), temporary)
    could_f = relevant_f & arithmetic.active(anchor.peaks_nf, config.coverage.threshold)
    product = {
        "anchor": _set(anchor), "seed": _set(seed), "sae": anchor.identity.sae, "acts": anchor.identity.acts,
        "threshold": config.coverage.threshold, "chosen": chosen, "sweep": rows,
        "curves": {scan.identity.name: curve(scan, could_f, config.coverage.threshold) for scan in (anchor, seed)},
        "validity": {
            scan.identity.name: validity(
                relevant_f, scan.peaks_nf, scan.content_tokens_n, scan.features("tokens")["tokens"].to_numpy(),
                config.coverage.threshold,
            )
            for scan in (anchor, seed)
        },
    }  # fmt: skip
    write_text(out / "coverage.json", json.dumps(product, indent=1, allow_nan=False))
    return {name: chosen[name] for name in chosen if name != "length_matched"}


def curve(scan: Scan, could_f: Bool[np.ndarray, " f"], threshold: float) -> dict[str, list[float]]:
    """The fac that so many of a scan's documents have in expectation, for numbers of documents up to all of them."""
    total = scan.peaks_nf.shape[0]
    if not could_f.any() or not total:
        return {"documents": [], "fac": []}
    sizes = arithmetic.curve_sizes(total, CURVE_POINTS)
    documents_f = arithmetic.active_documents(scan.peaks_nf, threshold)
    covered = arithmetic.expected_covered(documents_f[could_f], total, sizes)
    return {"documents": sizes.tolist(), "fac": (covered / np.count_nonzero(could_f)).tolist()}


def evaluate(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: coverage of the seed alone, with the random and with the kept generations, at every threshold."""
    names = config.coverage.anchor, config.coverage.seed, "random", "kept"
    scans = dict(zip(names, load_scans(*(inputs[f"scan:{name}"] for name in names)), strict=True))
    anchor, seed, random, kept = (samples(scans[name]) for name in names)
    relevant_f = relevant_features(inputs["relevance"], scans[config.coverage.anchor])
    rows = []
    for threshold in thresholds(config):
        for name, added, rival in (("seed", None, None), ("seed+random", random, kept), ("seed+kept", kept, random)):
            rows.append({"set": name, **after(config, relevant_f, anchor, seed, threshold, added, rival)})
    product = {
        "threshold": config.coverage.threshold, "rows": rows,
        "sets": {name: _set(scan) for name, scan in scans.items()},
    }  # fmt: skip
    write_text(out / "coverage.json", json.dumps(product, indent=1, allow_nan=False))
    shown = ("documents", "fac", "raw_fac_ratio", "target_hit_rate")
    chosen = [row for row in rows if row["threshold"] == config.coverage.threshold]
    return {row["set"]: {name: row[name] for name in shown} for row in chosen}


def thresholds(config: Config) -> list[float]:
    """The sweep with the chosen threshold in it, ascending."""
    return sorted({*config.coverage.sweep, config.coverage.threshold})


def before(
    config: Config, relevant_f: Bool[np.ndarray, " f"], anchor: Samples, seed: Samples, threshold: float
) -> dict[str, Any]:
    """One row of the sweep: the seed against the anchor.

    `length_matched` is the fac of random pieces of the anchor that are as long as the seed: a seed below it is less
    diverse than its size explains.
    """
    anchor_f, seed_f = arithmetic.active(anchor.peaks_nf, threshold), arithmetic.active(seed.peaks_nf, threshold)
    missing_f = arithmetic.missing(relevant_f, anchor_f, seed_f)
    drawn = _draws(config, anchor, seed)
    interval = arithmetic.bootstrap_fac(
        relevant_f, anchor_f, seed.peaks_nf, threshold, config.coverage.bootstrap_draws, config.run.seed
    )
    return {
        "threshold": threshold,
        "relevant_features": int(relevant_f.sum()),
        "anchor_features": int((relevant_f & anchor_f).sum()),
        "seed_features": int((relevant_f & seed_f).sum()),
        "missing_features": int(missing_f.sum()),
        "fac": arithmetic.fac(relevant_f, anchor_f, seed_f),
        "fac_low": interval and interval[0],
        "fac_high": interval and interval[1],
        "raw_fac_ratio": arithmetic.raw_fac_ratio(relevant_f, anchor_f, seed_f),
        "fac_freq": arithmetic.fac_freq(relevant_f, anchor_f, seed.peaks_nf, threshold),
        "fac_magnitude": arithmetic.fac_magnitude(relevant_f, anchor_f, seed.peaks_nf, threshold),
        "length_matched": {
            "tokens": int(min(anchor.tokens_n.sum(), seed.tokens_n.sum())),
            **_spread([arithmetic.fac(relevant_f, anchor_f, arithmetic.active(d.peaks_nf, threshold)) for d in drawn]),
        },
    }


def after(
    config: Config,
    relevant_f: Bool[np.ndarray, " f"],
    anchor: Samples,
    seed: Samples,
    threshold: float,
    added: Samples | None = None,
    rival: Samples | None = None,
) -> dict[str, Any]:
    """One row of the evaluation: the seed with `added`; the target hit rate is that of `added` alone.

    `length_matched` is the fac with the longer of `added` and `rival` cut to the other's length.
    """
    whole = seed if added is None else seed.plus(added)
    anchor_f, seed_f, whole_f = (arithmetic.active(one.peaks_nf, threshold) for one in (anchor, seed, whole))
    row: dict[str, Any] = {
        "threshold": threshold,
        "documents": whole.peaks_nf.shape[0],
        "tokens": int(whole.tokens_n.sum()),
        "fac": arithmetic.fac(relevant_f, anchor_f, whole_f),
        "raw_fac_ratio": arithmetic.raw_fac_ratio(relevant_f, anchor_f, whole_f),
        "fac_freq": arithmetic.fac_freq(relevant_f, anchor_f, whole.peaks_nf, threshold),
        "fac_magnitude": arithmetic.fac_magnitude(relevant_f, anchor_f, whole.peaks_nf, threshold),
        "target_hit_rate": None,
        "length_matched": None,
    }
    if added is None or rival is None:
        return row
    missing_f = arithmetic.missing(relevant_f, anchor_f, seed_f)
    row["target_hit_rate"] = arithmetic.target_hit_rate(missing_f, arithmetic.active(added.peaks_nf, threshold))
    seen = [seed_f | arithmetic.active(draw.peaks_nf, threshold) for draw in _draws(config, added, rival)]
    row["length_matched"] = {
        "tokens": int(min(added.tokens_n.sum(), rival.tokens_n.sum())),
        **_spread([arithmetic.fac(relevant_f, anchor_f, seen_f) for seen_f in seen]),
    }
    return row


def missing_rows(
    relevant_f: Bool[np.ndarray, " f"],
    anchor: Scan,
    seed: Scan,
    threshold: float,
    explanations: Mapping[int, str | None],
) -> list[dict[str, Any]]:
    """Missing features, those with the highest anchor peak first, with the document that shows the peak."""
    active_f, seed_f = (arithmetic.active_documents(scan.peaks_nf, threshold) for scan in (anchor, seed))
    missing = np.flatnonzero(arithmetic.missing(relevant_f, active_f > 0, seed_f > 0))
    columns = anchor.peaks_nf[:, missing].tocsc()
    rows = []
    for index, feature in enumerate(missing.tolist()):
        span = slice(columns.indptr[index], columns.indptr[index + 1])
        documents, peaks = columns.indices[span], columns.data[span]
        # Equal peaks: the smallest document id, so that the order of the corpus does not matter.
        top = min(np.flatnonzero(peaks == peaks.max()), key=lambda at: anchor.ids_n[documents[at]])
        rows.append({
            "feature": feature, "anchor_peak": float(peaks[top]), "anchor_documents": int(active_f[feature]),
            "top_document": str(anchor.ids_n[documents[top]]), "explanation": explanations.get(feature),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (-row["anchor_peak"], row["feature"]))


def _draws(config: Config, longer: Samples, shorter: Samples) -> list[Samples]:
    """Random pieces of the first set with as many tokens as the second has, or all of it when it has no more."""
    budget, draws, seed = int(shorter.tokens_n.sum()), config.coverage.length_match_draws, config.run.seed
    return [longer.only(rows) for rows in arithmetic.draws_of_length(longer.tokens_n, budget, draws, seed)]


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and 5% and 95% quantiles of a figure over the draws; None where it is undefined."""
    known = [value for value in values if value is not None]
    if not known:
        return {"draws": len(values), "fac": None, "low": None, "high": None}
    low, high = np.quantile(known, [0.05, 0.95]).tolist()
    return {"draws": len(values), "fac": float(np.mean(known)), "low": low, "high": high}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    matched = {f"length_matched_{name}": value for name, value in row["length_matched"].items()}
    return {**{name: value for name, value in row.items() if name != "length_matched"}, **matched}


def _set(scan: Scan) -> dict[str, Any]:
    return {"name": scan.identity.name, "documents": len(scan.ids_n), "tokens": int(scan.content_tokens_n.sum())}


def _explanations(folder: Path) -> dict[int, str | None]:
    table = pq.read_table(folder / "explanations.parquet", columns=["feature", "explanation"])
    return dict(zip(table["feature"].to_pylist(), table["explanation"].to_pylist(), strict=True))
