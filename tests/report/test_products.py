"""What is read from a run directory, whole, partial and damaged."""

import dataclasses
import json
from pathlib import Path

import pytest

from fac_jax.config.features import JudgeConfig
from fac_jax.errors import UserError
from fac_jax.report.products import RunView, read_view
from tests.report.sample_run import write_run


def test_missing_features_are_joined_with_what_is_known_of_them(view: RunView) -> None:
    first = view.missing[0]
    assert (first.feature, first.anchor_documents, first.relevance["auroc"]) == (100, 5, pytest.approx(0.71))
    assert first.explanation["fires_on"] == ["kill", "shoot", "murder"]
    assert first.spans[0].token == "kill"
    assert first.kept_peak == pytest.approx(6.0)
    assert view.missing[1].kept_peak == pytest.approx(0.2)


def test_kept_samples_are_joined_with_the_span_of_their_own_scan(view: RunView) -> None:
    assert [sample.feature for sample in view.kept[:3]] == [100, 174, 248]
    assert all(sample.span is not None and sample.span.token in sample.text for sample in view.kept)
    assert view.kept[2].covers == [137, 211], "others that are missing"


def test_a_stage_that_has_not_run_is_absent(tmp_path: Path) -> None:
    partial = read_view(tmp_path / "run", write_run(tmp_path / "run", upto="coverage"))
    assert partial.coverage is not None and len(partial.missing) == 23
    assert partial.missing[0].kept_peak is None
    assert (partial.synthesis, partial.evaluation, partial.finetune, partial.selection) == (None, None, None, None)


def test_a_classifier_of_another_task_is_not_shown(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run")
    record = tmp_path / "run/relevance/stage.json"
    written = json.loads(record.read_text())
    written["summary"]["metric"] = "win rate"
    record.write_text(json.dumps(written))
    view = read_view(tmp_path / "run", dataclasses.replace(config, judge=JudgeConfig(task="/tasks/./mine/")))
    assert view.finetune is None and view.task == "toxicity", "the task that features were judged for, by its name"


def test_a_product_without_a_record_is_not_read(tmp_path: Path) -> None:
    """The record is written last: without it the product may be half made."""
    config = write_run(tmp_path / "run")
    (tmp_path / "run/finetune/stage.json").unlink()
    assert read_view(tmp_path / "run", config).finetune is None


@pytest.mark.parametrize("file", ["coverage/coverage.json", "coverage/missing.parquet", "sae/metrics.jsonl"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    config = write_run(tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(b"{damaged")
    with pytest.raises(UserError, match=f"{file} cannot be read .*run its stage again"):
        read_view(tmp_path / "run", config)
