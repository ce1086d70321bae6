"""Validation where a value is born: an error says the value and what it must be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fac_jax.errors import UserError


def check(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`: validation where a value is born."""
    if not ok:
        raise UserError(message)


def check_layers(section: str, layers: Sequence[int]) -> None:
    """Raise UserError for a layer that cannot be one."""
    for layer in layers:
        check(layer >= 1, f"{section}.layers has {layer}; it counts blocks applied, so it starts at 1")


def check_output(flag: str, file: str) -> None:
    """Raise UserError, before the work, where its outcome could not be written to the file that `flag` names."""
    path = Path(file)
    folder = path.parent
    check(not path.is_dir(), f"{flag} is {file}, which is a folder; name a file to write")
    check(folder.is_dir(), f"{flag} is {file}, and there is no folder {folder}; make it, or name another file")
    check(os.access(folder, os.W_OK), f"{flag} is {file}, and {folder} cannot be written; name another file")
