"""The training loop: same bytes after a kill, one line of metrics per interval, and errors that name the culprit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.activations.reader import StoreReader
from fac_jax.activations.rows import Rows
from fac_jax.activations.store import add_layers, layer_path
from fac_jax.activations.stream import batches
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig
from fac_jax.config.sae import SaeConfig, SweepConfig, TrainConfig
from fac_jax.errors import UserError
from fac_jax.sae import fit as fit_module
from fac_jax.sae import train as module
from fac_jax.sae.checkpoint import load_sae, read_card
from fac_jax.sae.fit import Fitted, Member, fit, to_device
from fac_jax.sae.problem import Problem, pose
from fac_jax.sae.step import TrainState
from fac_jax.sae.train import sweep, train
from tests.sae.tiny_store import WIDTH, make_store, rows_of

SETTINGS = TrainConfig(
    steps=14, batch_rows=32, k_start=8, anneal_steps=8, dead_after_rows=100, aux_k=8, log_every=3, checkpoint_every=4
)


def rows_from(step: int, with_origin: bool = True) -> Iterator[tuple[int, Rows]]:
    while True:
        yield step, rows_of(step)
        step += 1


def problem(**changes: object) -> Problem:
    return pose(SaeConfig(features=64, k=4), replace(SETTINGS, **changes), WIDTH, 37.0)  # type: ignore[arg-type]


def run(out: Path, mesh: Mesh, rows_from: object = rows_from, **changes: object) -> Fitted:
    return fit([Member("sae", problem(**changes), 3, out)], np.ones(WIDTH), rows_from, mesh, out)  # type: ignore[arg-type]


def assert_same_bytes(one: TrainState, other: TrainState) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, mesh_1x1: Mesh) -> tuple[Path, Fitted]:
    out = tmp_path_factory.mktemp("undisturbed")
    return out, run(out, mesh_1x1)


def test_metrics_are_named_and_finite(undisturbed: tuple[Path, Fitted]) -> None:
    out, fitted = undisturbed
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6, 9, 12, 13]
    assert [line["k"] for line in lines] == [7, 6, 4, 4, 4, 4]
    assert set(lines[0]) == {
        "step", "loss", "fvu", "l0", "k", "dead_features", "dead_fraction", "aux_loss", "learning_rate",
        "gradient_norm", "rows_left_out", "rows_at_cap",
    }  # fmt: skip
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["l0"] <= 4
    assert fitted.rows_per_second > 0 and fitted.states[0].step == 14


def test_the_share_of_time_waited_for_rows(tmp_path: Path, mesh_1x1: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to none where steps are the slower side, nearly all where reading is; in lines of their own."""
    make_train_step = fit_module.make_train_step

    def slow_steps(*given: Any) -> Any:
        take = make_train_step(*given)
        return lambda *args: (time.sleep(0.1), take(*args))[1]

    def slow_reading(step: int, with_origin: bool) -> Iterator[tuple[int, Rows]]:
        return ((time.sleep(0.25), pair)[1] for pair in rows_from(step))  # longer than a step, on a busy machine too

    waited = run(tmp_path / "slow reading", mesh_1x1, slow_reading)
    monkeypatch.setattr(fit_module, "make_train_step", slow_steps)
    ready = run(tmp_path / "slow steps", mesh_1x1)
    print(f"waited for rows: {ready.data_wait:.2%} of slow steps, {waited.data_wait:.2%} of slow reading")
    assert ready.data_wait < 0.05 < 0.6 < waited.data_wait <= 1
    lines = [json.loads(line) for line in (tmp_path / "slow steps" / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 13]  # the first step compiles
    assert all(line["data_wait"] < 0.05 and line["rows_per_second"] > 0 for line in lines)


def test_stopped_and_continued_is_undisturbed(undisturbed: tuple[Path, Fitted], tmp_path: Path, mesh_1x1: Mesh) -> None:
    class Stop(Exception):
        pass

    def interrupted(step: int, with_origin: bool) -> Iterator[tuple[int, Rows]]:
        for number, rows in rows_from(step):
            if number == 11:
                raise Stop  # after the checkpoint of step 8 and lines beyond it
            yield number, rows

    with pytest.raises(Stop):
        run(tmp_path, mesh_1x1, interrupted)
    asked: list[int] = []

    def watched(step: int, with_origin: bool) -> Iterator[tuple[int, Rows]]:
        asked.append(step)
        return rows_from(step)

    assert_same_bytes(run(tmp_path, mesh_1x1, watched).states[0], undisturbed[1].states[0])
    assert asked == [8]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed[0] / "metrics.jsonl").read_bytes()


def test_finished_training_is_not_done_again(undisturbed: tuple[Path, Fitted], mesh_1x1: Mesh) -> None:
    def never(step: int, with_origin: bool) -> Iterator[tuple[int, Rows]]:
        raise AssertionError("rows were read")

    assert_same_bytes(run(undisturbed[0], mesh_1x1, never).states[0], undisturbed[1].states[0])


def test_killed_process_is_undisturbed(undisturbed: tuple[Path, Fitted], tmp_path: Path, mesh_1x1: Mesh) -> None:
    """kill -9, as soon as a checkpoint exists."""
    program = (
        "import sys, time; sys.path[:0] = [sys.argv[2]]\n"
        "from pathlib import Path\n"
        "import test_train as t\n"
        "from fac_jax.config.machine import MeshConfig\n"
        "from fac_jax.mesh import make_mesh\n"
        "slow = lambda step, with_origin: ((time.sleep(0.3), pair)[1] for pair in t.rows_from(step))\n"
        "t.run(Path(sys.argv[1]), make_mesh(MeshConfig(data=1)), slow)\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    compiled_alike = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in conftest.py, or it would round otherwise
    process = subprocess.Popen(arguments, env=os.environ | compiled_alike | {"PYTHONPATH": path})
    try:
        while not (tmp_path / "checkpoints" / "4").exists():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert_same_bytes(run(tmp_path, mesh_1x1).states[0], undisturbed[1].states[0])
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed[0] / "metrics.jsonl").read_bytes()


def test_continues_on_another_mesh(
    undisturbed: tuple[Path, Fitted], tmp_path: Path, mesh_2x4: Mesh, mesh_1x1: Mesh
) -> None:
    run(tmp_path, mesh_1x1, steps=8)
    state = run(tmp_path, mesh_2x4).states[0]
    assert len(state.params["w_fd"].sharding.device_set) == 8
    np.testing.assert_allclose(state.params["w_fd"], undisturbed[1].states[0].params["w_fd"], rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_finite_stop_the_run(tmp_path: Path, mesh_1x1: Mesh) -> None:
    def poisoned(step: int, with_origin: bool) -> Iterator[tuple[int, Rows]]:
        for number, rows in rows_from(step):
            if number == 5:
                rows.resid[9, 2] = np.nan
            yield number, rows

    message = (
        r"loss nan and gradient norm nan at step 5, learning rate 0.001, k 5, batch 5 of 32 rows from 8 documents "
        r"\(0000000000001388, .*1 of its rows are not finite \(documents 000000000000138a at token 9\): harvest again"
    )
    with pytest.raises(UserError, match=message):
        run(tmp_path, mesh_1x1, poisoned)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4"]


def test_documents_are_read_only_to_be_named(tmp_path: Path, mesh_1x1: Mesh) -> None:
    """A batch comes without its documents; the one that stops the run is read once more, with them."""
    asked: list[tuple[int, bool]] = []

    def poisoned(step: int, with_origin: bool) -> Iterator[tuple[int, Rows]]:
        asked.append((step, with_origin))
        for number, rows in rows_from(step):
            if number == 5:
                rows.resid[9, 2] = np.nan
            known = len(rows) if with_origin else 0
            yield number, Rows(rows.resid, rows.doc[:known], rows.position[:known], rows.token[:known])

    with pytest.raises(UserError, match=r"1 of its rows are not finite \(documents 000000000000138a at token 9\)"):
        run(tmp_path, mesh_1x1, poisoned)
    assert asked == [(0, False), (5, True)]


def test_divergence_names_the_rate(tmp_path: Path, mesh_1x1: Mesh) -> None:
    with pytest.raises(
        UserError, match=r"at step 1, learning rate 1e\+30.*training diverged: lower train.learning_rate"
    ):
        run(tmp_path, mesh_1x1, learning_rate=1e30)


def test_batch_must_fit_the_mesh(tmp_path: Path, mesh_2x4: Mesh) -> None:
    with pytest.raises(UserError, match="train.batch_rows 33 cannot be shared equally by mesh.data 2"):
        run(tmp_path, mesh_2x4, batch_rows=33)


def test_official_weights_make_sequences_equal(mesh_1x1: Mesh) -> None:
    rows = replace(rows_of(0), doc=np.repeat(np.arange(5, 8, dtype=np.uint64), [1, 21, 10]))
    weight_b = to_device(rows, problem(compat="official"), mesh_1x1).weight_b
    np.testing.assert_allclose([weight_b[0], weight_b[1:22].sum(), weight_b[22:].sum()], 1, rtol=1e-6)
    assert (to_device(rows, problem(), mesh_1x1).weight_b == 1).all()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


def config(**changes: object) -> Config:
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    backbone = BackboneConfig(model="tiny", layer=3)
    return Config(
        backbone=backbone, sae=SaeConfig(features=64, k=4), train=settings, mesh=MeshConfig(data=2, feature=4)
    )


def test_stage_from_store_to_sae(store: Path, tmp_path: Path, mesh_1x1: Mesh) -> None:
    summary = train(config(), tmp_path, {"activations": store})
    assert summary["rows"] == 14 * 32 and summary["steps"] == 14 and summary["k"] == 4
    assert 0 < summary["fvu"] < 1 and 0 < summary["l0"] <= 4 and summary["validation_rows"] > 200
    card, loaded = read_card(tmp_path), load_sae(tmp_path, mesh_1x1, expect_d_model=WIDTH, expect_layer=3)
    assert card.metrics["fvu"] == summary["fvu"] and card.model == "tiny" and card.model_digest == "0123"
    assert loaded.sae.w_fd.shape == (64, WIDTH) and loaded.k == 4
    again = train(config(), tmp_path, {"activations": store})
    assert {name: again[name] for name in ("fvu", "l0", "dead_fraction")} == {
        name: summary[name] for name in ("fvu", "l0", "dead_fraction")
    }


def test_the_best_checkpoint_becomes_the_sae(store: Path, tmp_path: Path) -> None:
    """A rate that ruins what was learned: the last state is worse than the best checkpoint, which is handed out."""
    settings = {"checkpoint_every": 2, "learning_rate": 0.3, "anneal_steps": 2, "keep_checkpoints": 1}
    found = {}
    for finish in ("last", "best"):
        train(config(finish=finish, **settings), tmp_path / finish, {"activations": store})
        found[finish] = read_card(tmp_path / finish).metrics["fvu"]
    lines = [json.loads(line) for line in (tmp_path / "best" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14]
    best = min(lines, key=lambda line: line["fvu"])
    assert best["step"] < 14 and found["best"] < found["last"]
    np.testing.assert_allclose([found["best"], found["last"]], [best["fvu"], lines[-1]["fvu"]], rtol=1e-6)
    kept = sorted(int(path.name) for path in (tmp_path / "best" / "checkpoints").iterdir())
    assert kept == [best["step"], 14]


@pytest.mark.parametrize("changed", ["layer", "model"])
def test_store_of_something_else(changed: str, store: Path, tmp_path: Path) -> None:
    other = BackboneConfig(model="tiny", layer=4) if changed == "layer" else BackboneConfig(model="huge", layer=3)
    holds = "layer 3, config asks 4" if changed == "layer" else "model tiny, config asks huge"
    with pytest.raises(UserError, match=re.escape(f"store at {store} holds {holds}: run `fac harvest` again")):
        train(replace(config(), backbone=other), tmp_path, {"activations": store})


def test_named_store_wins(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no activation store at"):
        train(config(store=str(tmp_path / "nowhere")), tmp_path, {"activations": store})


SWEEP = SweepConfig(k=(4,), features=(64, 32), variants=("topk", "batchtopk", "jumprelu", "matryoshka"))


def test_sweep_trains_all_from_one_reading(
    store: Path, tmp_path: Path, mesh_1x1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every combination, each with its files; the member that `train` would make is the very same SAE."""
    passes: list[int] = []
    monkeypatch.setattr(module, "batches", lambda *args: (passes.append(args[3]), batches(*args))[1])
    asked = replace(config(), sweep=SWEEP)
    summary = sweep(asked, tmp_path / "sweep", {"activations": store})
    assert passes == [0], "the store was read more than once"
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    members = {member["name"]: member for member in found["members"]}
    assert summary["saes"] == len(members) == 8 and found["steps"] == 14
    for name, member in members.items():
        card, loaded = read_card(tmp_path / "sweep" / name), load_sae(tmp_path / "sweep" / name, mesh_1x1)
        assert card.variant == member["variant"] and loaded.features == member["features"]
        assert card.metrics["fvu"] == member["fvu"] and 0 < member["fvu"] < 2  # after 14 steps
        assert loaded.k == (member["k"] if member["variant"] in ("topk", "matryoshka") else None)
        lines = (tmp_path / "sweep" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 3, 6, 9, 12, 13]
    train(config(), tmp_path / "sae", {"activations": store})
    alone, among = (folder / "sae.safetensors" for folder in (tmp_path / "sae", tmp_path / "sweep/topk-64-k4-seed0"))
    assert alone.read_bytes() == among.read_bytes()


def test_sweep_of_layers_makes_what_each_layer_alone_makes(tmp_path: Path) -> None:
    """Side by side in one product, from one store of both layers; a layer that it lacks is said before any training."""
    root = tmp_path / "activations"
    add_layers(root, (2, 3))
    for layer in (2, 3):
        make_store(Path(layer_path(root, layer)), layer)
    asked = replace(config(), sweep=SweepConfig(layers=(3, 2)))
    summary = sweep(asked, tmp_path / "sweep", {"activations": root})
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["members"]
    assert [(one["name"], one["layer"]) for one in found] == [
        ("layer-03/topk-64-k4-seed0", 3),
        ("layer-02/topk-64-k4-seed0", 2),
    ]
    assert summary["saes"] == 2 and summary["layer-02 store_rows"] == StoreReader(layer_path(root, 2)).rows
    for one in found:
        alone = replace(config(), backbone=BackboneConfig(model="tiny", layer=one["layer"]))
        train(alone, tmp_path / one["name"], {"activations": root})
        bytes_of = [
            (folder / one["name"] / "sae.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "sweep")
        ]
        assert bytes_of[0] == bytes_of[1] and read_card(tmp_path / one["name"]).layer == one["layer"]
    lacking = replace(config(), sweep=SweepConfig(layers=(3, 5)))
    with pytest.raises(UserError, match="holds layers 2, 3, config asks 5: set harvest.layers"):
        sweep(lacking, tmp_path / "lacking", {"activations": root})
    assert not (tmp_path / "lacking").exists()


def test_stopped_sweep_is_undisturbed(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All members go on from one checkpoint, which holds all of them."""
    asked = replace(config(), sweep=SweepConfig(variants=("batchtopk", "jumprelu"), seeds=(1, 2)))
    sweep(asked, tmp_path / "undisturbed", {"activations": store})

    def interrupted(*args: Any) -> Iterator[tuple[int, Rows]]:
        for number, rows in batches(*args):
            if number == 10:
                raise InterruptedError
            yield number, rows

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(module, "batches", interrupted)
        sweep(asked, tmp_path / "stopped", {"activations": store})
    sweep(asked, tmp_path / "stopped", {"activations": store})
    for seed in (1, 2):
        for variant in ("batchtopk", "jumprelu"):
            for file in ("sae.safetensors", "config.json", "metrics.jsonl"):
                name = f"{variant}-64-k4-seed{seed}/{file}"
                assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    one, other = (tmp_path / f"stopped/jumprelu-64-k4-seed{seed}/sae.safetensors" for seed in (1, 2))
    assert one.read_bytes() != other.read_bytes()


def test_a_member_that_diverges_is_named(store: Path, tmp_path: Path) -> None:
    asked = replace(config(learning_rate=1e30), sweep=SweepConfig(k=(4, 5)))
    with pytest.raises(UserError, match=r"^topk-64-k4-seed0: loss .* at step 1"):
        sweep(asked, tmp_path, {"activations": store})


def test_training_starts_from_an_sae(store: Path, tmp_path: Path) -> None:
    """What was trained starts better than at random, and a changed kind is refused."""
    train(config(), tmp_path / "first", {"activations": store})
    train(config(init=str(tmp_path / "first"), anneal_steps=0), tmp_path / "second", {"activations": store})
    first, second = (
        [json.loads(line)["fvu"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    )
    assert second[0] < 0.8 * first[0] and second[-1] < first[-1]
    other = replace(config(init=str(tmp_path / "first")), sae=SaeConfig(features=64, k=4, tied=False))
    with pytest.raises(UserError, match="train.init has encoder tied, this training asks for untied"):
        train(other, tmp_path / "third", {"activations": store})
