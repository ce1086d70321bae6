"""Several real processes of `fac train` on one machine, and what can go wrong in one of them.

As a program: `python gang.py MISHAP ARGUMENTS...` is `fac ARGUMENTS...` in which MISHAP, such as `hang@1:13`, befalls
process 1 when it reads the rows of step 13: raise, hang, kill, stop (a signal that nothing can refuse) or term. With
GANG_ONCE in the environment it happens only while that file does not exist, and makes it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MISHAP = "mishap"
"""File in the folder of a gang: when it happened."""


@dataclass
class Ended:
    """How a process of a gang ended."""

    status: int
    seconds: float
    """After the mishap."""
    output: str

    @property
    def last_line(self) -> str:
        return self.output.rstrip().rpartition("\n")[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def command(mishap: str, *arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__)), mishap, *arguments]


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def keeping_programs(folder: Path) -> dict[str, str]:
    """Environment in which a process reads from `folder` what an earlier one has compiled, and compiles the rest."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run_gang(
    folder: Path, *arguments: str, processes: int = 2, devices: int = 4, mishap: str = "none", patience_s: float = 60
) -> list[Ended]:
    """Run `fac ARGUMENTS...` as so many processes and wait until all have ended; `folder` takes their output.

    Those that are still there `patience_s` after the first has ended are killed.
    """
    port, children, logs = free_port(), [], []
    for index in range(processes):
        several = ("--mesh.coordinator", f"127.0.0.1:{port}", "--mesh.processes", str(processes))
        own = (*several, "--mesh.process-id", str(index)) if processes > 1 else ()
        logs.append(folder / f"{port}-{index}.log")
        with open(logs[-1], "w") as log:
            children.append(
                subprocess.Popen(
                    command(mishap, *arguments, *own), stdout=log, stderr=log, env=environment(devices), cwd=folder
                )
            )
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < processes:
        for index, child in enumerate(children):
            if index not in ended and child.poll() is not None:
                ended[index] = (child.returncode, time.time())
        if ended and time.time() - min(at for _, at in ended.values()) > patience_s:
            for child in children:
                child.kill()
        time.sleep(0.05)
    began = float((folder / MISHAP).read_text()) if (folder / MISHAP).exists() else time.time()
    return [Ended(ended[i][0], ended[i][1] - began, logs[i].read_text()) for i in range(processes)]


def _main() -> None:
    from fac_jax import cli
    from fac_jax.distributed import Process
    from fac_jax.sae import train

    kind, _, where = sys.argv[1].partition("@")
    once = Path(os.environ["GANG_ONCE"]) if "GANG_ONCE" in os.environ else None
    batches = train.batches

    def watched(*given: Any) -> Iterator[Any]:
        for step, rows in batches(*given):
            if where == f"{Process.index}:{step}" and not (once and once.exists()):
                if once:
                    once.touch()
                _befall(kind)
            yield step, rows
            time.sleep(0.3 if kind == "term" else 0.02)  # JAX's preemption service takes about a second to agree

    if where:
        train.batches = watched  # type: ignore[assignment]
    sys.exit(cli.main(sys.argv[2:]))


def _befall(kind: str) -> None:
    Path(MISHAP).write_text(str(time.time()))
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
    if kind == "raise":
        raise RuntimeError("a cosmic ray")
    if kind == "hang":
        time.sleep(3600)
    os.kill(os.getpid(), signals[kind])


if __name__ == "__main__":
    _main()
