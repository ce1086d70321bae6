"""The stage over scans written by hand, of sentences whose mean residual is that of a table of words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax.backbone.weights import load_backbone
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.downstream import FinetuneConfig, LoraConfig
from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig
from fac_jax.downstream import arms as module
from fac_jax.downstream.evaluate import auprc
from fac_jax.downstream.finetune import finetune
from fac_jax.downstream.tune import tune
from fac_jax.errors import Stopped, UserError
from fac_jax.mesh import make_mesh
from fac_jax.scan.parts import Identity
from fac_jax.scan.tables import DOCUMENTS, PEAKS
from tests.backbone.tiny_backbone import tiny_tokenizer, write_model
from tests.downstream.experiment import stopping_before

NICE, VILE = ["good", "kind", "calm"], ["bad", "vile", "cruel"]
PLAIN = ["the", "a", "dog", "cat", "is", "was", "very"]
WORDS = [*NICE, *VILE, *PLAIN]
TABLE = np.random.default_rng(0).normal(size=(len(WORDS), 12)).astype(np.float32)
TABLE[[WORDS.index(word) for word in VILE], 0] += 6.0

Row = dict[str, Any]


def sentences(seed: int, n: int) -> list[Row]:
    """Texts, half of them with a vile word and so a label of 1; no text twice."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = [*generator.choice(PLAIN, size=5), generator.choice(VILE if i % 2 else NICE)]
        rows.append({"text": " ".join(map(str, words)), "label": float(i % 2)})
    return list({row["text"]: row for row in rows}.values())


@dataclass
class Experiment:
    """Rows of every scan; `run` writes the scans and trains."""

    folder: Path
    rows: dict[str, list[Row]]
    models: dict[str, str] = field(default_factory=dict)
    config: Config = Config(finetune=FinetuneConfig(epochs=20, learning_rate=1e-2, batch=8))

    @property
    def out(self) -> Path:
        return self.folder / "finetune"

    def run(self) -> dict[str, Any]:
        self.out.mkdir(exist_ok=True)
        return finetune(self.config, self.out, {f"scan:{name}": self._scan(name) for name in self.rows})

    def evaluation(self) -> dict[str, Any]:
        return json.loads((self.out / "eval.json").read_text())

    def _scan(self, name: str) -> Path:
        """A finished scan; a document's id is its text."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        documents = []
        for index, row in enumerate(self.rows[name]):
            words = row["text"].split()
            mean_d = TABLE[[WORDS.index(word) for word in words]].mean(0) if words else np.zeros(12)
            documents.append({
                "index": index, "id": row["text"], "label": row["label"], "source": f"{name}.jsonl:{index + 1}",
                "text": row["text"], "content_tokens": len(words), "mean_residual": mean_d,
                "token_ids": [10 + WORDS.index(word) for word in words],
            })  # fmt: skip
        pq.write_table(pa.Table.from_pylist(documents, DOCUMENTS), folder / "documents.parquet")
        pq.write_table(PEAKS.empty_table(), folder / "peaks.parquet")
        identity = Identity(name, "data", self.models.get(name, "model"), 3, "sae-1", 4, 2, "topk", 10, 32, "all")
        counts = {"documents": len(documents)}
        (folder / "scan.json").write_text(json.dumps({"identity": dataclasses.asdict(identity), "counts": counts}))
        return folder


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    unique = sentences(0, 400)
    rows = {"seed": unique[:20], "anchor": unique[:120], "heldout": unique[200:300]}
    rows |= {"kept": [row for row in unique[120:160] if row["label"]], "random": unique[160:200]}
    return Experiment(tmp_path, rows)


def test_every_arm_is_measured_and_every_score_is_kept(experiment: Experiment) -> None:
    summary = experiment.run()
    evaluation = experiment.evaluation()
    assert list(evaluation["arms"]) == ["seed", "seed+random", "seed+kept", "anchor"] == list(summary["auprc"])
    assert evaluation["heldout"] == {"data": "heldout", "documents": 100, "positive": 50, "base_rate": 0.5}
    assert evaluation["arms"]["seed"]["documents"] == 20
    assert evaluation["arms"]["seed+kept"]["added"] == 20 == evaluation["arms"]["seed+kept"]["documents"] - 20
    assert evaluation["arms"]["anchor"]["auroc"]["mean"] > 0.95
    assert len(evaluation["arms"]["seed"]["auprc"]["values"]) == len(experiment.config.finetune.seeds)
    assert [(d["arm"], d["minus"]) for d in evaluation["differences"]] == list(module.COMPARED)
    predictions = pq.read_table(experiment.out / "predictions.parquet").to_pylist()
    assert len(predictions) == 4 * 3 * 100
    one = [row for row in predictions if row["arm"] == "seed+kept" and row["seed"] == 43]
    found = auprc(np.array([r["positive"] for r in one]), np.array([r["logit"] for r in one]))
    assert found == pytest.approx(evaluation["arms"]["seed+kept"]["auprc"]["values"][1])


def test_made_again_it_writes_the_same_bytes(experiment: Experiment) -> None:
    experiment.run()
    first = {path.name: path.read_bytes() for path in experiment.out.iterdir()}
    experiment.run()
    assert {path.name: path.read_bytes() for path in experiment.out.iterdir()} == first


def test_a_document_without_a_label_is_in_no_arm(experiment: Experiment) -> None:
    experiment.rows["seed"] = [*experiment.rows["seed"], {"text": "the the the", "label": None}]
    experiment.run()
    assert experiment.evaluation()["arms"]["seed"]["documents"] == 20


def test_a_held_out_document_in_training_is_named(experiment: Experiment) -> None:
    leak = experiment.rows["heldout"][3]
    experiment.rows["kept"] = [*experiment.rows["kept"], leak]
    with pytest.raises(
        UserError, match=rf"'seed\+kept' and in held-out data set 'heldout', the first is {leak['text']}"
    ):
        experiment.run()
    assert not (experiment.out / "eval.json").exists()


def test_so_is_one_in_other_spelling(experiment: Experiment) -> None:
    """Its id, a hash of its content, is another."""
    leak = experiment.rows["heldout"][3]
    respelled = leak["text"].replace(" ", "  ")
    experiment.rows["random"] = [*experiment.rows["random"], {**leak, "text": respelled}]
    with pytest.raises(
        UserError, match=rf"'seed\+random' are word for word .* first is {respelled}, there {leak['text']}"
    ):
        experiment.run()


def test_an_empty_synthesis_is_an_arm_that_adds_nothing(experiment: Experiment) -> None:
    experiment.rows |= {"kept": [], "random": []}
    experiment.run()
    arms = experiment.evaluation()["arms"]
    assert arms["seed+kept"]["added"] == 0
    assert arms["seed+kept"]["auprc"] == arms["seed"]["auprc"]


def test_a_seed_of_one_class_is_reported_as_not_trained(experiment: Experiment) -> None:
    """The paper's own setting: a safe seed, to which toxic samples are added."""
    experiment.rows["seed"] = [row for row in experiment.rows["seed"] if not row["label"]]
    experiment.run()
    arms = experiment.evaluation()["arms"]
    assert arms["seed"]["not_trained"] == "documents of one class only"
    assert "auprc" in arms["seed+kept"]


def test_an_unlabelled_held_out_set_is_an_error(experiment: Experiment) -> None:
    experiment.rows["heldout"] = [{**row, "label": None} for row in experiment.rows["heldout"]]
    with pytest.raises(UserError, match="'heldout' has no labelled documents of both classes"):
        experiment.run()


def test_a_labelled_document_without_content_is_named(experiment: Experiment) -> None:
    experiment.rows["anchor"] = [*experiment.rows["anchor"], {"text": "", "label": 1.0}]
    with pytest.raises(UserError, match=r"1 labelled documents of data set 'anchor' .* \(anchor.jsonl:121\); raise"):
        experiment.run()


def test_scans_of_another_backbone_are_not_mixed_in(experiment: Experiment) -> None:
    experiment.models["heldout"] = "other"
    with pytest.raises(UserError, match="was made with model_digest other"):
        experiment.run()


@pytest.fixture
def tuned(experiment: Experiment) -> Experiment:
    """The same with adapters in a tiny model that made the scans."""
    model = experiment.folder / "model"
    write_model(model)
    tiny_tokenizer().save_pretrained(model)
    digest = load_backbone(str(model), 1, "float32", make_mesh(MeshConfig(1, 1))).digest
    settings = FinetuneConfig(
        method="lora", epochs=5, learning_rate=1e-2, batch=8, seeds=(42, 43), lora=LoraConfig(rank=4)
    )
    experiment.models = dict.fromkeys(experiment.rows, digest)
    experiment.config = Config(
        mesh=MeshConfig(1, 1),
        backbone=BackboneConfig(model=str(model), dtype="float32", rows_per_batch=2, row_tokens=32),
        finetune=settings,
    )
    return experiment


def test_adapters_are_trained_and_kept(tuned: Experiment) -> None:
    tuned.run()
    evaluation = tuned.evaluation()
    assert evaluation["head"]["method"] == "lora" and "adapters of rank 4 on q, k" in evaluation["head"]["features"]
    assert evaluation["arms"]["anchor"]["auprc"]["mean"] > 0.9, "the word that tells is the last one"
    assert len(evaluation["arms"]["seed+kept"]["auprc"]["values"]) == 2
    files = {str(f.relative_to(tuned.out)) for f in tuned.out.rglob("*") if f.is_file()}
    arms = ("seed", "seed+random", "seed+kept", "anchor")
    names = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors", "metrics.jsonl")
    kept = {f"arms/{arm}/seed-{seed}/{name}" for arm in arms for seed in (42, 43) for name in names}
    assert files == kept | {"eval.json", "predictions.parquet"}, "no checkpoint is left"


def test_a_stopped_arm_is_gone_on_with(tuned: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ends as it would have."""
    tuned.config = dataclasses.replace(
        tuned.config, finetune=dataclasses.replace(tuned.config.finetune, epochs=1, seeds=(42,))
    )
    tuned.run()
    undisturbed = {f: f.read_bytes() for f in sorted(tuned.out.rglob("*")) if f.is_file()}
    shutil.rmtree(tuned.out)

    monkeypatch.setattr(module, "tune", stopping_before("seed+kept"))
    with pytest.raises(Stopped):
        tuned.run()
    assert (tuned.out / "arms" / "seed+random" / "seed-42" / "adapter_model.safetensors").exists()
    monkeypatch.setattr(module, "tune", tune)
    tuned.run()
    assert {f: f.read_bytes() for f in sorted(tuned.out.rglob("*")) if f.is_file()} == undisturbed


def test_a_model_that_did_not_make_the_scans_is_refused(tuned: Experiment) -> None:
    tuned.models = {}
    with pytest.raises(UserError, match="the scans were made with model model, .*model is [0-9a-f]{16}: scan again"):
        tuned.run()
