"""A run directory: every stage's product, the record that says what it was made from, and one owner at a time.

A stage is done when its record (`stage.json`, written last and renamed into place) holds the digest of the settings the
stage reads and of its inputs. Done is not done again; a product made from other settings is set aside under
`superseded/` and comes back by itself when those settings do, so nothing is lost and nothing is computed twice.
A half-made product stays where it is, and the same command goes on from it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fac_jax.config.file import Config, to_yaml
from fac_jax.distributed import Process, check_same, from_first, is_first, wait_for_all
from fac_jax.errors import UserError
from fac_jax.plain import digest, to_plain

log = logging.getLogger(__name__)

RECORD = "stage.json"
PARTIAL = "stage.partial.json"
SUPERSEDED = "superseded"
FORMAT = 1  # raised when a product's layout changes: older products are then made again
PACKAGES = ("fac-jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "tensorstore", "numpy")

StageFunction = Callable[[Config, Path, Mapping[str, Path]], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline: what it writes, what it is made from, and the verb that makes it."""

    name: str
    """Such as `scan:anchor`; the key under which later stages find its product."""
    folder: str
    """Product folder, relative to the run directory."""
    verb: str
    """Verb that makes it alone, with its options, such as `scan --data anchor`."""
    function: StageFunction
    made_of: Callable[[], Any]
    """Gives `settings`; not called by a verb that needs nothing of this stage, whose data may not be here."""
    inputs: tuple[str, ...] = ()
    """Earlier stages by name; `coverage/missing.parquet` means that one file of the product and nothing else of it."""
    distributed: bool = False
    """Whether several processes can make it together."""
    mends: bool = False
    """Whether it checks the files of a product that has no record, and makes only what is missing or damaged."""
    on_request: bool = False
    """Made by its own verb only, not by `fac run`; later stages use it if it is there."""

    @cached_property
    def settings(self) -> Any:
        """Every setting and fingerprint that changes the product (dataclasses and plain values)."""
        return self.made_of()

    @property
    def command(self) -> str:
        """Command line that makes it alone, such as `fac scan CONFIG --data anchor`."""
        verb, *options = self.verb.split()
        return " ".join(["fac", verb, "CONFIG", *options])


@dataclass(frozen=True)
class Record:
    """What `stage.json` holds."""

    stage: str
    digest: str
    finished: str
    seconds: float
    summary: dict[str, Any]
    settings: Any
    inputs: dict[str, str]
    versions: dict[str, str]
    files: dict[str, int]


def read_record(folder: Path) -> Record | None:
    """The record of a finished product, or None. Raises UserError when the file is there and cannot be read."""
    path = folder / RECORD
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or delete {folder}") from None


class Run:
    """A run directory of one config. `with Run(config) as run:` owns it; a second owner gets a UserError."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dir = Path(config.run.dir)
        self._lock: int | None = None
        # Products that were checked since the last one was made: by stage, their digest. Without it a run checks the
        # files of a product once for every way from a later stage to it.
        self._sound: dict[str, str] = {}
        self._aside: Path | None = None  # where the product of other settings lies that this stage had until now

    def __enter__(self) -> Run:
        check_same(self.config)
        if is_first():
            self._own()
        wait_for_all("the run directory is owned")
        if not (self.dir / "config.yaml").exists():
            raise UserError(
                f"run.dir {self.dir} of process 0 is not seen on {platform.node()}: choose a folder on a file system "
                "that all processes share"
            )
        return self

    def _own(self) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"run.dir {self.dir} cannot be written ({error.strerror}); choose another run.dir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._lock, 4096).decode(errors="replace") or "another process"
            os.close(self._lock)
            raise UserError(
                f"run.dir {self.dir} is in use by {owner}; wait for it, stop it, or choose another --run.dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {platform.node()} ({' '.join(sys.argv[:3])})".encode(), 0)
        write_text(self.dir / "config.yaml", to_yaml(self.config))

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def folder(self, stage: Stage) -> Path:
        """Product folder of a stage; always inside the run directory."""
        return self.dir / stage.folder

    def execute(self, stage: Stage, stages: Mapping[str, Stage]) -> Record:
        """Make the product of `stage` unless it is there; `stages` holds the earlier ones by name.

        Raises UserError when an input is missing or was made with other settings than the config has now.
        """
        if Process.count > 1 and not stage.distributed:
            raise UserError(
                f"{stage.name} is made by one process: run `{stage.command}` without --mesh.coordinator; what several "
                "processes made is not made again"
            )
        inputs = self.input_digests(stage, stages)
        key = self._key(stage, inputs)
        out = self.folder(stage)
        done = self._prepare(stage, key, out) if is_first() else None
        if from_first(done is not None):  # what a process sees of a shared file system may be out of date
            done = done or read_record(out)
            assert done is not None
            return done
        started = time.monotonic()
        folders = {name: self.folder(stages[name.partition("/")[0]]) for name in stage.inputs}
        folders = {name.partition("/")[0]: folder for name, folder in folders.items()}
        with self._put_back(stage, out):
            summary = stage.function(self.config, out, folders)
        wait_for_all(f"{stage.name} is made")
        record = Record(
            stage=stage.name, digest=key, finished=time.strftime("%Y-%m-%d %H:%M:%S"),
            seconds=round(time.monotonic() - started, 2), summary=summary, settings=to_plain(stage.settings),
            inputs=inputs, versions=versions(), files=dict(_files(out)),
        )  # fmt: skip
        if is_first():
            write_text(out / RECORD, json.dumps(to_plain(record), indent=1, allow_nan=False))
            (out / PARTIAL).unlink()
        self._sound.clear()  # making it may have taken days
        wait_for_all(f"{stage.name} has its record")
        return record

    def _prepare(self, stage: Stage, key: str, out: Path) -> Record | None:
        """The record of the product, if it is there; if not, the folder is made ready for it."""
        self._aside = self._set_aside_other_product(stage, key)
        done = read_record(out)
        if done is not None:
            self._check_files(done, out, stage)
            self._sound[stage.name] = key
            log.info("%s: done already (%s)", stage.name, done.finished)
            return done
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / PARTIAL, json.dumps({"digest": key}))
        return None

    def input_digests(self, stage: Stage, stages: Mapping[str, Stage]) -> dict[str, str]:
        """Digest of each input; UserError names the command that makes a missing or outdated one."""
        found = {}
        for name in stage.inputs:
            owner, _, file = name.partition("/")
            source = stages[owner]
            if owner not in self._sound:
                self._sound[owner] = self._check_input(stage, source, stages)
            found[name] = self._sound[owner] if not file else file_digest(self.folder(source) / file)
        return found

    def _check_input(self, stage: Stage, source: Stage, stages: Mapping[str, Stage]) -> str:
        """Digest of the product of `source`, which is there, up to date and whole."""
        record = read_record(self.folder(source))
        command = f"`{source.command}`"
        if record is None:
            raise UserError(f"{stage.name} needs {self.folder(source)}, which is not made yet: run {command} first")
        if record.digest != self._key(source, self.input_digests(source, stages)):
            raise UserError(
                f"{stage.name} needs {self.folder(source)}, which was made with other settings than the config "
                f"has now: run {command} again (`fac status CONFIG` shows what changed)"
            )
        self._check_files(record, self.folder(source), source)
        return record.digest

    def state(self, stage: Stage, stages: Mapping[str, Stage]) -> tuple[str, Record | None]:
        """`done`, `outdated`, `partial` or `absent`, and the record when there is one."""
        record = read_record(self.folder(stage))
        if record is None:
            return ("partial" if (self.folder(stage) / PARTIAL).exists() else "absent"), None
        try:
            current = record.digest == self._key(stage, self.input_digests(stage, stages))
        except UserError:
            current = False
        return ("done" if current else "outdated"), record

    def _key(self, stage: Stage, inputs: Mapping[str, str]) -> str:
        return digest({"stage": stage.name, "format": FORMAT, "settings": stage.settings, "inputs": dict(inputs)})

    def _set_aside_other_product(self, stage: Stage, key: str) -> Path | None:
        """Make room for a product; where the one that was there is now."""
        out, aside = self.folder(stage), None
        there = _digest_of(out)
        if there == key:
            return None
        if there is not None:
            aside = self.dir / SUPERSEDED / f"{stage.folder.replace('/', '-')}-{there}"
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                raise UserError(f"both {out} and {aside} hold the product {there}; delete one of them")
            os.replace(out, aside)
            log.info("%s: settings or inputs changed; the old product is kept at %s", stage.name, aside)
        elif not stage.mends and any(_files(out)):
            raise UserError(
                f"{out} holds files and no {RECORD} that says what they were made from: restore it, or delete {out}"
            )
        kept = self.dir / SUPERSEDED / f"{stage.folder.replace('/', '-')}-{key}"
        if kept.exists() and not any(_files(out)):
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            os.replace(kept, out)
            log.info("%s: a product with these settings was kept; it is back", stage.name)
        return aside

    @contextmanager
    def _put_back(self, stage: Stage, out: Path) -> Iterator[None]:
        """Where a stage fails before it has made anything, such as for a server that is not there, the product that was
        set aside for it comes back."""
        try:
            yield
        except BaseException:
            if self._aside is not None and not any(_files(out)):
                shutil.rmtree(out, ignore_errors=True)
                os.replace(self._aside, out)
                log.info("%s: nothing was made; the old product is back", stage.name)
            raise
        finally:
            self._aside = None

    def _check_files(self, record: Record, folder: Path, stage: Stage) -> None:
        there = dict(_files(folder))
        for file, size in record.files.items():
            if there.get(file) != size:
                what = "is missing" if file not in there else f"has {there[file]} bytes instead of {size}"
                raise UserError(
                    f"{folder / file} {what}: the product of {stage.name} is damaged; restore the file, or rename "
                    f"{folder / RECORD} to {PARTIAL}: `{stage.command}` then makes what is missing"
                )


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a temporary name in the same folder, then a rename. Raises UserError where it cannot."""
    try:
        with writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        if error.errno == errno.ENOSPC:  # the command line knows what to say of a full disk
            raise
        raise UserError(f"{path} cannot be written ({error.strerror}): mend that, or name another place") from None


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that becomes it when the block ends well, and vanishes when it does not.

    Raises UserError when `folder` holds something already, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something; remove it or name another folder")
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); name another folder") from None
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def whole_lines(path: Path) -> list[bytes]:
    """Lines of a log that is appended to, none when there is no log yet.

    A last line that a kill cut short is taken off the file, so that the next one starts on its own.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()


def file_digest(path: Path) -> str:
    """SHA-256 (16 hex digits) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def fingerprint(path: Path) -> str:
    """Digest of a file's size and its first and last mebibyte: cheap on corpora and weights of any size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(2**20)
        file.seek(max(size - 2**20, 0))
        tail = file.read(2**20)
    return hashlib.sha256(f"{size}:".encode() + head + tail).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that touch the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _digest_of(folder: Path) -> str | None:
    """Digest that a finished or half-made product is for; None where there is no product."""
    record = read_record(folder)
    if record is not None:
        return record.digest
    try:
        return str(json.loads((folder / PARTIAL).read_text(encoding="utf-8"))["digest"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{folder / PARTIAL} cannot be read ({error}); delete {folder} to start the stage afresh"
        ) from None


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (RECORD, PARTIAL) and not path.name.endswith(".tmp"):
            yield str(path.relative_to(folder)), path.stat().st_size
