"""Each of the five tasks, from a config to exported samples, on real weights and text: the backbone writes, then a
server does.

Takes minutes and installs gigabytes, so the suite does not collect it: `bash launch/test-tasks.sh SAE` runs it, and
prints what it measured. The budgets are tiny, so the figures only say that it works. FAC_TASKS_SAE names the SAE.
The server's model can write and no more (of 58 explanations it judged 58 relevant), so beside it the embedded methods
explain and judge: the features are the same, and only the samples are another writer's.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fac_jax.features.task import load_task
from fac_jax.scan.product import load_scan
from fac_jax.synthesis.forms import answer_misfit
from fac_jax.synthesis.samples import read_sample
from tests.llm.real_server import Running, fac, running

pytestmark = pytest.mark.timeout(1800)
CONFIGS = {
    "toxicity": "configs/quickstart.yaml",
    "helpfulness": "configs/tasks/helpfulness.yaml",
    "instruction_following": "configs/tasks/instruction_following.yaml",
    "sycophancy": "configs/tasks/sycophancy.yaml",
    "survival": "configs/tasks/survival.yaml",
}
EXPORTS = (
    ("toxicity", "official_tsv"),
    ("helpfulness", "trl_preference"),
    ("instruction_following", "trl_sft"),
    ("sycophancy", "caa"),
    ("survival", "caa"),
)
"""The tasks, and the format in which the samples of each are exported."""
# Short texts and few of them; a low threshold, so that much is missing and much of what is written counts.
SMALL = (
    "--data.anchor.max-tokens 48 --data.anchor.sample 0.15 --data.seed.max-tokens 48 --data.seed.sample 0.015"
    " --data.heldout.sample 0.2 --splice.documents 0 --judge.false-discovery-rate 0.2 --coverage.threshold 12"
    " --synthesize.max-features 2 --synthesize.candidates 4 --synthesize.second-step 2 --llm.local-batch 8"
    " --steer.limit 4 --steer.seeds 42 --finetune.seeds 42 --finetune.epochs 1"
).split()
FEW_ANSWERS = (
    "--data.instructions.sources.0.limit 2 --data.heldout_instructions.sources.0.limit 2"
    " --data.asked.sources.0.limit 1 --finetune.output-tokens 8"
).split()
"""What an instruction model is trained on and measured by, made small."""
NEW_TOKENS = {"toxicity": 48, "instruction_following": 192}
"""Tokens of a reply at most; 128 for the other tasks."""
COMPARES_ANSWERS = "instruction_following"
"""There the server has a part in training's figures too; of the other tasks it only writes."""
ONLY_WRITES = "--explain.method embedded --judge.method embedded --llm.no-cache --llm.timeout-s 600".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from running(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(("task", "export"), EXPORTS)
def test_the_backbone_writes(task: str, export: str, folders: Path) -> None:
    run(task, folders / task)
    check(task, folders / task, "embedded:")
    check_export(task, folders / task, export)


@pytest.mark.parametrize(("task", "export"), EXPORTS)
def test_a_server_writes(task: str, export: str, folders: Path, server: Running) -> None:
    folder = made_by_the_backbone(task, folders)
    before = records(folder)
    written = (*server_flags(server), *ONLY_WRITES)
    if task == COMPARES_ANSWERS:
        run(task, folder, *written)
    else:
        run(task, folder, *written, verb="synthesize")
        run(task, folder, *written, "--data", "kept", verb="scan")
    check(task, folder, "http:")
    check_export(task, folder, export)
    same = ("scans/anchor", "scans/seed", "explanations", "relevance", "coverage")
    assert all(records(folder)[name] == before[name] for name in same), "who writes changes nothing before"


def test_a_server_explains_and_judges(folders: Path, server: Running) -> None:
    """A few features of one task: its answers are read, whatever they are worth."""
    folder = made_by_the_backbone("sycophancy", folders)
    few = "--explain.features 4 --explain.scored-features 0 --explain.generation-features 0 --judge.passes 1".split()
    for verb in ("explain", "judge"):
        run("sycophancy", folder, *server_flags(server), "--llm.no-cache", "--llm.timeout-s", "600", *few, verb=verb)
    explained, judged = (summary(folder, stage) for stage in ("explanations", "relevance"))
    print(f"[measured] sycophancy, explained and judged by the server: {explained}; {judged}")
    assert explained["method"] == judged["method"] == "llm"
    assert explained["explained"] + explained["cannot_tell"] + explained["failed"] == 4


def made_by_the_backbone(task: str, folders: Path) -> Path:
    """The task's run directory; made here where only some of the tests run."""
    if not (folders / task / "synthesis/stage.json").exists():
        run(task, folders / task)
    return folders / task


def run(task: str, folder: Path, *more: str, verb: str = "run") -> str:
    tokens = str(NEW_TOKENS.get(task, 128))
    where = ("--run.dir", str(folder), "--scan.sae", str(Path(os.environ["FAC_TASKS_SAE"]).resolve()))
    few = FEW_ANSWERS if task == "instruction_following" else []
    return fac(verb, CONFIGS[task], *where, *SMALL, *few, "--synthesize.max-new-tokens", tokens, *more)


def server_flags(server: Running) -> tuple[str, ...]:
    return "--llm.url", server.url, "--llm.model", server.model


def check(task: str, folder: Path, writer: str) -> None:
    """What was written, kept and rejected holds up."""
    wrote = summary(folder, "synthesis")
    written, valid = (sum(wrote[step][what] for step in ("step1", "step2")) for what in ("written", "valid"))
    print(
        f"\n[measured] {task}, {wrote['generator']}: {valid} of {written} valid, {wrote['kept']} kept, "
        f"{wrote['target_hit_rate']:.1%} of {wrote['missing']} missing features hit"
    )
    candidates = pq.read_table(folder / "synthesis/candidates.parquet").to_pylist()
    kept = list(read_rows(folder / "synthesis/kept.jsonl"))
    assert kept and len(candidates) == written and len(kept) == wrote["kept"]
    assert all(row["generator"].startswith(writer) for row in (*kept, *candidates))
    assert all(row["valid"] or row["reason"] for row in candidates)
    assert {row["id"] for row in candidates if row["kept"]} == {row["id"] for row in kept}
    by_id = {row["id"]: row for row in candidates}
    for sample in kept:
        assert_well_formed(task, sample, by_id[sample["id"]])
    assert_proved(folder, kept, by_id)


def check_export(task: str, folder: Path, form: str) -> None:
    """The export holds every kept sample (`test_export_loaders.py` has each format read by the program it is for)."""
    with tempfile.TemporaryDirectory() as place:
        to = Path(place) / form
        print(fac("export", CONFIGS[task], "--run.dir", str(folder), "--format", form, "--to", str(to)))
        kept = list(read_rows(folder / "synthesis/kept.jsonl"))
        (exported,) = (file for file in to.iterdir() if file.name != "provenance.jsonl")
        assert len(list(read_rows(exported))) == len(kept) > 0


def read_rows(path: Path) -> Iterable[Any]:
    """The rows of a file, by its format: a text within a row may hold line breaks."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".tsv":
            yield from csv.reader(file, delimiter="\t")
        elif path.suffix == ".json":
            yield from json.load(file)
        else:
            yield from map(json.loads, file)


def assert_well_formed(task: str, sample: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
    """The raw reply, read again, is the sample; of an instruction, the answer is one."""
    what = load_task(task).description
    read = read_sample(candidate["raw"], candidate["finish_reason"], what.sample, what.form)
    assert read.reason is None and read.text == sample["text"] == candidate["text"]
    assert all(sample[name] == value for name, value in read.fields.items())
    if what.form == "instruction and answer":
        assert answer_misfit(sample["answer"], "stop") is None


def assert_proved(folder: Path, kept: list[dict[str, Any]], candidates: Mapping[str, Mapping[str, Any]]) -> None:
    """The scan of the kept samples, which knows nothing of how they were chosen, finds each above the threshold."""
    scan = load_scan(folder / "scans/kept")
    threshold = json.loads((folder / "synthesis/stage.json").read_text())["settings"]["threshold"]
    row_of = {text: row for row, text in enumerate(scan.documents("text")["text"].to_pylist())}
    for sample in kept:
        peak = float(scan.peaks_nf[[row_of[sample["text"]]]][:, [sample["feature"]]].toarray()[0, 0])
        assert peak > threshold
        if candidates[sample["id"]]["best_feature"] == sample["feature"]:
            assert peak == pytest.approx(candidates[sample["id"]]["best_peak"], rel=0.02)
    assert np.isfinite(scan.peaks_nf.data).all()


def summary(folder: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / stage / "stage.json").read_text())["summary"]
    return found


def records(folder: Path) -> dict[str, bytes]:
    """The record of each product that holds, by its folder."""
    found = {str(path.parent.relative_to(folder)): path.read_bytes() for path in folder.rglob("stage.json")}
    return {name: record for name, record in found.items() if "superseded" not in name}
