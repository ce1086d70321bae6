"""No row that is measured on is trained on: of documents, pairs and instructions, whatever spelling and order."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fac_jax.config.activations import BackboneConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.downstream import FinetuneConfig
from fac_jax.config.file import Config
from fac_jax.downstream.arms import check_apart, check_disjoint, check_texts_disjoint, read_arms, read_outputs_for
from fac_jax.downstream.published import Example, Kind
from fac_jax.errors import UserError
from fac_jax.text import Turn
from fac_jax.words import words

TEXT = st.text(alphabet="abAB ?!.\u00e9\u0301\uff41", min_size=1, max_size=4).filter(lambda text: text.strip() != "")


def respelled(text: str, how: int) -> str:
    """The same words."""
    changed = [
        text,
        text.upper(),
        unicodedata.normalize("NFKC", text),
        f"  {text}... ",
        text.replace(" ", "  ").replace("?", "!"),
    ][how]
    return changed if words(changed) == words(text) else text


@st.composite
def example(draw: Any, kind: Kind) -> Example:
    answers = {"pair": 2, "instruction": 1, "prompt": 0}[kind]
    asked = draw(st.lists(TEXT, min_size=0 if kind == "pair" else 1, max_size=2))
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(asked))
    return Example(turns, tuple(draw(TEXT) for _ in range(answers)), None, f"row {draw(st.integers(0, 99))}")


def is_in(one: Example, other: Example) -> bool:
    """By brute force: the same prompt in words or, where one has none, the same answers in any order."""
    if one.prompt and other.prompt:
        joined = ["\n".join(turn.content for turn in each.prompt) for each in (one, other)]
        return words(joined[0]) == words(joined[1])
    return sorted(map(words, one.answers)) == sorted(map(words, other.answers))


@pytest.mark.parametrize("kind", ["pair", "instruction"])
@given(data=st.data())
def test_an_arm_passes_only_where_no_example_is_held_out(kind: Kind, data: st.DataObject) -> None:
    training, heldout = (data.draw(st.lists(example(kind), max_size=5)) for _ in range(2))
    leaks = any(is_in(one, other) for one in training for other in heldout)
    try:
        check_apart(training, heldout, "seed+kept", "heldout")
    except UserError as error:
        assert leaks and "'seed+kept'" in str(error) and "the first is row " in str(error)
    else:
        assert not leaks


@given(st.lists(TEXT, max_size=5), st.lists(TEXT, max_size=5), st.integers(0, 4))
def test_so_does_a_classifiers(training: list[str], heldout: list[str], how: int) -> None:
    arms = [(f"t{n}", respelled(text, how)) for n, text in enumerate(training)]
    held = [(f"h{n}", text) for n, text in enumerate(heldout)]
    leaks = {words(text) for _, text in arms} & {words(text) for text in heldout}
    try:
        check_texts_disjoint(arms, held, "seed", "heldout")
    except UserError as error:
        assert leaks and "the first is t" in str(error)
    else:
        assert not leaks


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_and_by_ids(training: set[int], heldout: set[int]) -> None:
    try:
        check_disjoint([f"{one}" for one in training], [f"{one}" for one in heldout], "seed", "heldout")
    except UserError as error:
        assert f"the first is {min(training & heldout)};" in str(error)
    else:
        assert not training & heldout


def row(number: int, kind: Kind = "pair") -> dict[str, str]:
    if kind == "instruction":
        return {"instruction": f"Do number {number}.", "output": f"done {number}"}
    return {"prompt": f"Question {number}?", "chosen": f"yes {number}", "rejected": "no"}


class Written:
    """Files of an experiment: rows by group."""

    def __init__(self, folder: Path, kind: Kind, **rows: list[dict[str, Any]]) -> None:
        self.folder, self.kind = folder, kind
        numbers = {"seed": range(4), "random": range(4, 6), "kept": range(6, 9), "heldout": range(20, 23)}
        self.rows = {name: [row(n, kind) for n in some] for name, some in numbers.items()} | rows

    def config(self, **settings: Any) -> Config:
        for name, rows in self.rows.items():
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        data = {name: DataSet((Source(str(self.folder / f"{name}.jsonl")),)) for name in self.rows}
        finetune = FinetuneConfig(train="seed", heldout="heldout", **settings)
        return Config(data=data, finetune=finetune, backbone=BackboneConfig(row_tokens=256))


@pytest.mark.parametrize("kind", ["pair", "instruction"])
def test_arms_are_the_seed_and_what_was_written(tmp_path: Path, kind: Kind) -> None:
    written = Written(tmp_path, kind)
    written.rows["kept"].append(written.rows["seed"][0])
    arms = read_arms(written.config(), tmp_path, kind)
    assert {name: len(some) for name, some in arms.training.items()} == {"seed": 4, "seed+random": 6, "seed+kept": 7}
    assert [arms.added(name) for name in arms.training] == [0, 2, 3], "what was in the seed adds nothing"
    assert arms.training["seed+kept"][:4] == arms.training["seed"] and len(arms.heldout) == 3
    assert arms.counts["kept"] == {"rows": 4, "duplicates": 0, "skipped": []}


@pytest.mark.parametrize("group", ["seed", "random", "kept"])
@pytest.mark.parametrize("kind", ["pair", "instruction"])
def test_a_held_out_row_in_an_arm_is_named(tmp_path: Path, kind: Kind, group: str) -> None:
    """Also a sample that the model wrote, in other spelling and with another answer."""
    leak = {"prompt": "question 21", "chosen": "x", "rejected": "y"}
    leak = leak if kind == "pair" else {"instruction": "do NUMBER 21", "answer": "x"}
    written = Written(tmp_path, kind)
    written.rows[group].append(leak)
    arm = "seed" if group == "seed" else f"seed\\+{group}"
    place = len(written.rows[group])
    with pytest.raises(UserError, match=rf"arm '{arm}' .* {group}\.jsonl:{place}, there heldout\.jsonl:2; give"):
        read_arms(written.config(), tmp_path, kind)


def test_an_empty_synthesis_adds_nothing_and_an_empty_set_is_an_error(tmp_path: Path) -> None:
    arms = read_arms(Written(tmp_path, "pair", kept=[], random=[]).config(), tmp_path, "pair")
    assert arms.training["seed"] == arms.training["seed+kept"] == arms.training["seed+random"]
    with pytest.raises(UserError, match="data.heldout has no pair: .*heldout.jsonl gave nothing under its split"):
        read_arms(Written(tmp_path, "pair", heldout=[]).config(), tmp_path, "pair")


@pytest.mark.parametrize("group", ["kept", "random"])
@pytest.mark.parametrize(
    ("kind", "named", "seed", "sample"),
    [
        (
            "pair",
            {"prompt": "text", "answer": "chosen", "rejected": "rejected"},
            {"text": "Why?", "chosen": "so", "rejected": "no"},
            {"text": "Human: Now?\n\nAssistant: yes", "prompt": [{"role": "user", "content": "Now?"}],
             "chosen": "yes", "rejected": "no"},
        ),
        (
            "instruction", {"answer": "answer"}, {"answer": "so"},
            {"text": "Now?", "instruction": "Now?", "answer": "yes"},
        ),
    ],
)  # fmt: skip
def test_fields_of_the_data_sets_are_not_looked_for_in_what_synthesis_wrote(
    tmp_path: Path, kind: Kind, named: dict[str, str], seed: dict[str, Any], sample: dict[str, Any], group: str
) -> None:
    heldout = [{name: f"{value} not" for name, value in seed.items()}]
    written = Written(tmp_path, kind, seed=[seed], heldout=heldout, **{"kept": [], "random": [], group: [sample]})
    first, second = read_arms(written.config(**named), tmp_path, kind).training[f"seed+{group}"]
    assert first.asked == ("why" if kind == "pair" else "") and first.answers[0] == "so"
    assert second.asked == "now" and second.answers[0] == "yes"


def test_an_instruction_to_answer_is_not_trained_on_either(tmp_path: Path) -> None:
    written = Written(tmp_path, "instruction", asked=[{"prompt": "Do number 30"}, {"prompt": "do number 7"}])
    config = written.config(outputs_for="asked")
    arms = read_arms(config, tmp_path, "instruction")
    with pytest.raises(UserError, match=r"'seed\+kept' are in held-out data set 'asked' .*kept.jsonl:2, there asked"):
        read_outputs_for(config, arms)
    written.rows["asked"].pop()
    assert [one.asked for one in read_outputs_for(written.config(outputs_for="asked"), arms)] == ["do number 30"]


def test_texts_longer_than_a_row_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = Written(tmp_path, "pair").config()
    data = {**config.data, "seed": DataSet(config.data["seed"].sources, max_tokens=512)}
    with pytest.raises(UserError, match="data.seed.max_tokens is 512, more than backbone.row_tokens 256"):
        read_arms(Config(data=data, finetune=config.finetune, backbone=config.backbone), tmp_path, "pair")
