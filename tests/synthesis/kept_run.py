"""Finished runs of the toy world, one for each task, as exports read them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fac_jax.config.features import JudgeConfig
from fac_jax.config.file import Config
from fac_jax.config.machine import RunConfig
from fac_jax.features.task import load_task
from fac_jax.pipeline import pipeline
from fac_jax.plain import to_plain
from fac_jax.runs import Record, versions
from tests.synthesis.test_synthesize import able, in_form, run
from tests.synthesis.toy_world import make_toy

TASKS = ("toxicity", "helpfulness", "instruction_following", "survival", "sycophancy")
AWKWARD = (
    "plain words on one line",
    'tabs\there\tand "quotes", \'single\' and "" doubled',
    "two lines\nand a third\n\nafter an empty one",
    "text\tlabel",
    "ends as a label would\t1",
    '"quoted from end to end"',
    'a lone " quote and a back\\slash \\t \\n',
    "größer, 漢字, עברית, \u2028 a line separator, \u00a0 a space",
    "emoji 👩‍👩‍👧 and a flag 🇺🇳",
    "  spaces around  ",
    "# a comment?, a;b;c, {'json': [1]}, <b>html</b> & | pipes |",
    "A: B\r\nC\rD",
    "NA values are not this",
    "1e5 words",
    "---\nyaml: [front, matter]\n---",
)


def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str = "toxicity", write: Any = None) -> Config:
    """A run directory in `tmp_path` whose synthesis is finished; returns its config."""
    toy = make_toy(tmp_path, monkeypatch)
    config = dataclasses.replace(toy.config, judge=JudgeConfig(task=task), run=RunConfig(dir=str(tmp_path)))
    toy = dataclasses.replace(toy, config=config)
    form = load_task(task).description.form
    summary, _ = run(toy, write or (able if form == "user turns" else in_form(form)), monkeypatch)
    record = Record(
        stage="synthesis", digest="d" * 16, finished="2026-11-26 10:00:00", seconds=1.0, summary=summary,
        settings=to_plain(pipeline(config)["synthesis"].settings), inputs={}, versions=versions(), files={},
    )  # fmt: skip
    (toy.out / "stage.json").write_text(json.dumps(to_plain(record)))
    return config


def kept_rows(config: Config) -> list[dict[str, Any]]:
    """Rows of kept.jsonl."""
    text = (Path(config.run.dir) / "synthesis" / "kept.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def rewrite(config: Config, change: Callable[[dict[str, Any], int], dict[str, Any]]) -> None:
    """Replace each row of kept.jsonl by `change(row, its number)`."""
    rows = [change(row, number) for number, row in enumerate(kept_rows(config))]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (Path(config.run.dir) / "synthesis" / "kept.jsonl").write_text(text, encoding="utf-8")


def make_awkward(config: Config, texts: tuple[str, ...] = AWKWARD) -> None:
    """Put awkward texts into every field of every row, other ones into each; rows are repeated as often as needed."""
    path = Path(config.run.dir) / "synthesis" / "kept.jsonl"
    rows = kept_rows(config)
    more = [dict(rows[number % len(rows)]) for number in range(len(texts))]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in more), encoding="utf-8")

    def awkward(row: dict[str, Any], number: int) -> dict[str, Any]:
        def text(place: int) -> str:
            return texts[(number + place) % len(texts)]

        changed = {
            key: text(place)
            for place, key in enumerate(("text", "instruction", "answer", "chosen", "rejected", "choice_a", "choice_b"))
            if key in row
        }
        if "prompt" in row:
            turns = [("user", 7), ("assistant", 8), ("user", 9)][(number % 2) * 2 :]
            changed["prompt"] = [{"role": role, "content": text(place)} for role, place in turns]
        return row | changed

    rewrite(config, awkward)
