"""Explanations: what is named, how it is scored on text it was not made from, and what a model may answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from jax.sharding import Mesh
from scipy.sparse import csr_array

from fac_jax.config import Config, ExplainConfig, LlmConfig, ScanConfig
from fac_jax.errors import UserError
from fac_jax.features import embedded
from fac_jax.features import explain as module
from fac_jax.features.embedded import fires_on, heldout_auroc, over_represented, promotes, read_corpus, wording
from fac_jax.features.explain import explain
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from fac_jax.sae.model import SAE
from fac_jax.scan.scan import Scan

Make = Callable[..., Scan]
WIDTH = 5
# As in conftest.py.
VILE, ANIMALS = ["vile", "cruel"], ["dog", "cat"]
WORDS = ["<pad>", "<user>", *VILE, *ANIMALS, "the", "a", "is", "was", "very", "so"]
FEATURES = 6
ON_VILE, ON_ANIMALS, ON_EVERYTHING, ON_ONE = range(4)


def test_corpus_counts_content_tokens_only(make_scan: Make) -> None:
    scan = make_scan()
    corpus = read_corpus(scan)
    texts = scan.documents("text")["text"].to_pylist()
    for row, text in enumerate(texts):
        counts = corpus.held_nv[[row]].toarray()[0]
        assert {WORDS[v]: int(counts[v]) for v in np.flatnonzero(counts)} == {
            w: text.split().count(w) for w in text.split()
        }
    assert 0.3 < corpus.half_n.mean() < 0.7


def test_over_represented_by_hand() -> None:
    corpus = np.array([1000, 100, 10, 0])
    peaks = csr_array(np.array([[10, 0, 5, 0], [90, 10, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]))
    named = over_represented(peaks, corpus, 8)
    assert named[0] == [2], "half its corpus count in 15 peaks; token 0 is rarer than in the corpus"
    assert named[1] == [], "what holds as often as the corpus says nothing"
    assert named[2] == []
    prior = embedded.PRIOR_TOKENS  # of which token 2 gets 10 / 1110
    here, there = 5 + prior * 10 / 1110, 10 + prior * 10 / 1110
    odds = np.log(here / (15 + prior - here)) - np.log(there / (1110 + prior - there))
    assert odds / np.sqrt(1 / here + 1 / there) > embedded.SURE


def test_named_tokens_and_their_score(make_scan: Make) -> None:
    scan = make_scan()
    corpus = read_corpus(scan)
    named = [[WORDS[t] for t in tokens] for tokens in fires_on(scan, corpus, 3, np.ones(len(scan.ids_n), bool))]
    assert set(named[ON_VILE]) == set(VILE) and set(named[ON_ANIMALS]) == set(ANIMALS)
    scores = heldout_auroc(scan, corpus, 3)
    assert scores[ON_VILE] == scores[ON_ANIMALS] == 1.0
    assert np.isnan(scores[ON_EVERYTHING]), "active on all documents: nothing to tell apart"
    assert np.isnan(scores[ON_ONE]) or scores[ON_ONE] == 0.5
    assert np.isnan(scores[4]) and np.isnan(scores[5])


def test_score_is_not_measured_on_what_it_was_made_from(make_scan: Make) -> None:
    """Labels shuffled among features: tokens named from one half predict nothing on the other."""
    scan = make_scan(400)
    peaks = scan.peaks_nf.copy()
    generator = np.random.default_rng(1)
    data = (generator.random((len(scan.ids_n), FEATURES)) < 0.3).astype(np.float32)
    peaks = csr_array(data)
    token_ids = generator.integers(2, len(WORDS), peaks.nnz).astype(np.int32)
    noise = dataclasses.replace(scan, peaks_nf=peaks, token_ids_m=token_ids)
    assert np.abs(heldout_auroc(noise, read_corpus(scan), 3) - 0.5).max() < 0.15


def toy_model(mesh: Mesh, tokenizer: Any) -> tuple[Any, Any, np.ndarray]:
    unembed = np.random.default_rng(0).normal(size=(len(WORDS), WIDTH)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(FEATURES, WIDTH)).astype(np.float32)
    loaded = SimpleNamespace(
        mesh=mesh, tokenizer=tokenizer, config=SimpleNamespace(vocab=len(WORDS), d_model=WIDTH),
        logits_fn=lambda: lambda resid: jnp.einsum("btd,vd->btv", resid, unembed),
    )  # fmt: skip
    sae = SimpleNamespace(sae=SAE(jnp.asarray(w), jnp.zeros(FEATURES), jnp.zeros(WIDTH)), digest="sae-1")
    return loaded, sae, np.argsort(-(w @ unembed.T), axis=1)


@pytest.mark.parametrize("elements", [2**25, 2 * len(WORDS) * 2])
def test_logit_lens(mesh: Mesh, tokenizer: Any, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LENS_ELEMENTS", elements)
    loaded, sae, order = toy_model(mesh, tokenizer)
    assert promotes(loaded, sae, 3).tolist() == order[:, :3].tolist()


def test_wording() -> None:
    assert wording([" kill", ' "gun"'], [" weapon"]) == 'fires on: " kill", " \\"gun\\""; promotes: " weapon"'
    assert wording([], [" weapon"]) is None


@pytest.fixture
def embedded_inputs(
    make_scan: Make, tokenizer: Any, mesh_1x1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    loaded, sae, _ = toy_model(mesh_1x1, tokenizer)
    monkeypatch.setattr(module, "load_backbone", lambda *_: loaded)
    monkeypatch.setattr(module, "load_sae", lambda folder, *_: dataclasses.replace(_Sae(sae.sae), digest=folder.name))
    monkeypatch.setattr(module, "make_mesh", lambda _: mesh_1x1)
    return {"scan:anchor": make_scan().folder, "sae": Path("sae-1")}


@dataclasses.dataclass
class _Sae:
    sae: SAE
    digest: str = ""


def test_the_stage_without_a_server(embedded_inputs: dict[str, Path], tmp_path: Path) -> None:
    summary = explain(Config(explain=ExplainConfig(tokens=2)), tmp_path, embedded_inputs)
    assert summary["method"] == "embedded" and summary["features"] == 4 and summary["failed"] == 0
    rows = {row["feature"]: row for row in pq.read_table(tmp_path / "explanations.parquet").to_pylist()}
    assert set(rows[ON_VILE]["fires_on"]) == set(VILE) and rows[ON_VILE]["heldout_auroc"] == 1.0
    assert rows[ON_VILE]["explanation"].startswith("fires on: ") and "; promotes: " in rows[ON_VILE]["explanation"]
    assert rows[ON_EVERYTHING]["heldout_auroc"] is None
    first = (tmp_path / "explanations.parquet").read_bytes()
    explain(Config(explain=ExplainConfig(tokens=2)), tmp_path, embedded_inputs)
    assert (tmp_path / "explanations.parquet").read_bytes() == first


def test_the_scan_was_made_with_another_sae(embedded_inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was made with SAE sae-1, asked is SAE sae-2"):
        explain(Config(scan=ScanConfig(sae="sae-2")), tmp_path, embedded_inputs)


def reply(request: Request) -> str:
    data = json.loads(request.messages[1]["content"])
    if "explanation" in data:
        return '{"label": "Yes", "reason": "fits"}' if "vile" in data["explanation"] else "Yes, of course"
    token = data["spans"][0]["token"].strip()
    if token in VILE:
        return '{"verdict": "explained", "explanation": "vile words"}'
    if token in ANIMALS:
        return '{"verdict": "explained", "explanation": "animals"}'
    return '{"verdict": "cannot tell", "explanation": ""}' if len(data["spans"]) > 1 else "{"


def test_the_stage_with_a_server(make_scan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = FakeGenerator(reply)
    monkeypatch.setattr(module, "open_generator", lambda config, mesh: generator)
    config = Config(llm=LlmConfig(url="http://127.0.0.1:1/v1"), explain=ExplainConfig(spans=2))
    inputs = {"scan:anchor": make_scan().folder}
    summary = explain(config, tmp_path, inputs)
    assert summary == {
        "method": "llm", "features": 4, "explained": 2, "cannot_tell": 1, "failed": 1, "median_heldout_auroc": None
    }  # fmt: skip
    rows = {row["feature"]: row for row in pq.read_table(tmp_path / "explanations.parquet").to_pylist()}
    assert rows[ON_VILE]["explanation"] == "vile words" and rows[ON_VILE]["verified"] == "Yes"
    assert rows[ON_ANIMALS]["status"] == "explained" and rows[ON_ANIMALS]["verified"] is None
    assert rows[ON_ANIMALS]["error"].startswith("not JSON"), "an unreadable check is not taken for a yes"
    assert rows[ON_EVERYTHING]["status"] == "cannot tell" and rows[ON_EVERYTHING]["explanation"] is None
    assert rows[ON_ONE]["status"] == "failed" and rows[ON_ONE]["raw"] == "{" and rows[ON_ONE]["explanation"] is None
    asked = len(generator.requests)
    explain(config, tmp_path, inputs)
    assert len(generator.requests) == asked, "every reply is kept"
    shown = json.loads(generator.requests[0].messages[1]["content"])["spans"]
    assert set(shown[0]) == {"before", "token", "after", "activation"} and len(shown) <= 2
