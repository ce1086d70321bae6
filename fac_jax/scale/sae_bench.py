"""`fac bench sae`: the training step beside published ones, in one run, with the floor that no step can go below.

Contenders run in processes of their own and in rounds (contest.py), on the same shapes, the same kind of rows, the same
matmul type and the same allocator settings. Peers run in the Python that `--peers-python` names (`launch/bench.sh`
makes one).

The floor is the encoder's matmul, 2 x batch x d_model x features operations, at the highest rate that any library
reached here for such a matmul in the same run: every exact Top-K step must do it. Writes a table, and JSON to `--out`.
Memory is the process's, or with `--device gpu` what it took of the GPU's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from fac_jax.errors import UserError
from fac_jax.plain import suggest, to_plain
from fac_jax.scale.contest import Device, Result, circumstances, print_circumstances, run_json

OURS = "fac_jax"
PEERS = ("official", "sparsify", "sae_lens", "dictionary_learning")
"""Published steps; `hand_tuned` is not one of them."""
NAMES = (OURS, "hand_tuned", *PEERS)
WARM_UP = 4  # memory is still being faulted in during the first few steps
RATE_FEATURES = 16_384
"""Width at which the matmul rate is measured, at most: wider ones only need more memory."""


@dataclass(frozen=True)
class Bench:
    """What to measure, and against whom."""

    shapes: tuple[str, ...] = ("768x16384x1024", "2048x65536x1024", "4096x65536x512")
    """d_model x features x batch rows."""
    k: int = 32
    """Features kept per row."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the matmul's inputs; parameters are float32."""
    device: Device = "cpu"
    """Where to run."""
    contenders: tuple[str, ...] = NAMES
    """Who runs."""
    peers_python: str = sys.executable
    """Python that has torch and the peers installed."""
    steps: int = 4
    """Timed steps a round, after four that warm up."""
    rounds: int = 2
    """Rounds; every contender runs once in each."""
    timeout_s: float = 1800.0
    """Seconds one contender may take for a round."""
    out: str | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class Shape:
    """One SAE and batch."""

    d_model: int
    features: int
    batch: int

    @property
    def matmul_flops(self) -> int:
        """Operations of the encoder's matmul."""
        return 2 * self.batch * self.d_model * self.features


def measure(bench: Bench) -> dict[str, Any]:
    """Run all contenders at all shapes; the report as plain values, a list of rows per shape."""
    shapes = [read_shape(text) for text in bench.shapes]
    for name in bench.contenders:
        if name not in NAMES:
            raise UserError(f"contender {name!r} is unknown{suggest(name, NAMES)}; choose from {', '.join(NAMES)}")
    report = circumstances("sae", bench)
    return {**report, "tables": [_measure_shape(bench, shape) for shape in shapes]}


def read_shape(text: str) -> Shape:
    """`768x16384x1024`. Raises UserError for anything else."""
    numbers = text.split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise UserError(f"shape {text!r} must be d_model x features x batch rows, such as 768x16384x1024")
    return Shape(*map(int, numbers))


def _measure_shape(bench: Bench, shape: Shape) -> dict[str, Any]:
    results = {name: Result() for name in bench.contenders}
    rates: dict[str, float] = {}
    for index in range(bench.rounds):
        for name, found in matmul_rates(bench, shape).items():
            rates[name] = max(rates.get(name, 0.0), found)
        for name, result in results.items():
            if result.absent is None:
                print(f"{shape.d_model} x {shape.features}: round {index + 1}, {name}", file=sys.stderr, flush=True)
                result.add(_run(bench, shape, name, parts=index == bench.rounds - 1))
    if not any(rates.values()):
        raise UserError(
            "neither jax nor torch could multiply the encoder's matrices: there is no floor to compare with"
        )
    floor_s = shape.matmul_flops / max(rates.values())
    return {
        "shape": to_plain(shape),
        "matmul_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "floor_s": floor_s,
        "rows": rows(results, shape, floor_s),
    }


def rows(results: Mapping[str, Result], shape: Shape, floor_s: float) -> list[dict[str, Any]]:
    """One row per contender, fastest first; ratios are to the fastest published peer that ran."""
    ran = {name: result for name, result in results.items() if result.absent is None}
    best_peer_s = min((result.median_s for name, result in ran.items() if name in PEERS), default=None)
    table = [
        {
            "contender": name,
            "version": result.version,
            "tokens_per_second": shape.batch / result.median_s,
            "median_s": result.median_s,
            "least_s": min(result.seconds),
            "most_s": max(result.seconds),
            "to_best_peer": best_peer_s / result.median_s if best_peer_s else None,
            "floor_fraction": floor_s / result.median_s,
            "peak_gib": result.peak_bytes / 2**30,
            "parts": result.parts,
        }
        for name, result in sorted(ran.items(), key=lambda item: item[1].median_s)
    ]
    return table + [{"contender": name, "absent": one.absent} for name, one in results.items() if one.absent]


def _run(bench: Bench, shape: Shape, name: str, parts: bool) -> dict[str, Any]:
    """One contender, one round. One that runs out of memory or time, or falls over, is absent with the reason."""
    asked = {"contender": name, **to_plain(shape), "k": bench.k, "dtype": bench.dtype, "device": bench.device}
    asked |= {"warm_up": WARM_UP, "steps": bench.steps}
    if name == OURS:
        program = [sys.executable, "-m", "fac_jax.scale.sae_contender"]
    else:
        program = [bench.peers_python, str(Path(__file__).with_name("torch_contenders.py"))]
    return run_json([*program, json.dumps({**asked, "parts": parts})], bench.timeout_s, bench.device)


def matmul_rates(bench: Bench, shape: Shape) -> dict[str, float]:
    """Operations a second of the encoder's matmul in jax and in torch (0 where torch is not installed)."""
    sizes = [shape.batch, shape.d_model, min(shape.features, RATE_FEATURES)]
    found = {}
    for library, python in (("jax", sys.executable), ("torch", bench.peers_python)):
        script = Path(__file__).with_name("matmul_rate.py")
        asked = json.dumps([library, bench.device, bench.dtype, *sizes])
        answer = run_json([python, str(script), asked], bench.timeout_s, bench.device)
        found[library] = answer.get("flops_per_second", 0.0)
    return found


def print_report(report: Mapping[str, Any]) -> None:
    """The tables, for people."""
    console, bench = print_circumstances(report), report["bench"]
    for one in report["tables"]:
        shape = one["shape"]
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in one["matmul_gflops"].items())
        console.print(
            f"\nd_model {shape['d_model']:,}, {shape['features']:,} features, batch {shape['batch']:,}, "
            f"K {bench['k']}, {bench['dtype']}: the encoder's matmul alone takes {one['floor_s'] * 1e3:,.0f} ms "
            f"({rates} GFLOP/s)"
        )
        table = Table("step", "tokens/s", "ms", "to best peer", "of the floor", "peak GiB", box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in one["rows"]:
            if "absent" in row:
                continue
            ratio = "" if row["to_best_peer"] is None else f"{row['to_best_peer']:.2f}x"
            cells = f"{row['tokens_per_second']:,.0f}", f"{row['median_s'] * 1e3:,.0f}", ratio
            table.add_row(row["contender"], *cells, f"{row['floor_fraction']:.0%}", f"{row['peak_gib']:.1f}")
        console.print(table)
        for row in one["rows"]:
            if row.get("parts"):
                parts = ", ".join(f"{name} {seconds * 1e3:,.0f} ms" for name, seconds in row["parts"].items())
                console.print(f"{row['contender']}: {parts}")
            if "absent" in row:
                console.print(f"{row['contender']}: not measured, {row['absent']}")
