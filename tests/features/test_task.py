"""Tasks are data: the shipped one loads, a wrong name lists what there is, a wrong file is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fac_jax.errors import UserError
from fac_jax.features import task as module
from fac_jax.features.task import FOLDER, load_task, task_names


@pytest.mark.parametrize("name", task_names())
def test_shipped_tasks_load(name: str) -> None:
    task = load_task(name)
    assert task.description.labels == ("Yes", "Probably", "Maybe", "No")
    for prompt in ("explain", "verify", "judge"):
        assert "{{" not in task.prompt(prompt)
    assert task.rubric in task.prompt("judge") and task.description.positive in task.prompt("judge")


def test_unknown_task_lists_what_there_is() -> None:
    with pytest.raises(
        UserError, match=r"judge.task is 'toxcity' \(did you mean 'toxicity'\?\); the tasks are: .*toxicity"
    ):
        load_task("toxcity")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FOLDER / "toxicity", tmp_path / "mine")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return tmp_path / "mine"


def test_any_change_of_a_file_changes_the_digest(copy: Path) -> None:
    before = load_task("mine").digest
    (copy / "rubric.md").write_text("Everything is toxic.")
    assert load_task("mine").digest != before


def test_errors_name_the_file(copy: Path) -> None:
    (copy / "judge.txt").write_text("Judge by {{rubrik}}.")
    with pytest.raises(UserError, match=r"judge.txt asks for \{\{rubrik\}\}; known are: title, positive, rubric"):
        load_task("mine")
    (copy / "judge.txt").unlink()
    with pytest.raises(UserError, match="has no prompt judge.txt; it has:"):
        load_task("mine").prompt("judge")
    (copy / "task.yaml").write_text("title: x\nlabel: [Yes]")
    with pytest.raises(UserError, match="mine/task.yaml has no key 'label'"):
        load_task("mine")
