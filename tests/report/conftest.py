"""Made-up runs: a whole one, and one whose texts are hostile."""

from pathlib import Path

import pytest

from fac_jax.report.products import RunView, read_view
from tests.report.sample_run import write_run

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\u202e\x1b[31m[red]</style></title>"


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


@pytest.fixture(scope="session")
def view(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return read_view(folder, write_run(folder))


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "run"
    write_run(folder, payload=HOSTILE)
    return folder
