"""Does training with the samples help? What is trained, and measured by what, goes by the task's metric.

    auprc                 a classifier of documents                        classifier.py
    preference accuracy   a reward of answers, from pairs                  reward.py
    win rate              an instruction model, from answered instructions  completions.py

All train the same arms (seed, seed + as many blind samples, seed + kept samples) with the same seeds, write eval.json
and predictions.parquet, and refuse to train on what they measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fac_jax.config.file import Config
from fac_jax.downstream.arms import drop_checkpoints
from fac_jax.downstream.classifier import classifier
from fac_jax.downstream.completions import completions
from fac_jax.downstream.reward import reward
from fac_jax.features.task import load_task

TRAINS = {"auprc": classifier, "preference accuracy": reward, "win rate": completions}
"""By the metric of a task."""


def finetune(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage. Raises UserError for data that cannot be trained on, or held-out data that is trained on."""
    summary = TRAINS[load_task(config.judge.task).description.metric](config, out, inputs)
    drop_checkpoints(out)
    return summary
