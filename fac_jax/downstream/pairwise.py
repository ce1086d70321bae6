"""A local pairwise judge: the server at `llm.url` says which of two answers serves an instruction better.

It is not AlpacaEval: another judge, another prompt, no correction for length, so its figures compare arms of one run
and nothing else. Every two answers are shown in both orders. An arm wins where both orders prefer it; where they
disagree, or say tie, it is a tie, and so are equal answers, which nobody is asked about. An answer of the judge's that
cannot be read counts as failed, and its instruction for nobody. Instructions and answers travel as data
(`llm/question.py`).

Reads outputs in AlpacaEval's format; writes judgements.parquet, and replies.jsonl (`features/ask.py`), from which a
stopped run goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fac_jax.features.ask import ask
from fac_jax.llm.client import Generator, Request
from fac_jax.llm.question import label_schema, question
from fac_jax.llm.structured import Answer
from fac_jax.runs import writing

LABELS = ("A", "B", "tie")
SYSTEM = """\
You compare two answers to one instruction. The user message shows the instruction, answer A and answer B. Decide which
answer serves the person who gave the instruction better: whether it does what was asked, and all of it; whether it is
correct; whether it is clear. Which of them comes first means nothing, and a longer answer is not a better one. Say tie
only where neither is better.

Reply with a JSON object: "label" is "A", "B" or "tie", "reason" is one short sentence."""
VERDICTS = ("win", "loss", "tie", "disagreed", "equal", "failed")
"""Of the first arm. disagreed: the two orders do (a tie); equal: the answers are (a tie, not asked)."""
JUDGEMENTS = pa.schema(
    {
        "arm": pa.string(), "other": pa.string(), "instruction": pa.string(), "first": pa.string(),
        "second": pa.string(), "verdict": pa.string(),
    }
)  # fmt: skip


def compare_outputs(
    generator: Generator,
    outputs: Mapping[str, Sequence[Mapping[str, str]]],
    pairs: Sequence[tuple[str, str]],
    out: Path,
    seed: int,
) -> list[dict[str, Any]]:
    """Counts of each pair of arms, whose outputs are of the same instructions in the same order."""
    asked: dict[str, Request] = {}
    for arm, other in pairs:
        for place, (one, two) in enumerate(zip(outputs[arm], outputs[other], strict=True)):
            if one["output"] != two["output"]:
                asked |= {
                    _key(arm, other, place, order): _question(one["instruction"], *answers, seed)
                    for order, answers in enumerate(_orders(one["output"], two["output"]))
                }
    answers = ask(generator, asked, out / "replies.jsonl", "compare", "comparisons")
    rows, found = [], []
    for arm, other in pairs:
        counts: Counter[str] = Counter()
        for place, one in enumerate(outputs[arm]):
            labels = [_label(answers.get(_key(arm, other, place, order))) for order in range(2)]
            same = one["output"] == outputs[other][place]["output"]
            what = "equal" if same else verdict(*labels)
            counts[what] += 1
            rows.append({
                "arm": arm, "other": other, "instruction": one["instruction"], "first": labels[0],
                "second": labels[1], "verdict": what,
            })  # fmt: skip
        found.append({"arm": arm, "other": other, "judge": generator.name, **figures(counts)})
    with writing(out / "judgements.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, JUDGEMENTS), temporary)
    return found


def verdict(first: str | None, second: str | None) -> str:
    """Of an arm that was A in the first order and B in the second."""
    if first is None or second is None:
        return "failed"
    if first == second == "tie":
        return "tie"
    return {("A", "B"): "win", ("B", "A"): "loss"}.get((first, second), "disagreed")


def figures(counts: Mapping[str, int]) -> dict[str, Any]:
    """All counts, and the share of what could be judged that the arm wins, a tie as half of one."""
    judged = sum(counts.get(name, 0) for name in VERDICTS if name != "failed")
    ties = sum(counts.get(name, 0) for name in ("tie", "disagreed", "equal"))
    share = (counts.get("win", 0) + ties / 2) / judged if judged else None
    return {**{name: counts.get(name, 0) for name in VERDICTS}, "judged": judged, "preferred": share}


def _orders(one: str, two: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (one, two), (two, one)


def _question(instruction: str, a: str, b: str, seed: int) -> Request:
    data = {"instruction": instruction, "answer_a": a, "answer_b": b}
    return question(SYSTEM, data, label_schema(LABELS), seed)


def _label(answer: Answer | None) -> str | None:
    return None if answer is None or answer.value is None else str(answer.value["label"])


def _key(arm: str, other: str, place: int, order: int) -> str:
    return f"compare::{arm}/{other}:{place}:{order}"  # for the ledger: a purpose, of no feature
