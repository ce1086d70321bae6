"""A small store, and the means to damage it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.activations.tiny_store import fill, manifest


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """2,000 rows, 1,500 of them for training, in shards of 512."""
    fill(tmp_path / "store", manifest(), batches=8, rows=250)
    return tmp_path / "store"


@pytest.fixture
def damage(store: Path) -> Callable[[str, Callable[[bytearray], bytearray]], Path]:
    """Change the bytes of one of the store's files."""

    def change(name: str, how: Callable[[bytearray], bytearray]) -> Path:
        file = store / name
        file.write_bytes(how(bytearray(file.read_bytes())))
        return store

    return change
