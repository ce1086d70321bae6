"""What is checked before the work starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fac_jax.config.checks import check_output
from fac_jax.errors import UserError


def test_where_an_outcome_cannot_go_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there.json"
    there.touch()
    check_output("--out", str(there))  # it is replaced
    check_output("--out", str(tmp_path / "new.json"))
    for place, said in (
        (tmp_path, "which is a folder; name a file to write"),
        (tmp_path / "none" / "p.json", "and there is no folder .*none; make it"),
        (there / "p.json", "and there is no folder"),
    ):
        with pytest.raises(UserError, match=f"--out is {place}, {said}"):
            check_output("--out", str(place))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written; name another file"):
        check_output("--out", str(there))
