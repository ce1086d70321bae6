"""A whole study in the toy world: figures counted by hand, arms as they should be, a stopped one gone on with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score

from fac_jax.backbone.weights import load_backbone
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.coverage import DiversityConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.downstream import FinetuneConfig, StudyConfig
from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig
from fac_jax.diversity.measure import of_words
from fac_jax.downstream.tune import make_tuner
from fac_jax.errors import UserError
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from fac_jax.mesh import make_mesh
from fac_jax.scan.scan import scan
from fac_jax.study import cells as cells_module
from fac_jax.study.cells import adapter_settings, cells
from fac_jax.study.library import documents_of, read_library
from fac_jax.study.study import study
from fac_jax.study.texts import read_arms, write_texts
from fac_jax.synthesis import ablation
from tests.backbone.tiny_backbone import write_model
from tests.synthesis.toy_world import FILLER, SEEN, TOPICS, WORDS, Toy, feature, message, write

MISSING = [word for word in TOPICS if word not in SEEN]
STUDY = StudyConfig(budgets=(3, 6), seeds=(1, 2), lora_seeds=(1,))


def able(request: Request) -> str:
    """What is asked for; of what names no topic, something about ropes."""
    named = [word for word in TOPICS if word in request.messages[-1]["content"]]
    return message(named[0] if named else "ropes", request.seed)


@dataclasses.dataclass
class World:
    """The toy world up to what the arms wrote."""

    config: Config
    inputs: dict[str, Path]
    folder: Path
    generator: FakeGenerator

    def run(self, name: str = "cells", **settings: Any) -> dict[str, Any]:
        out = self.folder / "study" / name
        out.mkdir(parents=True, exist_ok=True)
        config = replace(self.config, study=replace(self.config.study, **settings))
        study(config, out, self.inputs)
        return json.loads((out / "study.json").read_text())


@pytest.fixture
def world(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    generator = FakeGenerator(able)
    monkeypatch.setattr(ablation, "open_generator", lambda config, mesh, directions: generator)
    lines = [json.dumps({"text": message(word, 700 + n), "label": n % 2}) for n, word in enumerate(TOPICS)]
    (tmp_path / "heldout.jsonl").write_text("\n".join(lines))
    heldout = DataSet(sources=(Source(path=str(tmp_path / "heldout.jsonl"), label="label"),), max_tokens=16)
    config = replace(
        toy.config,
        data={**toy.config.data, "heldout": heldout},
        study=STUDY,
        diversity=DiversityConfig(embedding_model=None, pos_model=None),
        finetune=FinetuneConfig(epochs=4, learning_rate=1e-2),
    )
    relevance = tmp_path / "relevance"
    write(relevance / "relevance.parquet", [{"feature": f, "relevant": w in TOPICS} for f, w in enumerate(WORDS)])
    (relevance / "relevance.json").write_text(json.dumps({"sae": "sae-1"}))
    (toy.out / "generations.jsonl").write_text("")
    inputs = {**toy.inputs, "relevance": relevance, "synthesis": toy.out, "study:texts": tmp_path / "texts"}
    inputs["study:texts"].mkdir()
    write_texts(config, inputs["study:texts"], inputs)
    for name in ("heldout", "study_texts"):
        inputs[f"scan:{name}"] = tmp_path / "scans" / name
        inputs[f"scan:{name}"].mkdir(parents=True)
        read = inputs if name == "study_texts" else {"sae": toy.inputs["sae"]}
        scan(config, inputs[f"scan:{name}"], read, name)
    return World(config, inputs, tmp_path, generator)


def test_every_arm_has_what_it_says(world: World):
    arms = read_arms(world.inputs["study:texts"])[0]
    library = read_library(world.config, world.inputs)
    texts = library.examples.texts
    assert set(arms) == set(STUDY.arms) - {"selection"}
    for name in STUDY.arms:
        added = library.added(name, 6, 0)
        assert len(added) == len(set(added.tolist())) == 6
        assert not set(added.tolist()) & set(library.seed.tolist()), "the seed is there anyway"
    topics = {name: {w for row in library.added(name, 6, 0) for w in TOPICS if w in texts[row]} for name in STUDY.arms}
    assert len(topics["two steps"] & set(MISSING)) == len(topics["one step"] & set(MISSING)) == 6
    assert topics["selection"] <= set(MISSING) and len(topics["selection"]) == 6
    assert topics["self-instruct"] == topics["evol-instruct"] == set(SEEN)
    anchor = pq.read_table(world.inputs["scan:anchor"] / "documents.parquet")["text"].to_pylist()
    assert all(texts[row] in anchor for row in library.added("selection", 6, 0))


def test_budgets_lie_in_one_another_and_seeds_draw_where_there_is_no_order(world: World):
    library = read_library(world.config, world.inputs)
    for name in STUDY.arms:
        small, large = library.added(name, 3, 0).tolist(), library.added(name, 6, 0).tolist()
        assert large[:3] == small
    assert library.added("one step", 6, 0).tolist() == library.added("one step", 6, 1).tolist()
    assert library.added("random generations", 6, 0).tolist() != library.added("random generations", 6, 1).tolist()


def test_figures_are_those_that_can_be_counted(world: World):
    product = world.run()
    at = {(line["arm"], line["budget"]): line for line in product["cells"]}
    assert len(at) == 1 + 7 * 2 and product["missing"] == len(MISSING)
    assert at["seed", 0]["fac"]["mean"] == pytest.approx(1 / 8) and at["seed", 0]["target_hit_rate"] is None
    assert at["two steps", 3]["fac"]["mean"] == pytest.approx(4 / 8)
    assert at["two steps", 6]["target_hit_rate"]["mean"] == pytest.approx(6 / 7)
    assert at["self-instruct", 6]["target_hit_rate"]["mean"] == 0
    library = read_library(world.config, world.inputs)
    rows = np.concatenate([library.seed, library.added("one step", 3, 0)])
    told = of_words(documents_of([library.examples.texts[row] for row in rows]))
    assert at["one step", 3]["distinct_2"]["mean"] == pytest.approx(told["distinct_2"]["value"])
    assert at["one step", 3]["vendi_score"] is None, "no encoder, no figure"
    assert at["seed", 0]["label_agreement"] is None
    added = library.added("two steps", 6, 0)
    assert at["two steps", 6]["label_agreement"]["mean"] == pytest.approx(library.agrees_n[added].mean())


def test_a_label_that_the_anchor_would_not_give_is_counted(world: World):
    """The toy's labels say nothing of its words, so make them: guns are positive in the anchor, and nothing else is."""
    lines = [json.dumps({"text": message(w, 300 + n), "label": int(w == "guns")}) for w in TOPICS for n in range(6)]
    (world.folder / "sorted.jsonl").write_text("\n".join(lines))
    ordered = DataSet(sources=(Source(path=str(world.folder / "sorted.jsonl"), label="label"),), max_tokens=16)
    finetune = replace(world.config.finetune, epochs=100)
    config = replace(world.config, data={**world.config.data, "anchor": ordered}, finetune=finetune)
    out = world.folder / "scans" / "sorted"
    out.mkdir()
    scan(config, out, {"sae": world.inputs["sae"]}, "anchor")
    library = read_library(config, {**world.inputs, "scan:anchor": out})
    written = [row for row, name in enumerate(library.examples.texts) if row not in set(library.seed.tolist())]
    for row in written:
        guns = "guns" in library.examples.texts[row]
        assert library.agrees_n[row] == (library.examples.positive_n[row] == guns)
    assert 0 < library.agrees_n[library.added("two steps", 6, 0)].sum() < 6, "all are labelled 1, few speak of guns"


def test_detection_is_that_of_the_scores_that_were_kept(world: World):
    product = world.run()
    line = next(one for one in product["cells"] if (one["arm"], one["budget"]) == ("selection", 6))
    library = read_library(world.config, world.inputs)
    found = []
    for seed in STUDY.seeds:
        told = json.loads((world.folder / "study" / "cells" / "heads" / f"selection-6-seed-{seed}.json").read_text())
        found.append(average_precision_score(library.heldout.positive_n, told["scores"]))
    assert line["auprc_head"]["mean"] == pytest.approx(np.mean(found))
    rows = pq.read_table(world.folder / "study" / "cells" / "cells.parquet").to_pylist()
    assert len(rows) == 15 * 2
    assert [row["auprc_head"] for row in rows if (row["arm"], row["budget"]) == ("selection", 6)] == pytest.approx(
        found
    )
    assert line["gain"]["head"]["low"] <= line["gain"]["head"]["mean"] <= line["gain"]["head"]["high"]
    told = product["correlations"]["head"]
    assert told["fac"]["pearson"]["cells"] == 15 and told["target_hit_rate"]["pearson"]["cells"] == 14
    assert told["vendi_score"] == {}
    assert product["correlations_of_written"]["head"]["fac"]["pearson"]["cells"] == 13


def test_a_stopped_study_goes_on_behind_what_is_there(world: World, monkeypatch: pytest.MonkeyPatch):
    whole = world.run()
    calls: list[int] = []
    true = cells_module.head_scores

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 11:
            raise UserError("stopped")
        return true(*arguments)

    monkeypatch.setattr(cells_module, "head_scores", dying)
    with pytest.raises(UserError, match="stopped"):
        world.run("parts")
    calls.clear()
    monkeypatch.setattr(cells_module, "head_scores", lambda *arguments: calls.append(1) or true(*arguments))
    assert world.run("parts") == whole and len(calls) == 20


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each time that adapters began to be trained, those of a tiny backbone."""
    write_model(tmp_path / "model", vocab_size=max(260, len(WORDS)))
    loaded = load_backbone(str(tmp_path / "model"), None, "float32", make_mesh(MeshConfig(data=1, feature=1)))
    geometry = BackboneConfig(rows_per_batch=2, row_tokens=128)
    found: list[int] = []

    def tuner(config: Config, settings: FinetuneConfig, model: str) -> Any:
        found.append(1)
        assert settings.batch == 4 and model == "model-1"
        return make_tuner(loaded, "classifier", settings, geometry)

    monkeypatch.setattr(cells_module, "open_tuner", tuner)
    return found


def test_adapters_are_trained_where_they_are_asked_for(world: World, made: list[int]):
    lora = {"lora_budgets": (0, 6), "lora_steps": 3, "lora_batch": 4, "lora_learning_rate": 1e-2}
    product = world.run(**lora)
    there = {(line["arm"], line["budget"]) for line in product["cells"] if line["auprc_lora"] is not None}
    assert there == {("seed", 0), *((arm, 6) for arm in STUDY.arms)}
    assert product["correlations"]["lora"]["fac"]["pearson"]["cells"] == 8
    adapters = world.folder / "study" / "adapters"
    assert sorted(file.suffix for file in adapters.iterdir()) == [".json"] * 8, "no checkpoint stays behind"
    assert world.run(**lora) == product and len(made) == 1
    assert world.run("fewer", **lora, arms=("two steps",))["cells"][0] == product["cells"][0]
    assert len(made) == 1, "adapters that are there serve another study"
    world.run("slower", **{**lora, "lora_budgets": (0,), "lora_learning_rate": 1e-3})
    assert len(made) == 2 and len(list(adapters.iterdir())) == 9


@pytest.mark.parametrize("name", ["seed", "heldout"])
def test_adapters_are_trained_again_where_documents_are_cut_elsewhere(name: str, world: World, made: list[int]):
    lora = {"lora_budgets": (0,), "lora_steps": 3, "lora_batch": 4, "lora_learning_rate": 1e-2}
    world.run(**lora)
    shorter = replace(world.config.dataset(name), max_tokens=8)
    world.config = replace(world.config, data={**world.config.data, name: shorter})
    whole, cut = world.inputs[f"scan:{name}"], world.folder / "scans" / "shorter"
    cut.mkdir()
    scan(world.config, cut, {"sae": world.inputs["sae"]}, name)
    world.inputs[f"scan:{name}"] = cut
    before, after = (pq.read_table(folder / "documents.parquet") for folder in (whole, cut))
    assert before["id"] == after["id"] and before["token_ids"] != after["token_ids"]
    world.run("shorter", **lora)
    assert len(made) == len(list((world.folder / "study" / "adapters").iterdir())) == 2


def test_adapters_take_about_as_many_steps_whatever_there_is_to_learn_from():
    config = Config(study=replace(STUDY, lora_steps=39, lora_batch=16))
    epochs = {documents: adapter_settings(config, documents).epochs for documents in (97, 122, 147, 197, 297, 2000)}
    assert epochs == {97: 6, 122: 5, 147: 4, 197: 3, 297: 2, 2000: 1}


def test_cells_are_listed_once():
    config = Config(study=replace(STUDY, lora_budgets=(3,)))
    every = cells(config)
    assert len(every) == len(set(every)) == (1 + 7 * 2) * 2
    assert {(cell.budget, cell.seed) for cell in cells(config, lora=True)} == {(3, 1)}


def heldout(world: World, rows: list[tuple[str, int]]) -> Any:
    """Try to read a library with these texts and labels held out."""
    (world.folder / "other.jsonl").write_text("\n".join(json.dumps({"text": t, "label": label}) for t, label in rows))
    other = DataSet(sources=(Source(path=str(world.folder / "other.jsonl"), label="label"),), max_tokens=16)
    config = replace(world.config, data={**world.config.data, "other": other}, finetune=FinetuneConfig(heldout="other"))
    out = world.folder / "scans" / "other"
    out.mkdir()
    scan(config, out, {"sae": world.inputs["sae"]}, "other")
    return read_library(config, {**world.inputs, "scan:other": out})


def test_a_held_out_document_in_training_is_refused(world: World):
    text = pq.read_table(world.inputs["scan:anchor"] / "documents.parquet")["text"][5].as_py()
    with pytest.raises(UserError, match="word for word in held-out data set 'other'"):
        heldout(world, [(f"{text} !", 1), (message("fire", 4), 0)])


def test_a_held_out_set_of_one_class_is_refused(world: World):
    with pytest.raises(UserError, match="'other' has no labelled documents of both classes"):
        heldout(world, [(message("fire", 4), 1), (message("fire", 5), 1)])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"budgets": (0, 5)}, "budgets"),
        ({"budgets": (5, 5)}, "none twice"),
        ({"budgets": (5,), "lora_budgets": (6,)}, "lora_budgets"),
        ({"budgets": (5,), "lora_seeds": (1,)}, "lora_seeds"),
        ({"pools": 0}, "pools"),
        ({"lora_steps": 0}, "lora_steps"),
        ({"lora_learning_rate": 0.0}, "lora_learning_rate"),
    ],
)
def test_a_study_that_cannot_be_is_refused(settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        StudyConfig(**settings)


def test_fillers_are_no_topics():
    """The toy's own assumption: a feature of a filler is never relevant."""
    assert not {feature(word) for word in FILLER} & {feature(word) for word in TOPICS}
