import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fac_jax.config.file import Config
from fac_jax.config.machine import RunConfig
from tests.synthesis.kept_run import make_run
from tests.synthesis.toy_world import Toy, make_toy


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    return make_toy(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Config]:
    """The finished run of a task, made once."""
    made: dict[str, Config] = {}

    def run(task: str) -> Config:
        if task not in made:
            with pytest.MonkeyPatch.context() as monkeypatch:
                made[task] = make_run(tmp_path_factory.mktemp(task), monkeypatch, task)
        return made[task]

    return run


@pytest.fixture
def made(finished: Callable[[str], Config], tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    """A copy of it in `tmp_path`: of toxicity, or of the task that the test is parametrized with."""
    config = finished(getattr(request, "param", "toxicity"))
    shutil.copytree(config.run.dir, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(config, run=RunConfig(dir=str(tmp_path)))
