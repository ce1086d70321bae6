"""`fac export`: the kept samples of a run as files that another program loads unmodified, and on the hub if asked.

Reads the run directory (`read.py`). Writes one folder, whole or not at all; a folder with LLaMA-Factory's
dataset_info.json gets one more data set. Refuses before anything is written or sent:
- a format that does not hold what the task's samples are;
- for a task about harm, samples that are more than what a user writes: no request for harm leaves with an answer;
- for a task about harm, a public repository that nobody asked for by name of what it is.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.plain import suggest
from fac_jax.runs import write_text, writing_folder
from fac_jax.synthesis.export.formats import DATASET_INFO, FORMATS, TURNS, Files
from fac_jax.synthesis.export.hub import push
from fac_jax.synthesis.export.read import Kept, read_kept

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Hub:
    """Where to push to, and who may see it."""

    repository: str
    public: bool = False
    publish_harmful: bool = False
    """Whether it was said that what is published is harmful."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    files: tuple[str, ...]
    samples: int
    address: str | None
    """On the hub."""


def export(config: Config, form: str, to: Path, name: str | None = None, hub: Hub | None = None) -> Exported:
    """Write the folder `to`; `name` is what LLaMA-Factory and AlpacaEval call the data set (default: fac_TASK).

    Raises UserError for all that is refused, and where the run has no samples or the folder cannot be written.
    """
    if form not in FORMATS:
        raise UserError(f"--format is {form!r}{suggest(form, FORMATS)}; the formats are: {', '.join(FORMATS)}")
    kept = read_kept(config)
    _check_format(kept, form)
    if hub is not None:
        _check_hub(kept, form, hub)
    name = name or "fac_" + re.sub(r"[^\w.-]+", "_", kept.task.name)
    if not _NAME.fullmatch(name) or f"{name}.json" == DATASET_INFO:
        raise UserError(f"--name is {name!r}; it must begin with a letter or digit and have no other signs than . _ -")
    files = FORMATS[form].files(kept, name)
    try:
        _write(to, files, merge=form == "llama_factory")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{to} cannot be written ({error.strerror}); choose another --to") from None
    address = None if hub is None else push(to, hub.repository, hub.public, gated=kept.harmful)
    return Exported(to, tuple(files), len(kept.rows), address)


def formats_for(form: str) -> list[str]:
    """Names of the formats that hold samples of this form."""
    return [name for name, one in FORMATS.items() if form in one.forms]


def _check_format(kept: Kept, form: str) -> None:
    fitting = formats_for(kept.form)
    if kept.harmful and kept.form != TURNS:
        raise UserError(
            f"task {kept.task.name!r} is about harm and its samples are of the form {kept.form!r}: only what a user "
            f"writes ({TURNS}) is exported of such a task, never with an answer"
        )
    if form not in fitting:
        never = "; no request for harm leaves with an answer" if kept.harmful else ""
        raise UserError(
            f"--format {form} is for {FORMATS[form].reader} and holds samples of the form "
            f"{' or '.join(map(repr, FORMATS[form].forms))}; those of task {kept.task.name!r} are {kept.form!r}: "
            f"choose {' or '.join(fitting)}{never}"
        )


def _check_hub(kept: Kept, form: str, hub: Hub) -> None:
    if form != "hf":
        raise UserError(f"--push is for --format hf, which has a data set card, and --format is {form}")
    if not _REPOSITORY.fullmatch(hub.repository):
        raise UserError(f"--push is {hub.repository!r}; it must be OWNER/NAME")
    if hub.publish_harmful and not hub.public:
        raise UserError("--publish-harmful does nothing without --public; a push is private without it")
    if kept.harmful and hub.public and not hub.publish_harmful:
        raise UserError(
            f"task {kept.task.name!r} is about harm, so --public would let anyone find these texts: push without it "
            "(private), or add --publish-harmful if publishing them is what you mean to do"
        )


def _write(to: Path, files: Files, merge: bool) -> None:
    if merge and (to / DATASET_INFO).exists():
        _merge(to, files)
        return
    with writing_folder(to) as folder:
        for file, text in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            write_text(folder / file, text)


def _merge(to: Path, files: Files) -> None:
    """Add a data set to those of a folder of LLaMA-Factory; its entry comes last, when the file is there."""
    path = to / DATASET_INFO
    there, new = _read_info(path), json.loads(files[DATASET_INFO])
    others = [file for file in files if file != DATASET_INFO]
    if taken := [name for name in new if name in there] or [file for file in others if (to / file).exists()]:
        raise UserError(f"{to} has {taken[0]!r} already: give this data set another --name, or remove that one")
    for file in others:
        write_text(to / file, files[file])
    write_text(path, json.dumps({**there, **new}, indent=2) + "\n")


def _read_info(path: Path) -> Mapping[str, Any]:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): mend it, or name another folder") from None
    if not isinstance(there, dict):
        raise UserError(f"{path} holds a {type(there).__name__} where data sets by name are expected: mend it")
    return there
