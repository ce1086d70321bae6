"""Peaks of packed batches against a brute-force loop over tokens in numpy, on one device and on eight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from fac_jax.packing import EncodedDocument, PackedBatch, pack
from fac_jax.sae.model import SAE
from fac_jax.scan import peaks
from fac_jax.scan.peaks import BatchPeaks, collect, dispatch
from fac_jax.text import Document, Turn

D, FEATURES, K = 8, 32, 4


def encoded_documents(count: int, seed: int = 0) -> list[EncodedDocument]:
    generator = np.random.default_rng(seed)
    documents = []
    for index in range(count):
        length = int(generator.integers(3, 24))
        content = generator.random(length) < 0.6
        document = Document(f"{index:016x}", (Turn("user", f"text {index}"),), None, f"file:{index}")
        documents.append(EncodedDocument(document, generator.integers(0, 50, length).astype(np.int32), content, {}))
    return documents


def fake_backbone(mesh: Mesh) -> Any:
    """The residual is a table look-up by token and position, rounded so that activations tie."""
    table = np.round(np.random.default_rng(1).normal(size=(50, 24, D)), 0).astype(np.float32)
    return SimpleNamespace(mesh=mesh, table=table, residual_fn=lambda layer: lambda t, s, p: jnp.asarray(table[t, p]))


def make_sae(mesh: Mesh) -> Any:
    generator = np.random.default_rng(2)
    arrays = {
        "w_fd": np.round(generator.normal(size=(FEATURES, D))),
        "b_enc_f": np.round(generator.normal(size=FEATURES)),
        "b_dec_d": np.zeros(D),
    }  # fmt: skip
    placed = {
        name: jax.device_put(value.astype(np.float32), NamedSharding(mesh, SAE.SPECS[name]))
        for name, value in arrays.items()
    }
    return SimpleNamespace(sae=SAE(**placed), features=FEATURES, k=K, layer=3, arrays=arrays)


def brute_force(
    batch: PackedBatch, backbone: Any, sae: Any, acts: str
) -> tuple[dict[tuple[int, int], Any], np.ndarray]:
    best: dict[tuple[int, int], tuple[float, int]] = {}
    tokens_f = np.zeros(FEATURES, np.int64)
    for slot, encoded in enumerate(batch.documents):
        for position in np.flatnonzero(encoded.content):
            x = backbone.table[encoded.ids[position], position]
            pre = x @ sae.arrays["w_fd"].T + sae.arrays["b_enc_f"]
            order = np.lexsort((np.arange(FEATURES), -pre))
            for f in order[: K if acts == "topk" else FEATURES]:
                if pre[f] > 0:
                    tokens_f[f] += 1
                    if pre[f] > best.get((slot, f), (0.0, 0))[0]:
                        best[slot, f] = (float(pre[f]), int(position))
    return best, tokens_f


def mean_residuals(batch: PackedBatch, backbone: Any) -> np.ndarray:
    rows = [backbone.table[encoded.ids, np.arange(len(encoded.ids))][encoded.content] for encoded in batch.documents]
    return np.stack([row.mean(0) if len(row) else np.zeros(D) for row in rows])


def as_dict(found: BatchPeaks) -> dict[tuple[int, int], tuple[float, int]]:
    rows = zip(found.document, found.feature, found.peak, found.position, strict=True)
    return {(int(d), int(f)): (float(p), int(t)) for d, f, p, t in rows}


@pytest.mark.parametrize("acts", ["topk", "relu"])
@pytest.mark.parametrize("chunk_elements", [peaks.CHUNK_ELEMENTS, 4 * FEATURES * 8])
def test_equal_to_brute_force(mesh: Mesh, acts: Any, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "CHUNK_ELEMENTS", chunk_elements)
    backbone, sae = fake_backbone(mesh), make_sae(mesh)
    for batch in pack(encoded_documents(30), rows=4, row_tokens=32):
        found = collect(batch, dispatch(batch, backbone, sae, acts))
        best, tokens_f = brute_force(batch, backbone, sae, acts)
        assert as_dict(found) == best
        assert found.tokens_f.tolist() == tokens_f.tolist()
        np.testing.assert_allclose(found.mean_nd, mean_residuals(batch, backbone), atol=1e-6)
        assert (np.diff(found.document * FEATURES + found.feature) > 0).all()


@pytest.mark.parametrize("acts", ["topk", "relu"])
def test_more_documents_than_slots(mesh_1x1: Mesh, acts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "TOKENS_PER_SLOT", 10**6)
    backbone, sae = fake_backbone(mesh_1x1), make_sae(mesh_1x1)
    batch = next(pack(encoded_documents(30), rows=8, row_tokens=64))
    assert len(batch.documents) > 16
    started = dispatch(batch, backbone, sae, acts)
    assert len(started) > 2
    found = collect(batch, started)
    best, tokens_f = brute_force(batch, backbone, sae, acts)
    assert as_dict(found) == best and found.tokens_f.tolist() == tokens_f.tolist()
    np.testing.assert_allclose(found.mean_nd, mean_residuals(batch, backbone), atol=1e-6)


def test_a_batch_without_content(mesh_1x1: Mesh) -> None:
    document = Document("0" * 16, (Turn("user", "x"),), None, "file:0")
    batch = next(pack([EncodedDocument(document, np.arange(5, dtype=np.int32), np.zeros(5, bool), {})], 2, 16))
    found = collect(batch, dispatch(batch, fake_backbone(mesh_1x1), make_sae(mesh_1x1), "topk"))
    assert len(found.peak) == 0 and found.tokens_f.sum() == 0 and found.mean_nd.tolist() == [[0.0] * D]


def test_one_compile_serves_every_batch(mesh_1x1: Mesh) -> None:
    backbone, sae = fake_backbone(mesh_1x1), make_sae(mesh_1x1)
    before = peaks.fold._cache_size()  # type: ignore[attr-defined]
    for batch in pack(encoded_documents(60, seed=5), rows=2, row_tokens=48):
        collect(batch, dispatch(batch, backbone, sae, "topk"))
    assert peaks.fold._cache_size() - before <= 1  # type: ignore[attr-defined]
