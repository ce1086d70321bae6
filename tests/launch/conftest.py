"""Stub programs for every test of a launcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.stubs import Stubs


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path / "stubs")
