"""What the benchmarks share: contenders in processes of their own, what they answer, and where it was measured.

Every contender runs alone, and all of them in rounds, so that a machine that slows down slows all; what counts is the
median over rounds. Whoever cannot run, or falls over, is absent with the reason, never left out in silence.
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

from rich.console import Console

from fac_jax.errors import UserError
from fac_jax.plain import to_plain
from fac_jax.runs import versions

ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES")
"""Beginnings of the variables that tune glibc's allocator: as launch/allocator.sh sets them, for every contender."""


Device = Literal["cpu", "gpu"]
"""Where contenders compute: one NVIDIA GPU, or the processor."""
IDLE_LOAD = 0.5
"""Load average (running programs, over a minute) up to which a machine counts as idle."""


@dataclass
class Result:
    """What one contender did, over all rounds."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    version: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    count: int = 0
    """Tokens or rows of one measurement, where the contender counts them."""
    active: int = 0
    """Pairs of feature and document, or activations, that a scan found: those of one kind agree."""
    absent: str | None = None
    """Why it did not run."""

    @property
    def median_s(self) -> float:
        """Median seconds of a measurement."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """What it counted, a second."""
        return self.count / self.median_s

    def add(self, found: Mapping[str, Any]) -> None:
        """What it answered in one more round."""
        self.absent = found.get("absent")
        if self.absent is None:
            self.seconds += found["seconds"]
            self.peak_bytes = max(self.peak_bytes, found["peak_bytes"])
            self.version = found["version"]
            self.parts = found.get("parts", {})
            self.count = found.get("count", 0)
            self.active = found.get("active", 0)


def run_json(command: Sequence[str], timeout_s: float, device: Device = "cpu") -> dict[str, Any]:
    """The JSON object on the last line that a program prints; {"absent": reason} when it does not come."""
    environment = {**os.environ, "JAX_PLATFORMS": "cuda" if device == "gpu" else "cpu"}
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


def circumstances(what: str, settings: Any) -> dict[str, Any]:
    """The head of a report on `fac bench WHAT`, before it begins: command, date, machine, load, versions, settings.

    Raises UserError where a GPU is asked for and there is none.
    """
    return {
        "command": f"fac bench {what} " + " ".join(sys.argv[3:]),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu_name() if settings.device == "gpu" else None,
        "load": os.getloadavg()[0],
        "versions": versions(),
        "allocator": {name: value for name, value in sorted(os.environ.items()) if name.startswith(ALLOCATOR)},
        "bench": to_plain(settings),
    }


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpu_name() -> str:
    """The first GPU as its driver names it; this process leaves it alone. Raises UserError where there is none."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout
        return said.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"no NVIDIA GPU is here (nvidia-smi: {error}): leave --device out to measure the CPU"
        ) from error


def print_circumstances(report: Mapping[str, Any]) -> Console:
    """The head of a report, for people; returns the console that the rest goes to."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    where = f"{report['cores']} cores of {report['cpu']}"
    if report["gpu"]:
        console.print(f"{report['command']}  ({report['date']}, {report['gpu']}, {where})")
        return console
    console.print(f"{report['command']}  ({report['date']}, {where})")
    tuned = ", ".join(f"{name}={value}" for name, value in report["allocator"].items())
    console.print(f"allocator: {tuned or 'glibc as it comes (launch/allocator.sh tunes it)'}")
    if report["load"] > IDLE_LOAD:
        console.print(
            f"other programs were running (load {report['load']:.1f}): torch's threads suffer more from that than "
            "ours, so the ratios may flatter us; measure again on an idle machine"
        )
    return console
