"""What synthesis sets out to do: missing features in words, anchor texts that show them, and the rules to keep to.

Reads `missing.parquet`, the anchor's and the seed's scans, the explanations and the task's prompts. Writes nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from fac_jax.config.file import Config
from fac_jax.config.synthesis import SynthesizeConfig
from fac_jax.features.task import Description, SampleShape, load_task
from fac_jax.scan.product import Scan
from fac_jax.synthesis.contrast import Target
from fac_jax.synthesis.generations import Sampling
from fac_jax.synthesis.prompt import Example, Prompt, load_prompt
from fac_jax.text import POSITIVE_ABOVE
from fac_jax.words import normalised

EXAMPLE_WORDS = 24
"""Anchor texts of at most so many words are shown whole; of longer ones, the sentence with the activating token."""
FEWEST_WORDS = 5
"""Where that sentence has fewer words, the whole span is shown."""
EXAMPLES = 8
"""Anchor texts per feature that prompts choose from."""
NAMED_TOKENS = 4
"""Tokens that stand for a feature in a prompt when its explanation is a list of them."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Plan:
    """All that synthesis needs beside a writer and a scorer."""

    missing: tuple[Target, ...]
    """Missing features, highest anchor peak first; every candidate is scored against each."""
    known: frozenset[str]
    """Normalised anchor and seed texts, which no sample may copy."""
    step1: Prompt
    step2: Prompt
    description: Description
    """Of the task: what a sample is."""
    answer: str | None
    """What the writer is told before an instruction that it answers; None where samples are no instructions."""
    settings: SynthesizeConfig
    threshold: float
    seed: int

    @property
    def targets(self) -> tuple[Target, ...]:
        """Missing features that are written for."""
        return self.missing[: self.settings.max_features]

    @property
    def features(self) -> Int[np.ndarray, " m"]:
        """Missing features, ascending."""
        return np.array(sorted(target.feature for target in self.missing), np.int64)

    @property
    def sampling(self) -> Sampling:
        """How texts are drawn."""
        return Sampling(self.settings.max_new_tokens, self.settings.temperature, self.settings.top_p, self.seed)


def make_plan(config: Config, anchor: Scan, seed: Scan, inputs: Mapping[str, Path]) -> Plan:
    """Read what is missing, what it is about and what shows it."""
    missing = pq.read_table(inputs["coverage"] / "missing.parquet", columns=["feature", "anchor_peak"]).to_pylist()
    missing.sort(key=lambda row: (-row["anchor_peak"], row["feature"]))
    return plan_for({row["feature"]: row["anchor_peak"] for row in missing}, config, anchor, seed, inputs)


def plan_for(peaks: Mapping[int, float], config: Config, anchor: Scan, seed: Scan, inputs: Mapping[str, Path]) -> Plan:
    """The same for features with these peaks on the anchor, in the order in which they are written for."""
    task = load_task(config.judge.task)
    texts = anchor.documents("text")["text"].to_pylist()
    return Plan(
        missing=read_targets(peaks, anchor, texts, inputs["explanations"], task.description.sample),
        known=frozenset(normalised(text) for text in (*texts, *seed.documents("text")["text"].to_pylist())),
        step1=load_prompt(task, "contrast"),
        step2=load_prompt(task, "cover"),
        description=task.description,
        answer=task.prompt("answer") if task.description.form == "instruction and answer" else None,
        settings=config.synthesize,
        threshold=config.coverage.threshold,
        seed=config.run.seed,
    )


def read_targets(
    peaks: Mapping[int, float], anchor: Scan, texts: Sequence[str], explanations: Path, shape: SampleShape
) -> tuple[Target, ...]:
    """What each feature is about, and anchor texts that activate it; `peaks` holds their anchor peaks, in order.

    A sample carries the task's label, so texts that carry it too are shown before the others.
    """
    columns = ["feature", "explanation", "fires_on"]
    table = pq.read_table(explanations / "explanations.parquet", columns=columns).to_pylist()
    explained = {row["feature"]: row for row in table}
    spans = anchor.features("spans")["spans"].take(pa.array(list(peaks), pa.int64())).to_pylist()
    positive_n = anchor.labels_n > POSITIVE_ABOVE
    targets = []
    for (feature, peak), shown in zip(peaks.items(), spans, strict=True):
        shown.sort(key=lambda span: positive_n[span["document"]] != (shape.label > POSITIVE_ABOVE))
        examples = [
            Example(_example_text(span, texts[span["document"]]), span["score"], anchor=True)
            for span in shown[:EXAMPLES]
        ]
        targets.append(Target(feature, about(explained.get(feature, {}), shown), tuple(examples), peak))
    return tuple(targets)


def about(explained: Mapping[str, Any], spans: Sequence[Mapping[str, Any]]) -> str:
    """A feature in a prompt's words: tokens that it fires on, else its explanation, else the tokens of its spans.

    Of tokens, those that begin a word and have three letters or more, where there are any: they say more to a writer.
    """
    tokens = explained.get("fires_on") or []
    if not tokens and explained.get("explanation"):
        return " ".join(explained["explanation"].split())
    if not tokens:
        tokens = [token for token, _ in Counter(span["token"] for span in spans).most_common()]
    readable = [token for token in tokens if any(map(str.isalnum, token))]
    words = [token for token in readable if token[0].isspace() and len(token.strip()) > 2]
    named = dict.fromkeys(token.strip().lower() for token in words or readable)
    return ", ".join(list(named)[:NAMED_TOKENS]) or "the same thing"


def _example_text(span: Mapping[str, Any], document: str) -> str:
    whole = span["before"] + span["token"] + span["after"]
    sentence = _SENTENCE_END.split(span["before"])[-1] + span["token"] + _SENTENCE_END.split(span["after"])[0]
    if len(document.split()) <= EXAMPLE_WORDS:
        shown = document
    else:
        shown = sentence if len(sentence.split()) >= FEWEST_WORDS else whole
    return " ".join(shown.replace("\ufffd", "").split())
