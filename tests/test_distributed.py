"""Two real processes as one run: the same losses, the same bytes after a kill, one end for both, with its reason."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.gang import ROOT, Ended, command, environment, run_gang
from tests.sae.tiny_store import make_store

STEPS = 24
FILES = ("sae.safetensors", "config.json", "metrics.jsonl", "validation.jsonl")
Train = Callable[..., list[Ended]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def config(store: Path) -> Path:
    """24 steps of a small SAE on a mesh of 2 x 4, with a checkpoint at every sixth."""
    settings = {
        "backbone": {"model": "tiny", "layer": 3},
        "mesh": {"feature": 4, "step_timeout_s": 8.0},
        "sae": {"features": 64, "k": 4},
        "train": {
            "store": str(store), "steps": STEPS, "batch_rows": 32, "k_start": 8, "anneal_steps": 8, "aux_k": 8,
            "dead_after_rows": 100, "log_every": 1, "checkpoint_every": 6, "select_dtype": "float32",
        },
    }  # fmt: skip
    path = store.parent / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def train(config: Path, tmp_path: Path) -> Train:
    """`fac train` of the config into `tmp_path`, as several processes."""

    def run(name: str, *arguments: str, **how: object) -> list[Ended]:
        given = ("train", str(config), "--run.dir", str(tmp_path / name), *arguments)
        return run_gang(tmp_path, *given, **how)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of two processes of four devices."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for ended in run_gang(folder, "train", str(config), "--run.dir", str(folder / "run")):
        assert ended.status == 0, ended.output
    return folder / "run" / "sae"


def lines(product: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (product / name).read_text().splitlines()]


def assert_same_bytes(product: Path, other: Path) -> None:
    for name in FILES:
        assert (product / name).read_bytes() == (other / name).read_bytes(), name


def test_two_processes_are_one(undisturbed: Path, train: Train, tmp_path: Path) -> None:
    """2 x 4 devices in two processes, the same in one, and another mesh in two: the same rows, losses and SAE."""
    (alone,) = train("alone", processes=1, devices=8)
    assert alone.status == 0, alone.output
    for ended in train("wide", "--mesh.feature", "2", "--train.shard-optimizer"):
        assert ended.status == 0, ended.output
    assert [line["step"] for line in lines(undisturbed)] == list(range(STEPS))
    assert [line["step"] for line in lines(undisturbed, "validation.jsonl")] == [6, 12, 18, 24]
    want = load_file(undisturbed / "sae.safetensors")
    for name in ("alone", "wide"):
        for one, other in zip(lines(undisturbed), lines(tmp_path / name / "sae"), strict=True):
            assert one.keys() == other.keys()
            np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=1e-4, atol=1e-5)
        for key, array in load_file(tmp_path / name / "sae/sae.safetensors").items():
            np.testing.assert_allclose(array, want[key], rtol=1e-4, atol=1e-4)


def test_only_the_first_process_speaks(train: Train, tmp_path: Path) -> None:
    first, second = train("spoken", "--train.steps", "2")
    assert first.status == second.status == 0
    assert "fvu:" in first.output and "fvu:" not in second.output and "train" not in second.output


@pytest.mark.parametrize("mishap", ["raise@1:13", "kill@1:13", "hang@0:13", "stop@1:13"])
def test_one_that_fails_ends_all_and_the_run_goes_on(
    mishap: str, undisturbed: Path, train: Train, tmp_path: Path
) -> None:
    """Within 30 s both have ended, the last line says why, and the same command ends with the same bytes."""
    kind, _, where = mishap.partition("@")
    ended = train("run", mishap=mishap, patience_s=3 if kind == "stop" else 60)
    culprit = int(where[0])
    other = ended[1 - culprit]
    if kind == "stop":  # nobody can end a stopped process but its launcher
        assert ended[culprit].status == -signal.SIGKILL
    print(f"{mishap}: all ended after {max(one.seconds for one in ended):.1f} s")
    assert max(one.seconds for one in ended) < 30, [one.output for one in ended]
    assert other.status not in (0, 1, 2), other.output
    if kind == "raise":
        assert ended[culprit].status == 70
        assert ended[culprit].last_line == f"process {culprit} of 2: RuntimeError: a cosmic ray"
    if kind == "hang":
        assert ended[culprit].status == 71
        assert f"process {culprit} of 2: nothing moved for" in ended[culprit].last_line
    if other.status in (70, 71):
        assert other.last_line.startswith(f"process {1 - culprit} of 2: ")
    else:  # JAX's own end, in C++
        assert "another task died" in other.output or "heartbeat" in other.output, other.output
    for again in train("run"):
        assert again.status == 0, again.output
    assert_same_bytes(tmp_path / "run" / "sae", undisturbed)


def test_sigterm_saves_at_a_common_step(undisturbed: Path, train: Train, tmp_path: Path) -> None:
    """To one of two processes, at a step at which no checkpoint is due."""
    ended = train("run", mishap="term@1:13")
    assert [one.status for one in ended] == [143, 143], [one.output for one in ended]
    said = {one.output.partition("SIGTERM: saved after step ")[2].partition(" ")[0] for one in ended}
    (step,) = map(int, said)
    assert 10 <= step < 18  # rows are read up to three steps before they are trained on
    steps = sorted(int(path.name) for path in (tmp_path / "run/sae/checkpoints").iterdir())
    assert steps[-1] == step + 1
    for again in train("run"):
        assert again.status == 0, again.output
    assert_same_bytes(tmp_path / "run" / "sae", undisturbed)


def test_sigterm_saves_alone(config: Path, train: Train, tmp_path: Path) -> None:
    (ended,) = train("run", processes=1, devices=8, mishap="term@0:8")
    assert ended.status == 143 and "SIGTERM: saved after step" in ended.output
    (again,) = train("run", processes=1, devices=8)
    assert again.status == 0, again.output
    assert [line["step"] for line in lines(tmp_path / "run/sae")] == list(range(STEPS))


def test_a_run_goes_on_with_another_number_of_processes(undisturbed: Path, train: Train, tmp_path: Path) -> None:
    train("run", mishap="kill@0:13")
    (alone,) = train("run", "--mesh.feature", "2", processes=1, devices=2)
    assert alone.status == 0, alone.output
    assert len(lines(tmp_path / "run/sae")) == STEPS
    for one, other in zip(lines(undisturbed), lines(tmp_path / "run/sae"), strict=True):
        np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=1e-4, atol=1e-5)


def test_the_launcher_restarts_the_gang(undisturbed: Path, config: Path, tmp_path: Path) -> None:
    """A kill -9 in the middle: launch/local.py starts all again, and the bytes are those of a run without it."""
    mishap = "kill@1:13"  # befalls only the first gang: the second one reads step 13 as well, so it is told once
    once = tmp_path / "once"
    program = command(mishap, "train", str(config), "--run.dir", str(tmp_path / "run"))
    arguments = ["--processes", "2", "--devices-per-process", "4", "--restarts", "2", "--grace", "5", "--"]
    found = subprocess.run(
        [sys.executable, str(ROOT / "launch/local.py"), *arguments, *program],
        env=environment(4) | {"GANG_ONCE": str(once)}, capture_output=True, text=True, timeout=200, cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert once.exists() and "restart" in found.stderr
    assert_same_bytes(tmp_path / "run" / "sae", undisturbed)


def test_settings_must_be_the_same(train: Train, config: Path, tmp_path: Path) -> None:
    other = shutil.copy(config, tmp_path / "other.yaml")
    Path(other).write_text(config.read_text().replace("k: 4", "k: 5"))
    script = tmp_path / "pick.py"
    script.write_text(
        "import sys; from fac_jax import cli\n"
        f"mine = sys.argv[-1] == '1'\nsys.argv[2] = {str(other)!r} if mine else sys.argv[2]\nsys.exit(cli.main())\n"
    )
    from tests import gang

    original = gang.command
    try:
        gang.command = lambda mishap, *arguments: [sys.executable, str(script), *arguments]
        ended = train("run")
    finally:
        gang.command = original
    assert [one.status for one in ended] == [1, 1]
    assert "processes 1 were started with other settings than process 0" in ended[0].output


def test_a_stage_for_one_process_says_so(config: Path, tmp_path: Path) -> None:
    ended = run_gang(tmp_path, "coverage", str(config), "--run.dir", str(tmp_path / "run"))
    assert [one.status for one in ended] == [1, 1]
    assert "coverage is made by one process: run `fac coverage CONFIG` without --mesh.coordinator" in ended[0].output


def test_processes_that_never_come(config: Path, tmp_path: Path) -> None:
    arguments = ["train", str(config), "--mesh.coordinator", "127.0.0.1:1", "--mesh.processes", "2"]
    found = subprocess.run(
        command("none", *arguments, "--mesh.process-id", "1", "--mesh.start-timeout-s", "3"),
        env=environment(4), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert found.returncode == 71
    assert found.stderr.splitlines()[-1].startswith("process 1 of 2: nothing moved for 3 s (limit 3 s) after calling")
