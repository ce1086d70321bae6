"""Validation where a value is born: an error says the value and what it must be."""

from __future__ import annotations

from collections.abc import Sequence

from fac_jax.errors import UserError


def check(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`: validation where a value is born."""
    if not ok:
        raise UserError(message)


def check_layers(section: str, layers: Sequence[int]) -> None:
    """Raise UserError for a layer that cannot be one."""
    for layer in layers:
        check(layer >= 1, f"{section}.layers has {layer}; it counts blocks applied, so it starts at 1")
