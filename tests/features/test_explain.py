"""Explanations: what is named, how it is scored on text it was not made from, and what a model may answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from jax.sharding import Mesh
from scipy.sparse import csr_array

from fac_jax import dry_run
from fac_jax.config.features import ExplainConfig, ScanConfig
from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.features import embedded
from fac_jax.features import explain as module
from fac_jax.features.embedded import (
    fires_on,
    named_tokens,
    over_represented,
    promotes,
    token_counts,
    wording,
)
from fac_jax.features.explain import explain, later_requests
from fac_jax.features.scores.score import SCORED_SPANS
from fac_jax.features.spans import explaining_half, read_passages
from fac_jax.llm.client import Request
from fac_jax.llm.fake import FakeGenerator
from fac_jax.sae.model import SAE
from fac_jax.scan.product import Scan
from tests.scan.written_scan import altered

Make = Callable[..., Scan]
WIDTH = 5
# As in conftest.py.
VILE, ANIMALS = ["vile", "cruel"], ["dog", "cat"]
WORDS = ["<pad>", "<user>", *VILE, *ANIMALS, "the", "a", "is", "was", "very", "so"]
FEATURES = 6
ON_VILE, ON_ANIMALS, ON_EVERYTHING, ON_ONE = range(4)


def test_content_tokens_are_counted(make_scan: Make) -> None:
    scan = make_scan()
    held_nv = token_counts(read_passages(scan))
    for row, text in enumerate(scan.documents("text")["text"].to_pylist()):
        counts = held_nv[[row]].toarray()[0]
        assert {WORDS[v]: int(counts[v]) for v in np.flatnonzero(counts)} == {
            w: text.split().count(w) for w in text.split()
        }


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
    passages = read_passages(make_scan())
    held_nv = token_counts(passages)
    tokens = named_tokens(passages, held_nv, 3)
    named = [[WORDS[t] for t in mine] for mine in tokens]
    assert set(named[ON_VILE]) == set(VILE) and set(named[ON_ANIMALS]) == set(ANIMALS)


def test_tokens_are_named_from_one_half(make_scan: Make) -> None:
    """What the other half holds does not matter, unless it alone holds the feature: then it explains it."""
    scan = make_scan()
    half_n = explaining_half(scan)
    passages = read_passages(scan)
    held_nv = token_counts(passages)
    named = named_tokens(passages, held_nv, 3)
    rows = np.repeat(np.arange(len(scan.ids_n)), np.diff(scan.peaks_nf.indptr))
    vile = (scan.peaks_nf.indices == ON_VILE) & ~half_n[rows]
    changed = altered(scan, token_ids_m=np.where(vile, WORDS.index("the"), scan.token_ids_m))
    assert named_tokens(read_passages(changed), held_nv, 3) == named
    only = scan.peaks_nf.copy()
    only.data = np.where((only.indices == ON_VILE) & half_n[rows], 0, only.data)
    kept = only.data > 0
    only.eliminate_zeros()
    rest = altered(scan, peaks_nf=only, token_ids_m=scan.token_ids_m[kept], positions_m=scan.positions_m[kept])
    elsewhere = named_tokens(read_passages(rest), held_nv, 3)
    assert set(elsewhere[ON_VILE]) == {WORDS.index(word) for word in VILE}
    assert elsewhere[ON_VILE] == fires_on(scan, held_nv, 3, ~half_n)[ON_VILE]


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
    assert set(rows[ON_VILE]["fires_on"]) == set(VILE)
    assert rows[ON_VILE]["explanation"].startswith("fires on: ") and "; promotes: " in rows[ON_VILE]["explanation"]
    for feature in (ON_VILE, ON_ANIMALS):
        assert rows[feature]["detection_auroc"] == rows[feature]["fuzzing_auroc"] == 1
        assert rows[feature]["detection_low"] == rows[feature]["detection_high"] == 1
    assert rows[ON_EVERYTHING]["detection_auroc"] is None, "silent nowhere"
    assert rows[ON_ONE]["fuzzing_auroc"] is None and rows[ON_ONE]["generation_score"] is None
    assert summary["detection_auroc"]["median"] == 1 and "generation" not in summary
    spans = pq.read_table(tmp_path / "scored_spans.parquet", schema=SCORED_SPANS).to_pylist()
    assert {span["feature"] for span in spans if span["test"] == "detection"} == {ON_VILE, ON_ANIMALS}
    products = {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    explain(Config(explain=ExplainConfig(tokens=2)), tmp_path, embedded_inputs)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")} == products and len(products) == 2


def test_beside_a_server_that_only_writes(embedded_inputs: dict[str, Path], tmp_path: Path) -> None:
    """Nobody listens at this address: it is not asked."""
    (tmp_path / "alone").mkdir()
    explain(Config(), tmp_path / "alone", embedded_inputs)
    (tmp_path / "beside").mkdir()
    config = Config(explain=ExplainConfig(method="embedded"), llm=LlmConfig(url="http://127.0.0.1:9/v1"))
    assert explain(config, tmp_path / "beside", embedded_inputs)["method"] == "embedded"
    rows = [pq.read_table(tmp_path / name / "explanations.parquet").to_pylist() for name in ("alone", "beside")]
    assert rows[0] == rows[1] and not (tmp_path / "beside/replies.jsonl").exists()


def test_the_scan_was_made_with_another_sae(embedded_inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was made with SAE sae-1, asked is SAE sae-2"):
        explain(Config(scan=ScanConfig(sae="sae-2")), tmp_path, embedded_inputs)


def reply(request: Request) -> str:
    content = request.messages[1]["content"]
    data = json.loads(content[content.index("{") : content.rindex("}") + 1])
    if request.schema is None:
        return "so vile and so cruel" if "vile" in data["explanation"] else "a dog"
    if "explanation" in data and isinstance(data["spans"], dict):
        words = VILE if "vile" in data["explanation"] else ANIMALS
        texts = {number: s if isinstance(s, str) else s["token"] for number, s in data["spans"].items()}
        return json.dumps({number: "Yes" if set(text.split()) & set(words) else "No" for number, text in texts.items()})
    if "explanation" in data:
        return '{"label": "Yes", "reason": "fits"}' if "vile" in data["explanation"] else "Yes, of course"
    token = data["spans"][0]["token"].strip()
    if token in VILE:
        return '{"verdict": "explained", "explanation": "vile words"}'
    if token in ANIMALS:
        return '{"verdict": "explained", "explanation": "animals"}'
    return '{"verdict": "cannot tell", "explanation": ""}' if len(data["spans"]) > 1 else "{"


def score(texts: Sequence[str]) -> csr_array:
    """Peaks of 2 on ON_VILE where a text holds a vile word, of 0.5 on ON_ANIMALS where it holds an animal."""
    peaks = np.zeros((len(texts), FEATURES), np.float32)
    for row, text in enumerate(texts):
        peaks[row, ON_VILE], peaks[row, ON_ANIMALS] = 2 * ("vile" in text), 0.5 * ("dog" in text)
    return csr_array(peaks)


@pytest.fixture
def server_inputs(embedded_inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> dict[str, Path]:
    monkeypatch.setattr(module, "load_backbone", None)
    monkeypatch.setattr(module, "load_tokenizer", lambda source: tokenizer)
    monkeypatch.setattr(module, "open_scorer", lambda *_: score)
    return embedded_inputs


def test_the_stage_with_a_server(
    server_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = FakeGenerator(reply)
    monkeypatch.setattr(module, "open_generator", lambda config, mesh: generator)
    config = Config(llm=LlmConfig(url="http://127.0.0.1:1/v1"), explain=ExplainConfig(spans=2, generation_texts=3))
    summary = explain(config, tmp_path, server_inputs)
    counts = {name: summary[name] for name in ("method", "features", "explained", "cannot_tell", "failed")}
    assert counts == {"method": "llm", "features": 4, "explained": 2, "cannot_tell": 1, "failed": 1}
    assert summary["left_out"] == 0
    assert summary["rating_replies_unreadable"] == 0
    rows = {row["feature"]: row for row in pq.read_table(tmp_path / "explanations.parquet").to_pylist()}
    assert rows[ON_VILE]["explanation"] == "vile words" and rows[ON_VILE]["verified"] == "Yes"
    assert rows[ON_ANIMALS]["status"] == "explained" and rows[ON_ANIMALS]["verified"] is None
    assert rows[ON_ANIMALS]["error"].startswith("not JSON"), "an unreadable check is not taken for a yes"
    assert rows[ON_EVERYTHING]["status"] == "cannot tell" and rows[ON_EVERYTHING]["explanation"] is None
    assert rows[ON_ONE]["status"] == "failed" and rows[ON_ONE]["raw"] == "{" and rows[ON_ONE]["explanation"] is None
    for feature in (ON_VILE, ON_ANIMALS):
        assert rows[feature]["detection_auroc"] == rows[feature]["fuzzing_auroc"] == 1
        assert rows[feature]["control_detection_auroc"] < 1 and rows[feature]["unread_ratings"] == 0
    assert rows[ON_EVERYTHING]["detection_auroc"] is None and rows[ON_EVERYTHING]["unread_ratings"] is None
    # coverage.threshold is 1: animals activate their feature above 0, and not above that.
    generated = [rows[feature]["generation_score"] for feature in (ON_VILE, ON_ANIMALS)]
    assert generated == [1, 0] and rows[ON_ANIMALS]["generation_any"] == 1
    assert rows[ON_VILE]["generation_control_any"] == 0 and rows[ON_VILE]["generation_peaks"] == [2, 2, 2]
    assert summary["generation"]["generation_score"]["mean"] == 0.5 and summary["generation"]["texts"] == 6
    asked = len(generator.requests)
    assert asked - 4 <= later_requests(config, 4)
    log = (tmp_path / "replies.jsonl").read_bytes()
    explain(config, tmp_path, server_inputs)
    assert len(generator.requests) == asked, "every reply is kept"
    assert (tmp_path / "replies.jsonl").read_bytes() == log
    content = generator.requests[0].messages[1]["content"]
    shown = json.loads(content[content.index("{") : content.rindex("}") + 1])["spans"]
    assert set(shown[0]) == {"before", "token", "after", "activation"} and len(shown) <= 2


def test_a_server_and_another_sae(
    server_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_generator", lambda config, mesh: FakeGenerator(reply))
    with pytest.raises(UserError, match="was made with SAE sae-1, asked is SAE sae-2"):
        explain(
            Config(scan=ScanConfig(sae="sae-2"), llm=LlmConfig(url="http://127.0.0.1:1/v1")), tmp_path, server_inputs
        )


def test_only_some_features_are_asked_about(
    server_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = FakeGenerator(reply)
    monkeypatch.setattr(module, "open_generator", lambda config, mesh: generator)
    choice = ExplainConfig(features=2, generation_features=0)
    config = Config(llm=LlmConfig(url="http://127.0.0.1:1/v1"), explain=choice)
    summary = explain(config, tmp_path, server_inputs)
    rows = pq.read_table(tmp_path / "explanations.parquet").to_pylist()
    assert summary["left_out"] == 2 and len(rows) == summary["features"] == 4
    keys = [json.loads(line)["key"] for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    asked = {int(key.split(":")[1]) for key in keys}
    assert len(asked) == 2 and asked == {row["feature"] for row in rows if row["status"] != "left out"}
    assert len(generator.requests) - 2 <= later_requests(config, 4)


def test_the_first_questions_are_foretold(
    server_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    generator = FakeGenerator(reply, "http:small")
    monkeypatch.setattr(module, "open_generator", lambda config, mesh: generator)
    monkeypatch.setattr(dry_run, "load_tokenizer", lambda source: tokenizer)
    config = Config(llm=LlmConfig(url="http://127.0.0.1:1/v1", model="small"))
    found = dry_run.estimate(config, "explanations", tmp_path, server_inputs, None)
    explain(config, tmp_path, server_inputs)
    assert sorted(map(repr, found.requests)) == sorted(map(repr, generator.requests[:4]))
    assert 4 < len(generator.requests) <= found.paid


def test_requests_to_come_are_foretold() -> None:
    llm = LlmConfig(url="http://127.0.0.1:1/v1")
    every = Config(llm=llm, explain=ExplainConfig(generation_features=0, control_features=0))
    assert later_requests(every, 1000) == 1000 + 4 * 1000, "a check, and 20 spans of two kinds in tens"
    some = ExplainConfig(scored_features=10, control_features=3, generation_features=2, generation_texts=5)
    assert later_requests(Config(llm=llm, explain=some), 1000) == 1000 + 4 * 13 + 10
    fewer = ExplainConfig(features=20, control_features=5, generation_features=0)
    assert later_requests(Config(llm=llm, explain=fewer), 1000) == 20 + 4 * 25
    assert later_requests(Config(llm=llm), 1000) == 1000 + 4 * 1100 + 50 * 4


@pytest.mark.parametrize("wrong", [{"spans": 0}, {"scored_spans": 2}, {"generation_texts": 0}, {"scored_features": -1}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"explain.{next(iter(wrong))} is .*; it must be at least"):
        ExplainConfig(**wrong)
