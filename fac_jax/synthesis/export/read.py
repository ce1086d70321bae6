"""What an export is made of: the samples that a run kept, where each came from, and what all of them came from.

Reads the product of synthesis (`kept.jsonl`; `samples.parquet` and `candidates.parquet` for provenance; `stage.json`)
and the identity of the anchor's scan. What the product was made with stands in its record, and is taken from there: the
config may say something else by now. Writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fac_jax.config.file import Config
from fac_jax.errors import UserError, first_line
from fac_jax.features.task import Task, load_task
from fac_jax.runs import Record, read_record
from fac_jax.scan.parts import Identity, read_identity

Row = Mapping[str, Any]
ORIGIN = ("feature", "peak", "generator", "prompt_digest", "seed")
"""Where a sample came from, as far as it travels in rows of other programs' formats."""


@dataclass(frozen=True)
class Kept:
    """The kept samples of a finished run."""

    task: Task
    rows: tuple[Row, ...]
    """Those of kept.jsonl in their order, each with `peak`, `about`, `written_for` and `model` beside what it has."""
    record: Record
    """Of synthesis."""
    backbone: str
    """As the config named it; a local path by its last part, since an export leaves this machine."""
    sae: str
    """Where it came from, in the same way."""
    scan: Identity | None
    """Of the anchor's scan: layer, digests of model and SAE. None where the scan is not there any more."""

    @property
    def form(self) -> str:
        """What a sample is."""
        return self.task.description.form

    @property
    def harmful(self) -> bool:
        """Whether the task is about harm."""
        return self.task.description.harmful

    @property
    def threshold(self) -> float:
        """A feature is active above this."""
        return float(self.record.settings["threshold"])


def read_kept(config: Config) -> Kept:
    """Read the run. Raises UserError where nothing was synthesised or kept, or where it was for another task."""
    folder = Path(config.run.dir) / "synthesis"
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder} holds no finished samples: run `fac synthesize CONFIG` first")
    task = load_task(config.judge.task)
    _check_task(record, task, config.judge.task)
    rows = _rows(folder)
    if not rows:
        raise UserError(_nothing_kept(folder, record))
    return Kept(
        task=task,
        rows=tuple(rows),
        record=record,
        backbone=_without_folders(str(record.settings["backbone"]["model"])),
        sae="trained in the run" if config.scan.sae is None else _without_folders(config.scan.sae),
        scan=read_identity(Path(config.run.dir) / "scans" / config.coverage.anchor),
    )


def _check_task(record: Record, task: Task, name: str) -> None:
    """The task says what a sample is and whether it may do harm, so it must be the one that was written for."""
    written_for = record.settings["writer"]["task"]
    if written_for["files"] == task.digest:
        return
    if written_for["name"] == name:
        raise UserError(
            f"the files of task {name!r} have changed since its samples were written: run `fac synthesize CONFIG` again"
        )
    raise UserError(
        f"the samples were written for task {written_for['name']!r}, and judge.task is {name!r}: "
        f"say --judge.task {written_for['name']}, or run `fac synthesize CONFIG` for the other"
    )


def _rows(folder: Path) -> list[Row]:
    file = folder / "kept.jsonl"
    samples = _by_id(folder / "samples.parquet", ["id", "peak", "about", "written_for"])
    candidates = _by_id(folder / "candidates.parquet", ["id", "model"])
    rows: list[Row] = []
    # Not splitlines: it would also split at characters that JSON leaves as they are, such as U+2028.
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            rows.append({**row, **samples[row["id"]], "model": candidates[row["id"]]["model"]})
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(file, f":{number} is no kept sample", error) from None
    return rows


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(file, " cannot be read", error) from None


def _by_id(file: Path, columns: list[str]) -> dict[str, Row]:
    try:
        return {row["id"]: row for row in pq.read_table(file, columns=columns).to_pylist()}
    except (OSError, pa.ArrowException) as error:
        raise _damaged(file, " cannot be read", error) from None


def _damaged(file: Path, what: str, error: Exception) -> UserError:
    return UserError(
        f"{file}{what} ({type(error).__name__}: {first_line(error)}): restore the file, or rename "
        f"{file.parent / 'stage.json'} to stage.partial.json and run `fac synthesize CONFIG` again (no reply is lost)"
    )


def _nothing_kept(folder: Path, record: Record) -> str:
    summary = record.summary
    if not summary["missing"]:
        return f"{folder} holds no samples, as nothing is missing: the seed covers all that the anchor does"
    written = summary["step1"]["written"] + summary["step2"]["written"]
    return (
        f"{folder} holds no samples: none of {written} texts activates any of {summary['missing']} missing features "
        f"above {record.settings['threshold']:g}. Try again with --synthesize.attempts 3 or more "
        "--synthesize.candidates, let a larger model write (--llm.url), or ask for less (--coverage.threshold)"
    )


def _without_folders(source: str) -> str:
    """A local path by its last part; anything else, such as a hub id, as it is."""
    path = Path(source).expanduser()
    return path.name if path.is_absolute() or path.exists() else source
