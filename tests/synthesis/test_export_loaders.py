"""Exports in the programs that they are for: each one's own loader finds what was kept, to the letter.

Needs an interpreter with those programs, named by EXPORT_LOADERS_PYTHON: `bash launch/test-exports.sh` makes one and
runs this. The runs are those of the toy world; every field of every row is then an awkward text.

All programs share one environment, with the versions that TRL of today asks for. LLaMA-Factory 0.9.5 declares older
ones and torchaudio, RewardBench 0.1.4 pins transformers 4.51: loaders_program.py puts an empty module in place of what
they import and do not use here. By hand, on 2026-11-26, both also passed with versions that they declare: LLaMA-Factory
with transformers 5.6, trl 0.24 and datasets 4.0 (without torchaudio), RewardBench, whole, with transformers 4.51
and datasets 3.6. Of CAA and of the paper's code there is no package: what their published readers do is done there in
a few lines of our own.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fac_jax.config.file import Config
from fac_jax.synthesis.export.export import export
from tests.synthesis.kept_run import TASKS, kept_rows, make_awkward

PROGRAM = Path(__file__).parent / "loaders_program.py"
PYTHON = os.environ.get("EXPORT_LOADERS_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None,
    reason="EXPORT_LOADERS_PYTHON names no interpreter with the loaders; run bash launch/test-exports.sh",
)


@pytest.fixture
def made(made: Config) -> Config:
    make_awkward(made)
    return made


def for_task(task: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("made", [task], indirect=True)


def load(form: str, folder: Path, **environment: str) -> Any:
    """What the loader of this format read from the export in `folder`."""
    answer = folder.parent / "answer.json"
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    own = {"HF_HOME": str(folder.parent / "cache"), **environment}
    done = subprocess.run(
        [str(PYTHON), str(PROGRAM), form, str(folder), str(answer)],
        capture_output=True, text=True, timeout=280, env=inherited | own, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(answer.read_text(encoding="utf-8"))
    print(f"{form}: {found['loader']}")
    return found["read"]


def chat(turns: list[dict[str, str]]) -> str:
    """Under the chat template of loaders_program.py."""
    return "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in turns)


def chatml(turns: list[dict[str, str]]) -> str:
    """Under LLaMA-Factory's chatml template."""
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def said(row: dict[str, Any], answer: str) -> list[dict[str, str]]:
    """A conversation of a kept row."""
    before = row.get("prompt") or [{"role": "user", "content": row["instruction"]}]
    return [*before, {"role": "assistant", "content": row[answer]}]


@for_task("instruction_following")
def test_trl_trains_on_the_answers(made: Config, tmp_path: Path):
    export(made, "trl_sft", tmp_path / "out")
    for read, row in zip(load("trl_sft", tmp_path / "out"), kept_rows(made), strict=True):
        assert read == {"whole": chat(said(row, "answer")), "trained_on": f"{row['answer']}<|end|>"}


@for_task("helpfulness")
def test_trl_trains_a_reward_model(made: Config, tmp_path: Path):
    export(made, "trl_reward", tmp_path / "out")
    for read, row in zip(load("trl_reward", tmp_path / "out"), kept_rows(made), strict=True):
        assert read == {key: chat(said(row, key)) for key in ("chosen", "rejected")}


@for_task("helpfulness")
def test_trl_optimises_preferences(made: Config, tmp_path: Path):
    export(made, "trl_preference", tmp_path / "out")
    for read, row in zip(load("trl_preference", tmp_path / "out"), kept_rows(made), strict=True):
        assert read["prompt"] == chat(row["prompt"]) + "<|assistant|>"
        assert (read["chosen"], read["rejected"]) == (f"{row['chosen']}<|end|>", f"{row['rejected']}<|end|>")


@pytest.mark.parametrize("made", ["instruction_following", "helpfulness"], indirect=True)
def test_llama_factory_finds_the_data_set_beside_others(made: Config, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dataset_info.json").write_text(json.dumps({"other": {"file_name": "gone.json"}}))
    export(made, "llama_factory", out)
    answers = ("answer",) if made.judge.task == "instruction_following" else ("chosen", "rejected")
    for read, row in zip(load("llama_factory", out), kept_rows(made), strict=True):
        for answer in answers:
            name = "whole" if answer == "answer" else answer
            assert read[name] == chatml(said(row, answer))
            assert read[f"{name}_trained_on"] == f"{row[answer]}<|im_end|>\n"


@for_task("helpfulness")
def test_rewardbench_reads_the_pairs(made: Config, tmp_path: Path):
    export(made, "rewardbench", tmp_path / "out")
    for read, row in zip(load("rewardbench", tmp_path / "out"), kept_rows(made), strict=True):
        assert read == {key: chat(said(row, key)) for key in ("chosen", "rejected")}


@for_task("instruction_following")
def test_alpaca_eval_reads_the_outputs(made: Config, tmp_path: Path):
    export(made, "alpaca_eval", tmp_path / "out", name="mine")
    for read, row in zip(load("alpaca_eval", tmp_path / "out"), kept_rows(made), strict=True):
        assert read == {
            "instruction": row["instruction"], "output": row["answer"], "generator": "fake:writer", "dataset": "mine",
            "id": row["id"], "model": "fake:writer",
        }  # fmt: skip


@pytest.mark.parametrize("made", TASKS, indirect=True)
def test_datasets_loads_the_folder(made: Config, tmp_path: Path):
    export(made, "hf", tmp_path / "out")
    read = load("hf", tmp_path / "out")
    assert read["splits"] == ["train"]
    for one, row in zip(read["rows"], kept_rows(made), strict=True):
        assert {key: one[key] for key in row} == row and one["peak"] == 3.0
    assert ("extra_gated_prompt" in read["card"]) == (made.judge.task == "toxicity")


@for_task("toxicity")
def test_the_published_code_reads_texts_and_labels(made: Config, tmp_path: Path):
    export(made, "official_tsv", tmp_path / "out")
    read = load("official_tsv", tmp_path / "out")
    assert read == [{"text": row["text"], "label": 1} for row in kept_rows(made)]


@pytest.mark.parametrize("made", ["survival", "sycophancy"], indirect=True)
def test_caa_finds_the_letters(made: Config, tmp_path: Path):
    """Also where the encoding of the machine is not UTF-8."""
    export(made, "caa", tmp_path / "out")
    read = load("caa", tmp_path / "out", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    other = {"A": "B", "B": "A"}
    assert read == [
        {
            "question": row["text"], "answer_matching_behavior": row["matches"],
            "answer_not_matching_behavior": other[row["matches"]],
        }
        for row in kept_rows(made)
    ]  # fmt: skip
