"""The training step: the published trajectory, K's schedule, one compile, two meshes, dead features, filtered rows."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.config.machine import MeshConfig
from fac_jax.config.sae import SaeConfig, TrainConfig
from fac_jax.errors import UserError
from fac_jax.mesh import DATA, FEATURE, make_mesh, sharding
from fac_jax.sae import dense
from fac_jax.sae.model import SAE, encode
from fac_jax.sae.problem import Problem, decoding_plan, k_at, k_widths, learning_rate_at, pose
from fac_jax.sae.step import (
    Batch,
    Metrics,
    Params,
    TrainState,
    init_state,
    loss_and_metrics,
    make_train_step,
    state_shardings,
    unscaled,
)

SMALL = SaeConfig(features=64, k=4)
QUICK = TrainConfig(
    steps=20, batch_rows=32, k_start=8, anneal_steps=10, dead_after_rows=100, aux_k=8, select_dtype="float32"
)


def official(k: int = 20, k_start: int = 200, anneal_steps: int = 8) -> Problem:
    train = TrainConfig(compat="official", k_start=k_start, anneal_steps=anneal_steps)
    return pose(SaeConfig(features=256, k=k), train, 32, 1.0)


def official_params(golden: dict[str, np.ndarray]) -> Params:
    return {
        "w_fd": jnp.asarray(golden["W_enc"].T),
        "b_enc_f": jnp.asarray(golden["b_enc"]),
        "b_dec_d": jnp.asarray(golden["b_dec"]),
    }


def sequence(x_bd: np.ndarray) -> Batch:
    """Rows of one document: with compat official each weighs 1 / its length."""
    return Batch(jnp.asarray(x_bd), jnp.full(len(x_bd), 1 / len(x_bd)))


def rows(seed: int, b: int = 32, d: int = 16) -> Batch:
    """Rows around a mean, made of a few directions."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).standard_normal((24, d))
    x_bd = (rng.random((b, 24)) < 0.2) * rng.exponential(size=(b, 24)) @ basis * 3 + 1
    return Batch(jnp.asarray(x_bd, jnp.float32), jnp.ones(b))


@cache
def loss_and_gradient(problem: Problem, mesh: Mesh, k_max: int, decoding: str = "by rule") -> Callable[..., Any]:
    """(params, batch, k, dead_f) -> ((loss, (metrics, active_f)), gradient)."""
    loss = partial(loss_and_metrics, k_max=k_max, problem=problem, mesh=mesh)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@cache
def run(problem: Problem, mesh: Mesh, steps: int) -> tuple[TrainState, list[Metrics]]:
    state, step = init_state(problem, np.full(16, 1.0), 7, mesh), make_train_step(problem, mesh)
    metrics = []
    for i in range(steps):
        state, found = step(state, jax.device_put(rows(i), sharding(mesh, DATA)))
        metrics.append(jax.device_get(found))
    return state, metrics


def test_loss_and_gradients_are_the_official_ones(golden: dict[str, np.ndarray], mesh: Mesh, decoding: str) -> None:
    (value, (metrics, *_)), gradient = loss_and_gradient(official(), mesh, 20, decoding)(
        official_params(golden), sequence(golden["x"]), 20, jnp.zeros(256, bool)
    )
    np.testing.assert_allclose([value, metrics.loss], golden["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics.l0, golden["l0"], rtol=1e-6)
    for name, want in (
        ("w_fd", golden["grad_W_enc"].T),
        ("b_enc_f", golden["grad_b_enc"]),
        ("b_dec_d", golden["grad_b_dec"]),
    ):
        np.testing.assert_allclose(gradient[name], want, rtol=1e-5, atol=1e-5)


def test_gradients_are_summed_over_sequences(golden: dict[str, np.ndarray], mesh_1x1: Mesh) -> None:
    both_ways = loss_and_gradient(official(), mesh_1x1, 20)

    def gradient(batch: Batch) -> jax.Array:
        return both_ways(official_params(golden), batch, 20, jnp.zeros(256, bool))[1]["w_fd"]

    first, second = sequence(golden["x"][:32]), sequence(golden["x"][32:])
    both = Batch(*(jnp.concatenate(pair) for pair in zip(first, second, strict=True)))
    np.testing.assert_allclose(gradient(both), gradient(first) + gradient(second), rtol=1e-5, atol=1e-5)


def test_adam_trajectory_is_the_official_one(golden: dict[str, np.ndarray], mesh: Mesh, decoding: str) -> None:
    problem = official()
    state = init_state(problem, np.zeros(32), 0, mesh)
    state = replace(state, params=jax.device_put(official_params(golden), state_shardings(state, mesh).params))
    step = make_train_step(problem, mesh)
    for x_bd, k, loss in zip(golden["traj_x"], golden["traj_k"], golden["traj_loss"], strict=True):
        state, metrics = step(state, jax.device_put(sequence(x_bd), sharding(mesh, DATA)))
        assert metrics.k == k
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-4)
    for name, want in (("w_fd", "W_enc"), ("b_enc_f", "b_enc"), ("b_dec_d", "b_dec")):
        np.testing.assert_allclose(state.params[name], golden[f"traj_final_{want}"].T, rtol=1e-4, atol=1e-4)


def test_k_schedule_is_the_official_one() -> None:
    problem = official(anneal_steps=625)
    want = [int(max(20, 200 - 180 * (t + 1) / 625)) for t in range(700)]
    got = jax.vmap(lambda t: k_at(t, problem))(jnp.arange(700))
    assert want[0] == 199 and want[624] == 20
    np.testing.assert_array_equal(got, want)
    assert k_at(3, official(k_start=20)) == 20 and k_at(0, official(anneal_steps=0)) == 20
    assert k_widths(problem) == [20, 40, 80, 160, 200]


def test_schedules_by_name() -> None:
    """official is the published sequence whatever k_start says; exponential falls by equal factors; both end in K."""
    names: tuple[Literal["official", "exponential"], ...] = ("official", "exponential")
    train = TrainConfig(k_start=100, anneal_steps=50)
    published, falling = (
        [
            int(k_at(t, pose(SaeConfig(features=256, k=20), replace(train, k_schedule=name), 32, 1.0)))
            for t in range(700)
        ]
        for name in names
    )
    assert published == [int(max(20, 200 - 180 * (t + 1) / 625)) for t in range(700)]
    assert published[0] == 199 and published[620] == 21 and set(published[621:]) == {20}
    np.testing.assert_array_equal(falling[:50], np.round(20 * 5 ** (1 - np.arange(1, 51) / 50)))
    assert falling[0] == 97 and set(falling[49:]) == {20}


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_a_whole_anneal_compiles_once(schedule: str, activation: str, mesh_1x1: Mesh) -> None:
    """One compile for all values of K, with a branch for each bucket (one for JumpReLU, whose K is only a target)."""
    sae = replace(SMALL, activation=activation)  # type: ignore[arg-type]
    problem = pose(sae, replace(QUICK, k_start=16, k_schedule=schedule), 16, 37.0)  # type: ignore[arg-type]
    assert k_widths(problem) == ([16] if activation == "jumprelu" else [4, 8, 16])
    state, step = init_state(problem, np.zeros(16), 0, mesh_1x1), make_train_step(problem, mesh_1x1)
    seen = []
    for i in range(12):
        state, metrics = step(state, jax.device_put(rows(i), sharding(mesh_1x1, DATA)))
        seen.append(int(metrics.k))
    want = (
        [14, 13, 12, 11, 10, 8, 7, 6, 5, 4, 4, 4] if schedule == "linear" else [14, 12, 11, 9, 8, 7, 6, 5, 5, 4, 4, 4]
    )
    assert seen == want
    assert step._cache_size() == 1  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def alone(mesh_1x1: Mesh) -> tuple[TrainState, list[Metrics]]:
    """Twenty steps on one device."""
    return run(pose(SMALL, QUICK, 16, 37.0), mesh_1x1, 20)


@pytest.mark.parametrize("shard_optimizer", [False, True])
@pytest.mark.parametrize("shape", ["2x4", "8x1", "1x8"])
def test_meshes_agree_over_twenty_steps(
    shape: str, shard_optimizer: bool, alone: tuple[TrainState, list[Metrics]]
) -> None:
    mesh = make_mesh(MeshConfig(*map(int, shape.split("x"))))
    state, shared = run(pose(SMALL, replace(QUICK, shard_optimizer=shard_optimizer), 16, 37.0), mesh, 20)
    assert max(m.dead_features for m in alone[1]) > 0, "the auxiliary loss was never used"
    for one, other in zip(alone[1], shared, strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=2e-5, atol=2e-5)
    for (path, leaf), want in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(alone[0]), strict=True):
        np.testing.assert_allclose(leaf, want, rtol=1e-4, atol=1e-4, err_msg=jax.tree_util.keystr(path))
    assert shared[-1].loss < 0.6 * shared[9].loss + 0.4 * shared[0].loss


@pytest.mark.parametrize("shard_optimizer", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_every_leaf_is_sharded(steps: int, shard_optimizer: bool, mesh_2x4: Mesh) -> None:
    """All leaves of an untied JumpReLU SAE with Adam, as they are born and after steps: none is larger than need be."""
    problem = pose(replace(KINDS["jumprelu"], tied=False), replace(QUICK, shard_optimizer=shard_optimizer), 16, 37.0)
    state = run(problem, mesh_2x4, steps)[0]
    moments = (FEATURE, DATA) if shard_optimizer else FEATURE
    wanted = {"params": FEATURE, "silent_f": FEATURE, "optimizer": moments}
    seen = set()
    for path, leaf in jax.tree.leaves_with_path(state):
        first, name = (jax.tree_util.keystr(path[i : i + 1 or None], simple=True) for i in (0, -1))
        whole = name in ("step", "threshold", "count", "b_dec_d")
        spec = () if whole else (wanted[first], None)[: leaf.ndim]
        assert leaf.sharding.is_equivalent_to(sharding(mesh_2x4, *spec), leaf.ndim), jax.tree_util.keystr(path)
        seen.add((first, name))
    parameters = {"w_fd", "w_enc_fd", "b_enc_f", "b_dec_d", "log_threshold_f"}
    assert {(part, name) for part in ("params", "optimizer") for name in parameters} <= seen


@pytest.mark.parametrize("shard_optimizer", [False, True])
def test_no_device_ever_holds_w(shard_optimizer: bool, mesh_2x4: Mesh) -> None:
    """Neither the program that makes the state nor the step has an array as large as W on a device."""
    problem = pose(SMALL, replace(QUICK, shard_optimizer=shard_optimizer), 16, 37.0)
    born = jax.jit(lambda: init_state(problem, np.zeros(16), 0, mesh_2x4)).lower()
    batch = jax.device_put(rows(0), sharding(mesh_2x4, DATA))
    step = make_train_step(problem, mesh_2x4).lower(init_state(problem, np.zeros(16), 0, mesh_2x4), batch)  # type: ignore[attr-defined]
    for program in (born, step):
        text = program.compile().as_text()
        assert "f32[16,16]" in text and "[64,16]" not in text and "[16,64]" not in text


def test_only_kept_values_cross_feature_shards(mesh_2x4: Mesh) -> None:
    """No collective moves W or whole rows of pre-activations: the largest gather holds 4 shards x k values a row."""
    problem = pose(SMALL, QUICK, 16, 37.0)
    batch = jax.device_put(rows(0), sharding(mesh_2x4, DATA))
    step, state = make_train_step(problem, mesh_2x4), init_state(problem, np.zeros(16), 0, mesh_2x4)
    text = step.lower(state, batch).compile().as_text()  # type: ignore[attr-defined]
    gathered = [
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"\[([\d,]+)\][^=]* all-gather(?:-start)?\(", text)
    ]
    assert gathered and max(gathered) <= 16 * 4 * QUICK.k_start < 64 * 16
    assert "all-to-all" not in text


def test_dead_is_counted_in_rows(mesh_1x1: Mesh) -> None:
    """A feature that cannot fire is dead after dead_after_rows rows, and not one step earlier."""
    problem = pose(SMALL, replace(QUICK, aux_coefficient=0.0), 16, 37.0)
    state, step = init_state(problem, np.zeros(16), 0, mesh_1x1), make_train_step(problem, mesh_1x1)
    params = state.params | {"b_enc_f": state.params["b_enc_f"].at[3].set(-1e6)}
    state, dead = replace(state, params=params), []
    for i in range(6):
        state, metrics = step(state, jax.device_put(rows(i), sharding(mesh_1x1, DATA)))
        dead.append(int(metrics.dead_features))
    assert state.silent_f[3] == 6 * 32
    assert dead[:4] == [0, 0, 0, 0] and dead[4] >= 1  # 4 x 32 rows >= 100


def test_auxiliary_loss_is_the_published_one(mesh: Mesh, decoding: str) -> None:
    """Value and gradient against a dense numpy-like reference: detached residual, no b_dec, its variance below."""
    problem = pose(SMALL, replace(QUICK, norm_filter=0.0), 16, math.sqrt(16))
    batch = rows(0)
    params = init_state(problem, np.full(16, 1.0), 7, mesh).params
    dead_f = jnp.arange(64) % 4 == 0

    def reference(params: Params) -> jax.Array:
        sae = SAE(**params)
        acts_bf = encode(sae, batch.x_bd, 4)
        x_hat_bd = acts_bf @ sae.w_fd[...] + sae.b_dec_d[...]
        main = jnp.mean(jnp.mean((batch.x_bd - x_hat_bd) ** 2, axis=1) / jnp.mean(batch.x_bd**2, axis=1))
        pre_bf = (batch.x_bd - sae.b_dec_d[...]) @ sae.w_fd[...].T + sae.b_enc_f[...]
        best_bk = jax.lax.top_k(jnp.where(dead_f, pre_bf, -jnp.inf), 8)[1]
        some_bf = jnp.zeros(pre_bf.shape, bool).at[jnp.arange(32)[:, None], best_bk].set(True)
        e_hat_bd = jnp.where(some_bf, jax.nn.relu(pre_bf), 0) @ sae.w_fd[...]
        e_bd = jax.lax.stop_gradient(batch.x_bd - x_hat_bd)
        return main + jnp.mean((e_bd - e_hat_bd) ** 2) / jnp.mean((e_bd - e_bd.mean(axis=0)) ** 2) / 32

    assert problem.scale == 1.0
    want, got = (
        jax.jit(jax.value_and_grad(reference))(params),
        loss_and_gradient(problem, mesh, 16, decoding)(params, batch, 4, dead_f),
    )
    np.testing.assert_allclose(got[0][0], want[0], rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=1e-4, atol=1e-5)


def test_no_dead_feature_no_auxiliary_loss_and_no_nan(mesh_1x1: Mesh) -> None:
    problem = pose(SMALL, QUICK, 16, 37.0)
    params = init_state(problem, np.zeros(16), 7, mesh_1x1).params
    still = Batch(jnp.zeros((32, 16)), jnp.ones(32))  # rows without norm, hence a residual without variance
    for dead_f in (jnp.zeros(64, bool), jnp.ones(64, bool)):
        (loss, (metrics, *_)), gradient = loss_and_gradient(problem, mesh_1x1, 16)(params, still, 4, dead_f)
        assert loss == 0 and metrics.aux_loss == 0 and metrics.rows_left_out == 32
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_filtered_rows_change_nothing_but_their_count(mesh_1x1: Mesh) -> None:
    problem = pose(SMALL, QUICK, 16, 37.0)
    params = init_state(problem, np.zeros(16), 7, mesh_1x1).params
    batch = rows(0)
    sinks = Batch(batch.x_bd.at[:8].multiply(1e6), batch.weight_b)
    outcomes = [
        loss_and_gradient(problem, mesh_1x1, 16)(params, given, 4, jnp.zeros(64, bool))
        for given in (sinks, Batch(batch.x_bd[8:], batch.weight_b[8:]))
    ]
    assert [outcome[0][1][0].rows_left_out for outcome in outcomes] == [8, 0]
    np.testing.assert_array_equal(outcomes[0][0][1][1], outcomes[1][0][1][1])
    np.testing.assert_allclose(outcomes[0][0][0], outcomes[1][0][0], rtol=1e-6)
    np.testing.assert_allclose(outcomes[0][1]["w_fd"], outcomes[1][1]["w_fd"], rtol=1e-5, atol=1e-6)


def test_scale_is_folded_away(mesh_1x1: Mesh) -> None:
    """The finished SAE on raw rows does what the trained one does on scaled rows, in the units of the raw ones."""
    problem = pose(SMALL, QUICK, 16, 40.0)
    state = init_state(problem, np.full(16, 1.0), 7, mesh_1x1)
    params = state.params | {"b_enc_f": jnp.linspace(-1, 1, 64)}
    raw_bd = rows(0).x_bd
    want = encode(SAE(**params), raw_bd * problem.scale, 4) / problem.scale
    np.testing.assert_allclose(
        encode(unscaled(replace(state, params=params), problem), raw_bd, 4), want, rtol=1e-5, atol=1e-5
    )


def test_bfloat16_only_selects(mesh_1x1: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding does not change the selection, nothing changes at all; elsewhere near ties are swapped."""
    monkeypatch.setattr(dense, "DENSE_SHARE", {"cpu": 2.0})  # by the selected rows
    problem = pose(SMALL, QUICK, 16, 37.0)
    rounded = replace(problem, select_dtype="bfloat16")
    params, never = init_state(problem, np.zeros(16), 7, mesh_1x1).params, jnp.zeros(64, bool)
    few, all_features = (
        [loss_and_gradient(p, mesh_1x1, 64, "by rows")(params, rows(0), k, never)[0][0] for p in (problem, rounded)]
        for k in (4, 64)
    )
    np.testing.assert_allclose(few[1], few[0], rtol=2e-3)
    np.testing.assert_allclose(all_features[1], all_features[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_start": 65}, "train.k_start is 65, more than sae.features 64: lower it"),
        ({"k_schedule": "official"}, "train.k_start is 200, more than sae.features 64: lower it"),
        ({"median": 0.0}, "the median norm of the training rows is 0.0: the store holds no usable residuals"),
    ],
)
def test_impossible_problems(change: dict[str, float], message: str) -> None:
    median = change.pop("median", 1.0)
    with pytest.raises(UserError, match=message):
        pose(SMALL, replace(QUICK, **change), 16, median)  # type: ignore[arg-type]


def test_features_that_cannot_be_shared(mesh_2x4: Mesh) -> None:
    problem = pose(replace(SMALL, features=66), QUICK, 16, 1.0)
    with pytest.raises(UserError, match="sae.features 66 cannot be shared equally by 4 shards"):
        init_state(problem, np.zeros(16), 0, mesh_2x4)
    problem = pose(replace(SMALL, features=68), replace(QUICK, shard_optimizer=True), 16, 1.0)
    with pytest.raises(UserError, match="sae.features 68 cannot be shared equally by 8 devices: set train.shard_opt"):
        init_state(problem, np.zeros(16), 0, mesh_2x4)


KINDS = {
    "untied": SaeConfig(features=64, k=4, tied=False),
    "batchtopk": SaeConfig(features=64, k=4, activation="batchtopk"),
    "jumprelu": SaeConfig(features=64, k=4, activation="jumprelu", tied=False),
    "matryoshka": SaeConfig(features=64, k=4, matryoshka=(0.25, 0.5, 1.0)),
    "unit norm": SaeConfig(features=64, k=4, decoder_norm="unit"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_meshes_agree(kind: str, mesh_1x1: Mesh, mesh_2x4: Mesh) -> None:
    problem = pose(KINDS[kind], QUICK, 16, 37.0)
    (state, alone), (state_2x4, shared) = run(problem, mesh_1x1, 20), run(problem, mesh_2x4, 20)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-4, atol=1e-4)
    for name in state.params:
        np.testing.assert_allclose(state_2x4.params[name], state.params[name], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state_2x4.threshold, state.threshold, rtol=1e-4)
    assert alone[-1].loss < 0.7 * alone[9].loss + 0.3 * alone[0].loss
    assert ("w_enc_fd" in state.params) == (not KINDS[kind].tied)
    assert (state.threshold > 0) == (kind == "batchtopk")
    if kind == "unit norm":
        np.testing.assert_allclose(jnp.linalg.norm(state.params["w_fd"], axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_thresholds_keep_about_k(kind: str, mesh_1x1: Mesh) -> None:
    """The finished SAE, whose threshold decides, keeps about K features of rows it has not seen."""
    train = replace(QUICK, steps=400, learning_rate=3e-3)
    problem = pose(KINDS[kind], train, 16, 37.0)
    state, _ = run(problem, mesh_1x1, 400)
    sae = unscaled(state, problem)
    acts_bf = encode(sae, jnp.concatenate([rows(i).x_bd for i in range(500, 520)]), None)
    assert sae.threshold_f is not None and 3 < (acts_bf > 0).sum(axis=1).mean() < 5.5


def test_jumprelus_thresholds_start_where_k_features_are_active(mesh_1x1: Mesh) -> None:
    problem = pose(SaeConfig(features=2048, k=32, activation="jumprelu"), replace(QUICK, k_start=32), 256, 16.0)
    state = init_state(problem, np.zeros(256), 0, mesh_1x1)
    x_bd = jax.random.normal(jax.random.key(1), (500, 256))
    l0 = (encode(unscaled(state, problem), x_bd, None) > 0).sum(axis=1).mean()
    np.testing.assert_allclose(l0, 32, rtol=0.1)


@pytest.mark.parametrize("kind", ["topk", "untied", "jumprelu"])
def test_training_goes_on_from_an_sae(kind: str, mesh: Mesh) -> None:
    """What `unscaled` hands out comes back as the same parameters."""
    problem = pose(KINDS.get(kind, SMALL), QUICK, 16, 40.0)
    state = init_state(problem, np.full(16, 1.0), 7, mesh)
    again = init_state(problem, np.zeros(16), 0, mesh, unscaled(state, problem))
    assert again.params.keys() == state.params.keys()
    for name in state.params:
        np.testing.assert_allclose(again.params[name], state.params[name], rtol=1e-6, atol=1e-6)
        assert again.params[name].sharding == state.params[name].sharding


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (SaeConfig(features=32, k=4), r"shape \[features, d_model\] \(64, 16\), this training asks for \(32, 16\)"),
        (SaeConfig(features=64, k=4, tied=False), "encoder tied, this training asks for untied"),
        (SaeConfig(features=64, k=4, activation="jumprelu"), "activation top-k, this training asks for jumprelu"),
    ],
)
def test_an_sae_of_another_kind(sae: SaeConfig, message: str, mesh_1x1: Mesh) -> None:
    problem = pose(SMALL, QUICK, 16, 40.0)
    start = unscaled(init_state(problem, np.zeros(16), 7, mesh_1x1), problem)
    with pytest.raises(UserError, match="train.init has " + message):
        init_state(pose(sae, QUICK, 16, 40.0), np.zeros(16), 7, mesh_1x1, start)


def test_rates_by_name() -> None:
    def rates(schedule: str) -> list[float]:
        train = replace(QUICK, steps=20, warmup_steps=5, learning_rate_schedule=schedule)  # type: ignore[arg-type]
        return [float(learning_rate_at(t, pose(SMALL, train, 16, 1.0))) * 1e3 for t in range(20)]

    rise = np.arange(1, 6) / 5
    np.testing.assert_allclose(rates("constant"), [*rise, *np.ones(15)], rtol=1e-6)
    np.testing.assert_allclose(rates("linear"), [*rise, *(1 - np.arange(15) / 15)], rtol=1e-6)
    np.testing.assert_allclose(rates("cosine"), [*rise, *((1 + np.cos(np.pi * np.arange(15) / 15)) / 2)], rtol=1e-5)


def test_weight_decay_shrinks_rows_and_nothing_else(mesh_1x1: Mesh) -> None:
    """AdamW: the update of a step minus that without decay is - rate x decay x W."""
    with_decay, without = (pose(SMALL, replace(QUICK, weight_decay=decay), 16, 37.0) for decay in (0.1, 0.0))
    before = init_state(without, np.full(16, 1.0), 7, mesh_1x1).params
    decayed, plain = (run(problem, mesh_1x1, 1)[0].params for problem in (with_decay, without))
    np.testing.assert_allclose(decayed["w_fd"] - plain["w_fd"], -1e-3 * 0.1 * before["w_fd"], atol=1e-7)
    for name in ("b_enc_f", "b_dec_d"):
        np.testing.assert_array_equal(decayed[name], plain[name])


def test_adafactor_keeps_a_number_a_row_and_a_column(mesh_2x4: Mesh) -> None:
    problem = pose(SaeConfig(features=256, k=4), replace(QUICK, optimizer="adafactor"), 128, 37.0)
    state = init_state(problem, np.zeros(128), 7, mesh_2x4)
    sizes = [leaf.size for leaf in jax.tree.leaves(state.optimizer)]
    assert sum(sizes) < 2 * (256 + 128) + 1000 < 256 * 128
    rows_of_w = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (256,)]
    assert rows_of_w and all(leaf.addressable_shards[0].data.shape == (64,) for leaf in rows_of_w)
    small = pose(SMALL, replace(QUICK, optimizer="adafactor", learning_rate=1e-2), 16, 37.0)
    _, metrics = run(small, mesh_2x4, 20)
    assert metrics[-1].loss < 0.7 * metrics[9].loss + 0.3 * metrics[0].loss


def test_half_the_width_of_dead_features_by_default() -> None:
    assert pose(SMALL, replace(QUICK, aux_k=None), 16, 1.0).aux_k == 8
    assert (
        pose(SMALL, QUICK, 16, 1.0).aux_k == 8 and pose(SMALL, replace(QUICK, aux_coefficient=0.0), 16, 1.0).aux_k == 0
    )


def test_the_decoding_rule_is_said(mesh_1x1: Mesh, mesh_2x4: Mesh) -> None:
    """Per bucket of K: the share of a shard's features, and what it is compared with."""
    train = TrainConfig(k_start=16, anneal_steps=10, aux_k=110)
    problem = pose(SaeConfig(features=4096, k=8), train, 256, 1.0)
    assert decoding_plan(problem, mesh_1x1) == [
        "K up to 8: by the selected rows (8 of 4096 is 0.20%; all features pay above 2.5%)",
        "K up to 16: by the selected rows (16 of 4096 is 0.39%; all features pay above 2.5%)",
        "dead features, 110 a row: through all features (110 of 4096 is 2.69%; all features pay above 2.5%)",
    ]
    assert "K up to 16: by the selected rows (16 of 1024 is 1.56%" in decoding_plan(problem, mesh_2x4)[1]
    jumprelu = pose(SaeConfig(features=4096, k=8, activation="jumprelu"), train, 256, 1.0)
    assert decoding_plan(jumprelu, mesh_1x1)[0].startswith("jumprelu: through all features")
