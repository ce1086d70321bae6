"""Stage, on request: synthesis with one thing changed at a time, over several seeds, side by side.

Every arm runs both steps as `synthesize.py` does, and is measured by the same features: those that the seed misses at
the arm's threshold. Arms that are written for other features (the paper's controls) choose what they keep by those, and
meet the missing ones by chance. Replies are shared: an arm asks only for what no arm before it, nor another ablation in
the run directory, has had written with the same prompt, settings and seed; its cost is counted as if it stood alone.

Reads the SAE, the anchor's and the seed's scans, relevance and explanations. Writes
- `ARM/seed-N/`: the product of that synthesis, and `outcome.json`, so that a stopped ablation goes on behind it;
- `ablation.json`: a row an arm and seed, and each arm's mean with its 95% interval over seeds (Student's t).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy.sparse import csr_array
from scipy.stats import t as student

from fac_jax.config.file import Config
from fac_jax.config.synthesis import ArmConfig
from fac_jax.coverage import fac as arithmetic
from fac_jax.coverage.measure import missing_rows
from fac_jax.errors import UserError
from fac_jax.features.judge import relevant_features
from fac_jax.llm.client import Fluency, Generator
from fac_jax.llm.generator import open_generator
from fac_jax.llm.ledger import price
from fac_jax.mesh import make_mesh
from fac_jax.runs import write_text
from fac_jax.scan.product import Scan, load_scans
from fac_jax.scan.scorer import Score, open_scorer
from fac_jax.synthesis.generations import Generation, read_log, settle_log
from fac_jax.synthesis.plan import plan_for
from fac_jax.synthesis.synthesize import Written, write_samples

LOG = "generations.jsonl"
FIGURES = {
    "hit_rate": "hit rate",
    "hit_rate_written": "of all written",
    "written": "texts",
    "valid_share": "samples",
    "near_duplicate_rate": "near duplicates",
    "kept": "kept",
    "texts_per_hit": "texts a hit",
    "tokens_per_hit": "tokens a hit",
    "cost_per_hit": "money a hit",
    "nats_per_token": "nats a token",
}
"""Figures of an arm, and what they are called in tables."""
LEGEND = (
    "Hit rate: the share of the missing features that what is kept activates (each a hit), and that everything written "
    "does."
)
SHARES = ("hit_rate", "hit_rate_written", "valid_share", "near_duplicate_rate")
"""Those in 0 to 1."""


@dataclass(frozen=True)
class Outcome:
    """One arm with one seed. A hit is a missing feature whose peak exceeds the threshold on some text."""

    arm: str
    seed: int
    missing: int
    """Features that the seed set misses at the arm's threshold."""
    written_for: int
    written: int
    """Texts that were asked for: the attempts."""
    valid_share: float | None
    """Of the texts, those that are samples."""
    near_duplicate_rate: float | None
    """Of what would be a sample, what is nearly the same as an earlier one."""
    kept: int
    hits: int
    """By what is kept."""
    hit_rate: float | None
    """target_hit_rate of what is kept."""
    hit_rate_written: float | None
    """target_hit_rate of all samples, kept or not."""
    tokens: int | None
    """Read and written; answers to instructions that were chosen are among them."""
    texts_per_hit: float | None
    tokens_per_hit: float | None
    cost_per_hit: float | None
    """None without prices (llm.price_in, llm.price_out)."""
    nats_per_token: float | None
    """Fluency: how surprising a sample is to the writer, unsteered, as a reply to its prompt (mean over samples). None
    where no arm steers."""


@dataclass(frozen=True)
class Bench:
    """What all arms share."""

    config: Config
    inputs: Mapping[str, Path]
    anchor: Scan
    seed: Scan
    peak_f: Float[np.ndarray, " f"]
    """On the anchor."""
    relevant_f: Bool[np.ndarray, " f"]
    generator: Generator
    score: Score


def ablate(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage. Raises UserError where nothing is missing, a file of samples is none, or the writer fails."""
    return run_arms(open_bench(config, inputs), out)


def open_bench(config: Config, inputs: Mapping[str, Path]) -> Bench:
    """Scans, SAE and writer in memory."""
    anchor, seed = load_scans(inputs[f"scan:{config.coverage.anchor}"], inputs[f"scan:{config.coverage.seed}"])
    score = open_scorer(config, inputs, anchor, config.coverage.seed)
    generator = open_generator(config, make_mesh(config.mesh), score.directions)
    relevant_f = relevant_features(inputs["relevance"], anchor)
    peak_f = anchor.peaks_nf.max(axis=0).toarray()
    return Bench(config, inputs, anchor, seed, peak_f, relevant_f, generator, score)


def run_arms(bench: Bench, out: Path) -> dict[str, Any]:
    """Every arm with every seed, and the product."""
    config = bench.config.ablation
    outcomes, written = [], {number: _written_before(out, number) for number in config.seeds}
    for name, arm in config.arms.items():
        for number in config.seeds if arm.samples is None else config.seeds[:1]:
            folder = out / name / f"seed-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            outcomes.append(_outcome(bench, name, arm, number, folder, written[number]))
    arms = {name: _arm(bench, arm, [one for one in outcomes if one.arm == name]) for name, arm in config.arms.items()}
    product = {
        "name": config.name, "generator": bench.generator.name, "arms": arms,
        "outcomes": [asdict(one) for one in outcomes],
    }  # fmt: skip
    write_text(out / "ablation.json", json.dumps(product, indent=1, allow_nan=False))
    return {name: row["hit_rate"] and row["hit_rate"]["mean"] for name, row in arms.items()}


def mean_and_interval(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean, and the 95% interval of it (Student's t); no interval of one value, None of none.

    >>> mean_and_interval([1.0, 2.0, 3.0])
    {'mean': 2.0, 'low': -0.48..., 'high': 4.48...}
    """
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(product: Mapping[str, Any]) -> RenderableType:
    """A row an arm, for the terminal."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("arm")
    columns = shown_figures(product)
    for name in columns:
        shown.add_column(FIGURES[name], justify="right")
    for name, row in product["arms"].items():
        shown.add_row(name, *(said(figure, row[figure]) for figure in columns))
    seeds = len({one["seed"] for one in product["outcomes"]})
    title = f"{product['name']}: written by {product['generator']}, {seeds} seed{'s' * (seeds > 1)}"
    title += ", ± is half of the 95% interval" if seeds > 1 else ""
    return Group(Text(title, style="bold"), shown, Text(LEGEND))


def shown_figures(product: Mapping[str, Any]) -> list[str]:
    """The figures that some arm has."""
    return [name for name in FIGURES if any(row.get(name) is not None for row in product["arms"].values())]


def said(figure: str, value: Mapping[str, float | None] | None) -> str:
    """A mean with half of its interval."""
    if value is None or value["mean"] is None:
        return "–"
    share = figure in SHARES
    digits = 1 if share or value["mean"] < 100 else 0
    scale = 100 if share else 1
    half = "" if value["high"] is None else f" ± {scale * (value['high'] - value['mean']):,.{digits}f}"
    return f"{scale * value['mean']:,.{digits}f}{half}{' %' if share else ''}"


def _written_before(out: Path, number: int) -> list[Generation]:
    """All that arms of this and of other ablations have had written with a seed."""
    return [one for log in sorted(out.parent.glob(f"*/*/seed-{number}/{LOG}")) for one in read_log(log)]


def _arm(bench: Bench, arm: ArmConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Settings of an arm and its figures over seeds. A figure that one of them lacks is none: over the others alone,
    what a hit costs would flatter an arm that mostly hits nothing."""
    told = {name: [getattr(one, name) for one in outcomes] for name in FIGURES}
    figures = {name: mean_and_interval([] if None in values else values) for name, values in told.items()}
    changed = {name: value for name, value in asdict(arm).items() if value not in (None, "missing")}
    missing = sorted({one.missing for one in outcomes})
    return {"changed": changed, "threshold": _threshold(bench.config, arm), "missing": missing, **figures}


def _threshold(config: Config, arm: ArmConfig) -> float:
    return config.coverage.threshold if arm.threshold is None else arm.threshold


def _outcome(bench: Bench, name: str, arm: ArmConfig, number: int, folder: Path, written: list[Generation]) -> Outcome:
    """One arm with one seed, unless it is there; what is written for it joins `written`."""
    done = folder / "outcome.json"
    if done.exists():
        return Outcome(**json.loads(done.read_text(encoding="utf-8")))
    threshold = _threshold(bench.config, arm)
    missing = missing_at(bench, name, threshold)
    if arm.samples is not None:
        outcome = _of_samples(bench, name, number, Path(arm.samples), missing, threshold)
    else:
        made, targets = write_arm(bench, arm, number, missing, folder, written)
        outcome = _measured(bench, name, number, made, missing, threshold, targets)
    write_text(done, json.dumps(asdict(outcome)))
    return outcome


def missing_at(bench: Bench, name: str, threshold: float) -> list[int]:
    """Features that the seed misses, highest anchor peak first. Raises UserError, naming arm `name`, for none."""
    rows = missing_rows(bench.relevant_f, bench.anchor, bench.seed, threshold, {})
    if not rows:
        raise UserError(
            f"arm {name!r}: no feature is missing at threshold {threshold:g}, so there is nothing to write for; leave "
            "it out, or give it another threshold"
        )
    return [row["feature"] for row in rows]


def write_arm(
    bench: Bench, arm: ArmConfig, number: int, missing: Sequence[int], folder: Path, written: list[Generation]
) -> tuple[Written, int]:
    """What an arm writes with a seed, and for how many features; replies in `written` are used again, new ones join."""
    config, features = _settings(bench, arm, number, _threshold(bench.config, arm), missing)
    peaks = {feature: float(bench.peak_f[feature]) for feature in features}
    plan = plan_for(peaks, config, bench.anchor, bench.seed, bench.inputs)
    log = folder / LOG
    settle_log(log, list({one.key: one for one in (*written, *read_log(log))}.values()))
    made = write_samples(plan, bench.generator, bench.score, folder)
    written += read_log(log)
    return made, len(plan.targets)


def _settings(
    bench: Bench, arm: ArmConfig, number: int, threshold: float, missing: Sequence[int]
) -> tuple[Config, list[int]]:
    """The config of an arm, and the features it seeks, those that it writes for first."""
    config = bench.config
    settings = replace(config.synthesize, **arm.synthesis)
    if arm.feature_ratio is not None:
        settings = replace(settings, max_features=math.ceil(arm.feature_ratio * len(missing)))
    count = min(settings.max_features or len(missing), len(missing))
    random, pool = np.random.default_rng([number, 7]), np.array(sorted(missing))
    features = list(missing)
    if arm.target == "random missing" or arm.feature_ratio is not None:
        features = random.permutation(pool).tolist()
    elif arm.target != "missing":
        active_f = arithmetic.active(bench.anchor.peaks_nf, threshold)
        pool = np.flatnonzero(active_f & bench.relevant_f if arm.target == "random relevant" else active_f)
        features = random.permutation(pool)[:count].tolist()
    return replace(
        config,
        run=replace(config.run, seed=number),
        coverage=replace(config.coverage, threshold=threshold),
        synthesize=settings,
    ), features


def _measured(
    bench: Bench, name: str, number: int, made: Written, missing: Sequence[int], threshold: float, written_for: int
) -> Outcome:
    every, valid = made.every, len(made.every.valid)
    twins = sum(sample.is_twin for sample in every.samples)
    paid = [*every.generations, *made.answers]
    tokens = [sum(one.prompt_tokens for one in paid), sum(one.completion_tokens for one in paid)]
    hit_f = _hits(every.peaks_nf[[one.row for one in made.kept]], missing, threshold)
    money = price(bench.config.llm, *tokens)
    return Outcome(
        arm=name,
        seed=number,
        missing=len(missing),
        written_for=written_for,
        written=len(every.jobs),
        valid_share=_share(valid, len(every.jobs)),
        near_duplicate_rate=_share(twins, valid + twins),
        kept=len(made.kept),
        hits=len(hit_f),
        hit_rate=len(hit_f) / len(missing),
        hit_rate_written=len(_hits(every.peaks_nf[every.valid], missing, threshold)) / len(missing),
        tokens=sum(tokens),
        texts_per_hit=_share(len(every.jobs), len(hit_f)),
        tokens_per_hit=_share(sum(tokens), len(hit_f)),
        cost_per_hit=None if money is None else _share(money, len(hit_f)),
        nats_per_token=_nats_per_token(bench, made),
    )


def _nats_per_token(bench: Bench, made: Written) -> float | None:
    steers = any(arm.steer for arm in bench.config.ablation.arms.values())
    if not (steers and isinstance(bench.generator, Fluency) and made.every.valid):
        return None
    messages = [made.every.jobs[row].request.messages for row in made.every.valid]
    texts = [made.every.generations[row].text for row in made.every.valid]
    return float(bench.generator.nats_per_token(messages, texts).mean())


def _of_samples(bench: Bench, name: str, number: int, file: Path, missing: Sequence[int], threshold: float) -> Outcome:
    """Samples that another run wrote, as this run's SAE reads them."""
    try:
        texts = [str(json.loads(line)["text"]) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"arm {name!r}: {file} cannot be read as samples ({error!r}); it must have a JSON object with a `text` on "
            "every line, as synthesis/kept.jsonl of a run has"
        ) from None
    hits = len(_hits(bench.score(texts), missing, threshold))
    return Outcome(
        arm=name,
        seed=number,
        missing=len(missing),
        written_for=0,
        written=0,
        valid_share=None,
        near_duplicate_rate=None,
        kept=len(texts),
        hits=hits,
        hit_rate=hits / len(missing),
        hit_rate_written=None,
        tokens=None,
        texts_per_hit=None,
        tokens_per_hit=None,
        cost_per_hit=None,
        nats_per_token=None,
    )


def _hits(peaks_nf: csr_array, missing: Sequence[int], threshold: float) -> Int[np.ndarray, " hit"]:
    missing_m = np.asarray(missing, np.int64)
    return missing_m[arithmetic.active(peaks_nf, threshold)[missing_m]]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
