"""Tasks are data: those shipped load, one's own is a folder, a wrong name or file is named."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax.config.features import JudgeConfig
from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.features import judge as judge_module
from fac_jax.features.ask import ask
from fac_jax.features.explain import EXPLAIN
from fac_jax.features.judge import judge
from fac_jax.features.task import FOLDER, SHARED, Task, load_task, task_names
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from fac_jax.llm.question import question
from fac_jax.scan.product import Scan

README = FOLDER / "README.md"


def test_five_tasks_ship() -> None:
    assert task_names() == ["helpfulness", "instruction_following", "survival", "sycophancy", "toxicity"]
    for name in task_names():
        assert f"| `{name}` |" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", task_names())
def test_shipped_tasks_load(name: str) -> None:
    task = load_task(name)
    assert task.name == name and task.description.labels == ("Yes", "Probably", "Maybe", "No")
    for prompt in task.prompts.values():
        assert "{{" not in prompt
    answered = {"answer"} if task.description.form == "instruction and answer" else set()
    assert set(task.prompts) == {"explain", "verify", "judge", "contrast", "cover", *answered}
    assert task.rubric in task.prompt("judge") and task.description.positive in task.prompt("judge")
    assert len(task.rubric.split("\n- ")) > 5
    assert task.description.harmful == (name == "toxicity")


def test_tasks_differ_where_they_should() -> None:
    tasks = [load_task(name) for name in task_names()]
    for one, other in itertools.combinations(tasks, 2):
        assert one.digest != other.digest and one.prompt("judge") != other.prompt("judge")
        assert one.prompt("explain") == other.prompt("explain"), "what a feature responds to does not depend on it"
        assert one.prompt("contrast") != other.prompt("contrast")


def test_unknown_task_lists_what_there_is() -> None:
    with pytest.raises(
        UserError,
        match=r"judge.task is 'toxcity' \(did you mean 'toxicity'\?\); the tasks are: .*toxicity; or give the",
    ):
        load_task("toxcity")
    with pytest.raises(UserError, match=r"judge.task is 'no/such', and no/such/task.yaml does not exist"):
        load_task("no/such")
    with pytest.raises(UserError, match="judge.task is ''; the tasks are"):
        load_task("")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a shipped task as a folder of one's own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER / "toxicity", tmp_path / "mine")
    return tmp_path / "mine"


def test_a_folder_is_found_by_name_and_by_path(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_task("mine") == load_task("./mine") == load_task(str(mine)) and load_task("mine").name == "mine"
    mine.rename(mine.with_name("toxicity"))
    (mine.with_name("toxicity") / "rubric.md").write_text("Everything.")
    assert load_task("toxicity").rubric != "Everything." == load_task("./toxicity").rubric


def test_prompts_of_the_task_come_before_the_shared_ones(mine: Path) -> None:
    before = load_task("mine")
    assert before.prompt("verify") == (SHARED / "verify.txt").read_text(encoding="utf-8").strip()
    (mine / "verify.txt").write_text("Is it so? {{title}}")
    after = load_task("mine")
    assert after.prompt("verify") == "Is it so? toxicity of user intent"
    assert after.prompt("judge") == before.prompt("judge")


@pytest.mark.parametrize("file", ["task.yaml", "rubric.md", "contrast.txt", "cover.txt"])
def test_any_change_of_a_file_changes_the_digest(mine: Path, file: str) -> None:
    before = load_task("mine").digest
    (mine / file).write_text((mine / file).read_text(encoding="utf-8") + "\n# more\n")
    assert load_task("mine").digest != before


def test_shared_prompts_count_and_strangers_do_not(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_task("mine").digest
    (mine / "notes.md").write_text("To do: everything")
    (mine / ".swap").write_text("x")
    assert load_task("mine").digest == before, "what is not read makes no other product"
    (mine / "explain.txt").write_text((SHARED / "explain.txt").read_text(encoding="utf-8"))
    assert load_task("mine").digest == before, "the same prompts, wherever they lie"
    shutil.copytree(SHARED, mine.parent / "shared")
    (mine.parent / "shared" / "verify.txt").write_text("Well?")
    monkeypatch.setattr("fac_jax.features.task.SHARED", mine.parent / "shared")
    assert load_task("mine").digest != before


SAMPLE = {"min_turns": 1, "max_turns": 1, "min_words": 1, "max_words": 9, "label": 1}
GOOD = {
    "title": "x", "positive": "it is x", "labels": ["Yes", "No"], "metric": "auprc", "form": "user turns",
    "sample": SAMPLE,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"label": ["Yes"]}, "mine/task.yaml has no key 'label'"),
        ({"labels": ["Yes"]}, r"mine/task.yaml: labels are \['Yes'\]; they must be two or more"),
        ({"labels": ["Yes", "No", "Yes"]}, "none twice and none empty"),
        ({"title": " "}, "title is ' ' and positive 'it is x'; neither may be empty"),
        ({"metric": "accuracy"}, "mine/task.yaml: metric is 'accuracy'.*choose from"),
        ({"metric": "win rate"}, "mine/task.yaml: metric is 'win rate'; with the form 'user turns' it is 'auprc'"),
        ({"form": "limericks"}, "mine/task.yaml: form is 'limericks'; choose from"),
        ({"sample": None}, "mine/task.yaml.*sample"),
        ({"sample": {**SAMPLE, "max_words": 0}}, "sample has min_words 1 and max_words 0; need 1 <= min <= max"),
        ({"sample": {**SAMPLE, "label": 2}}, "sample has the label 2; it must lie in 0 to 1"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_named(mine: Path, change: dict[str, object], why: str) -> None:
    (mine / "task.yaml").write_text(json.dumps(GOOD))
    load_task("mine")
    (mine / "task.yaml").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(UserError, match=why):
        load_task("mine")


def test_errors_name_the_file(mine: Path) -> None:
    (mine / "judge.txt").write_text("Judge by {{rubrik}}.")
    with pytest.raises(UserError, match=r"judge.txt asks for \{\{rubrik\}\}; known are: title, positive, rubric"):
        load_task("mine")
    (mine / "judge.txt").rename(mine / "judg.txt")
    with pytest.raises(
        UserError, match=r"judg.txt is no prompt of a task \(did you mean 'judge'\?\); the prompts are: "
    ):
        load_task("mine")
    (mine / "judg.txt").unlink()
    (mine / "cover.txt").unlink()
    with pytest.raises(UserError, match="task 'mine' has no prompt cover.txt; it has: contrast, explain"):
        load_task("mine").prompt("cover")
    (mine / "task.yaml").write_text("title: [x")
    with pytest.raises(UserError, match="mine/task.yaml is not valid YAML"):
        load_task("mine")
    (mine / "task.yaml").write_text(json.dumps(GOOD))
    (mine / "rubric.md").write_bytes(b"\xff")
    with pytest.raises(UserError, match="rubric.md is not UTF-8"):
        load_task("mine")
    (mine / "rubric.md").write_text(" \n")
    with pytest.raises(UserError, match="rubric.md is empty"):
        load_task("mine")
    (mine / "rubric.md").unlink()
    with pytest.raises(UserError, match="rubric.md does not exist; a task needs task.yaml and rubric.md"):
        load_task("mine")


def readme_files() -> dict[str, str]:
    """The files of the README's example."""
    blocks: dict[str, list[str]] = {}
    block: list[str] = []
    for line in README.read_text(encoding="utf-8").splitlines():
        if line.startswith("`mine/politeness/"):
            block = blocks.setdefault(line.split("`")[1].rsplit("/", 1)[1], [])
        elif line.startswith("    ") or not line:
            block.append(line.removeprefix("    "))
        else:
            block = []
    return {name: "\n".join(lines).strip() for name, lines in blocks.items()}


@pytest.fixture
def politeness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The README's example, as a folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine" / "politeness"
    folder.mkdir(parents=True)
    for name, text in readme_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return load_task("mine/politeness")


def test_a_sixth_task_explains_and_judges_without_code(
    politeness: Task, make_scan: Callable[..., Scan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(len(text.splitlines()) for text in readme_files().values()) <= 20
    assert politeness.name == "politeness" and set(politeness.prompts) == {"contrast", "explain", "judge", "verify"}
    assert politeness.description.sample.max_words == 40

    def answer(request: Request) -> str:
        system = request.messages[0]["content"]
        if "Thanks, please, apologies" in system:
            return '{"label": "Maybe", "reason": "it greets"}'
        assert system.startswith("You describe what one feature")
        return '{"verdict": "explained", "explanation": "greetings"}'

    generator = FakeGenerator(answer)
    asked = {"explain:0": question(politeness.prompt("explain"), {"spans": []}, EXPLAIN)}
    explained = ask(generator, asked, tmp_path / "explain.jsonl", "explain")["explain:0"].value
    assert explained is not None
    monkeypatch.setattr(judge_module, "open_generator", lambda config, mesh: generator)
    monkeypatch.setattr(judge_module, "make_mesh", lambda config: None)
    row = {"feature": 0, "method": "llm", "status": "explained", "verified": "Yes"}
    rows = [{**row, "explanation": explained["explanation"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "explanations.parquet")
    config = Config(llm=LlmConfig(url="http://127.0.0.1:1/v1"), judge=JudgeConfig(task="mine/politeness"))
    summary = judge(config, tmp_path, {"scan:anchor": make_scan().folder, "explanations": tmp_path})
    assert summary["task"] == "politeness" and summary["labels"] == {"Maybe": 1} and summary["relevant"] == 1
