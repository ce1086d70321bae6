"""Real processes of `fac scan`: killed, in two at once, in two commands whose shares are merged; and how much memory
they take."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from fac_jax.cli import main
from fac_jax.sae.checkpoint import save_sae
from fac_jax.sae.model import SAE
from tests.backbone.tiny_backbone import write_gguf
from tests.gang import environment, run_gang

DOCUMENTS, FEATURES, WIDTH = 4_500, 64, 32  # three units
SIZES = {"corpus": DOCUMENTS, "small": 1_500, "tenfold": 15_000}
FILES = ("documents.parquet", "peaks.parquet", "features.parquet", "scan.json")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scan")
    write_gguf(folder / "model.gguf")  # of a folder's tokenizer every process would import torch first
    generator = np.random.default_rng(0)
    w = generator.normal(size=(FEATURES, WIDTH)).astype(np.float32)
    card = {
        "k": 4,
        "variant": "topk",
        "model": "tiny",
        "rows": 1,
        "steps": 1,
        "metrics": {},
        "layer": 2,
        "model_digest": None,
    }
    save_sae(folder / "sae", SAE(jnp.asarray(w), jnp.zeros(FEATURES), jnp.zeros(WIDTH)), card)
    for name, count in SIZES.items():
        lines = (json.dumps({"text": f"{n} " + "".join(generator.choice(list("abcdefgh "), 12))}) for n in range(count))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    settings = {
        "backbone": {"model": str(folder / "model.gguf"), "layer": 2, "rows_per_batch": 32, "row_tokens": 128},
        "data": {
            name: {"sources": [{"path": str(folder / f"{name}.jsonl")}], "max_tokens": 24}
            for name in SIZES
        },
        "scan": {"sae": str(folder / "sae"), "top_spans": 4},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def scan(config: Path, folder: Path, *more: str, data: str = "corpus") -> list[str]:
    return ["scan", str(config), "--data", data, "--run.dir", str(folder), *more]


def product(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (ended,) = run_gang(folder, *scan(config, folder / "run"), processes=1, devices=2)
    assert ended.status == 0, ended.output
    return product(folder / "run" / "scans" / "corpus")


def test_killed_it_ends_with_the_same_bytes(config: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "fac_jax.cli", *scan(config, tmp_path / "run")]
    state = tmp_path / "run" / "scans" / "corpus" / "shares" / "1-of-1" / "state.parquet"
    with subprocess.Popen(arguments, env=environment(2), stderr=subprocess.PIPE, text=True) as process:
        while not state.exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (state.parents[2] / "scan.json").exists()
    (ended,) = run_gang(tmp_path, *scan(config, tmp_path / "run"), processes=1, devices=2)
    assert ended.status == 0, ended.output
    assert product(tmp_path / "run" / "scans" / "corpus") == undisturbed


def test_two_processes_give_what_one_gives(config: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for ended in run_gang(tmp_path, *scan(config, tmp_path / "run"), processes=2, devices=2):
        assert ended.status == 0, ended.output
    assert product(tmp_path / "run" / "scans" / "corpus") == undisturbed
    assert {path.name for path in (tmp_path / "run" / "scans" / "corpus").iterdir()} == {*FILES, "stage.json"}


def test_shares_of_two_commands_are_merged(
    config: Path, undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for share in ("1/2", "2/2"):
        run = tmp_path / f"run-{share[0]}"
        (ended,) = run_gang(tmp_path, *scan(config, run, "--scan.share", share), processes=1, devices=2)
        assert ended.status == 0 and "not finished in" in ended.output, ended.output
        folders.append(str(run / "scans" / "corpus"))
    assert main(["scan", "merge", str(tmp_path / "whole"), *folders[:1]]) == 1
    assert "of 2 shares 2-of-2 is missing" in capsys.readouterr().err
    assert main(["scan", "merge", str(tmp_path / "whole"), *reversed(folders)]) == 0
    assert product(tmp_path / "whole") == undisturbed


def test_memory_does_not_grow_with_the_corpus(config: Path, tmp_path: Path) -> None:
    """Ten times the documents, and the peak is the same within a tenth."""
    peaks = {}
    program = "import resource, sys; from fac_jax.cli import main; status = main(sys.argv[1:]);"
    program += "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    for data in ("small", "tenfold"):
        arguments = scan(config, tmp_path / "run", "--scan.peaks", "none", data=data)
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], env=environment(1) | {"MALLOC_ARENA_MAX": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = re.search(r"PEAK (\d+)", done.stdout)
        assert found is not None
        peaks[data] = int(found[1])
    print(f"peak KiB: {peaks}")
    assert peaks["tenfold"] < 1.1 * peaks["small"], peaks
    assert os.listdir(tmp_path / "run" / "scans" / "tenfold")
