"""Contrastive activation addition (CAA, arXiv 2312.06681): a vector from samples with two choices, and what adding it
does to the answers to held-out questions.

    vector = mean over samples of x(letter that matches) - x(letter that does not)

x is the residual after `steer.layer` blocks at the answer's letter; which choice is (A) is drawn for each sample. The
vector, times a multiplier, is added behind the user's words only: to the rest of the template and what opens the
answer (the published code adds it everywhere, and reads the letters behind an end-of-turn token). Every question is
asked in both orders: robust accuracy counts those whose matching choice wins in both, so a model that always answers
(A) has none. SCR is robust accuracy at 1 less that at -1. A sample that is a held-out question stops the run.

Arms: vectors of the kept samples, of as many blind ones, and a random direction as long as the first. Reads what
synthesis wrote, the questions and the whole backbone; writes eval.json, answers.parquet and vectors.safetensors.

With `steer.equal_norm_with` the first is as long as it and the vectors of those behaviours are on average, seed by
seed, and the other arms are made as long, the blind one too: then arms differ in direction only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from fac_jax.backbone.decode import Steering, extend, unrolled, zero_cache
from fac_jax.backbone.generate import padded_size
from fac_jax.backbone.model import logits, residual
from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.file import Config
from fac_jax.downstream.choices import Asked, Question, ask_all, check_unseen, read_questions, read_samples
from fac_jax.downstream.equal_norm import Behaviour, behaviours_with, equal_norm, of_length
from fac_jax.downstream.evaluate import spread
from fac_jax.downstream.pieces import Text, pack_batch
from fac_jax.errors import UserError
from fac_jax.mesh import make_mesh
from fac_jax.runs import write_text, writing

TOGETHER = 32
"""Questions whose answers are read at once, at most."""
ANSWERS = pa.schema(
    {
        "arm": pa.string(), "seed": pa.int64(), "multiplier": pa.float32(), "question": pa.int64(),
        "order": pa.string(), "text": pa.string(), "matches": pa.string(), "margin": pa.float32(),
    }
)  # fmt: skip


def steer(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Stage. Raises UserError where synthesis kept nothing, the questions are none, or a sample is one of them."""
    questions = read_questions(config.steer)
    samples = {arm: read_samples(inputs["synthesis"] / f"{arm}.jsonl") for arm in ("kept", "random")}
    for arm, some in samples.items():
        check_unseen(some, questions, arm, str(config.steer.heldout))
    if not samples["kept"]:
        raise UserError(
            f"{inputs['synthesis'] / 'kept.jsonl'} is empty: no sample was kept, so there is nothing to steer by"
        )
    others = config.steer.equal_norm_with
    behaviours = behaviours_with(str(inputs["synthesis"].parent), others) if others else []
    loaded = load_backbone(config.backbone.model, None, config.backbone.dtype, make_mesh(config.mesh))
    layer = config.steer.layer or config.backbone.layer
    if not 1 <= layer < loaded.config.n_layers:
        raise UserError(f"steer.layer is {layer}; the model has {loaded.config.n_layers} blocks, so 1 to one less")
    vectors = _vectors(config, loaded, layer, samples)
    equalised = _equalise(config, loaded, layer, vectors, behaviours) if behaviours else []
    for seed in config.steer.seeds:
        drawn = np.random.default_rng([seed, 6]).normal(size=loaded.config.d_model)
        length = np.linalg.norm(vectors["kept", seed])
        vectors["random direction", seed] = (length * drawn / np.linalg.norm(drawn)).astype(np.float32)
    multipliers = sorted(config.steer.multipliers)
    both = [one for question in questions for one in (question, question.swapped)]
    pushed = {(arm, seed, m): m * v for (arm, seed), v in vectors.items() for m in multipliers if m != 0}
    answers = answer_logits(
        loaded, ask_all(both, loaded.tokenizer), [0 * next(iter(vectors.values())), *pushed.values()], layer
    )
    matches_n = np.array([question.matches for question in both])
    margin_mn = np.take_along_axis(answers, matches_n[None, :, None], 2)[..., 0]
    margin_mn = margin_mn - np.take_along_axis(answers, 1 - matches_n[None, :, None], 2)[..., 0]
    unsteered, steered = margin_mn[0], dict(zip(pushed, margin_mn[1:], strict=True))
    arms = {}
    for arm in dict.fromkeys(name for name, _ in vectors):
        by_seed = {
            seed: {m: figures(unsteered if m == 0 else steered[arm, seed, m], matches_n) for m in multipliers}
            for name, seed in vectors
            if name == arm
        }
        arms[arm] = _arm(by_seed, multipliers, [float(np.linalg.norm(vectors[arm, seed])) for seed in by_seed])
    evaluation: dict[str, Any] = {
        "questions": len(questions), "heldout": config.steer.heldout, "layer": layer, "multipliers": multipliers,
        "seeds": list(config.steer.seeds), "samples": {arm: len(found) for arm, found in samples.items()}, "arms": arms,
    }  # fmt: skip
    if equalised:
        evaluation["equal_norm"] = equalised
    _write_answers(out / "answers.parquet", both, unsteered, steered)
    with writing(out / "vectors.safetensors") as temporary:
        save_file({f"{arm}.seed-{seed}": vector for (arm, seed), vector in vectors.items()}, temporary)
    write_text(out / "eval.json", json.dumps(evaluation, indent=1, allow_nan=False))
    return {
        "questions": len(questions),
        "robust_accuracy": arms["kept"]["robust_accuracy"]["0"]["mean"],
        "scr": {arm: row["scr"]["mean"] for arm, row in arms.items()},
    }


def figures(margin_n: Float[np.ndarray, " n"], matches_n: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Of questions asked in both orders, one after the other: `margin_n` is the logit of the matching letter less that
    of the other one. A tie is no match."""
    won = (margin_n > 0).reshape(-1, 2)
    letter = np.where(margin_n > 0, matches_n, 1 - matches_n).reshape(-1, 2)
    return {
        "accuracy": float(won.mean()),
        "robust_accuracy": float(won.all(axis=1).mean()),
        "positional_bias": float((letter[:, 0] == letter[:, 1]).mean()),
        "probability": float((1 / (1 + np.exp(-margin_n))).mean()),
    }


def caa_vector(
    loaded: Loaded, questions: Sequence[Question], layer: int, seed: int, rows: int, row_tokens: int
) -> Float[np.ndarray, " d"]:
    """The mean difference between the residuals at the two letters; each question in an order that the seed draws."""
    flip_n = np.random.default_rng([seed, 5]).random(len(questions)) < 0.5
    drawn = [question.swapped if flip else question for question, flip in zip(questions, flip_n, strict=True)]
    pairs = []
    for question, asked in zip(drawn, ask_all(drawn, loaded.tokenizer), strict=True):
        told = [
            np.append(np.concatenate([asked.body_t, asked.tail_t]), letter).astype(np.int32) for letter in asked.letters
        ]
        match, other = told[question.matches], told[1 - question.matches]
        pairs.append(tuple(Text(ids, np.zeros(len(ids), bool)) for ids in (match, other)))
    model = nnx.split(loaded.model)
    sums = []
    for start in range(0, len(pairs), TOGETHER):
        for piece in pack_batch(pairs[start : start + TOGETHER], rows, row_tokens, TOGETHER):
            x_nd = np.asarray(
                _last(*model, piece.tokens_bt, piece.segments_bt, piece.positions_bt, piece.last_n, layer)
            )
            x_nd = x_nd[piece.there_n].astype(np.float64)
            sums.append((x_nd[::2] - x_nd[1::2]).sum(0))
    return (np.sum(sums, axis=0) / len(pairs)).astype(np.float32)


@partial(jax.jit, static_argnames=("graph", "layer"))
def _last(
    graph: Any, state: Any, tokens_bt: Array, segments_bt: Array, positions_bt: Array, last_n: Array, layer: int
) -> Array:
    """Residuals at the places `last_n` of the rows laid end to end; compiled once for all seeds and behaviours."""
    x_btd = residual(nnx.merge(graph, state), tokens_bt, segments_bt, positions_bt, layer)
    return x_btd.reshape(-1, x_btd.shape[-1])[last_n]


def answer_logits(
    loaded: Loaded, asked: Sequence[Asked], vectors: Sequence[Float[np.ndarray, " d"]], layer: int
) -> Float[np.ndarray, "m n 2"]:
    """Logits of the two letters, for each of m vectors added behind the user's words and each of n questions.

    What stands before the added vector is computed once: it does not see what is added behind it.
    """
    graph, state = nnx.split(loaded.model)
    blocks = unrolled(loaded.model)

    @jax.jit
    def read(state: Any, blocks: Any, body_bs: Array) -> Any:
        cache = zero_cache(loaded.config, blocks, *body_bs.shape)
        return extend(nnx.merge(graph, state), blocks, cache, body_bs, jnp.int32(0))[1]

    @jax.jit
    def answer(state: Any, blocks: Any, cache: Any, tail_kb: Array, start_b: Array, vector_d: Array) -> Array:
        model, steering = (
            nnx.merge(graph, state),
            Steering(layer, jnp.broadcast_to(vector_d, (len(start_b), len(vector_d)))),
        )

        def step(carry: tuple[Array, Any], token_b: Array) -> tuple[tuple[Array, Any], Array]:
            at_b, cache = carry
            x_b1d, cache = extend(model, blocks, cache, token_b[:, None], at_b, steering)
            return (at_b + 1, cache), x_b1d[:, 0]

        x_kbd = jax.lax.scan(step, (start_b, cache), tail_kb)[1]
        return logits(model, x_kbd[-1][:, None])[:, 0]

    found, together = np.zeros((len(vectors), len(asked), 2), np.float32), min(TOGETHER, len(asked))
    tails = sorted({len(one.tail_t) for one in asked})
    for tail in tails:
        rows = sorted((n for n, one in enumerate(asked) if len(one.tail_t) == tail), key=lambda n: len(asked[n].body_t))
        for first in range(0, len(rows), together):
            group = rows[first : first + together]
            size = padded_size(max(len(asked[n].body_t) for n in group) + tail)
            body_bs, tail_kb = np.zeros((together, size), np.int32), np.zeros((tail, together), np.int32)
            start_b = np.zeros(together, np.int32)
            for row, n in enumerate(group):
                body_bs[row, : len(asked[n].body_t)], start_b[row] = asked[n].body_t, len(asked[n].body_t)
                tail_kb[:, row] = asked[n].tail_t
            cache = read(state, blocks, body_bs)
            for m, vector_d in enumerate(vectors):
                logits_bv = np.asarray(answer(state, blocks, cache, tail_kb, start_b, vector_d))
                for row, n in enumerate(group):
                    found[m, n] = logits_bv[row, list(asked[n].letters)]
    return found


def _vectors(
    config: Config, loaded: Loaded, layer: int, samples: Mapping[str, Sequence[Question]]
) -> dict[tuple[str, int], Float[np.ndarray, " d"]]:
    """By the name of the samples and the seed; none where there are no samples."""
    shape = config.backbone.rows_per_batch, config.backbone.row_tokens
    return {
        (name, seed): caa_vector(loaded, questions, layer, seed, *shape)
        for name, questions in samples.items()
        for seed in config.steer.seeds
        if questions
    }


def _equalise(
    config: Config,
    loaded: Loaded,
    layer: int,
    vectors: dict[tuple[str, int], Float[np.ndarray, " d"]],
    behaviours: Sequence[Behaviour],
) -> list[dict[str, Any]]:
    """Bring `vectors`, which are of the first behaviour, to the norm that all share at each seed; the norms before and
    after, by behaviour."""
    own, *others = behaviours
    before = {(own.run, seed): vectors["kept", seed] for seed in config.steer.seeds}
    before |= _vectors(config, loaded, layer, {one.run: one.samples for one in others})
    after: dict[tuple[str, int], Float[np.ndarray, " d"]] = {}
    for seed in config.steer.seeds:
        after |= equal_norm({key: vector for key, vector in before.items() if key[1] == seed})
        vectors["kept", seed] = after[own.run, seed]
        if ("random", seed) in vectors:
            length = float(np.linalg.norm(after[own.run, seed]))
            vectors["random", seed] = of_length(vectors["random", seed], length)

    def norm(of: Mapping[tuple[str, int], Float[np.ndarray, " d"]], run: str) -> dict[str, Any]:
        return asdict(spread([float(np.linalg.norm(of[run, seed])) for seed in config.steer.seeds]))

    return [
        {
            "behaviour": one.task, "run": one.run, "samples": len(one.samples),
            "norm_before": norm(before, one.run), "norm": norm(after, one.run),
        }
        for one in behaviours
    ]  # fmt: skip


def _arm(
    by_seed: Mapping[int, Mapping[float, Mapping[str, float]]], multipliers: Sequence[float], norms: Sequence[float]
) -> dict[str, Any]:
    """Figures over seeds, by multiplier."""
    names = ("robust_accuracy", "accuracy", "positional_bias", "probability")
    row: dict[str, Any] = {
        name: {f"{m:g}": asdict(spread([found[m][name] for found in by_seed.values()])) for m in multipliers}
        for name in names
    }
    for name, of in (("scr", "robust_accuracy"), ("probability_change", "probability")):
        row[name] = asdict(spread([found[1.0][of] - found[-1.0][of] for found in by_seed.values()]))
    return {**row, "norm": asdict(spread(list(norms)))}


def _write_answers(
    path: Path,
    both: Sequence[Question],
    unsteered: Float[np.ndarray, " n"],
    steered: Mapping[tuple[str, int, float], Float[np.ndarray, " n"]],
) -> None:
    origins = [(None, None, 0.0), *steered]
    rows = [
        {
            "arm": arm, "seed": seed, "multiplier": multiplier, "question": place // 2,
            "order": ("AB", "BA")[place % 2], "text": question.text, "matches": "AB"[question.matches],
            "margin": float(margin),
        }
        for (arm, seed, multiplier), margin_n in zip(origins, [unsteered, *steered.values()], strict=True)
        for place, (question, margin) in enumerate(zip(both, margin_n, strict=True))
    ]  # fmt: skip
    with writing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, ANSWERS), temporary)
