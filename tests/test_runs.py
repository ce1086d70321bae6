"""Done is not done again, changed is made again and the old product kept, and two owners never share a run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fac_jax.config.file import Config
from fac_jax.config.machine import RunConfig
from fac_jax.errors import UserError
from fac_jax.runs import PARTIAL, RECORD, Run, Stage, fingerprint, read_record, writing


class Recorder:
    """Stage functions that write a file and remember that they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail: str | None = None

    def stage(self, name: str, settings: Any, inputs: tuple[str, ...] = ()) -> Stage:
        def function(config: Config, out: Path, folders: Mapping[str, Path]) -> dict[str, Any]:
            self.ran.append(name)
            (out / "kept.txt").touch()
            if self.fail == name:
                raise RuntimeError("killed")
            (out / "value.txt").write_text(f"{settings}")
            (out / "same.txt").write_text("always the same")
            for folder in folders.values():
                assert (folder / "value.txt").exists()
            return {"settings": settings}

        return Stage(name, f"products/{name}", name, function, lambda: settings, inputs)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(run=RunConfig(dir=str(tmp_path / "run")))


def chain(recorder: Recorder, first: int = 1, second: int = 1, third: int = 1, part: str = "") -> dict[str, Stage]:
    stages = [
        recorder.stage("one", first),
        recorder.stage("two", second, ("one" + part,)),
        recorder.stage("three", third, ("two",)),
    ]
    return {stage.name: stage for stage in stages}


def execute(config: Config, stages: dict[str, Stage]) -> None:
    with Run(config) as run:
        for stage in stages.values():
            run.execute(stage, stages)


def test_done_is_not_done_again_and_only_what_depends_on_a_change_is(recorder: Recorder, config: Config) -> None:
    execute(config, chain(recorder))
    execute(config, chain(recorder))
    assert recorder.ran == ["one", "two", "three"]
    execute(config, chain(recorder, second=2))
    assert recorder.ran[3:] == ["two", "three"]


def test_a_stage_that_fails_before_it_made_anything_takes_no_product_away(config: Config) -> None:
    def function(config: Config, out: Path, folders: Mapping[str, Path]) -> dict[str, Any]:
        assert not (out / "value.txt").exists(), "it has a folder of its own"
        if fails:
            raise UserError("no server")
        (out / "value.txt").write_text("made")
        return {}

    fails = False
    execute(config, {"one": Stage("one", "one", "one", function, lambda: 1)})
    fails, before = True, (Path(config.run.dir) / "one" / RECORD).read_bytes()
    changed = {"one": Stage("one", "one", "one", function, lambda: 2)}
    with pytest.raises(UserError, match="no server"):
        execute(config, changed)
    assert (Path(config.run.dir) / "one" / RECORD).read_bytes() == before
    assert not list(Path(config.run.dir, "superseded").iterdir())
    with Run(config) as run:
        assert run.state(changed["one"], changed)[0] == "outdated"


def test_files_that_nothing_vouches_for_are_not_adopted(recorder: Recorder, config: Config) -> None:
    execute(config, chain(recorder))
    (Path(config.run.dir) / "products/one" / RECORD).unlink()
    with pytest.raises(UserError, match=r"products/one holds files and no stage.json that says what they were made fr"):
        execute(config, chain(recorder, first=2))
    mending = chain(recorder)
    mending["one"] = dataclasses.replace(mending["one"], mends=True)
    execute(config, mending)
    assert recorder.ran[3:] == ["one"]


def test_a_product_of_other_settings_is_kept_and_comes_back(recorder: Recorder, config: Config) -> None:
    execute(config, chain(recorder))
    execute(config, chain(recorder, third=2))
    assert len(list(Path(config.run.dir, "superseded").iterdir())) == 1
    execute(config, chain(recorder))
    assert recorder.ran == ["one", "two", "three", "three"]
    assert Path(config.run.dir, "products/three/value.txt").read_text() == "1"


def test_an_input_that_names_one_file_ignores_the_rest_of_the_product(recorder: Recorder, config: Config) -> None:
    execute(config, chain(recorder, part="/same.txt"))
    execute(config, chain(recorder, first=2, part="/same.txt"))
    assert recorder.ran[3:] == ["one"]


def test_a_killed_stage_goes_on_from_what_it_wrote(recorder: Recorder, config: Config) -> None:
    recorder.fail = "two"
    with pytest.raises(RuntimeError):
        execute(config, chain(recorder))
    folder = Path(config.run.dir, "products/two")
    assert (folder / PARTIAL).exists() and not (folder / RECORD).exists() and (folder / "kept.txt").exists()
    recorder.fail = None
    execute(config, chain(recorder))
    assert recorder.ran == ["one", "two", "two", "three"] and not (folder / PARTIAL).exists()
    assert not Path(config.run.dir, "superseded").exists()


def test_missing_and_outdated_inputs_name_the_command(recorder: Recorder, config: Config) -> None:
    stages = chain(recorder)
    with Run(config) as run:
        with pytest.raises(UserError, match="which is not made yet: run `fac one CONFIG` first"):
            run.execute(stages["two"], stages)
        run.execute(stages["one"], stages)
        run.execute(stages["two"], stages)
        changed = chain(recorder, first=2)
        with pytest.raises(UserError, match="made with other settings.*run `fac one CONFIG` again"):
            run.execute(changed["two"], changed)
        assert run.state(changed["one"], changed)[0] == "outdated" and run.state(stages["two"], stages)[0] == "done"
        assert run.state(stages["three"], stages) == ("absent", None)


def test_a_damaged_product_is_named(recorder: Recorder, config: Config) -> None:
    execute(config, chain(recorder))
    value = Path(config.run.dir, "products/one/value.txt")
    value.write_text("longer than before")
    with pytest.raises(UserError, match="value.txt has 18 bytes instead of 1"):
        execute(config, chain(recorder))
    value.unlink()
    with pytest.raises(
        UserError, match=r"value.txt is missing.*rename .*stage.json to stage.partial.json: `fac one CONFIG` then"
    ):
        execute(config, chain(recorder))
    record = Path(config.run.dir, "products/one", RECORD)
    record.rename(record.with_name(PARTIAL))
    execute(config, chain(recorder))
    assert value.exists() and recorder.ran[3:] == ["one"], "what was made from it is what it was"
    record.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_record(record.parent)


def test_a_busy_run_directory_names_its_owner(config: Config) -> None:
    code = "import sys; from fac_jax.runs import Run; from fac_jax.config.file import *\n"
    code += f"Run(Config(run=RunConfig(dir={config.run.dir!r}))).__enter__(); print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "in\n"
        with (
            pytest.raises(UserError, match=f"in use by process {owner.pid} on .*choose another --run.dir"),
            Run(config),
        ):
            pass
        owner.kill()
        owner.wait()
    with Run(config):  # a killed owner leaves no lock behind
        pass


def test_the_resolved_config_and_provenance_are_kept(recorder: Recorder, config: Config) -> None:
    execute(config, chain(recorder))
    record = read_record(Path(config.run.dir, "products/three"))
    assert record is not None and record.versions["jax"] and record.settings == 1 and list(record.inputs) == ["two"]
    assert "features: 65536" in Path(config.run.dir, "config.yaml").read_text()


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        Run(Config(run=RunConfig(dir=str(tmp_path / "file" / "x")))),
    ):
        pass


def test_writing_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ValueError), writing(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_fingerprints_see_head_tail_and_size(tmp_path: Path) -> None:
    path, seen = tmp_path / "x", set()
    data = bytearray(3 * 2**20)
    for place in (None, 0, -1):
        changed = bytearray(data)
        if place is not None:
            changed[place] = 1
        path.write_bytes(changed)
        seen.add(fingerprint(path))
    path.write_bytes(data + b"0")
    assert len(seen | {fingerprint(path)}) == 4


def test_records_are_json(recorder: Recorder, config: Config) -> None:
    execute(config, chain(recorder))
    record = json.loads(Path(config.run.dir, "products/one", RECORD).read_text())
    assert record["files"]["value.txt"] == 1 and dataclasses.is_dataclass(
        read_record(Path(config.run.dir, "products/one"))
    )


def test_a_product_is_looked_at_once_however_many_ways_lead_to_it(
    recorder: Recorder, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten stages, each made from all before it: 2 ** 9 ways from the last to the first."""
    stages: dict[str, Stage] = {}
    for number in range(10):
        stages[str(number)] = recorder.stage(str(number), 1, tuple(stages))
    execute(config, stages)
    looked_at: list[str] = []
    check_files = Run._check_files
    monkeypatch.setattr(
        Run,
        "_check_files",
        lambda run, record, *rest: (looked_at.append(record.stage), check_files(run, record, *rest)),
    )
    execute(config, stages)
    assert len(recorder.ran) == 10
    assert looked_at == list(stages)


def test_a_product_lost_while_a_later_one_was_made_is_noticed(recorder: Recorder, config: Config) -> None:
    """What was whole when the run began may be gone days later."""
    stages = chain(recorder)
    stages["four"] = recorder.stage("four", 1, ("one", "three"))
    make = stages["three"].function

    def lose(config: Config, out: Path, folders: Mapping[str, Path]) -> dict[str, Any]:
        (Path(config.run.dir) / "products/one/value.txt").unlink()
        return make(config, out, folders)

    stages["three"] = dataclasses.replace(stages["three"], function=lose)
    with pytest.raises(UserError, match=r"one/value.txt is missing: the product of one is damaged"):
        execute(config, stages)
    assert recorder.ran == ["one", "two", "three"]
