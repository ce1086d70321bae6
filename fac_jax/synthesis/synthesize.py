"""Stage: write samples that activate what is missing, in the paper's two steps, and keep those that do.

Reads the SAE, the anchor's and the seed's scans, the explanations and `missing.parquet`. Writes
- `generations.jsonl`: every reply as it came, appended at once; an interrupted run uses them again;
- `candidates.parquet`: one row per reply: the text as it would be kept, or the reason why it is no sample; its peak on
  the feature that it was written for, its best feature, and the missing features that it activates; `steer` is the
  strength that it was written with, as a multiple of its feature's anchor peak, and null where it was not steered;
- `pairs.parquet`: the contrastive pair of each feature that was written for, or why it has none;
- `samples.parquet`: what is kept, most useful first, each with the feature and the activation that it is kept for;
- `kept.jsonl`, `random.jsonl`: data sets of equally many samples, the second drawn blindly from step 1's valid ones.
  `text` is what was measured; beside it stand the fields that samples of other forms than user turns consist of.
All of them may be empty: a writer that fails is recorded as one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_array, vstack

from fac_jax.config.file import Config
from fac_jax.llm.client import Generator
from fac_jax.llm.generator import open_generator
from fac_jax.mesh import make_mesh
from fac_jax.runs import write_text, writing
from fac_jax.scan.product import load_scans
from fac_jax.scan.scorer import Score, open_scorer
from fac_jax.synthesis import contrast, cover
from fac_jax.synthesis.contrast import Pair
from fac_jax.synthesis.cover import Kept
from fac_jax.synthesis.forms import answer_misfit
from fac_jax.synthesis.generations import Generation, Job, settle_log, write_all
from fac_jax.synthesis.plan import Plan, make_plan
from fac_jax.synthesis.samples import Sample, read_sample, reasons, without_copies
from fac_jax.synthesis.steering import Strengths

ANSWER = 3
"""The step in which instructions are answered."""
CANDIDATES = pa.schema(
    {
        "id": pa.string(), "feature": pa.int32(), "step": pa.int32(), "index": pa.int32(), "text": pa.string(),
        "valid": pa.bool_(), "reason": pa.string(), "mended": pa.list_(pa.string()), "peak": pa.float32(),
        "best_feature": pa.int32(), "best_peak": pa.float32(), "covers": pa.list_(pa.int32()), "kept": pa.bool_(),
        "raw": pa.string(), "finish_reason": pa.string(), "prompt_digest": pa.string(), "seed": pa.int64(),
        "generator": pa.string(), "model": pa.string(), "prompt_tokens": pa.int64(), "completion_tokens": pa.int64(),
        "fields": pa.string(), "steer": pa.float32(),
    }
)  # fmt: skip
PAIRS = pa.schema(
    {
        "feature": pa.int32(), "about": pa.string(), "strong": pa.string(), "strong_text": pa.string(),
        "strong_peak": pa.float32(), "weak": pa.string(), "weak_text": pa.string(), "weak_peak": pa.float32(),
        "reason": pa.string(),
    }
)  # fmt: skip
SAMPLES = pa.schema(
    {
        "rank": pa.int64(), "id": pa.string(), "text": pa.string(), "feature": pa.int32(), "about": pa.string(),
        "peak": pa.float32(), "adds": pa.list_(pa.int32()), "covered": pa.int64(), "step": pa.int32(),
        "written_for": pa.int32(), "generator": pa.string(), "prompt_digest": pa.string(), "seed": pa.int64(),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What one step wrote, and what became of it."""

    jobs: list[Job]
    generations: list[Generation]
    samples: list[Sample]
    peaks_nf: csr_array
    """Peaks of the samples that are valid, 0 elsewhere [jobs, features]."""

    @property
    def valid(self) -> list[int]:
        """Rows that are samples."""
        return [row for row, sample in enumerate(self.samples) if sample.reason is None]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Ids and texts of the samples."""
        return [(self.jobs[row].id, self.samples[row].text) for row in self.valid]

    def plus(self, other: Step) -> Step:
        """Both, one after the other."""
        peaks_nf = csr_array(vstack([self.peaks_nf, other.peaks_nf], format="csr"))
        joined = (self.jobs + other.jobs, self.generations + other.generations, self.samples + other.samples)
        return Step(*joined, peaks_nf)


@dataclass(frozen=True)
class Written:
    """All that came of a plan."""

    first: Step
    second: Step
    every: Step
    """Both steps, one after the other."""
    pairs: list[Pair]
    kept: list[Kept]
    """Rows of `every`."""
    drawn: list[int]
    """As many rows of step 1, drawn blindly."""
    answers: list[Generation]
    """To instructions that were chosen to be kept."""


def synthesize(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage. Raises UserError when scans and SAE do not fit together, or the writer fails (what it wrote is kept)."""
    anchor, seed = load_scans(inputs[f"scan:{config.coverage.anchor}"], inputs[f"scan:{config.coverage.seed}"])
    plan = make_plan(config, anchor, seed, inputs)
    score = open_scorer(config, inputs, anchor, config.coverage.seed)
    generator = open_generator(config, make_mesh(config.mesh), score.directions)
    return _summary(plan, generator.name, write_samples(plan, generator, score, out))


def write_samples(plan: Plan, generator: Generator, score: Score, out: Path) -> Written:
    """Both steps, the choice, and the product."""
    log = out / "generations.jsonl"
    first, pairs, strengths = _first_step(plan, generator, score, log)
    valid = first.valid
    texts = [first.samples[row].shown for row in valid]
    by_feature = {pair.feature: pair for pair in pairs}
    count, sampling = plan.settings.second_step, plan.sampling
    jobs = cover.jobs(plan.step2, plan.targets, by_feature, texts, count, sampling, strengths)
    second = _step(plan, jobs, generator, score, log, first.texts)
    every = first.plus(second)
    kept, answers = _chosen(plan, every, generator, log)
    drawn, more = _drawn(plan, every, valid, len(kept), generator, log)
    settle_log(log, [*every.generations, *{one.key: one for one in (*answers, *more)}.values()])
    _write_tables(out, plan, every, pairs, valid, kept)
    label = plan.description.sample.label
    _write_data_set(out / "kept.jsonl", every, {one.row: one.feature for one in kept}, label)
    _write_data_set(out / "random.jsonl", every, {row: every.jobs[row].feature for row in drawn}, label)
    return Written(first, second, every, pairs, kept, drawn, answers)


def _first_step(plan: Plan, generator: Generator, score: Score, log: Path) -> tuple[Step, list[Pair], Strengths]:
    """Candidates for every target, then again for those that none of them activates, as often as is allowed; the pair
    of each target among them all, or why it has none; and the strengths that each was steered with last."""
    size, targets, features = plan.settings.candidates, plan.targets, [target.feature for target in plan.targets]
    strengths = Strengths(plan.settings.steer)
    jobs = contrast.jobs(plan.step1, targets, size, plan.sampling, strengths=strengths)
    step = last = _step(plan, jobs, generator, score, log, [])
    for attempt in range(plan.settings.attempts):
        if attempt:
            strengths = strengths.searched(_intact(last, {target.feature for target in targets}))
            jobs = contrast.jobs(plan.step1, targets, size, plan.sampling, attempt * size, strengths)
            last = _step(plan, jobs, generator, score, log, step.texts)
            step = step.plus(last)
        written_for = np.array([step.jobs[row].feature for row in step.valid], np.int64)
        pairs = contrast.pairs(features, step.peaks_nf[step.valid], written_for, plan.threshold)
        unmet = {pair.feature for pair in pairs if pair.strong is None}
        targets = tuple(target for target in targets if target.feature in unmet)
        if not targets:
            break
    return step, pairs, strengths


def _intact(step: Step, features: Collection[int]) -> dict[int, list[bool]]:
    """Of each feature's steered draws, whether they are samples: a writer that is steered too hard writes none."""
    found: dict[int, list[bool]] = defaultdict(list)
    for job, sample in zip(step.jobs, step.samples, strict=True):
        if job.feature in features and job.request.steer is not None:
            found[job.feature].append(sample.in_form)
    return found


def _step(
    plan: Plan, jobs: list[Job], generator: Generator, score: Score, log: Path, earlier: Sequence[tuple[str, str]]
) -> Step:
    generations = write_all(jobs, generator, log)
    what = plan.description
    read = [read_sample(one.text, one.finish_reason, what.sample, what.form) for one in generations]
    shown = [[m["content"] for m in job.request.messages if m["role"] == "assistant"] for job in jobs]
    samples = without_copies(read, [job.id for job in jobs], plan.known, shown, earlier)
    rows = np.array([row for row, sample in enumerate(samples) if sample.reason is None], np.int64)
    scored = score([samples[row].text for row in rows]).tocoo()
    peaks_nf = csr_array((scored.data, (rows[scored.row], scored.col)), shape=(len(jobs), scored.shape[1]))
    return Step(jobs, generations, samples, peaks_nf)


def _chosen(plan: Plan, every: Step, generator: Generator, log: Path) -> tuple[list[Kept], list[Generation]]:
    """What is kept, and every answer that was written. Of instructions only those are kept that were answered as they
    should be: another one takes the place of what was not."""
    written: list[Generation] = []
    while True:
        kept = cover.assign(every.peaks_nf, plan.features, plan.threshold, plan.settings.keep_per_feature)
        answers, rejected = _answer(plan, every, [one.row for one in kept], generator, log)
        written += answers
        if not rejected:
            return kept, written


def _answer(
    plan: Plan, every: Step, rows: Sequence[int], generator: Generator, log: Path
) -> tuple[list[Generation], set[int]]:
    """Let the writer answer these instructions; in `every` they get their answers, or the reason why they have none
    and no peaks.

    Returns what it wrote, and the rows that are no samples any more. Asks nothing where samples are no instructions.
    """
    if plan.answer is None:
        return [], set()
    jobs = [
        plan.sampling.job(
            every.jobs[row].feature, ANSWER, row,
            ({"role": "system", "content": plan.answer}, {"role": "user", "content": every.samples[row].text}),
        )
        for row in rows
    ]  # fmt: skip
    answers, rejected = write_all(jobs, generator, log), set()
    for row, answer in zip(rows, answers, strict=True):
        sample = every.samples[row]
        if (reason := answer_misfit(answer.text, answer.finish_reason)) is None:
            every.samples[row] = replace(sample, fields={**sample.fields, "answer": answer.text.strip()})
        else:
            every.samples[row] = sample.rejected(reason)
            every.peaks_nf.data[slice(*every.peaks_nf.indptr[row : row + 2])] = 0
            rejected.add(row)
    return answers, rejected


def _drawn(
    plan: Plan, every: Step, valid: Sequence[int], count: int, generator: Generator, log: Path
) -> tuple[list[int], list[Generation]]:
    """`count` of step 1's samples, all with the same chance, whatever their peaks: the control for the filter. As with
    what is kept, others take the place of instructions that were not answered as they should be."""
    random = np.random.default_rng([plan.seed, len(valid)])
    drawn, written = list[int](), list[Generation]()
    left = [row for row in valid if every.samples[row].reason is None]
    while len(drawn) < count and left:
        asked = random.choice(np.asarray(left, np.int64), min(count - len(drawn), len(left)), replace=False).tolist()
        answers, rejected = _answer(plan, every, sorted(asked), generator, log)
        written += answers
        drawn += [row for row in asked if row not in rejected]
        left = [row for row in left if row not in asked]
    return sorted(drawn), written


def _write_tables(
    out: Path, plan: Plan, every: Step, pairs: Sequence[Pair], valid: Sequence[int], kept: Sequence[Kept]
) -> None:
    abouts = {target.feature: target.about for target in plan.missing}
    tables = {
        "candidates": pa.Table.from_pylist(_candidate_rows(plan, every, {one.row for one in kept}), CANDIDATES),
        "pairs": pa.Table.from_pylist([_pair_row(pair, valid, every, abouts) for pair in pairs], PAIRS),
        "samples": pa.Table.from_pylist(_sample_rows(every, kept, abouts), SAMPLES),
    }
    for name, table in tables.items():
        with writing(out / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary)


def _candidate_rows(plan: Plan, every: Step, kept: set[int]) -> list[dict[str, Any]]:
    missing, anchor_peaks = plan.features, {target.feature: target.peak for target in plan.missing}
    rows = []
    for row, (job, generation, sample) in enumerate(zip(every.jobs, every.generations, every.samples, strict=True)):
        peaks_m = every.peaks_nf[[row]][:, missing].toarray()[0]
        best = int(peaks_m.argmax()) if sample.reason is None else None
        rows.append({
            "id": job.id, "feature": job.feature, "step": job.step, "index": job.index, "text": sample.text,
            "valid": sample.reason is None, "reason": sample.reason, "mended": list(sample.mended),
            "peak": None if best is None else float(peaks_m[missing == job.feature][0]),
            "best_feature": None if best is None else int(missing[best]),
            "best_peak": None if best is None else float(peaks_m[best]),
            "covers": missing[peaks_m > plan.threshold].tolist(), "kept": row in kept, "raw": generation.text,
            "finish_reason": generation.finish_reason, "prompt_digest": generation.prompt_digest,
            "seed": generation.seed, "generator": generation.generator, "model": generation.model,
            "prompt_tokens": generation.prompt_tokens, "completion_tokens": generation.completion_tokens,
            "fields": json.dumps(sample.fields, ensure_ascii=False) if sample.fields else None,
            "steer": None if (by := job.request.steer) is None else by.strength / anchor_peaks[by.feature],
        })  # fmt: skip
    return rows


def _pair_row(pair: Pair, valid: Sequence[int], every: Step, abouts: Mapping[int, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "feature": pair.feature, "about": abouts[pair.feature], "strong_peak": pair.strong_peak,
        "weak_peak": pair.weak_peak if pair.weak is not None else None, "reason": pair.reason,
    }  # fmt: skip
    for name, place in (("strong", pair.strong), ("weak", pair.weak)):
        if place is not None:
            found |= {name: every.jobs[valid[place]].id, f"{name}_text": every.samples[valid[place]].text}
    return found


def _sample_rows(every: Step, kept: Sequence[Kept], abouts: Mapping[int, str]) -> list[dict[str, Any]]:
    covered = np.cumsum([len(one.adds) for one in kept]).tolist()
    return [
        {
            "rank": rank, "id": every.jobs[one.row].id, "text": every.samples[one.row].text, "feature": one.feature,
            "about": abouts[one.feature], "peak": one.peak, "adds": list(one.adds), "covered": covered[rank],
            "step": every.jobs[one.row].step, "written_for": every.jobs[one.row].feature,
            "generator": every.generations[one.row].generator,
            "prompt_digest": every.generations[one.row].prompt_digest, "seed": every.generations[one.row].seed,
        }
        for rank, one in enumerate(kept)
    ]  # fmt: skip


def _write_data_set(path: Path, every: Step, features: Mapping[int, int], label: float) -> None:
    """One line per chosen row, as `text.read_documents` takes it, with what it came from."""
    lines = [
        {
            "id": every.jobs[row].id, "text": every.samples[row].text, "label": label, "feature": feature,
            **every.samples[row].fields, "step": every.jobs[row].step, "generator": every.generations[row].generator,
            "prompt_digest": every.generations[row].prompt_digest, "seed": every.generations[row].seed,
        }
        for row, feature in features.items()
    ]  # fmt: skip
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _summary(plan: Plan, generator: str, written: Written) -> dict[str, Any]:
    """Numbers of the stage; `target_hit_rate` is the share of the missing features that the samples activate."""
    return {
        "generator": generator,
        "missing": len(plan.missing),
        "written_for": len(plan.targets),
        "step1": _step_summary(plan, written.first),
        "step2": _step_summary(plan, written.second),
        "pairs": sum(pair.reason is None for pair in written.pairs),
        "exhausted": sum(pair.strong is None for pair in written.pairs),
        "kept": len(written.kept),
        "kept_from_step2": sum(one.row >= len(written.first.jobs) for one in written.kept),
        "random": len(written.drawn),
        "target_hit_rate_one_step": _hit_rate(plan, written.every, len(written.first.jobs)),
        "target_hit_rate": _hit_rate(plan, written.every, len(written.every.jobs)),
    }


def _step_summary(plan: Plan, step: Step) -> dict[str, Any]:
    own = {job.feature for row, job in enumerate(step.jobs) if step.peaks_nf[row, job.feature] > plan.threshold}
    return {
        "written": len(step.jobs),
        "valid": len(step.valid),
        "rejected": reasons(step.samples),
        "hit_by_their_own": len(own),
        "prompt_tokens": sum(one.prompt_tokens for one in step.generations),
        "completion_tokens": sum(one.completion_tokens for one in step.generations),
    }


def _hit_rate(plan: Plan, every: Step, count: int) -> float | None:
    """Of the first `count` texts."""
    if not plan.missing:
        return None
    peaks_m = every.peaks_nf[:count, plan.features].max(axis=0).toarray() if count else np.zeros(1)
    return float((peaks_m > plan.threshold).sum() / len(plan.missing))
