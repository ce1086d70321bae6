"""`fac bench`: which benchmarks there are, and what they say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from fac_jax.errors import UserError
from fac_jax.scale.bench import BENCHES, main


def test_what_is_not_measured_is_named() -> None:
    with pytest.raises(
        UserError, match="measures 'sae' or 'activations' or 'scan', not 'activation' .did you mean 'activations'"
    ):
        main(["activation"])


@pytest.mark.parametrize("what", BENCHES)
def test_what_could_not_be_written_is_not_measured(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, module, _, shown = BENCHES[what]
    monkeypatch.setitem(BENCHES, what, (settings, module, lambda bench: pytest.fail("measured"), shown))
    with pytest.raises(UserError, match="--out is .*, which is a folder"):
        main([what, "--out", str(tmp_path)])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"fac bench {what}" in shown for what in BENCHES) and "`--device gpu`" in shown
    for what in BENCHES:
        with pytest.raises(SystemExit) as ended:
            main([what, "--help"])
        assert ended.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "--peers-python" in shown and "processes of their own" in shown
