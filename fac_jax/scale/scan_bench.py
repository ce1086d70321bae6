"""`fac bench scan`: what activates each feature of an SAE over a corpus, beside the ways others find it, in one run.

The conversations of a run file go through its backbone and an SAE of random directions (as many of its features are
active on a token as of a trained one: K of them, or with ReLU alone half of all). Beside us: the published code's way,
one prompt at a time, all ReLU activations, a Python loop over the active features; and delphi's latent cache, padded
batches and Top-K, which holds every activation in memory and writes them. Ours is run with either kind of activation,
so that each has its equal. Counted are real tokens, never padding; weights are loaded and programs compiled before the
clock starts. The peers are given token ids, our time includes reading, tokenizing and packing.

Contenders run in processes of their own and in rounds (contest.py). Prints a table and where our time goes, and writes
JSON to `--out`. Backbones compute in `--dtype`. Memory is the process's, or with `--device gpu` what it took of the
GPU's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.table import Table

from fac_jax.config.file import load_config
from fac_jax.errors import UserError
from fac_jax.plain import suggest
from fac_jax.scale.activations_bench import empty_folder, prepare, read_geometry, say
from fac_jax.scale.activations_table import Goal
from fac_jax.scale.contest import Device, Result, circumstances, print_circumstances, run_json

PEERS = {"official": "relu", "delphi": "topk"}
"""Who scans beside us, and the kind of activations that it counts."""
LABELS = {
    "official": "official way: one prompt at a time, all ReLU activations",
    "delphi": "delphi's latent cache: padded batches, Top-K",
    "fac_jax relu": "fac_jax, all ReLU activations",
    "fac_jax topk": "fac_jax, Top-K",
}
AIMED_AT, BOOKKEEPING = 10.0, 0.1


@dataclass(frozen=True)
class ScanBench:
    """What to measure, and against whom."""

    config: str = "configs/quickstart.yaml"
    """Run file whose backbone, layer and harvest.data are scanned."""
    documents: int = 64
    """Documents scanned, the first of the data set."""
    features: tuple[int, ...] = (4096, 65536)
    """Widths of the SAE."""
    k: int = 32
    """Features that a token keeps, with Top-K."""
    top: int = 10
    """Best documents kept of each feature."""
    peaks: str = "none"
    """What ours keeps of single documents: none or all, as scan.peaks."""
    geometry: str = "8x512"
    """Our batches: packed rows x tokens."""
    device: Device = "cpu"
    """Where to run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the backbone computes in."""
    peers: tuple[str, ...] = tuple(PEERS)
    """Who scans beside us: official, delphi."""
    peers_python: str = sys.executable
    """Python that has torch, transformers and delphi installed."""
    rounds: int = 2
    """Rounds; every contender runs once in each."""
    timeout_s: float = 1800.0
    """Seconds one contender may take for a round."""
    folder: str | None = None
    """Folder for the files in between; by default the system's for temporary files."""
    out: str | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        for name in ("documents", "k", "top", "rounds", "timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be more than 0")
        for peer in self.peers:
            if peer not in PEERS:
                raise UserError(f"peer {peer!r} is unknown{suggest(peer, PEERS)}; choose from {', '.join(PEERS)}")
        if self.peaks not in ("none", "all"):
            raise UserError(f"peaks is {self.peaks!r}; choose none or all")
        if narrow := [features for features in self.features if features < self.k]:
            raise UserError(f"features is {narrow[0]} and k {self.k}; an SAE needs at least as many features as k")
        read_geometry(self.geometry)


def measure(bench: ScanBench) -> dict[str, Any]:
    """Run all contenders at every width; the report as plain values."""
    report = circumstances("scan", bench)
    with TemporaryDirectory(prefix="fac-bench-", dir=bench.folder) as name:
        folder = Path(name)
        # In processes of their own: what this one holds would count as its children's peak memory.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            asked = pool.submit(prepare, load_config(bench.config), bench.documents, folder).result()
            for features in bench.features:
                pool.submit(make_sae, folder / str(features), asked, features, bench.k).result()
        report |= {"documents": asked["count"], "tokens": asked["tokens"], "layer": asked["layer"]}
        report["widths"] = [measure_width(bench, features, asked, folder) for features in bench.features]
    return report


def make_sae(folder: Path, asked: Mapping[str, Any], features: int, k: int) -> None:
    """An SAE of random unit directions, as our folder."""
    import jax.numpy as jnp
    import numpy as np

    from fac_jax.backbone.weights import open_model
    from fac_jax.sae.checkpoint import save_sae
    from fac_jax.sae.model import SAE

    width = open_model(asked["model"])[0].d_model
    w_fd = np.random.default_rng(0).normal(size=(features, width)).astype(np.float32)
    sae = SAE(jnp.asarray(w_fd / np.linalg.norm(w_fd, axis=1, keepdims=True)), jnp.zeros(features), jnp.zeros(width))
    card = {
        "layer": asked["layer"], "k": k, "variant": "topk", "model": "random", "model_digest": None, "rows": 0,
        "steps": 0, "metrics": {},
    }  # fmt: skip
    save_sae(folder, sae, card)


def measure_width(bench: ScanBench, features: int, asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Every contender with an SAE of one width."""
    sae = folder / str(features)
    given = {
        **asked, "sae_folder": str(sae), "sae": str(sae / "sae.safetensors"), "k": bench.k, "top": bench.top,
        "geometry": bench.geometry, "peaks": bench.peaks, "device": bench.device, "dtype": bench.dtype,
    }  # fmt: skip
    cases = {f"fac_jax {acts}": {**given, "acts": acts} for acts in ("topk", "relu")}
    cases |= {peer: {**given, "contender": peer} for peer in bench.peers}
    results = {name: Result() for name in cases}
    for index in range(bench.rounds):
        for name, case in cases.items():
            if results[name].absent is None:
                say(index, f"scan, {features} features, {name}")
                with empty_folder(folder / "scanned") as made:
                    program = [bench.peers_python, str(Path(__file__).with_name("torch_scan.py"))]
                    if name not in bench.peers:
                        program = [sys.executable, "-m", "fac_jax.scale.scan_contender"]
                    asking = {**case, "folder": str(made), "parts": index == bench.rounds - 1}
                    results[name].add(run_json([*program, json.dumps(asking)], bench.timeout_s, bench.device))
    return {"features": features, "rows": rows(results)}


def rows(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """One row per contender, ours first; a peer's ratio is ours of the same kind of activation to it."""
    table = []
    for name, result in results.items():
        row: dict[str, Any] = {"contender": name}
        if result.absent is None:
            ours = results.get(f"fac_jax {PEERS[name]}") if name in PEERS else None
            row |= {
                "tokens_per_second": result.rate, "median_s": result.median_s, "least_s": min(result.seconds),
                "most_s": max(result.seconds), "peak_gib": result.peak_bytes / 2**30, "version": result.version,
                "ahead": ours.rate / result.rate if ours is not None and ours.absent is None else None,
                "parts": result.parts, "active": result.active,
            }  # fmt: skip
        else:
            row["absent"] = result.absent
        table.append(row)
    return table


def print_report(report: Mapping[str, Any]) -> None:
    """The tables, for people."""
    console = print_circumstances(report)
    for width in report["widths"]:
        title = (
            f"scan of {report['documents']} documents, {report['tokens']:,} real tokens, layer {report['layer']}, SAE "
            f"of {width['features']:,} features"
        )
        columns = ("", "tokens/s", "seconds", "peak GiB", "we are ahead")
        table = Table(*columns, title=title, title_justify="left", box=None)
        for row in width["rows"]:
            name = LABELS[row["contender"]]
            if "absent" in row:
                table.add_row(name, f"absent: {row['absent']}")
                continue
            ahead = "" if row["ahead"] is None else f"{row['ahead']:.1f}x"
            seconds = f"{row['median_s']:.1f} ({row['least_s']:.1f} to {row['most_s']:.1f})"
            table.add_row(name, f"{row['tokens_per_second']:,.0f}", seconds, f"{row['peak_gib']:.1f}", ahead)
        console.print(table)
        for row in width["rows"]:
            if parts := row.get("parts"):
                whole = sum(parts.values())
                said = ", ".join(f"{name} {seconds:.1f} s ({seconds / whole:.0%})" for name, seconds in parts.items())
                console.print(f"  {row['contender']}, part by part: {said}")
        for goal in goals(width["rows"]):
            console.print("  " + goal.line())


def goals(found: list[dict[str, Any]]) -> list[Goal]:
    """What was aimed at beside what came out."""
    lines = []
    for row in found:
        if parts := row.get("parts"):
            share = parts["bookkeeping"] / sum(parts.values())
            lines.append(Goal(f"{row['contender']}: bookkeeping takes {{}}", share, BOOKKEEPING, True, True))
        if row.get("ahead") is not None:
            lines.append(Goal(f"{{}} as fast as {LABELS[row['contender']]}", row["ahead"], AIMED_AT))
    return lines
