"""Where an SAE comes from: every form by path and by hub id, errors that say what to do, and what makes another SAE."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fac_jax.config.file import load_config
from fac_jax.errors import UserError
from fac_jax.pipeline import pipeline
from fac_jax.sae.checkpoint import read_card, read_sae, save_sae
from fac_jax.sae.formats.source import fingerprints, locate
from fac_jax.sae.model import SAE
from tests.sae.formats.loopback_hub import loopback_hub

ROOT = Path(__file__).parents[3]
SAE_LENS = ROOT / "tests/data/sae_lens/topk-checkpoint"
CARD = {
    "k": 3, "layer": 2, "variant": "topk", "model": "tiny", "model_digest": "01", "rows": 1, "steps": 1,
    "metrics": {"fvu": 0.5},
}  # fmt: skip


def write_ours(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    sae = SAE(*(rng.standard_normal(shape).astype(np.float32) for shape in ((32, 8), 32, 8)))
    save_sae(folder, sae, CARD)
    return folder


def write_official(path: Path, seed: int = 0) -> Path:
    torch = pytest.importorskip("torch")
    rng = torch.Generator().manual_seed(seed)
    weight = {"mask": torch.ones(32), "W_enc": torch.randn(8, 32, generator=rng), "b_enc": torch.zeros(32)}
    content = {"weight": weight | {"b_dec": torch.zeros(8)}, "config": {"d_inp": 8, "d_hide": 32, "topK": 3}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def test_every_form_is_recognised(tmp_path: Path) -> None:
    assert locate(write_ours(tmp_path / "ours")).form == "fac"
    assert locate(SAE_LENS).form == "sae_lens"
    assert locate(write_official(tmp_path / "TopK7_l2_h8_epoch1.pth")).form == "official"
    (tmp_path / "notes.txt").write_text("")
    for source, message in {
        tmp_path / "notes.txt": "notes.txt is no SAE; give an SAE folder of fac_jax",
        tmp_path / "gone": "no SAE in .*gone: nothing is there",
        "../gone/sae": "nothing is there",
        "gone": "no SAE in gone: nothing is there",
    }.items():
        with pytest.raises(UserError, match=message):
            locate(source)


def test_another_k(tmp_path: Path) -> None:
    ours = write_ours(tmp_path / "ours")
    card, _ = read_sae(ours, k=5)
    assert (card.k, card.metrics) == (5, {}) and read_sae(ours, k=3)[0] == read_card(ours)
    assert read_sae(SAE_LENS, k=7)[0].k == 7
    for source, k, message in (
        (ours, 33, "has 32 features and K 33; K must lie between 1 and 32"),
        (SAE_LENS, 0, "has 64 features and K 0"),
        (SAE_LENS.with_name("batchtopk-trained"), 4, "has a threshold for each feature and no K: leave out --k 4"),
    ):
        with pytest.raises(UserError, match=message):
            read_sae(source, k=k)


@pytest.mark.parametrize("form", ["ours", "sae_lens", "official"])
def test_other_content_is_another_sae_for_every_stage(form: str, tmp_path: Path) -> None:
    """Also where neither the name nor the size of a file changes, and only in the middle."""
    source = tmp_path / "sae"
    if form == "ours":
        write_ours(source)
    elif form == "sae_lens":
        shutil.copytree(SAE_LENS, source)
    else:
        source = write_official(tmp_path / "TopK7_l2_h8_epoch1.pth")
    config = load_config(ROOT / "configs/quickstart.yaml")
    config = dataclasses.replace(config, scan=dataclasses.replace(config.scan, sae=str(source)))
    init = dataclasses.replace(config.train, init=str(source))

    def settings() -> list[str]:
        stages = pipeline(config)
        assert "sae" not in stages
        train = pipeline(dataclasses.replace(config, scan=type(config.scan)(), train=init))["sae"]
        return [str(stage.settings) for stage in (stages["scan:anchor"], stages["explanations"], train)]

    before = settings()
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert fingerprints(tmp_path / "elsewhere" / source.name) == fingerprints(source)
    time.sleep(0.01)
    if form == "ours":
        save_sae(source, SAE(*(np.ones(s, np.float32) for s in ((32, 8), 32, 8))), CARD)
    elif form == "sae_lens":
        weights = source / "sae_weights.safetensors"
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    else:
        write_official(source, seed=1)
    assert all(new != old for new, old in zip(settings(), before, strict=True))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    root = tmp_path_factory.mktemp("hub")
    write_ours(root / "someone" / "ours")
    shutil.copytree(SAE_LENS, root / "someone" / "many" / "layer_2" / "width_64")
    write_official(root / "someone" / "official" / "TopK7_l2_h8_epoch3.pth")
    for epoch in (1, 3):
        write_official(root / "someone" / "epochs" / f"TopK7_l2_h8_epoch{epoch}.pth")
    for repository in (root / "someone").iterdir():
        (repository / "README.md").write_text("read me")
    with loopback_hub(root) as (address, fetched):
        yield address, fetched


def convert(source: str, to: Path, cache: Path, address: str, offline: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": offline}
    command = [sys.executable, "-m", "fac_jax.cli", "convert", "--sae", source, "--to", str(to)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_an_sae_on_the_hub_is_downloaded_once(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, fetched = hub
    for number, (source, names) in enumerate(
        {
            "someone/ours": {"config.json", "sae.safetensors"},
            "someone/many/layer_2/width_64": {"cfg.json", "sae_weights.safetensors"},
            "someone/official": {"TopK7_l2_h8_epoch3.pth"},
            "someone/epochs/TopK7_l2_h8_epoch1.pth": {"TopK7_l2_h8_epoch1.pth"},
        }.items()
    ):
        fetched.clear()
        done = convert(source, tmp_path / str(number), tmp_path / "cache", address)
        assert done.returncode == 0, done.stderr
        assert {name.rpartition("/")[2] for name in fetched} == names  # nothing else of the repository
        again = convert(source, tmp_path / f"{number}-again", tmp_path / "cache", "http://127.0.0.1:9", "1")
        assert again.returncode == 0, again.stderr
        cards = [json.loads((tmp_path / name / "config.json").read_text()) for name in (f"{number}", f"{number}-again")]
        assert cards[0] == cards[1] and cards[0]["layer"] in (2, 3)


def test_what_the_hub_lacks_is_said_in_a_line(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = hub
    for source, message in {
        "someone/epochs": "holds 2 checkpoints; add one to the id: TopK7_l2_h8_epoch1.pth, TopK7_l2_h8_epoch3.pth",
        "someone/many": "holds none there; it holds SAEs in layer_2/width_64; add the folder or file to the hub id",
        "someone/gone": "no SAE in someone/gone: it is no path here, and the hub gave RepositoryNotFoundError",
        "someone/ours/gone.pth": "no SAE in someone/ours/gone.pth: it is no path here, and the hub gave",
    }.items():
        done = convert(source, tmp_path / "to", tmp_path / "cache", address)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    for reached, offline in (("http://127.0.0.1:9", "0"), (address, "1")):
        done = convert("someone/ours", tmp_path / "to", tmp_path / "empty", reached, offline)
        assert done.returncode == 1 and "the hub cannot be reached" in done.stderr, done.stderr
        assert "download it where there is a network" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "to").exists()
