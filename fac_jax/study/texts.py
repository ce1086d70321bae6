"""What each arm of a study has written, as one data set that is scanned once: every cell is then some of its rows.

    one step, two steps    for what the seed misses, chosen by the SAE, those that cover most first (the method)
    random generations     of all samples of one step, whatever they activate (no filter)
    random features        two steps for as many features at random, chosen by those (the paper's control)
    self-instruct, evol-instruct     `rivals.py`

Arms of a step or two share replies. `selection` writes nothing: `cells.py` picks it from the anchor. Writes
- `study_texts.jsonl`: every text once;
- `arms.json`: of every pool (a writing anew of all arms) and arm, which lines of `study_texts.jsonl` are its samples,
  best first where it has an order, and what they cost;
- `pool-N/ARM/`: the replies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fac_jax.config.file import Config
from fac_jax.config.synthesis import ArmConfig
from fac_jax.features.task import load_task
from fac_jax.runs import write_text
from fac_jax.scan.product import Scan
from fac_jax.study.rivals import Writing, check_seeds, evol_instruct, self_instruct
from fac_jax.synthesis.ablation import LOG, Bench, missing_at, open_bench, write_arm
from fac_jax.synthesis.generations import Generation, Sampling, read_log
from fac_jax.synthesis.synthesize import Written
from fac_jax.text import POSITIVE_ABOVE
from fac_jax.words import normalised

RIVALS = {"self-instruct": self_instruct, "evol-instruct": evol_instruct}
IN_ORDER = ("one step", "two steps", "random features", "selection")
"""Arms whose samples have an order, of which a budget takes the first; of the others a seed draws."""


@dataclass(frozen=True)
class ArmTexts:
    """The samples of one arm in one pool."""

    rows: list[int]
    """In study_texts.jsonl."""
    written: int
    """Texts that were asked for."""
    tokens: int
    """Read and written."""


def write_texts(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage: every arm, so often as there are pools. Raises UserError where nothing is missing or a rival has no text
    to begin with."""
    bench = open_bench(config, inputs)
    rows: dict[str, int] = {}
    pools = [_pool(bench, pool, out / f"pool-{pool}", rows) for pool in range(config.study.pools)]
    label = load_task(config.judge.task).description.sample.label
    lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text in rows)
    write_text(out / "study_texts.jsonl", "".join(lines))
    told = {
        "generator": bench.generator.name,
        "pools": [{name: asdict(arm) for name, arm in pool.items()} for pool in pools],
    }
    write_text(out / "arms.json", json.dumps(told))
    return {"texts": len(rows), "samples": {name: [len(pool[name].rows) for pool in pools] for name in pools[0]}}


def read_arms(folder: Path) -> list[dict[str, ArmTexts]]:
    """Arms by name, of every pool."""
    told = json.loads((folder / "arms.json").read_text(encoding="utf-8"))["pools"]
    return [{name: ArmTexts(**arm) for name, arm in pool.items()} for pool in told]


def positive_texts(scan: Scan) -> list[str]:
    """Texts with the task's label, in the order of the corpus."""
    texts = scan.documents("text")["text"].to_pylist()
    return [text for text, label in zip(texts, scan.labels_n, strict=True) if label > POSITIVE_ABOVE]


def _pool(bench: Bench, pool: int, folder: Path, rows: dict[str, int]) -> dict[str, ArmTexts]:
    """All arms, written with a seed of the pool's; new texts join `rows`."""
    config, number = bench.config, bench.config.run.seed + pool
    most, names = max(config.study.budgets), config.study.arms
    step = config.synthesize.candidates + config.synthesize.second_step
    forms = {
        "two steps": ArmConfig(keep_per_feature=most),
        "one step": ArmConfig(keep_per_feature=most, candidates=step, second_step=0),
        "random features": ArmConfig(keep_per_feature=most, target="random"),
    }
    missing = missing_at(bench, "two steps", config.coverage.threshold)
    shared = read_log(bench.inputs["synthesis"] / LOG)
    arms: dict[str, ArmTexts] = {}

    def placed(texts: Sequence[str]) -> list[int]:
        return [rows.setdefault(text, len(rows)) for text in texts]

    wanted = {*names, *(("one step",) if "random generations" in names else ())}
    for name, form in ((name, form) for name, form in forms.items() if name in wanted):
        made, _ = write_arm(bench, form, number, missing, _folder(folder, name), shared)
        kept = [made.every.samples[one.row].text for one in made.kept][:most]
        cost = _cost(made)
        if name in names:
            arms[name] = ArmTexts(placed(kept), *cost)
        if name == "one step" and "random generations" in names:
            valid = [made.first.samples[row].text for row in made.first.valid]
            arms["random generations"] = ArmTexts(placed(valid), *cost)
    for name in (name for name in names if name in RIVALS):
        seeds = positive_texts(bench.seed)
        check_seeds(seeds, config.coverage.seed)
        rival = RIVALS[name](_writing(bench, number, _folder(folder, name)), seeds, most)
        arms[name] = ArmTexts(placed(rival.texts), rival.written, rival.tokens)
    return arms


def _writing(bench: Bench, number: int, folder: Path) -> Writing:
    settings = bench.config.synthesize
    texts = (text for scan in (bench.anchor, bench.seed) for text in scan.documents("text")["text"].to_pylist())
    return Writing(
        load_task(bench.config.judge.task).description,
        frozenset(map(normalised, texts)),
        bench.generator,
        Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, number),
        folder,
    )


def _folder(pool: Path, arm: str) -> Path:
    folder = pool / arm.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cost(made: Written) -> tuple[int, int]:
    paid: list[Generation] = [*made.every.generations, *made.answers]
    return len(made.every.jobs), sum(one.prompt_tokens + one.completion_tokens for one in paid)
