"""Every script of launch/: bash can parse it, and what its comments name exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_bash_parses_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_shellcheck_finds_no_error(script: Path) -> None:
    done = subprocess.run(["shellcheck", "--severity=error", str(ROOT / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_file_that_the_launchers_and_their_guide_name_exists() -> None:
    files = [path for path in (ROOT / "launch").rglob("*") if path.is_file() and path.suffix != ".txt"]
    for file in files:
        for name in re.findall(r"\blaunch/[\w/.-]*\w", file.read_text()):
            assert (ROOT / name).exists(), f"{file.relative_to(ROOT)} names {name}"
