"""The whole loop on the real model and real text, small: done once, killed and continued, and changed in one place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fac_jax.activations.store import read_manifest
from fac_jax.config.data import Source
from fac_jax.config.downstream import StudyConfig
from fac_jax.config.file import Config, load_config
from fac_jax.errors import UserError
from fac_jax.pipeline import check_data, data_fingerprint, external_store, pipeline
from fac_jax.plain import digest, to_plain
from fac_jax.runs import RECORD, Record, Stage, read_record
from tests.activations.tiny_store import fill, manifest
from tests.gang import keeping_programs

ROOT = Path(__file__).parent.parent
SMALL = (
    "--backbone.layer 4 --harvest.tokens 6000 --harvest.shard-rows 2048 --data.chat.max-tokens 96"
    " --data.anchor.max-tokens 96 --data.anchor.sources.2.limit 40 --data.anchor.sample 0.4 --data.seed.sample 0.04"
    " --data.seed.max-tokens 96 --data.seed.sources.2.limit 10 --sae.features 512 --sae.k 8 --train.steps 40"
    " --train.batch-rows 512 --train.k-start 16 --train.anneal-steps 10 --train.checkpoint-every 10"
    " --splice.documents 4 --splice.new-tokens 4"
    " --coverage.threshold 0 --synthesize.max-features 2 --synthesize.candidates 2 --synthesize.second-step 1"
    " --synthesize.max-new-tokens 24 --judge.false-discovery-rate 0.2"
).split()


def command(folder: Path, *more: str, verb: str = "run") -> list[str]:
    quickstart = str(ROOT / "configs/quickstart.yaml")
    return [sys.executable, "-m", "fac_jax.cli", verb, quickstart, "--run.dir", str(folder), *SMALL, *more]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One device, as on a laptop: eight fake ones would share two cores. Programs are compiled once for all runs; that
    compiling them anew gives the same bytes, tests/activations/test_live.py and tests/sae/test_train.py show."""
    return {**os.environ, "XLA_FLAGS": "", **keeping_programs(tmp_path_factory.mktemp("programs"))}


def records(folder: Path) -> dict[str, Record]:
    found = (read_record(path.parent) for path in folder.rglob(RECORD) if "superseded" not in path.parts)
    return {record.stage: record for record in found if record is not None}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Products that hold no time of day and no duration."""
    kinds = (
        "activations/**/c/*/*",
        "sae/sae.safetensors",
        "scans/*/*.parquet",
        "coverage/*.parquet",
        "synthesis/*.parquet",
    )
    return {str(p.relative_to(folder)): p.read_bytes() for kind in kinds for p in folder.glob(kind) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = subprocess.run(command(folder), env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "report:" in done.stdout
    return folder


def test_live_training_needs_no_store() -> None:
    """Its stages are what changes with the corpus then; what only a store has changes nothing."""
    stored = load_config(ROOT / "configs/quickstart.yaml")
    live = replace(stored, train=replace(stored.train, activations="live"))
    stages = pipeline(live)
    assert set(pipeline(stored)) - set(stages) == {"activations"}
    assert (stages["sae"].inputs, stages["sweep"].inputs, stages["splice"].inputs) == ((), (), ("sae",))

    def settings(**changes: object) -> dict[str, str]:
        changed = pipeline(replace(live, harvest=replace(live.harvest, **changes)))  # type: ignore[arg-type]
        return {name: digest(changed[name].settings) for name in ("sae", "sweep", "splice")}

    assert settings() == settings(tokens=5, shard_rows=512, compression="bitshuffle")
    for change in ({"validation_fraction": 0.2}, {"data": "anchor"}):
        assert all(settings(**change)[name] != before for name, before in settings().items())
    assert settings(dtype="float16")["sae"] != settings()["sae"]
    deeper = pipeline(replace(live, backbone=replace(live.backbone, layer=3)))["sae"]
    assert digest(deeper.settings) != settings()["sae"]


def test_the_sets_and_labels_that_a_run_comes_to_late_are_asked_for_at_once() -> None:
    config = load_config(ROOT / "configs/quickstart.yaml")
    assert check_data(config) == ["chat", "anchor", "seed", "heldout"]

    def without(name: str) -> Config:
        return replace(config, data={key: data for key, data in config.data.items() if key != name})

    for name, setting in (("chat", "harvest.data"), ("seed", "coverage.seed"), ("heldout", "finetune.heldout")):
        with pytest.raises(UserError, match=f"{setting}: no data set is called '{name}' under data:"):
            check_data(without(name))
    for given in ({"train": replace(config.train, store="there")}, {"scan": replace(config.scan, sae="there")}):
        assert check_data(replace(without("chat"), **given)) == ["anchor", "seed", "heldout"]  # type: ignore[arg-type]
    rewards = load_config(ROOT / "configs/tasks/helpfulness.yaml")
    with pytest.raises(UserError, match="finetune.train: no data set is called 'pears' under data:"):
        check_data(replace(rewards, finetune=replace(rewards.finetune, train="pears")))

    published = load_config(ROOT / "configs/llama31_8b_l16.yaml")
    assert "finetune" not in pipeline(published) and "scan:heldout" not in pipeline(published), "no labels to train on"
    with pytest.raises(UserError, match="judge needs labels: no source of data.anchor has any"):
        check_data(published)
    assert check_data(replace(published, llm=replace(published.llm, url="http://a/v1")))


def test_a_store_from_before_its_files_were_noted_is_what_it_was(tmp_path: Path) -> None:
    fill(tmp_path, manifest(), batches=2, rows=250)
    there = to_plain(read_manifest(tmp_path))
    assert there.pop("files_digest") == "" and external_store(str(tmp_path)) == [digest(there)]


def test_a_study_without_labels_does_not_begin() -> None:
    published = load_config(ROOT / "configs/llama31_8b_l16.yaml")
    asked = replace(published, llm=replace(published.llm, url="http://a/v1"), study=StudyConfig(budgets=(25,)))
    with pytest.raises(UserError, match=r"study.budgets are set, and neither data.seed nor data.anchor has the labels"):
        check_data(asked)


def test_the_config_that_the_readme_shows_is_one(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own data")[2]
    shown = text.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "my.yaml").write_text(shown.replace("configs/quickstart.yaml", str(ROOT / "configs/quickstart.yaml")))
    config = load_config(tmp_path / "my.yaml")
    assert check_data(config) == ["chat", "anchor", "seed", "heldout"]
    assert all(data.sample == 1 for data in config.data.values()), "nothing that is not shown takes documents away"


def test_who_answers_changes_only_what_asks(tmp_path: Path) -> None:
    """A server that only writes leaves explanations and relevance as they were without it."""
    config = load_config(ROOT / "configs/quickstart.yaml")
    asking = ("explanations", "relevance", "synthesis")

    def settings(url: str | None, explain: str, judge: str, texts: int | None = None) -> list[str]:
        changed = replace(
            config,
            llm=replace(config.llm, url=url),
            explain=replace(config.explain, method=explain, generation_features=texts),  # type: ignore[arg-type]
            judge=replace(config.judge, method=judge),  # type: ignore[arg-type]
        )
        stages = pipeline(changed)
        return [digest(stages[name].settings) for name in asking]

    alone, served = settings(None, "auto", "auto"), settings("http://a/v1", "auto", "auto")
    assert all(one != other for one, other in zip(alone, served, strict=True))
    assert settings(None, "embedded", "embedded") == alone
    assert settings("http://a/v1", "embedded", "embedded") == [*alone[:2], served[2]]
    assert settings("http://a/v1", "embedded", "auto") == [alone[0], *served[1:]]
    written = [settings(url, "embedded", "auto", texts=5)[0] for url in (None, "http://a/v1", "http://b/v1")]
    assert len({*written, alone[0]}) == 4, "texts are written from explanations: by whom matters"


def test_what_is_trained_goes_by_the_task() -> None:
    """A reward from pairs, an instruction model from instructions, where the config names them."""

    def stages(name: str, **settings: object) -> dict[str, Stage]:
        config = load_config(ROOT / f"configs/tasks/{name}.yaml")
        url = settings.pop("url", None)
        changed = replace(config.finetune, **settings)  # type: ignore[arg-type]
        return pipeline(replace(config, finetune=changed, llm=replace(config.llm, url=url)))  # type: ignore[arg-type]

    tasks = ("helpfulness", "instruction_following", "sycophancy", "survival")
    assert [name for name in tasks if "finetune" in stages(name)] == ["helpfulness", "instruction_following"]
    assert "finetune" not in stages("helpfulness", train=None) and "finetune" in pipeline(
        load_config(ROOT / "configs/quickstart.yaml")
    )
    reward = stages("helpfulness")
    assert reward["finetune"].inputs == ("synthesis",) and "finetune" in reward["report"].inputs
    assert "scan:heldout_pairs" not in reward, "answers are not scanned"

    def marked(name: str, **settings: object) -> str:
        return digest(stages(name, **settings)["finetune"].settings)

    assert marked("helpfulness") == marked("helpfulness", url="http://a/v1"), "it asks nobody"
    assert marked("instruction_following") != marked("instruction_following", url="http://a/v1")
    assert marked("helpfulness", heldout="pairs") != marked("helpfulness")


def test_a_study_is_written_scanned_and_measured_and_each_is_made_of_what_it_reads() -> None:
    config = load_config(ROOT / "configs/science_toxicity.yaml")
    assert not [name for name in pipeline(replace(config, study=StudyConfig())) if "study" in name]
    names = ("study:texts", "scan:study_texts", "study")
    assert set(names) <= set(pipeline(config)) and "study" in pipeline(config)["report"].inputs

    def settings(**changes: object) -> dict[str, str]:
        stages = pipeline(replace(config, study=replace(config.study, **changes)))  # type: ignore[arg-type]
        return {name: digest(stages[name].settings) for name in names}

    before = settings()
    for change in ({"seeds": (42, 43, 44, 9)}, {"lora_seeds": (42, 43)}, {"budgets": (10, 25, 50, 100, 200)}):
        after = settings(**change)
        assert {name for name in names if after[name] != before[name]} == {"study"}, "the same texts serve"
    after = settings(budgets=(25, 50, 100, 200, 300))
    assert after["study:texts"] != before["study:texts"], "more are written"


def test_a_data_set_without_another_is_made_of_both(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/science_toxicity.yaml")
    (tmp_path / "held.jsonl").write_text('{"text": "one"}')
    before = data_fingerprint(config, "anchor")
    assert "without" not in before["settings"], "products from before there was such a setting stay what they are"
    held = Source(path=str(tmp_path / "held.jsonl"))
    changed = replace(config, data={**config.data, "anchor": replace(config.dataset("anchor"), without=(held,))})
    found = data_fingerprint(changed, "anchor")
    (tmp_path / "held.jsonl").write_text('{"text": "two!"}')
    assert len({digest(one) for one in (before, found, data_fingerprint(changed, "anchor"))}) == 3


def test_every_stage_is_done_and_the_report_is_there(undisturbed: Path) -> None:
    stages = pipeline(load_config(undisturbed / "config.yaml"))
    assert set(records(undisturbed)) == {name for name, stage in stages.items() if not stage.on_request}
    page = (undisturbed / "report/index.html").read_text()
    assert "<script" not in page and 'src="http' not in page and len(page) > 10_000
    coverage = json.loads((undisturbed / "evaluation/coverage.json").read_text())
    by_set = {row["set"]: row["fac"] for row in coverage["rows"] if row["threshold"] == 0}
    assert by_set["seed"] <= by_set["seed+kept"] <= 1 and by_set["seed"] <= by_set["seed+random"] <= 1


def test_run_again_does_nothing_and_another_threshold_only_what_follows(
    undisturbed: Path, environment: dict[str, str]
) -> None:
    before = records(undisturbed)
    subprocess.run(command(undisturbed), env=environment, check=True, capture_output=True, timeout=120)
    assert records(undisturbed) == before
    more = ("--coverage.sweep", "0", "5")
    subprocess.run(command(undisturbed, *more), env=environment, check=True, capture_output=True, timeout=120)
    after = records(undisturbed)
    remade = {name for name in after if after[name] != before[name]}
    assert remade == {"coverage", "evaluation", "report"}  # the missing features stayed the same, so synthesis did too
    subprocess.run(command(undisturbed), env=environment, check=True, capture_output=True, timeout=120)
    assert records(undisturbed) == before  # what was set aside came back


@pytest.mark.timeout(900)
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    undisturbed: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    waits_for = ("activations/layer-04/records/p0000/000000.json", "sae/checkpoints/10", "synthesis/generations.jsonl")
    for sign in waits_for:
        with subprocess.Popen(command(folder), env=environment, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 200
            while not (folder / sign).exists():
                assert process.poll() is None and time.monotonic() < deadline, f"never came to {sign}"
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
    done = subprocess.run(command(folder), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = bytes_of(undisturbed), bytes_of(folder)
    assert expected and {name for name in expected if expected[name] != found.get(name)} == set()


def test_a_sweep_is_made_on_request_and_then_reported(undisturbed: Path, environment: dict[str, str]) -> None:
    """On the store of the run; the report shows it, and a further run neither makes it again nor loses it."""
    asked = ("--sweep.k", "8", "--sweep.features", "256", "--sweep.variants", "topk", "jumprelu")
    before = records(undisturbed)
    for verb in ("sweep", "report", "run"):
        done = subprocess.run(command(undisturbed, *asked, verb=verb), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        if verb == "sweep":
            assert "topk-256-k8-seed0: fvu" in done.stdout and "jumprelu-256-k8-seed0: fvu" in done.stdout
        if verb == "report":
            reported = records(undisturbed)
    after = records(undisturbed)
    assert after == reported and set(after) == {*before, "sweep"}
    assert {name for name in before if after[name] != before[name]} == {"report"}
    assert "FVU, 256 features" in (undisturbed / "report/index.html").read_text()
