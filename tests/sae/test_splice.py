"""The stage `splice` against transformers with a hook, on a tiny random Llama; what holds of any SAE; its errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.activations.harvest import harvest, held_out
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.store import layer_path
from fac_jax.backbone.weights import load_backbone
from fac_jax.config.activations import BackboneConfig, HarvestConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.features import ScanConfig
from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig
from fac_jax.config.sae import SpliceConfig
from fac_jax.errors import UserError
from fac_jax.mesh import make_mesh, sharding
from fac_jax.packing import EncodedDocument, encode, pack
from fac_jax.sae.checkpoint import LoadedSae, save_sae
from fac_jax.sae.model import SAE
from fac_jax.sae.splice import answer, batch_rows, counted, held_out_documents, loss_recovered, measure, splice
from fac_jax.text import USER, Turn, make_document
from tests.backbone.test_model import hugging_face
from tests.backbone.tiny_backbone import tiny_tokenizer

LAYER, FEATURES, K, D = 2, 64, 4, 32
GEOMETRY = BackboneConfig(layer=LAYER, dtype="float32", rows_per_batch=4, row_tokens=96)
WORDS = "the sea is deep and the path there is thin with thorns that thrive on both sides of the other thing".split()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, documents: list[EncodedDocument]) -> tuple[Any, Path]:
    """A random model of transformers, and its folder.

    Its unembedding is fitted to the documents: ablation lowers the loss of a model that predicts worse than chance.
    """
    import torch

    folder = tmp_path_factory.mktemp("model")
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "eos_token_id": 258}
    model = hugging_face("Llama", changes, folder)
    with torch.no_grad():
        tokens = [torch.tensor(item.ids[None].astype(np.int64)) for item in documents]
        hidden = torch.cat([model.model(ids).last_hidden_state[0, :-1] for ids in tokens])
    target = torch.cat([ids[0, 1:] for ids in tokens])
    optimizer = torch.optim.Adam(model.lm_head.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.lm_head(hidden), target).backward()
        optimizer.step()
    model.save_pretrained(folder, max_shard_size="20KB")
    return model, folder


@pytest.fixture(scope="module")
def documents() -> list[EncodedDocument]:
    rng = np.random.default_rng(1)

    def turns() -> list[Turn]:
        return [Turn(USER, " ".join(rng.choice(WORDS, rng.integers(1, 7)))) for _ in range(rng.integers(1, 4))]

    tokenizer = tiny_tokenizer()
    return [encode(make_document(turns(), None, f"row {i}"), tokenizer, 96) for i in range(14)]


def random_sae(mesh: Mesh, seed: int = 0, threshold: bool = False) -> LoadedSae:
    rng = np.random.default_rng(seed)
    arrays = {
        "w_fd": rng.standard_normal((FEATURES, D)) / np.sqrt(D),
        "b_enc_f": rng.standard_normal(FEATURES) * 0.1,
        "b_dec_d": rng.standard_normal(D) * 0.1,
    }
    if threshold:
        arrays |= {"w_enc_fd": arrays["w_fd"] + rng.standard_normal((FEATURES, D)) * 0.05}
        arrays |= {"threshold_f": rng.uniform(0.5, 1.5, FEATURES)}
    return placed(arrays, None if threshold else K, mesh)


def placed(arrays: dict[str, np.ndarray], k: int | None, mesh: Mesh) -> LoadedSae:
    put = {n: jax.device_put(a.astype(np.float32), sharding(mesh, *SAE.SPECS[n])) for n, a in arrays.items()}
    return LoadedSae(SAE(**put), FEATURES, k, D, "digest", LAYER, "tiny", None)


def signed_identity(mesh: Mesh) -> LoadedSae:
    """Rows +e_i and -e_i: ReLU of both gives every residual back, and one row of the two is active."""
    return placed({"w_fd": np.concatenate([np.eye(D), -np.eye(D)]), "b_enc_f": np.zeros(FEATURES),
                   "b_dec_d": np.zeros(D)}, D, mesh)  # fmt: skip


def restated(sae: SAE, k: int | None) -> Any:
    """The SAE in torch."""
    import torch

    w, b_enc, b_dec = (torch.tensor(np.asarray(p[...])) for p in (sae.w_fd, sae.b_enc_f, sae.b_dec_d))
    encoder = w if sae.w_enc_fd is None else torch.tensor(np.asarray(sae.w_enc_fd[...]))

    def reconstruct(x: Any) -> Any:
        pre = (x - b_dec) @ encoder.T + b_enc
        if sae.threshold_f is not None:
            acts = torch.relu(pre) * (pre > torch.tensor(np.asarray(sae.threshold_f[...])))
        else:
            kept = pre.topk(k, dim=-1)
            acts = torch.zeros_like(pre).scatter(-1, kept.indices, torch.relu(kept.values))
        return acts @ w + b_dec

    return reconstruct


def hooked(model: Any, item: EncodedDocument, replace: Any) -> Any:
    """Log-probabilities of a document alone, its content residuals after LAYER blocks replaced."""
    import torch

    content = torch.tensor(item.content)

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(content[None, :, None], replace(hidden), hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.model.layers[LAYER - 1].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor(item.ids[None].astype(np.int64))).logits[0].double(), -1)
    finally:
        handle.remove()


def expected(model: Any, documents: list[EncodedDocument], sae: LoadedSae, mean_d: np.ndarray) -> dict[str, float]:
    import torch

    ways = {
        "ce_clean": lambda x: x,
        "ce_spliced": restated(sae.sae, sae.k),
        "ce_zero": torch.zeros_like,
        "ce_mean": lambda x: torch.tensor(mean_d.astype(np.float32)).expand_as(x),
    }
    total, tokens = dict.fromkeys([*ways, "kl"], 0.0), 0
    for item in documents:
        at = np.flatnonzero(item.content[:-1] & item.content[1:])
        found = {name: hooked(model, item, replace)[at] for name, replace in ways.items()}
        for name, log_p in found.items():
            total[name] -= float(log_p[np.arange(len(at)), item.ids[at + 1]].sum())
        total["kl"] += float((found["ce_clean"].exp() * (found["ce_clean"] - found["ce_spliced"])).sum())
        tokens += len(at)
    return {name: value / tokens for name, value in total.items()} | {"tokens": tokens}


@pytest.mark.parametrize("threshold", [False, True], ids=["topk", "threshold"])
def test_the_figures_are_those_of_transformers_with_a_hook(
    reference: tuple[Any, Path], documents: list[EncodedDocument], mesh: Mesh, threshold: bool
) -> None:
    """On both meshes; documents are packed here and alone there, so attention never crosses them."""
    model, folder = reference
    loaded, sae = load_backbone(str(folder), None, "float32", mesh), random_sae(mesh, threshold=threshold)
    mean_d = np.random.default_rng(2).standard_normal(D)
    found = dataclasses.asdict(measure(documents, loaded, sae, mean_d, GEOMETRY))
    for name, value in expected(model, documents, sae, mean_d).items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert found["documents"] == len(documents)
    assert found["ce_clean"] < found["ce_spliced"] and found["kl"] > 0.01


def test_a_perfect_sae_recovers_everything_and_one_of_zeros_nothing(
    reference: tuple[Any, Path], documents: list[EncodedDocument], mesh: Mesh
) -> None:
    loaded = load_backbone(str(reference[1]), None, "float32", mesh)
    perfect = measure(documents, loaded, signed_identity(mesh), None, GEOMETRY)
    assert perfect.ce_spliced == pytest.approx(perfect.ce_clean, abs=1e-5) and perfect.kl == pytest.approx(0, abs=1e-5)
    assert perfect.loss_recovered == pytest.approx(1, abs=1e-4)
    assert perfect.ce_mean is None and perfect.loss_recovered_mean is None
    zeros = placed({"w_fd": np.zeros((FEATURES, D)), "b_enc_f": np.ones(FEATURES), "b_dec_d": np.zeros(D)}, K, mesh)
    nothing = measure(documents, loaded, zeros, None, GEOMETRY)
    assert nothing.ce_spliced == nothing.ce_zero > nothing.ce_clean and nothing.loss_recovered == 0
    bias = np.random.default_rng(3).standard_normal(D).astype(np.float32)
    constant = placed({"w_fd": np.zeros((FEATURES, D)), "b_enc_f": np.ones(FEATURES), "b_dec_d": bias}, K, mesh)
    averaged = measure(documents, loaded, constant, bias.astype(np.float64), GEOMETRY)
    assert averaged.ce_spliced == pytest.approx(averaged.ce_mean, abs=1e-6)


def test_neighbours_and_batches_change_nothing(
    reference: tuple[Any, Path], documents: list[EncodedDocument], mesh_1x1: Mesh
) -> None:
    loaded, sae = load_backbone(str(reference[1]), None, "float32", mesh_1x1), random_sae(mesh_1x1)
    together = measure(documents, loaded, sae, None, GEOMETRY)
    small = dataclasses.replace(GEOMETRY, rows_per_batch=1)
    parts = [measure([item], loaded, sae, None, small) for item in documents if counted_alone(item)]
    tokens = [part.tokens for part in parts]
    assert sum(tokens) == together.tokens
    for name in ("ce_clean", "ce_spliced", "ce_zero", "kl"):
        mean = np.average([getattr(part, name) for part in parts], weights=tokens)
        assert getattr(together, name) == pytest.approx(mean, abs=1e-5), name


def counted_alone(item: EncodedDocument) -> int:
    return int((item.content[:-1] & item.content[1:]).sum())


def test_only_predictions_of_content_from_content_of_the_same_document_count(documents: list[EncodedDocument]) -> None:
    (batch,) = pack(documents[:5], 4, 96)
    at = {(row, place) for row, place in zip(*np.nonzero(counted(batch)), strict=True)}
    assert len(at) == sum(map(counted_alone, documents[:5]))
    for row, place in at:
        assert batch.slot[row, place] == batch.slot[row, place + 1] >= 0
        assert batch.content[row, place : place + 2].all()


def test_rows_are_as_few_as_hold_the_documents(documents: list[EncodedDocument]) -> None:
    assert batch_rows(documents[:1], GEOMETRY, 1) == 1 and batch_rows(documents[:1], GEOMETRY, 2) == 2
    assert batch_rows(documents * 9, GEOMETRY, 2) == 4
    with pytest.raises(UserError, match="4 rows do not divide over mesh.data=3"):
        batch_rows(documents, GEOMETRY, 3)


def test_what_cannot_be_recovered_is_undefined() -> None:
    assert loss_recovered(2.0, 2.5, 4.0) == 0.75
    assert loss_recovered(2.0, 5.0, 4.0) == -0.5
    assert loss_recovered(2.0, 2.5, 2.0) is None and loss_recovered(2.0, 2.5, 1.0) is None


def test_the_answers_are_those_of_transformers_with_a_hook(
    reference: tuple[Any, Path], documents: list[EncodedDocument], mesh: Mesh
) -> None:
    model, folder = reference
    loaded, sae = load_backbone(str(folder), None, "float32", mesh), random_sae(mesh)
    found = answer(documents, loaded, sae, 12)
    item = encode(make_document(documents[0].document.turns[:1], None, ""), loaded.tokenizer, 96)
    assert found.document == documents[0].document.id and found.prompt == loaded.tokenizer.decode(item.ids)

    def greedy(replace: Any) -> str:
        ids, content = item.ids, item.content
        for _ in range(12):
            log_p = hooked(model, EncodedDocument(item.document, ids, content, {}), replace)[-1]
            if int(log_p.argmax()) == 258:
                break
            ids, content = np.append(ids, np.int32(log_p.argmax())), np.append(content, True)
        return str(loaded.tokenizer.decode(ids[len(item.ids) :], clean_up_tokenization_spaces=False))

    assert found.clean == greedy(lambda x: x) and found.spliced == greedy(restated(sae.sae, sae.k))
    assert found.clean != found.spliced
    assert answer(documents, loaded, signed_identity(mesh), 12).spliced == found.clean


@pytest.fixture
def config(reference: tuple[Any, Path], tmp_path: Path) -> Config:
    rng = np.random.default_rng(5)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 6))}) + "\n" for _ in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    data = DataSet(sources=(Source(path=str(tmp_path / "rows.jsonl")),), max_tokens=64)
    return Config(
        mesh=MeshConfig(data=1, feature=1),
        backbone=dataclasses.replace(GEOMETRY, model=str(reference[1])),
        data={"corpus": data},
        harvest=HarvestConfig(validation_fraction=0.3, shard_rows=128),
        splice=SpliceConfig(documents=5, new_tokens=6),
    )


def test_the_stage_measures_what_the_store_holds_out(config: Config, tmp_path: Path) -> None:
    harvest(config, tmp_path / "activations", {})
    loaded = load_backbone(config.backbone.model, None, "float32", make_mesh(config.mesh))
    chosen = held_out_documents(config, loaded.tokenizer)
    reader = StoreReader(layer_path(tmp_path / "activations", LAYER), "validation")
    stored = reader.read_blocks(np.arange(len(reader.block_rows))).doc
    assert len(chosen) == 5 and {int(item.document.id, 16) for item in chosen} <= set(stored.tolist())
    assert all(held_out(item.document.id, 0.3) for item in chosen)
    sae = random_sae(loaded.mesh)
    card = {
        "k": K,
        "layer": LAYER,
        "variant": "topk",
        "model": "tiny",
        "model_digest": loaded.digest,
        "rows": 1,
        "steps": 1,
    }
    save_sae(tmp_path / "sae", sae.sae, card | {"metrics": {}})
    inputs = {"sae": tmp_path / "sae", "activations": tmp_path / "activations"}
    (tmp_path / "splice").mkdir()
    summary = splice(config, tmp_path / "splice", inputs)
    mean_d = StoreReader(layer_path(tmp_path / "activations", LAYER), "train").mean
    assert summary == dataclasses.asdict(measure(chosen, loaded, sae, mean_d, config.backbone))
    product = json.loads((tmp_path / "splice/splice.json").read_text())
    assert summary.items() <= product.items() and set(product["sample"]) == {"document", "prompt", "clean", "spliced"}
    outside = dataclasses.replace(config, scan=ScanConfig(sae=str(tmp_path / "sae")))  # no store, so no mean
    summary = splice(outside, tmp_path / "splice", {})
    assert summary["ce_mean"] is None and summary["ce_zero"] == product["ce_zero"]


def test_nothing_to_predict_is_an_error(reference: tuple[Any, Path], mesh_1x1: Mesh) -> None:
    loaded = load_backbone(str(reference[1]), None, "float32", mesh_1x1)
    one = encode(make_document([Turn(USER, "a")], None, ""), loaded.tokenizer, 96)
    with pytest.raises(UserError, match=r"1 held-out documents have no two content tokens in a row"):
        measure([one], loaded, random_sae(mesh_1x1), None, GEOMETRY)
    with pytest.raises(UserError, match=r"0 held-out documents have no two"):
        measure([], loaded, random_sae(mesh_1x1), None, GEOMETRY)
