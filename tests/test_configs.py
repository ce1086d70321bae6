"""The configs of the published setting: they load, and train unchanged on one CPU but for sizes; those of the tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from fac_jax.cli import main
from fac_jax.config.file import load_config
from fac_jax.features.task import task_names
from tests.sae.tiny_store import make_store

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = ("helpfulness", "instruction_following", "sycophancy", "survival")
PUBLISHED = {"llama31_8b_l16": (16, 286), "qwen2_7b_l14": (14, 256), "mistral_7b_l16": (16, 256)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_they_hold_the_published_figures(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    layer, max_tokens = PUBLISHED[name]
    assert (config.backbone.layer, config.dataset("corpus").max_tokens) == (layer, max_tokens)
    assert (config.sae.features, config.sae.k, config.sae.tied) == (65_536, 20, True)
    assert (config.train.learning_rate, config.train.learning_rate_schedule) == (1e-3, "constant")
    assert (config.train.k_schedule, config.train.aux_coefficient, config.train.weight_decay) == ("official", 0, 0)
    assert config.train.steps * config.train.batch_rows == pytest.approx(3 * 113e6, rel=0.01)
    for data in (config.harvest.data, config.coverage.anchor, config.coverage.seed, config.finetune.heldout):
        assert config.dataset(data).sources


@pytest.mark.parametrize("name", PUBLISHED)
def test_they_train_unchanged_on_one_cpu(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "store")
    flags = {
        "run.dir": str(tmp_path / "run"), "train.store": str(store), "backbone.model": "tiny", "backbone.layer": "3",
        "sae.features": "512", "train.steps": "20", "train.batch-rows": "64",
    }  # fmt: skip
    arguments = [word for key, value in flags.items() for word in (f"--{key}", value)]
    assert main(["train", str(CONFIGS / f"{name}.yaml"), *arguments]) == 0
    assert "steps: 20" in capsys.readouterr().out


@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_on_the_quickstarts_model_and_sae_with_labelled_text_of_its_own(name: str) -> None:
    config, base = load_config(CONFIGS / f"tasks/{name}.yaml"), load_config(CONFIGS / "quickstart.yaml")
    assert (config.judge.task, config.run.dir) == (name, f"runs/tasks/{name}")
    for part in ("backbone", "harvest", "sae", "train", "scan", "coverage"):
        assert getattr(config, part) == getattr(base, part)
    anchor, seed = config.dataset("anchor"), config.dataset("seed")
    assert {source.constant_label for source in anchor.sources} == {0.0, 1.0}
    assert (seed.sources, seed.sample, anchor.sample) == (anchor.sources, 0.1, 1.0)
    assert anchor.sources != base.dataset("anchor").sources
    assert config.steer.heldout not in {source.path for source in anchor.sources}


def test_every_task_has_a_config() -> None:
    assert sorted(path.stem for path in (CONFIGS / "tasks").glob("*.yaml")) == sorted(TASKS)
    assert {*TASKS, load_config(CONFIGS / "quickstart.yaml").judge.task} == set(task_names())
