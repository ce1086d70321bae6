"""A toy world in which feature f fires on word f of a small vocabulary, with real scans of real files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax.config.activations import BackboneConfig
from fac_jax.config.coverage import CoverageConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig
from fac_jax.config.synthesis import SynthesizeConfig
from fac_jax.llm.client import Request
from fac_jax.mesh import make_mesh
from fac_jax.sae.checkpoint import LoadedSae
from fac_jax.sae.model import SAE
from fac_jax.scan import scan as scan_module
from fac_jax.scan import scorer as scorer_module
from fac_jax.scan.scan import scan
from tests.word_tokenizer import word_tokenizer

TOPICS = ["knives", "guns", "poison", "theft", "fire", "venom", "fraud", "ropes"]
FILLER = "we they must all go now and see the old town by night or day for some good talk".split()
WORDS = ["<pad>", "<user>", *TOPICS, *FILLER]
SEEN = ["ropes"]
"""Topic of the seed: nothing of it is missing."""


def feature(word: str) -> int:
    """The feature that fires on a word."""
    return WORDS.index(word)


def message(word: str, draw: int) -> str:
    """A message of eight words with `word` in it; different draws share few runs of three words."""
    chosen = np.random.default_rng(draw).choice(FILLER, 7, replace=False).tolist()
    return " ".join([*chosen[:3], word, *chosen[3:]])


def asked_for(request: Request) -> str:
    """The topic of a request, out of its last user turn."""
    return next(word for word in TOPICS if word in request.messages[-1]["content"])


@dataclass(frozen=True)
class Toy:
    """A config, the products of earlier stages, and an empty product folder."""

    config: Config
    inputs: dict[str, Path]
    out: Path


def make_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """Scans of an anchor and a seed in `tmp_path`, what is missing and its explanations."""
    tokenizer = word_tokenizer(WORDS)
    mesh = make_mesh(MeshConfig(data=1, feature=1))
    table = (3.0 * np.eye(len(WORDS))).astype(np.float32)
    loaded = SimpleNamespace(
        tokenizer=tokenizer, digest="model-1", mesh=mesh, config=SimpleNamespace(d_model=len(WORDS)),
        residual_fn=lambda layer: lambda tokens, segments, positions: jnp.asarray(table[tokens]),
    )  # fmt: skip
    sae = SAE(jnp.eye(len(WORDS)), jnp.zeros(len(WORDS)), jnp.zeros(len(WORDS)))
    scorer: tuple[Any, LoadedSae] = (
        loaded, LoadedSae(sae, len(WORDS), 2, len(WORDS), "sae-1", 3, "toy", "model-1")
    )  # fmt: skip
    for module in (scan_module, scorer_module):
        monkeypatch.setattr(module, "load_scorer", lambda config, inputs: scorer)

    data = {
        "anchor": [(word, draw) for word in TOPICS for draw in range(3)],
        "seed": [(word, draw) for word in SEEN for draw in range(3)],
    }
    sets = {}
    for name, rows in data.items():
        lines = [json.dumps({"text": message(word, 100 + draw), "label": draw % 2}) for word, draw in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        source = Source(path=str(tmp_path / f"{name}.jsonl"), label="label")
        sets[name] = DataSet(sources=(source,), max_tokens=16)
    config = Config(
        backbone=BackboneConfig(layer=3, rows_per_batch=2, row_tokens=32),
        data=sets,
        coverage=CoverageConfig(threshold=1.0),
        synthesize=SynthesizeConfig(candidates=2, second_step=2, max_new_tokens=30),
    )
    inputs = {"sae": tmp_path / "sae", "explanations": tmp_path / "explanations", "coverage": tmp_path / "coverage"}
    for name in data:
        inputs[f"scan:{name}"] = tmp_path / "scans" / name
        inputs[f"scan:{name}"].mkdir(parents=True)
        scan(config, inputs[f"scan:{name}"], {"sae": inputs["sae"]}, name)
    missing = [word for word in TOPICS if word not in SEEN]
    write(inputs["coverage"] / "missing.parquet", [{"feature": feature(w), "anchor_peak": 3.0} for w in missing])
    rows = [{"feature": feature(w), "explanation": f"fires on: {w}", "fires_on": [f" {w}"]} for w in missing]
    write(inputs["explanations"] / "explanations.parquet", rows)
    (tmp_path / "synthesis").mkdir()
    return Toy(config, inputs, tmp_path / "synthesis")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
