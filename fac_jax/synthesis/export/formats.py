"""Kept samples as the files of other programs, a function for each format. Reads and writes no file.

Each says whose reader it is for and what that reader asks for. `tests/synthesis/test_export_loaders.py` runs the
readers themselves on what is written here. Rows keep their id and where they came from wherever the reader passes over
columns that it does not know; where it does not, `provenance.jsonl` has the same, row for row.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fac_jax.errors import UserError
from fac_jax.synthesis.export.card import card
from fac_jax.synthesis.export.read import ORIGIN, Kept, Row

Files = dict[str, str]
"""Content by path inside the folder."""
PROVENANCE = "provenance.jsonl"
DATASET_INFO = "dataset_info.json"
NOT_A_TEXT = frozenset(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null".split("|")
)
"""What pandas takes for a missing value, in quotes or not."""


@dataclass(frozen=True)
class Format:
    """One format."""

    forms: tuple[str, ...]
    """Forms of samples that it can hold."""
    reader: str
    """Who reads it."""
    files: Callable[[Kept, str], Files]
    """Its files; the second argument is the name that the data set is to have there."""


def trl_sft(kept: Kept, name: str) -> Files:
    """Prompt and completion, conversational: TRL then computes the loss on the answer alone."""
    return {
        "train.jsonl": _lines(
            {"prompt": [_turn("user", row["instruction"])], "completion": [_turn("assistant", row["answer"])]}
            | _origin(row)
            for row in kept.rows
        )
    }


def trl_reward(kept: Kept, name: str) -> Files:
    """Two whole conversations, as TRL's RewardTrainer and the method's reward_modeling scripts read them."""
    return {
        "train.jsonl": _lines(
            {key: [*row["prompt"], _turn("assistant", row[key])] for key in ("chosen", "rejected")} | _origin(row)
            for row in kept.rows
        )
    }


def trl_preference(kept: Kept, name: str) -> Files:
    """The conversation once, and two answers to it, as TRL's DPOTrainer reads them."""
    return {
        "train.jsonl": _lines(
            {"prompt": row["prompt"], **{key: [_turn("assistant", row[key])] for key in ("chosen", "rejected")}}
            | _origin(row)
            for row in kept.rows
        )
    }


def llama_factory(kept: Kept, name: str) -> Files:
    """Instructions as alpaca, pairs as a sharegpt ranking; and what dataset_info.json says of them."""
    if kept.form == "instruction and answer":
        rows = [
            {"instruction": row["instruction"], "input": "", "output": row["answer"], **_origin(row)}
            for row in kept.rows
        ]
        entry: dict[str, Any] = {"columns": {"prompt": "instruction", "query": "input", "response": "output"}}
    else:
        speakers = {"user": "human", "assistant": "gpt"}
        rows = [
            {"conversations": [_said(speakers[turn["role"]], turn["content"]) for turn in row["prompt"]]}
            | {key: _said("gpt", row[key]) for key in ("chosen", "rejected")}
            | _origin(row)
            for row in kept.rows
        ]
        columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
        entry = {"formatting": "sharegpt", "ranking": True, "columns": columns}
    # Its reader opens dataset_info.json in the encoding of the machine: ASCII is the same in all of them.
    info = {name: {"file_name": f"{name}.json", **entry}}
    return {f"{name}.json": _array(rows), DATASET_INFO: json.dumps(info, indent=2) + "\n"}


def rewardbench(kept: Kept, name: str) -> Files:
    """The question, and two whole conversations: the schema that its own reader documents. With `datasets` of today it
    takes a prompt that is a list of turns for one of these too, and fails on answers alone."""
    return {
        "preferences.jsonl": _lines(
            {"prompt": row["prompt"][-1]["content"]}
            | {key: [*row["prompt"], _turn("assistant", row[key])] for key in ("chosen", "rejected")}
            | _origin(row)
            for row in kept.rows
        )
    }


def alpaca_eval(kept: Kept, name: str) -> Files:
    """Outputs of one model. `generator` has a meaning there, and pandas makes numbers of digests that look like some,
    so where samples came from stands beside."""
    rows = [
        {
            "instruction": row["instruction"], "output": row["answer"], "generator": row["generator"], "dataset": name,
            "id": row["id"],
        }
        for row in kept.rows
    ]  # fmt: skip
    return {"model_outputs.json": _array(rows), PROVENANCE: _provenance(kept.rows)}


def caa(kept: Kept, name: str) -> Files:
    """Questions with both choices, and the letter of each, as Contrastive Activation Addition generates vectors from
    (datasets/generate/BEHAVIOR/generate_dataset.json there)."""
    rows = [
        {
            "question": row["text"],
            "answer_matching_behavior": f"({row['matches']})",
            "answer_not_matching_behavior": f"({_other(row['matches'])})",
            **_origin(row),
        }
        for row in kept.rows
    ]
    return {"generate_dataset.json": _array(rows, ascii_only=True)}  # read in the encoding of the machine


def official_tsv(kept: Kept, name: str) -> Files:
    """Text and label without a header, as the method's toxicity_detection scripts read them with pandas.

    Texts stand in quotes, doubled where they hold some: a tab or a line break in one then neither moves the label nor
    makes it part of the text.
    """
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    for row in kept.rows:
        if row["label"] not in (0, 1):
            raise UserError(f"sample {row['id']} has the label {row['label']:g}; official_tsv has 0 and 1: choose hf")
        if row["text"].strip() in NOT_A_TEXT:
            raise UserError(
                f"sample {row['id']} is the text {row['text']!r}, which readers of official_tsv take for no text at "
                "all: choose hf"
            )
        writer.writerow([row["text"], int(row["label"])])
    return {"train.tsv": table.getvalue(), PROVENANCE: _provenance(kept.rows)}


def hf(kept: Kept, name: str) -> Files:
    """A data set folder with its card; every form, all that is known of a row."""
    first = ("id", "text", "label")
    rows = [
        {key: row[key] for key in first} | {key: value for key, value in row.items() if key not in first}
        for row in kept.rows
    ]
    return {"README.md": card(kept, list(rows[0])), "data/train.jsonl": _lines(rows)}


TURNS, PAIR, CHOICES, INSTRUCTION = "user turns", "preference pair", "two choices", "instruction and answer"
FORMATS = {
    "hf": Format((TURNS, PAIR, CHOICES, INSTRUCTION), "datasets.load_dataset, with a data set card", hf),
    "trl_sft": Format((INSTRUCTION,), "TRL's SFTTrainer", trl_sft),
    "trl_reward": Format((PAIR,), "TRL's RewardTrainer", trl_reward),
    "trl_preference": Format((PAIR,), "TRL's DPOTrainer", trl_preference),
    "llama_factory": Format((INSTRUCTION, PAIR), "LLaMA-Factory, with its entry in dataset_info.json", llama_factory),
    "rewardbench": Format((PAIR,), "RewardBench", rewardbench),
    "alpaca_eval": Format((INSTRUCTION,), "AlpacaEval", alpaca_eval),
    "caa": Format((CHOICES,), "Contrastive Activation Addition", caa),
    "official_tsv": Format((TURNS,), "the method's toxicity scripts", official_tsv),
}
"""By the name that --format takes."""


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _said(speaker: str, what: str) -> dict[str, str]:
    return {"from": speaker, "value": what}


def _other(letter: str) -> str:
    return {"A": "B", "B": "A"}[letter]


def _origin(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("id", *ORIGIN)}


def _provenance(rows: Sequence[Row]) -> str:
    return _lines({"row": number, **_origin(row)} for number, row in enumerate(rows))


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _array(rows: Sequence[Row], ascii_only: bool = False) -> str:
    return json.dumps(rows, ensure_ascii=ascii_only, indent=1) + "\n"
