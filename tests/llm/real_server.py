"""A real vLLM server on a CPU with SmolLM2-135M, and the command line, for tests that the suite does not collect.

Installs and starts gigabytes. The environment and the model lie in the user's cache folder and are made once.
FAC_SIDECAR_KIND chooses another kind of server.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KIND = os.environ.get("FAC_SIDECAR_KIND", "vllm-cpu")


@dataclass(frozen=True)
class Running:
    """The server, as `fac sidecar start` announced it."""

    url: str
    model: str
    pid: int
    arguments: tuple[str, ...]


def fac(*arguments: str) -> str:
    """The command line in a process of its own, with the user's cache folder and not the suite's."""
    environment = {key: value for key, value in os.environ.items() if key not in ("FAC_JAX_CACHE", "XLA_FLAGS")}
    if own := os.environ.get("FAC_SIDECAR_CACHE"):
        environment["FAC_JAX_CACHE"] = own
    words = [sys.executable, "-m", "fac_jax.cli", *arguments]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(arguments)} ended with {done.returncode}"
    return done.stdout


def get(url: str) -> Any:
    return json.loads(urllib.request.urlopen(url, timeout=30).read())


def running(run: Path) -> Iterator[Running]:
    """The body of a fixture: starts the server, whose run directory is `run`, and stops it."""
    arguments = (
        "configs/quickstart.yaml", "--run.dir", str(run), "--sidecar.port", "0", "--sidecar.kind", KIND,
        "--sidecar.context-tokens", "2048",
    )  # fmt: skip
    began = time.monotonic()
    said = fac("sidecar", "start", *arguments)
    found = re.search(r"process (\d+)\) answers at (\S+);", said)
    assert found, said
    print(f"\n[measured] started in {time.monotonic() - began:.0f} s, installation included")
    url = found[2]
    model = "SmolLM2-135M-Instruct" if KIND == "transformers" else str(get(f"{url}/models")["data"][0]["id"])
    yield Running(url, model, int(found[1]), arguments)
    fac("sidecar", "stop", *arguments)
