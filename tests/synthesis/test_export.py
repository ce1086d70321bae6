"""Exports in this process: fields of every format, what is refused and that nothing is left behind, awkward texts.

What the programs' own loaders make of the files is tested in test_export_loaders.py.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fac_jax import cli
from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.features.task import load_task
from fac_jax.synthesis.export import export as module
from fac_jax.synthesis.export.card import COLUMNS
from fac_jax.synthesis.export.export import Hub, export, formats_for
from fac_jax.synthesis.export.formats import FORMATS, official_tsv
from fac_jax.synthesis.export.hub import push
from fac_jax.synthesis.export.read import read_kept
from tests.synthesis.hub_server import HubServer
from tests.synthesis.kept_run import TASKS, kept_rows, make_awkward, make_run, rewrite

ORIGIN = {"id", "feature", "peak", "generator", "prompt_digest", "seed"}


def for_task(task: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("made", [task], indirect=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def turns(row: dict[str, Any], key: str) -> list[dict[str, str]]:
    return [*row["prompt"], {"role": "assistant", "content": row[key]}]


@for_task("instruction_following")
def test_instructions_for_sft(made: Config, tmp_path: Path):
    make_awkward(made)
    export(made, "trl_sft", tmp_path / "out")
    for row, kept in zip(lines(tmp_path / "out" / "train.jsonl"), kept_rows(made), strict=True):
        assert row.keys() == {"prompt", "completion", *ORIGIN}
        assert row["prompt"] == [{"role": "user", "content": kept["instruction"]}]
        assert row["completion"] == [{"role": "assistant", "content": kept["answer"]}]


@for_task("instruction_following")
def test_instructions_for_alpaca_eval_keep_their_origin_beside_them(made: Config, tmp_path: Path):
    make_awkward(made)
    export(made, "alpaca_eval", tmp_path / "out", name="mine")
    rows, kept = json.loads((tmp_path / "out" / "model_outputs.json").read_text()), kept_rows(made)
    assert [(row["instruction"], row["output"]) for row in rows] == [(k["instruction"], k["answer"]) for k in kept]
    assert {row["generator"] for row in rows} == {"fake:writer"} and {row["dataset"] for row in rows} == {"mine"}
    beside = lines(tmp_path / "out" / "provenance.jsonl")
    assert [(one["row"], one["id"]) for one in beside] == [(number, row["id"]) for number, row in enumerate(rows)]
    assert all(one.keys() == {"row", *ORIGIN} for one in beside)


@for_task("helpfulness")
def test_pairs_for_reward_models_and_preference_optimisation(made: Config, tmp_path: Path):
    make_awkward(made)
    for form in ("trl_reward", "trl_preference", "rewardbench"):
        export(made, form, tmp_path / form)
    kept = kept_rows(made)
    for row, one in zip(lines(tmp_path / "trl_reward" / "train.jsonl"), kept, strict=True):
        assert row.keys() == {"chosen", "rejected", *ORIGIN}
        assert (row["chosen"], row["rejected"]) == (turns(one, "chosen"), turns(one, "rejected"))
    for row, one in zip(lines(tmp_path / "trl_preference" / "train.jsonl"), kept, strict=True):
        assert row.keys() == {"prompt", "chosen", "rejected", *ORIGIN} and row["prompt"] == one["prompt"]
        assert row["prompt"] + row["chosen"] == turns(one, "chosen")
        assert row["prompt"] + row["rejected"] == turns(one, "rejected")
    for row, one in zip(lines(tmp_path / "rewardbench" / "preferences.jsonl"), kept, strict=True):
        assert row.keys() == {"prompt", "chosen", "rejected", *ORIGIN}
        assert row["prompt"] == one["prompt"][-1]["content"] and row["chosen"] == turns(one, "chosen")


@pytest.mark.parametrize(
    ("made", "entry"),
    [
        ("instruction_following", {"columns": {"prompt": "instruction", "query": "input", "response": "output"}}),
        (
            "helpfulness",
            {
                "formatting": "sharegpt",
                "ranking": True,
                "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
            },
        ),
    ],
    indirect=["made"],
)
def test_llama_factory_gets_rows_and_their_entry(made: Config, entry: dict[str, Any], tmp_path: Path):
    make_awkward(made)
    export(made, "llama_factory", tmp_path / "out", name="mine")
    assert json.loads((tmp_path / "out" / "dataset_info.json").read_text()) == {
        "mine": {"file_name": "mine.json", **entry}
    }
    rows = json.loads((tmp_path / "out" / "mine.json").read_text(encoding="utf-8"))
    for row, kept in zip(rows, kept_rows(made), strict=True):
        assert set(row) > ORIGIN
        if "ranking" in entry:
            speakers = {"user": "human", "assistant": "gpt"}
            said = [(speakers[turn["role"]], turn["content"]) for turn in kept["prompt"]]
            assert [(turn["from"], turn["value"]) for turn in row["conversations"]] == said
            assert row["chosen"] == {"from": "gpt", "value": kept["chosen"]}
        else:
            assert (row["instruction"], row["input"], row["output"]) == (kept["instruction"], "", kept["answer"])


@for_task("instruction_following")
def test_llama_factory_adds_to_the_data_sets_of_others(made: Config, tmp_path: Path):
    out = tmp_path / "data"
    out.mkdir()
    others = {"zürich": {"file_name": "z.json"}, "alpaca": {"hf_hub_url": "a/b", "columns": {"prompt": "p"}}}
    (out / "dataset_info.json").write_text(json.dumps(others, ensure_ascii=False), encoding="utf-8")
    (out / "z.json").write_text("[]")
    export(made, "llama_factory", out)
    export(made, "llama_factory", out, name="again")
    info = json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))
    assert list(info) == ["zürich", "alpaca", "fac_instruction_following", "again"]
    assert {name: info[name] for name in others} == others and (out / "z.json").read_text() == "[]"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for name, taken in (("again", "'again'"), ("z", "'z.json'")):
        with pytest.raises(UserError, match=f"has {taken} already: give this data set another --name"):
            export(made, "llama_factory", out, name=name)
    for content, words in (("{", "is not valid JSON"), ("[]", "holds a list where data sets by name are expected")):
        (out / "dataset_info.json").write_text(content)
        with pytest.raises(UserError, match=words):
            export(made, "llama_factory", out, name="more")
    assert {file.name for file in out.iterdir()} == set(before)


@pytest.mark.parametrize("made", ["survival", "sycophancy"], indirect=True)
def test_choices_for_steering(made: Config, tmp_path: Path):
    make_awkward(made)
    rewrite(made, lambda row, number: row | {"matches": "AB"[number % 2]})
    export(made, "caa", tmp_path / "out")
    text = (tmp_path / "out" / "generate_dataset.json").read_text(encoding="ascii")
    for row, kept in zip(json.loads(text), kept_rows(made), strict=True):
        assert row.keys() == {"question", "answer_matching_behavior", "answer_not_matching_behavior", *ORIGIN}
        assert row["question"] == kept["text"] and row["answer_matching_behavior"] == f"({kept['matches']})"
        letters = {row["answer_matching_behavior"], row["answer_not_matching_behavior"]}
        assert letters == {"(A)", "(B)"}


@for_task("survival")
def test_the_question_for_steering_shows_both_choices(made: Config, tmp_path: Path):
    export(made, "caa", tmp_path / "out")
    for row, kept in zip(
        json.loads((tmp_path / "out/generate_dataset.json").read_text()), kept_rows(made), strict=True
    ):
        asked, _, choices = row["question"].partition("\n\nChoices:\n")
        assert asked == kept["question"] and choices == f" (A) {kept['choice_a']}\n (B) {kept['choice_b']}"


def read_tsv(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))


def test_texts_and_labels_do_not_mix_in_the_tsv(made: Config, tmp_path: Path):
    make_awkward(made)
    rewrite(made, lambda row, number: row | {"label": float(number % 2)})
    export(made, "official_tsv", tmp_path / "out")
    content = (tmp_path / "out" / "train.tsv").read_bytes().decode()
    assert read_tsv(content) == [[row["text"], str(int(row["label"]))] for row in kept_rows(made)]
    beside = lines(tmp_path / "out" / "provenance.jsonl")
    assert [one["id"] for one in beside] == [row["id"] for row in kept_rows(made)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1))
def test_any_text_comes_back_from_the_tsv(made: Config, texts: list[str]):
    kept = read_kept(made)
    rows = [kept.rows[0] | {"text": f"{text} said one"} for text in texts]
    files = official_tsv(type(kept)(**{**vars(kept), "rows": tuple(rows)}), "")
    assert [text for text, _ in read_tsv(files["train.tsv"])] == [row["text"] for row in rows]


def test_what_the_tsv_cannot_hold_is_refused(made: Config, tmp_path: Path):
    rewrite(made, lambda row, number: row | {"text": "None"})
    with pytest.raises(UserError, match="is the text 'None', which readers .* take for no text at all"):
        export(made, "official_tsv", tmp_path / "out")
    rewrite(made, lambda row, number: row | {"text": "some text", "label": 0.75})
    with pytest.raises(UserError, match="has the label 0.75; official_tsv has 0 and 1"):
        export(made, "official_tsv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made", TASKS, indirect=True)
def test_the_data_set_folder_has_every_form_and_says_what_it_is(made: Config, tmp_path: Path):
    done = export(made, "hf", tmp_path / "out")
    rows, kept = lines(tmp_path / "out" / "data" / "train.jsonl"), kept_rows(made)
    assert done.samples == len(rows) == len(kept) == 7
    for row, one in zip(rows, kept, strict=True):
        assert {key: row[key] for key in one} == one
        assert set(row) == {*one, "peak", "about", "written_for", "model"} and row["peak"] == 3.0
        assert set(row) <= set(COLUMNS)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    _, front, prose = text.split("---\n", 2)
    matter, task = yaml.safe_load(front), load_task(made.judge.task)
    assert matter["configs"][0]["data_files"] == [{"split": "train", "path": "data/train.jsonl"}]
    assert matter["size_categories"] == ["n<1K"] and "synthetic" in matter["tags"]
    harmful = task.description.harmful
    assert ("extra_gated_prompt" in matter) == ("not-for-all-audiences" in matter["tags"]) == harmful
    assert ("## Access" in prose) == ("Only for detectors of harm" in prose) == harmful
    for said in (
        "SmolLM2-135M-Instruct", "`fake:writer`", "active above 1", "7, of which 7 were written for", "14 + 14 in two",
        task.digest, "70% of their three-word runs", task.rubric.splitlines()[0], "fac-jax",
        *(f"| `{column}` |" for column in rows[0]),
    ):  # fmt: skip
        assert said in prose, said
    assert str(tmp_path) not in text, "an export leaves this machine"
    for row in rows:
        assert row["text"] not in text, "the card shows no sample"


@pytest.mark.parametrize("made", TASKS, indirect=True)
def test_a_format_that_does_not_fit_is_refused_with_those_that_do(made: Config, tmp_path: Path):
    form = load_task(made.judge.task).description.form
    fitting = formats_for(form)
    assert "hf" in fitting and len(fitting) >= 2
    for name in FORMATS.keys() - fitting:
        with pytest.raises(UserError, match=f"those of task '{made.judge.task}' are '{form}': choose {fitting[0]} or"):
            export(made, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_request_for_harm_leaves_with_an_answer(made: Config, tmp_path: Path):
    assert formats_for("user turns") == ["hf", "official_tsv"]
    for name in ("trl_sft", "llama_factory", "alpaca_eval", "trl_preference"):
        with pytest.raises(UserError, match="choose hf or official_tsv; no request for harm leaves with an answer"):
            export(made, name, tmp_path / "out")
    for name in ("hf", "official_tsv"):
        export(made, name, tmp_path / name)
    assert lines(tmp_path / "hf" / "data" / "train.jsonl")[0].keys().isdisjoint({"answer", "chosen", "prompt"})


def own_task(folder: Path, like: str, **changed: str) -> str:
    """A task of one's own: files of one that ships, with lines of its task.yaml replaced."""
    task, shipped = folder / "mine", Path(module.__file__).parents[2] / "features" / "tasks" / like
    task.mkdir()
    for file in shipped.iterdir():
        (task / file.name).write_text(file.read_text())
    text = (task / "task.yaml").read_text()
    (task / "task.yaml").write_text(text + "".join(f"{key}: {value}\n" for key, value in changed.items()))
    return str(task)


@pytest.mark.parametrize("like", ["helpfulness", "instruction_following", "sycophancy"])
def test_a_task_about_harm_exports_nothing_but_user_turns(like: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_run(tmp_path, monkeypatch, own_task(tmp_path, like, harmful="true"))
    for name in FORMATS:
        with pytest.raises(UserError, match="only what a user writes .* is exported of such a task"):
            export(config, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_task_is_the_one_that_was_written_for(made: Config, tmp_path: Path):
    """Or naming another task would take the rules on harm off its samples."""
    flags = ["--run.dir", made.run.dir, "--format", "hf", "--to", str(tmp_path / "out")]
    (tmp_path / "mine.yaml").write_text("judge: {task: helpfulness}\n")
    assert cli.main(["export", str(tmp_path / "mine.yaml"), *flags]) == 1
    assert cli.main(["export", str(tmp_path / "mine.yaml"), *flags, "--judge.task", "toxicity"]) == 0
    assert (tmp_path / "out" / "README.md").exists()


def test_a_task_whose_files_changed_is_not_taken_for_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = own_task(tmp_path, "toxicity")
    config = make_run(tmp_path, monkeypatch, task)
    text = (tmp_path / "mine" / "task.yaml").read_text().replace("harmful: true", "harmful: false")
    (tmp_path / "mine" / "task.yaml").write_text(text)
    with pytest.raises(UserError, match="have changed since its samples were written: run `fac synthesize CONFIG`"):
        export(config, "hf", tmp_path / "out")


def test_a_run_without_samples_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_run(tmp_path, monkeypatch, write=lambda request: "too short")
    words = "none of 14 texts activates any of 7 missing features above 1.*--synthesize.attempts 3.*--llm.url"
    with pytest.raises(UserError, match=words):
        export(config, "hf", tmp_path / "out")
    (tmp_path / "synthesis" / "stage.json").unlink()
    with pytest.raises(UserError, match="holds no finished samples: run `fac synthesize CONFIG` first"):
        export(config, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_run_is_named_with_file_and_line(made: Config, tmp_path: Path):
    kept = tmp_path / "synthesis" / "kept.jsonl"
    whole = kept.read_text()
    for broken in ('{"id": ', '{"id": "nobody"}\n', "[1]\n"):
        kept.write_text(whole + broken)
        with pytest.raises(UserError, match=r"kept.jsonl:8 is no kept sample \(.*: restore the file, or rename"):
            export(made, "hf", tmp_path / "out")
    kept.write_bytes(b"\xff")
    with pytest.raises(UserError, match="kept.jsonl cannot be read .UnicodeDecodeError"):
        export(made, "hf", tmp_path / "out")
    (tmp_path / "synthesis" / "samples.parquet").write_text("no table")
    with pytest.raises(UserError, match="samples.parquet cannot be read .ArrowInvalid"):
        export(made, "hf", tmp_path / "out")
    (tmp_path / "synthesis" / "samples.parquet").unlink()
    with pytest.raises(UserError, match="samples.parquet cannot be read .FileNotFoundError"):
        export(made, "hf", tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(made: Config, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    export(made, "hf", out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for form in ("hf", "official_tsv"):
        with pytest.raises(UserError, match="out already holds something; remove it or name another folder"):
            export(made, form, out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .Not a directory.; name another folder"):
        export(made, "hf", tmp_path / "file" / "out")


def test_a_write_that_fails_leaves_nothing(made: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, text: str) -> None:
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(module, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        export(made, "hf", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("name", ["a/b", "../up", "", ".hidden", "dataset_info", "two words"])
@for_task("instruction_following")
def test_a_name_is_one_that_a_file_can_have(made: Config, name: str, tmp_path: Path):
    if name:
        with pytest.raises(UserError, match="--name is .*; it must begin with a letter or digit"):
            export(made, "llama_factory", tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


class Calls(list[tuple[str, dict[str, Any]]]):
    """What the hub was asked, by name of the method."""

    there: str | None = None
    """None, private or public: the repository before the push."""

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Calls:
    import huggingface_hub

    calls = Calls()

    class Api:
        def repo_exists(self, repo: str, **more: Any) -> bool:
            return calls.there is not None

        def dataset_info(self, repo: str) -> Any:
            return type("Info", (), {"private": calls.there == "private"})

        endpoint = "https://hub"

        def __getattr__(self, name: str) -> Any:
            takes = inspect.signature(getattr(real, name))

            def called(*given: Any, **more: Any) -> None:
                takes.bind(self, *given, **more)
                calls.append((name, {key: value for key, value in more.items() if value is not None}))

            return called

    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_a_push_is_private(made: Config, hub: Calls, tmp_path: Path):
    done = export(made, "hf", tmp_path / "out", hub=Hub("me/mine"))
    assert done.address == "https://hub/datasets/me/mine"
    assert hub.names == ["create_repo", "upload_folder"] and hub[0][1]["private"] is True
    assert hub[1][1]["folder_path"] == tmp_path / "out" and hub[1][1]["repo_type"] == "dataset"


def test_harm_is_public_only_when_that_was_said_and_opened_last_and_gated(made: Config, hub: Calls, tmp_path: Path):
    with pytest.raises(UserError, match="is about harm, so --public would .* add --publish-harmful if publishing"):
        export(made, "hf", tmp_path / "out", hub=Hub("me/mine", public=True))
    assert hub == [] and not (tmp_path / "out").exists()
    export(made, "hf", tmp_path / "out", hub=Hub("me/mine", public=True, publish_harmful=True))
    assert hub.names == ["create_repo", "upload_folder", "update_repo_settings"] and hub[0][1]["private"] is True
    assert hub[2][1] == {"repo_type": "dataset", "private": False, "gated": "manual"}
    assert "extra_gated_prompt" in (tmp_path / "out" / "README.md").read_text()


def test_a_repository_that_everyone_sees_is_gated_before_harm_is_sent_there(made: Config, hub: Calls, tmp_path: Path):
    hub.there = "public"
    export(made, "hf", tmp_path / "out", hub=Hub("me/mine", public=True, publish_harmful=True))
    assert hub.names == ["update_repo_settings", "upload_folder", "update_repo_settings"]
    assert hub[0][1] == {"repo_type": "dataset", "gated": "manual"}


@for_task("helpfulness")
def test_what_does_no_harm_may_be_public(made: Config, hub: Calls, tmp_path: Path):
    export(made, "hf", tmp_path / "out", hub=Hub("me/mine", public=True))
    assert hub.names == ["create_repo", "upload_folder", "update_repo_settings"]
    assert hub[0][1]["private"] is True and hub[2][1] == {"repo_type": "dataset", "private": False}


@for_task("helpfulness")
def test_a_repository_that_everyone_sees_takes_nothing_private(made: Config, hub: Calls, tmp_path: Path):
    hub.there = "public"
    with pytest.raises(UserError, match="me/mine is on the hub and everyone sees it: say --public"):
        export(made, "hf", tmp_path / "out", hub=Hub("me/mine"))
    assert hub == []
    hub.there = "private"
    export(made, "hf", tmp_path / "again", hub=Hub("me/mine"))
    assert hub.names == ["upload_folder"] and hub[0][1]["delete_patterns"] == ["data/*"]


@pytest.mark.parametrize(
    ("form", "asked", "words"),
    [
        ("official_tsv", Hub("me/mine"), "--push is for --format hf"),
        ("hf", Hub("mine"), "--push is 'mine'; it must be OWNER/NAME"),
        ("hf", Hub("me/mine", publish_harmful=True), "--publish-harmful does nothing without --public"),
    ],
)
def test_a_push_that_is_refused_asks_the_hub_nothing(
    form: str, asked: Hub, words: str, made: Config, hub: Calls, tmp_path: Path
):
    with pytest.raises(UserError, match=words):
        export(made, form, tmp_path / "out", hub=asked)
    assert hub == [] and not (tmp_path / "out").exists()


def test_the_hubs_own_client_sends_the_folder(made: Config, tmp_path: Path):
    """To a hub on loopback, with the key of the environment; and says what a hub that takes nothing said."""
    (tmp_path / "mine.yaml").write_text(f"run: {{dir: {tmp_path}}}\n")
    out = tmp_path / "out"
    flags = ["--format", "hf", "--to", str(out), "--push", "me/mine", "--public", "--publish-harmful"]
    exporting = ["-m", "fac_jax.cli", "export", str(tmp_path / "mine.yaml"), *flags]
    pushing = f"from pathlib import Path; from {push.__module__} import push; push(Path({str(out)!r}), 'me/mine', 0, 0)"
    with HubServer() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_of_the_test", "HF_HUB_OFFLINE": "0"}

        def python(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=140
            )

        done = python(*exporting)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1] == f"pushed: {server.url}/datasets/me/mine (public)"
        assert server.repository == {"visibility": "public", "gated": "manual"} and server.opened_last
        assert server.keys == {"Bearer hf_of_the_test"}
        for file in ("README.md", "data/train.jsonl"):
            assert server.files[file] == (out / file).read_bytes()
        server.repository, server.forbids = {}, True
        last = python("-c", pushing).stderr.splitlines()[-1]
    assert last.startswith("fac_jax.errors.UserError") and "the hub gave HfHubHTTPError for me/mine (403" in last
    assert last.endswith("check the name and that HF_TOKEN may write there, and push again")


def test_the_command_line_names_what_is_wrong(made: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.yaml").write_text(f"run: {{dir: {tmp_path}}}\n")

    def fac(*flags: str) -> tuple[int, str]:
        status = cli.main(["export", str(tmp_path / "mine.yaml"), *flags])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.out if status == 0 else " ".join(said.err.split())

    to = ("--to", str(tmp_path / "out"))
    for flags, words in (
        (to, "fac export needs --format NAME: of any samples hf"),
        (("--format", "hf"), "fac export needs --to FOLDER"),
        (("--format", "hff", *to), "--format is 'hff' (did you mean 'hf'?); the formats are: hf, trl_sft"),
        (("--format", "hf", *to, "--public"), "--public says who may see what --push OWNER/NAME uploads"),
        (("--format", "hf", *to, "--push", "me/mine", "--public"), "add --publish-harmful"),
        (("--format", "hf", *to, "--push", "me/mine"), "is written, but HF_HUB_OFFLINE is set"),
    ):
        status, said = fac(*flags)
        assert status == 1 and words in said, said
    status, said = fac("--format", "official_tsv", "--to", str(tmp_path / "tsv"))
    assert status == 0 and said == f"written: {tmp_path}/tsv (7 samples): train.tsv, provenance.jsonl\n"
