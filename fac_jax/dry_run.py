"""What a run would ask of the server at `llm.url`, before anything is sent or spent: `fac run CONFIG --dry-run`.

Reads the products that are there, the replies that a stopped stage has kept, and the cache; sends and writes nothing.
Stages whose method is embedded ask nothing.
What is asked first is counted exactly. Questions about answers that are not there yet (does this explanation fit, is it
relevant, the second step of synthesis) are bounded: so many at most, as long as those that are known. Tokens read are
guessed from characters; tokens written are the most that may be.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fac_jax.backbone.weights import load_tokenizer
from fac_jax.config.file import Config
from fac_jax.downstream.arms import COMPARED
from fac_jax.errors import UserError
from fac_jax.features.explain import active_features, explain_with, generation_features, later_requests
from fac_jax.features.passes import judge_with
from fac_jax.features.spans import read_passages
from fac_jax.features.task import load_task
from fac_jax.llm.cache import Cache, keys, open_cache
from fac_jax.llm.client import OnReply, Reply, Request
from fac_jax.llm.exchange import chat_body
from fac_jax.llm.ledger import guessed_tokens, price, read_ledger, sum_of
from fac_jax.pipeline import compares_outputs, pipeline
from fac_jax.runs import Run
from fac_jax.scan.product import load_scan, load_scans
from fac_jax.study.rivals import MOST
from fac_jax.synthesis import contrast
from fac_jax.synthesis.generations import write_all
from fac_jax.synthesis.plan import make_plan


@dataclass(frozen=True)
class Estimate:
    """What one stage would ask."""

    stage: str
    requests: Sequence[Request]
    """Known now, those whose reply is kept already left out."""
    cached: int
    """Of them, in the cache as the server last reported itself."""
    later: int
    """More of them at most, which depend on answers."""
    note: str = ""
    """Why nothing is known, where nothing is."""

    @property
    def paid(self) -> int:
        """Requests to be paid for, at most."""
        return len(self.requests) - self.cached + self.later

    def tokens(self) -> tuple[int, int]:
        """Read, about, and written, at most."""
        if not self.requests:
            return 0, 0
        read = sum(map(guessed_tokens, self.requests)) / len(self.requests)
        written = sum(request.max_tokens for request in self.requests) / len(self.requests)
        return round(self.paid * read), round(self.paid * written)


class _Collected(Exception):
    """Ends a stage at the first questions that it asks."""


class _Collector:
    """A generator that notes what it is asked, and answers nothing."""

    def __init__(self, name: str) -> None:
        self.name, self.spent = name, ""
        self.requests: list[Request] = []
        self.later: int | None = 0
        """Requests that may follow the first ones; None: one for each of them."""

    def generate(
        self, requests: Sequence[Request], on_reply: OnReply | None = None, about: Sequence[str] | None = None
    ) -> list[Reply]:
        self.requests += requests
        if requests:
            raise _Collected
        return []


def estimates(config: Config, wanted: Sequence[str]) -> list[Estimate]:
    """One for each of the wanted stages that asks a server. Raises UserError when there is none to ask."""
    if config.llm.url is None:
        raise UserError("--dry-run says what a server would be asked, and llm.url is not set: this run asks none")
    stages, run = pipeline(config), Run(config)
    cache = open_cache() if config.llm.cache else None
    found = []
    for name in wanted:
        if name == "finetune" and compares_outputs(config):
            done = run.state(stages[name], stages)[0] == "done"
            note = (
                f"compares the arms' answers: {2 * len(COMPARED)} questions at most for each instruction of data."
                f"{config.finetune.outputs_for}, which are not counted"
            )
            found.append(Estimate(name, [], 0, 0, "done" if done else note))
        if name == "study:texts":
            found.append(Estimate(name, [], 0, 0, _study_note(config)))
        if name not in ASKING or not _asks(config, name):
            continue
        if run.state(stages[name], stages)[0] == "done":
            found.append(Estimate(name, [], 0, 0, "done"))
            continue
        if name == "explanations" and config.method_of(config.explain) == "embedded":
            count = generation_features(config) * config.explain.generation_texts
            note = f"embedded; the server then writes {count:,} texts from explanations at most, which are not counted"
            found.append(Estimate(name, [], 0, count, note))
            continue
        owners = {source.partition("/")[0] for source in stages[name].inputs}
        missing = [owner for owner in stages if owner in owners and run.state(stages[owner], stages)[0] != "done"]
        if missing:
            command = stages[missing[0]].command
            found.append(Estimate(name, [], 0, 0, f"not known before {missing[0]} is made: run `{command}` first"))
            continue
        folders = {owner: run.folder(stages[owner]) for owner in owners}
        found.append(estimate(config, name, run.folder(stages[name]), folders, cache))
    return found


def estimate(config: Config, name: str, out: Path, inputs: Mapping[str, Path], cache: Cache | None) -> Estimate:
    """What the stage `name` would ask, whose product lies or will lie in `out`."""
    identity = None if cache is None else cache.last_identity(str(config.llm.url).rstrip("/"), config.llm.model)
    model = config.llm.model or (identity or {}).get("model", "")
    collector = _Collector(f"http:{model}")
    with tempfile.TemporaryDirectory() as folder:
        # Stages append to their log, and a line that a kill cut short is taken off: all that to a copy.
        for log in out.glob("*.jsonl"):
            shutil.copy(log, folder)
        with contextlib.suppress(_Collected):
            ASKING[name](config, collector, inputs, Path(folder))
    requests = collector.requests
    cached = 0
    if cache is not None and identity is not None:
        cached = len(cache.get(keys(identity, [chat_body(model, request) for request in requests])))
    later = len(requests) if collector.later is None else collector.later
    return Estimate(name, requests, cached, later)


def _study_note(config: Config) -> str:
    settings, most = config.synthesize, max(config.study.budgets)
    of_a_feature = 3 * (settings.candidates + settings.second_step)
    return (
        f"writes {of_a_feature} texts at most for each feature and {MOST * most:,} for each of self-instruct and "
        f"evol-instruct, {config.study.pools} times, which are not counted"
    )


def _asks(config: Config, name: str) -> bool:
    """Whether the server is asked anything by the stage `name`."""
    if name == "relevance":
        return config.method_of(config.judge) == "llm"
    return name != "explanations" or config.method_of(config.explain) == "llm" or generation_features(config) > 0


def _explain(config: Config, collector: _Collector, inputs: Mapping[str, Path], folder: Path) -> None:
    passages = read_passages(load_scan(inputs[f"scan:{config.coverage.anchor}"]))
    task, tokenizer = load_task(config.judge.task), load_tokenizer(config.backbone.model)
    collector.later = later_requests(config, len(active_features(passages.scan)))
    explain_with(collector, task, passages, tokenizer, config, folder / "replies.jsonl")


def _judge(config: Config, collector: _Collector, inputs: Mapping[str, Path], folder: Path) -> None:
    scan = load_scan(inputs[f"scan:{config.coverage.anchor}"])
    explanations = pq.read_table(inputs["explanations"] / "explanations.parquet").to_pylist()
    judge_with(collector, load_task(config.judge.task), scan, explanations, config, folder / "replies.jsonl")


def _synthesize(config: Config, collector: _Collector, inputs: Mapping[str, Path], folder: Path) -> None:
    anchor, seed = load_scans(inputs[f"scan:{config.coverage.anchor}"], inputs[f"scan:{config.coverage.seed}"])
    plan = make_plan(config, anchor, seed, inputs)
    jobs = contrast.jobs(plan.step1, plan.targets, plan.settings.candidates, plan.sampling)
    retried = plan.settings.candidates * (plan.settings.attempts - 1)
    collector.later = len(plan.targets) * (retried + plan.settings.second_step)
    if plan.answer is not None:  # instructions that are kept, and as many drawn blindly, are answered
        most = min(len(jobs) + collector.later, len(plan.missing) * plan.settings.keep_per_feature)
        collector.later += most + min(most, len(jobs))
    write_all(jobs, collector, folder / "generations.jsonl")


ASKING: Mapping[str, Callable[[Config, _Collector, Mapping[str, Path], Path], None]] = {
    "explanations": _explain, "relevance": _judge, "synthesis": _synthesize
}  # fmt: skip
"""Stages that ask a server: each asks its first questions."""


def table(config: Config, found: Sequence[Estimate]) -> Group:
    """The estimates and their sum, as `fac` prints them."""
    columns = ("stage", "requests", "in the cache", "later, at most", "tokens read", "tokens written", "cost")
    shown = Table(*columns, box=None)
    for column in shown.columns[1:]:
        column.justify = "right"
    read = written = 0
    for one in found:
        tokens = one.tokens()
        read, written = read + tokens[0], written + tokens[1]
        if not one.note:
            counts = [f"{count:,}" for count in (len(one.requests), one.cached, one.later)]
            shown.add_row(one.stage, *counts, *_spelled(config, *tokens))
    shown.add_row("all of these", "", "", "", *_spelled(config, read, written))
    spent = sum_of(read_ledger(Path(config.run.dir)))
    before = _spelled(config, spent.prompt_tokens, spent.completion_tokens)
    shown.add_row("spent before", f"{spent.answers:,}", f"{spent.cached:,}", "", *before)
    return Group(shown, *(Text(f" {one.stage}: {one.note}") for one in found if one.note))


def _spelled(config: Config, read: int, written: int) -> list[Any]:
    cost = price(config.llm, read, written)
    return [f"{read:,}", f"{written:,}", "no prices set" if cost is None else f"{cost:,.4f}"]
