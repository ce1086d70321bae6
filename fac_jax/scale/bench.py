"""`fac bench sae`: the training step beside published ones, in one run, with the floor that no step can go below.

Every contender runs in a process of its own, one at a time and in rounds, so that a machine that slows down slows all
of them; what counts is the median over all rounds. All get the same shapes, the same kind of rows, the same matmul type
and the same allocator settings. Peers run in the Python that `--peers-python` names (`launch/bench.sh` makes one);
a peer that is not installed there is named in the table, not left out in silence.

The floor is the encoder's matmul, 2 x batch x d_model x features operations, at the highest rate that any library
reached here for such a matmul in the same run: every exact Top-K step must do it. Writes a table, and JSON to `--out`.
Everything runs on the CPU.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from fac_jax.errors import UserError
from fac_jax.plain import suggest, to_plain
from fac_jax.runs import versions, write_text

OURS = "fac_jax"
PEERS = ("official", "sparsify", "sae_lens", "dictionary_learning")
"""Published steps; `hand_tuned` is not one of them."""
NAMES = (OURS, "hand_tuned", *PEERS)
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES")
"""Beginnings of the variables that tune glibc's allocator: as launch/allocator.sh sets them, for every contender."""
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


@dataclass
class Result:
    """What one contender did at one shape."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    version: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    absent: str | None = None
    """Why it did not run."""

    @property
    def median_s(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def main(arguments: Sequence[str]) -> int:
    """`fac bench sae [--shapes ...]`; returns the exit status."""
    what, *flags = arguments if arguments else ("",)
    if what in ("-h", "--help"):
        what, flags = "sae", ["--help"]
    if what != "sae":
        raise UserError(f"fac bench measures 'sae', not {what!r}{suggest(what, ['sae'])}: run `fac bench sae`")
    bench = tyro.cli(Bench, prog="fac bench sae", description=(__doc__ or "").partition("\n\n")[2], args=flags)
    report = measure(bench)
    print_report(report)
    if bench.out is not None:
        write_text(Path(bench.out), json.dumps(report, indent=1) + "\n")
    return 0


def measure(bench: Bench) -> dict[str, Any]:
    """Run all contenders at all shapes; the report as plain values, a list of rows per shape."""
    shapes = [read_shape(text) for text in bench.shapes]
    for name in bench.contenders:
        if name not in NAMES:
            raise UserError(f"contender {name!r} is unknown{suggest(name, NAMES)}; choose from {', '.join(NAMES)}")
    return {
        "command": "fac bench sae " + " ".join(sys.argv[3:]),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "allocator": {name: value for name, value in sorted(os.environ.items()) if name.startswith(ALLOCATOR)},
        "bench": to_plain(bench),
        "tables": [_measure_shape(bench, shape) for shape in shapes],
    }


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
                _add(result, _run(bench, shape, name, parts=index == bench.rounds - 1))
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


def _add(result: Result, found: Mapping[str, Any]) -> None:
    result.absent = found.get("absent")
    if result.absent is None:
        result.seconds += found["seconds"]
        result.peak_bytes = max(result.peak_bytes, found["peak_bytes"])
        result.version = found["version"]
        result.parts = found.get("parts", {})


def _run(bench: Bench, shape: Shape, name: str, parts: bool) -> dict[str, Any]:
    """One contender, one round. One that runs out of memory or time, or falls over, is absent with the reason."""
    asked = {"contender": name, **to_plain(shape), "k": bench.k, "dtype": bench.dtype}
    asked |= {"warm_up": WARM_UP, "steps": bench.steps}
    if name == OURS:
        program = [sys.executable, "-m", "fac_jax.scale.sae_contender"]
    else:
        program = [bench.peers_python, str(Path(__file__).with_name("torch_contenders.py"))]
    return run_json([*program, json.dumps({**asked, "parts": parts})], bench.timeout_s)


def matmul_rates(bench: Bench, shape: Shape) -> dict[str, float]:
    """Operations a second of the encoder's matmul in jax and in torch (0 where torch is not installed)."""
    sizes = [shape.batch, shape.d_model, min(shape.features, RATE_FEATURES)]
    found = {}
    for library, python in (("jax", sys.executable), ("torch", bench.peers_python)):
        script = Path(__file__).with_name("matmul_rate.py")
        answer = run_json([python, str(script), json.dumps([library, bench.dtype, *sizes])], bench.timeout_s)
        found[library] = answer.get("flops_per_second", 0.0)
    return found


def run_json(command: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """The JSON object on the last line that a program prints; {"absent": reason} when it does not come."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return {"absent": f"took more than {timeout_s:g} s"}
    except OSError as error:
        return {"absent": f"{command[0]} cannot be run ({error.strerror})"}
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1][:300]
        return {"absent": f"ended with status {done.returncode}: {said}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_report(report: Mapping[str, Any]) -> None:
    """The tables, for people."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    bench = report["bench"]
    console.print(f"{report['command']}  ({report['date']}, {report['cores']} cores of {report['cpu']})")
    tuned = ", ".join(f"{name}={value}" for name, value in report["allocator"].items())
    console.print(f"allocator: {tuned or 'glibc as it comes (launch/allocator.sh tunes it)'}")
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
