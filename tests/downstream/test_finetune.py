"""The stage on a toy backbone: arms, files, errors and resumption."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fac_jax.config import BackboneConfig, Config, CoverageConfig, DataSet, FinetuneConfig, Source
from fac_jax.downstream import finetune as stage
from fac_jax.downstream.finetune import finetune
from fac_jax.errors import UserError


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Any) -> tuple[Config, Path, dict[str, Path]]:
    """Config, product folder and inputs of a finetune over three small files and a fake synthesis."""
    loads: list[str] = []

    def load(source: str, layers: int, dtype: str, mesh: object) -> Any:
        loads.append(source)
        return toy

    monkeypatch.setattr(stage, "load_backbone", load)
    monkeypatch.setattr(stage, "loads", loads, raising=False)
    unique = toy.sentences(0, 400)
    parts = {"seed": unique[:20], "anchor": unique[:120], "heldout": unique[200:300]}
    data = {
        name: DataSet(
            sources=(Source(path=str(write_rows(tmp_path / f"{name}.jsonl", rows)), label="label"),), max_tokens=16
        )
        for name, rows in parts.items()
    }
    synthesis = tmp_path / "synthesis"
    synthesis.mkdir()
    write_rows(synthesis / "kept.jsonl", [{**row, "label": 1} for row in unique[120:160] if row["label"]])
    write_rows(synthesis / "random.jsonl", [{**row, "label": 1} for row in unique[160:200]])
    out = tmp_path / "finetune"
    out.mkdir()
    config = Config(
        backbone=BackboneConfig(layer=1, rows_per_batch=2, row_tokens=32),
        data=data,
        coverage=CoverageConfig(),
        finetune=FinetuneConfig(epochs=20, learning_rate=1e-2, batch=8),
    )
    return config, out, {"synthesis": synthesis}


def test_every_arm_is_measured_and_every_score_is_kept(prepared: tuple[Config, Path, dict[str, Path]]) -> None:
    config, out, inputs = prepared
    summary = finetune(config, out, inputs)
    evaluation = json.loads((out / "eval.json").read_text())
    assert list(evaluation["arms"]) == ["seed", "seed+random", "seed+kept", "anchor"] == list(summary["auprc"])
    assert evaluation["heldout"] == {"data": "heldout", "documents": 100, "positive": 50, "base_rate": 0.5}
    assert evaluation["arms"]["seed"]["documents"] == 20
    assert evaluation["arms"]["seed+kept"]["added"] == 20 == evaluation["arms"]["seed+kept"]["documents"] - 20
    assert evaluation["arms"]["anchor"]["auroc"]["mean"] > 0.95
    assert len(evaluation["arms"]["seed"]["auprc"]["values"]) == len(config.finetune.seeds)
    assert [(d["arm"], d["minus"]) for d in evaluation["differences"]] == list(stage.COMPARED)
    predictions = pq.read_table(out / "predictions.parquet").to_pylist()
    assert len(predictions) == 4 * 3 * 100
    one = [row for row in predictions if row["arm"] == "seed+kept" and row["seed"] == 43]
    found = stage.auprc(np.array([r["positive"] for r in one]), np.array([r["logit"] for r in one]))
    assert found == pytest.approx(evaluation["arms"]["seed+kept"]["auprc"]["values"][1])


def test_made_again_it_reads_the_features_and_writes_the_same_bytes(
    prepared: tuple[Config, Path, dict[str, Path]],
) -> None:
    config, out, inputs = prepared
    finetune(config, out, inputs)
    first = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    finetune(config, out, inputs)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == first
    assert len(stage.loads) == 1  # type: ignore[attr-defined]


def test_features_of_other_documents_are_not_reused(prepared: tuple[Config, Path, dict[str, Path]]) -> None:
    config, out, inputs = prepared
    finetune(config, out, inputs)
    kept = inputs["synthesis"] / "kept.jsonl"
    write_rows(kept, [{"text": "the dog was very very cruel", "label": 1}])
    finetune(config, out, inputs)
    assert json.loads((out / "eval.json").read_text())["arms"]["seed+kept"]["added"] == 1
    assert len(stage.loads) == 2  # type: ignore[attr-defined]


def test_a_held_out_document_in_training_is_named(prepared: tuple[Config, Path, dict[str, Path]]) -> None:
    config, out, inputs = prepared
    leak = Path(config.data["heldout"].sources[0].path).read_text().splitlines()[3]
    kept = inputs["synthesis"] / "kept.jsonl"
    kept.write_text(kept.read_text() + leak + "\n")
    document = next(
        stage.read_documents(DataSet(sources=(Source(path=str(write_rows(out / "l.jsonl", [json.loads(leak)]))),)), "l")
    )
    with pytest.raises(
        UserError, match=rf"'seed\+kept' and in held-out data set 'heldout', the first is {document.id}"
    ):
        finetune(config, out, inputs)
    assert not (out / "eval.json").exists()


def test_an_empty_synthesis_is_an_arm_that_adds_nothing(prepared: tuple[Config, Path, dict[str, Path]]) -> None:
    config, out, inputs = prepared
    for name in ("kept", "random"):
        (inputs["synthesis"] / f"{name}.jsonl").write_text("")
    finetune(config, out, inputs)
    arms = json.loads((out / "eval.json").read_text())["arms"]
    assert arms["seed+kept"]["added"] == 0
    assert arms["seed+kept"]["auprc"] == arms["seed"]["auprc"]


def test_a_seed_of_one_class_is_reported_as_not_trained(prepared: tuple[Config, Path, dict[str, Path]]) -> None:
    """The paper's own setting: a safe seed, to which toxic samples are added."""
    config, out, inputs = prepared
    seed = Path(config.data["seed"].sources[0].path)
    write_rows(seed, [row for line in seed.read_text().splitlines() if not (row := json.loads(line))["label"]])
    finetune(config, out, inputs)
    arms = json.loads((out / "eval.json").read_text())["arms"]
    assert arms["seed"]["not_trained"] == "documents of one class only"
    assert "auprc" in arms["seed+kept"]


def test_an_unlabelled_held_out_set_is_an_error(prepared: tuple[Config, Path, dict[str, Path]]) -> None:
    config, out, inputs = prepared
    source = dataclasses.replace(config.data["heldout"].sources[0], label=None)
    config = dataclasses.replace(config, data={**config.data, "heldout": DataSet(sources=(source,), max_tokens=16)})
    with pytest.raises(UserError, match="'heldout' has no labelled documents of both classes"):
        finetune(config, out, inputs)
